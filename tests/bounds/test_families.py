"""Bounds of every family of the test table: finite or refused by name, above an attack, and true node by node."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lipschitz import calibrate, lipschitz_bound, lipschitzify, verify_lipschitz
from hf_lipschitz.conversion import materialized
from hf_lipschitz.model_bounds import function_of, graph_of
from tests.bounds.regions import check_regions
from tests.families import FAMILIES, example


# Operator that is to blame where there is no global constant: routing jumps, and XLNet attends over what it is given.
REFUSED = {
    "mixtral": "aten.floor_divide.default",
    "gpt_oss": "aten.floor_divide.default",
    "xlnet": "aten.bmm.default",
}
# Its classifier takes no embeddings.
WITHOUT_EMBEDDINGS = {"t5"}
BOUNDED = [name for name in FAMILIES if name not in {*REFUSED, *WITHOUT_EMBEDDINGS}]
# Of which all attention can be clipped, or there is none.
CLIPPED = [name for name in BOUNDED if name not in ("deberta_v2", "siglip")]
# One of each kind; the others are slow.
FAST = {"bert", "llama", "resnet"}


def families(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def made(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    return model, example(model, batch=1)


def trained(model: PreTrainedModel) -> None:
    """A few steps with a large rate."""
    inputs = example(model, batch=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.zeros(2, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def attacked(model: PreTrainedModel, inputs: dict[str, Tensor], radius: float | None = None) -> float:
    return verify_lipschitz(model, inputs, radius=radius, starts=2, steps=3, power_iterations=3)


@pytest.mark.parametrize("name", families(BOUNDED))
def test_bounds_are_above_an_attack(name: str) -> None:
    model, inputs = made(name)
    trained(model)
    bound = lipschitz_bound(model, inputs)
    assert bound.is_sound
    assert bound.log_value < math.inf
    assert attacked(model, inputs) <= bound.value
    before = math.inf
    for radius in (1.0, 1e-3):
        local = lipschitz_bound(model, inputs, radius=radius)
        assert local.log_value <= min(before, bound.log_value) + 1e-9
        assert 0 < attacked(model, inputs, radius) <= local.value
        before = local.log_value


@pytest.mark.parametrize("name", families(CLIPPED))
def test_bounds_of_full_conversions_are_above_an_attack(name: str) -> None:
    model, inputs = made(name)
    plain = lipschitz_bound(model, inputs)
    has_norms = name not in ("resnet", "mobilenet_v2")
    lipschitzify(model, replace="all" if has_norms else ("weights", "norms"))
    if has_norms:
        calibrate(model, [inputs])
    bound = lipschitz_bound(model, inputs)
    assert bound.log_value < plain.log_value
    assert 0 < attacked(model, inputs) <= bound.value


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operator(name: str) -> None:
    model, inputs = made(name)
    bound = lipschitz_bound(model, inputs)
    assert bound.value == math.inf
    assert REFUSED[name] in [cost.operator for cost in bound.blame]
    assert all(cost.module in dict(model.named_modules()) for cost in bound.blame)
    assert REFUSED[name] in str(bound)


@pytest.mark.parametrize("name", sorted(WITHOUT_EMBEDDINGS))
def test_a_model_without_an_input_to_bound_says_so(name: str) -> None:
    model, inputs = made(name)
    assert "inputs_embeds" in inspect.signature(model.forward).parameters
    with pytest.raises(NotImplementedError, match="input embeddings"):
        lipschitz_bound(model, inputs)


@pytest.mark.parametrize("name", families([*BOUNDED, "xlnet"]))
@pytest.mark.parametrize("radius", [None, 1e-2])
def test_what_is_known_of_each_node_holds(name: str, radius: float | None) -> None:
    model, inputs = made(name)
    with materialized(model):
        function, named, wrt = function_of(model, inputs, None, None, None)
        graph = graph_of(function, named, wrt)
    generator = torch.Generator().manual_seed(0)
    center = named[wrt].double()
    noise = [torch.randn(center.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if radius is None:
        walk, points = graph.walk(), [scale * x for scale, x in zip((0.1, 1.0, 30.0), noise, strict=True)]
    else:
        walk = graph.walk(center=center, radius=radius)
        points = [center + scale * radius * x / x.norm() for scale, x in zip((1.0, 0.99, 0.1), noise, strict=True)]
    count = check_regions(graph, walk, points, radius)
    assert count > 0 or (radius is None and name in ("resnet", "convnext", "mobilenet_v2"))
