"""Plain adapters on constrained layers: the warnings, their numbers, and the refusal to merge."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from hf_lipschitz import lipschitzify, materialized
from hf_lipschitz.integrations.lora import lipschitz_lora_config, register_lora
from hf_lipschitz.integrations.lora_guard import GuardedLayer, GuardedTuner, norm_reached
from tests import families
from tests.integrations.adapters import constrained, logits, matrix, norm


register_lora()

PLAIN: dict[str, PeftConfig] = {
    "lora": LoraConfig(target_modules=["query"]),
    "loha": LoHaConfig(target_modules=["query"]),
    "lokr": LoKrConfig(target_modules=["query"]),
    "ia3": IA3Config(target_modules=["query"], feedforward_modules=[]),
}


def guarded(model: nn.Module) -> list[GuardedLayer]:
    return [m for m in model.modules() if isinstance(m, GuardedLayer)]


@torch.no_grad()
def grow(model: nn.Module, size: float = 1.0) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", PLAIN)
def test_merging_is_refused_and_changes_nothing(kind: str) -> None:
    base = constrained()
    before = logits(base)
    model = get_peft_model(base, copy.deepcopy(PLAIN[kind]))
    grow(model)
    after = logits(model)
    assert not torch.allclose(before, after)
    for merge in (model.merge_and_unload, model.merge_adapter, guarded(model)[0].merge):
        with pytest.raises(
            ValueError, match=r"layer.0.attention.self.query .*drop the adapter.*lipschitz_lora_config"
        ):
            merge()
    assert torch.equal(logits(model), after)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("kind", PLAIN)
def test_norm_reached_is_that_of_the_layer(kind: str) -> None:
    model = get_peft_model(constrained(), copy.deepcopy(PLAIN[kind]))
    grow(model)
    model.train()
    for layer in guarded(model):
        exact = norm(matrix(layer))
        assert exact * (1 - 2e-2) <= norm_reached(layer) <= exact * (1 + 1e-5)
        assert layer.training
        assert all(p.grad is None for p in layer.parameters())


def test_dropout_and_bias_are_no_part_of_the_norm() -> None:
    model = get_peft_model(constrained(), LoraConfig(target_modules=["query"], lora_dropout=0.5)).train()
    grow(model)
    layer = guarded(model)[0]
    with torch.no_grad():
        layer.base_layer.bias.fill_(100.0)
    exact = norm(matrix(layer))
    with torch.inference_mode():
        assert exact * 0.98 <= norm_reached(layer) <= exact * (1 + 1e-5)
    assert layer.lora_dropout["default"].training


def test_conv1d_of_transformers() -> None:
    model = get_peft_model(constrained("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    grow(model)
    layer = guarded(model)[0]
    assert norm_reached(layer) == pytest.approx(norm(matrix(layer)), rel=2e-2)


def test_warnings_name_the_fix_and_the_norm(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    base = constrained()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(base, LoraConfig(target_modules=["query", "dense"]))
        assert len(caplog.records) == 1
        assert "lipschitz_lora_config" in caplog.text
        caplog.clear()
        model.eval()
        assert not caplog.records, "nothing is outside before training"
        grow(model)
        model.train()
        model.eval()
        assert len(caplog.records) == 1
        told = re.search(
            r"took 9 of 9 .* the norm of (\S+) with its adapters is at least (\S+) and .* is 1\.", caplog.text
        )
        assert told is not None
        exact = {layer.constraint.name: norm(matrix(layer)) for layer in guarded(model)}
        assert told[1] == max(exact, key=exact.get)
        assert float(told[2]) == pytest.approx(exact[told[1]], rel=2e-2)
        caplog.clear()
        model.train()
        model.eval()
        assert not caplog.records, "told already"
        grow(model, 3.0)
        model.save_pretrained(tmp_path)
        assert len(caplog.records) == 1


def test_norm_is_told_on_materialized_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(constrained(), LoraConfig(target_modules=["query"]))
    grow(model)
    model.train()
    caplog.clear()
    with materialized(model):
        model.eval()
    assert "took 2 of 2 constrained layers" in caplog.text


def test_reload_of_a_plain_adapter_is_plain_and_guarded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(constrained(), LoraConfig(target_modules=["query"]))
    grow(model)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        reloaded = PeftModel.from_pretrained(constrained(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert "took 2 of 2 constrained layers" in caplog.text
    with pytest.raises(ValueError, match="drop the adapter"):
        reloaded.merge_and_unload()


def test_adapters_of_transformers_are_guarded(caplog: pytest.LogCaptureFixture) -> None:
    model = constrained()
    with caplog.at_level(logging.WARNING):
        model.add_adapter(LoraConfig(target_modules=["query"]))
    assert len(guarded(model)) == 2
    assert "cannot be merged" in caplog.text


def test_ours_on_a_guarded_layer_is_refused() -> None:
    model = get_peft_model(constrained(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"carries a plain adapter already: unload\(\) it before adding 'x'"):
        model.add_adapter("x", lipschitz_lora_config(LoraConfig(target_modules=["query"])))


def test_copies_are_guarded() -> None:
    model = copy.deepcopy(get_peft_model(constrained(), LoraConfig(target_modules=["query"])))
    grow(model)
    assert guarded(model)[0].watch.layers[0] is guarded(model)[0]
    with pytest.raises(ValueError, match="drop the adapter"):
        model.merge_and_unload()
    assert {"lora_A", "lora_B"} <= {key.split(".")[-3] for key in model.state_dict() if "lora_" in key}


def test_models_without_constraints_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(families.bert(), LoraConfig(target_modules=["query"]))
    assert not caplog.records
    assert not guarded(model)
    assert type(model.base_model) is LoraModel
    assert not isinstance(model.base_model, GuardedTuner)
    grow(model)
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before)
    assert not caplog.records


def test_layers_left_out_by_lipschitzify_are_left_alone() -> None:
    base = lipschitzify(families.bert(), exclude_modules=["query"])
    model = get_peft_model(base, LoraConfig(target_modules=["query"]))
    grow(model)
    assert not guarded(model)
    assert all(type(m) is LoraLinear for m in model.modules() if isinstance(m, LoraLinear))
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before)


def test_a_refused_merge_leaves_unconstrained_layers_as_they_were() -> None:
    base = lipschitzify(families.bert(), exclude_modules=["query"])
    model = get_peft_model(base, LoraConfig(target_modules=["query", "key"]))
    grow(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="attention.self.key"):
            merge()
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
