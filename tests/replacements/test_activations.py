"""replace="activations": what is found, what it becomes, and what is refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_lipschitz.nn.activations import Bounded, MaxMin
from hf_lipschitz.replacements import activations
from tests.families import FAMILIES, example, output


def config(activation: str = "bounded", strict: bool = False) -> SimpleNamespace:
    return SimpleNamespace(activation=activation, strict=strict)


STEEP = {"bert": 2, "albert": 1, "gpt2": 2, "llama": 2, "vit": 2, "convnext": 2, "swin": 2, "clip": 2}


@pytest.mark.parametrize("family", STEEP)
def test_every_steep_activation_is_bounded(family: str) -> None:
    model = FAMILIES[family]().eval()
    names = activations.find(model, config())
    assert len(names) == STEEP[family]
    before = output(model, example(model))
    activations.apply(model, config(), names)
    assert sum(isinstance(module, Bounded) for module in model.modules()) == STEEP[family]
    after = output(model, example(model))
    assert not torch.equal(before, after)
    assert activations.find(model, config()) == ()


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2", "t5", "segformer"])
def test_slopes_of_at_most_1_stay(family: str) -> None:
    model = FAMILIES[family]()
    names = activations.find(model, config())
    assert all(not isinstance(model.get_submodule(name), nn.ReLU) for name in names)
    assert family == "segformer" or names == ()


def test_slope_of_what_they_become() -> None:
    u = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    for name in ("gelu", "gelu_new", "silu", "quick_gelu", "mish"):
        slopes = torch.diff(Bounded(ACT2FN[name])(u)) / torch.diff(u)
        assert 0.999 < slopes.abs().max() <= 1 + 1e-9, name


def test_maxmin_sorts_the_axis_of_the_features() -> None:
    model = FAMILIES["convnext"]().eval()
    names = activations.find(model, config("maxmin"))
    activations.apply(model, config("maxmin"), names)
    assert {module.dim for module in model.modules() if isinstance(module, MaxMin)} == {-1}
    assert torch.isfinite(output(model, example(model))).all()


def test_odd_features_and_functions_are_named(caplog: pytest.LogCaptureFixture) -> None:
    odd = FAMILIES["bert"]()
    odd.bert.encoder.layer[0].intermediate.dense = nn.Linear(24, 39)
    odd.bert.encoder.layer[0].output.dense = nn.Linear(39, 24)
    names = activations.find(odd, config("maxmin"))
    assert len(names) == 1
    assert "MaxMin needs an even number of features, and it gets 39" in caplog.text
    with pytest.raises(ValueError, match="even number"):
        activations.find(odd, config("maxmin", strict=True))
    caplog.clear()
    caplog.set_level(logging.WARNING)
    activations.find(FAMILIES["whisper"](), config())
    assert "encoder: calls gelu as a function" in caplog.text


def test_maxmin_needs_a_model_that_can_be_run() -> None:
    with pytest.raises(ValueError, match="pass inputs"):
        activations.find(nn.Sequential(nn.Linear(4, 4), nn.GELU()), config("maxmin"))


def test_meta_models_become_alike() -> None:
    model = FAMILIES["vit"]()
    names = activations.find(model, config("maxmin"))
    empty = model.to("meta")
    activations.apply(empty, config("maxmin"), names)
    assert sum(isinstance(module, MaxMin) for module in empty.modules()) == 2
