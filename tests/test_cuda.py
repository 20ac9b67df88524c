"""What only a GPU can show: every family converted, trained, saved and merged there. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lipschitz import lipschitzify, materialized, merge
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import FAMILIES, HEADLESS, auto_class, example, output
from tests.families.linear_maps import exact_norm
from tests.test_families import METHODS
from tests.test_replace import all_that_go


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MODELS = {**FAMILIES, **HEADLESS}
CONSTANT = 0.05


def on_the_device(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = {name: x.to("cuda") for name, x in example(model).items()}
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def largest_norm(model: PreTrainedModel) -> float:
    return max(
        exact_norm(layer.module, layer.tensor_name, layer.effective_weight.detach().cpu())
        for layer in constrained_layers(model)
    )


def step(model: PreTrainedModel, inputs: dict[str, Tensor], *, is_autocast: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
        loss = output(model, inputs).float().square().sum()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_every_effective_weight_is_under_its_constant(family: str, method: str) -> None:
    model = lipschitzify(MODELS[family]().to("cuda").train(), layer_lipschitz=CONSTANT, method=method)
    assert largest_norm(model) <= CONSTANT * (1 + 1e-6)
    for is_autocast in (False, True):
        step(model, on_the_device(model), is_autocast=is_autocast)
        assert largest_norm(model) <= CONSTANT * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "convnext", "mixtral"])
def test_bfloat16_weights_are_under_their_constant(family: str, method: str) -> None:
    model = lipschitzify(MODELS[family]().to("cuda", torch.bfloat16).train(), layer_lipschitz=CONSTANT, method=method)
    step(model, on_the_device(model), is_autocast=False)
    assert largest_norm(model) <= CONSTANT * (1 + 1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_moved_there_and_back_computes_the_same(family: str) -> None:
    model = lipschitzify(MODELS[family]().eval(), replace=all_that_go(family))
    inputs = example(model)
    with torch.no_grad():
        before = output(model, inputs)
        there = output(model.to("cuda"), {name: x.to("cuda") for name, x in inputs.items()})
        assert torch.allclose(there.cpu(), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
        assert torch.equal(output(model.to("cpu"), inputs), before)


@pytest.mark.parametrize("family", MODELS)
def test_save_load_and_merge(family: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family]().to("cuda").eval(), layer_lipschitz=1.0)
    inputs = on_the_device(model)
    model.save_pretrained(tmp_path)
    again = auto_class(model).from_pretrained(tmp_path, device_map="cuda").eval()
    with torch.no_grad():
        logits = output(model, inputs)
        assert torch.equal(output(again, inputs), logits)
        with materialized(model) as plain:
            assert torch.allclose(output(plain, inputs), logits, rtol=1e-4, atol=1e-5)
        merged = merge(model)
        assert torch.allclose(output(merged, inputs), logits, rtol=1e-4, atol=1e-5)
