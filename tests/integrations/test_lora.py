"""LoRA inside the ball: norms, merging, saving, switching, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_lipschitz import LipschitzTrainer, LipschitzTrainingArguments, lipschitzify, materialized
from hf_lipschitz.integrations.lora import LipschitzLoraConfig, lipschitz_lora_config, register_lora
from hf_lipschitz.nn.attachment import constrained_layers
from tests import families
from tests.integrations.adapters import (
    TARGETS,
    adapted_layers,
    capped,
    constrained,
    logits,
    matrix,
    norm,
    raw_sum,
    shake,
    steps,
)


register_lora()


def adapted(family: str = "bert", base: nn.Module | None = None, **options: object) -> PeftModel:
    options = {"target_modules": TARGETS[family], "r": 4, **options}
    return get_peft_model(base or constrained(family), lipschitz_lora_config(LoraConfig(**options)))


@pytest.fixture(params=["bert", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_norms_stay_inside_through_training_reload_and_merge(family: str, tmp_path: Path) -> None:
    base = constrained(family)
    base.save_pretrained(tmp_path / "base")
    model = adapted(family, base)
    for _ in range(5):
        steps(model, 10)
        for layer in adapted_layers(model):
            total = raw_sum(layer, "default")
            assert norm(total) > 2, "the adapters do nothing to be held back from"
            assert norm(matrix(layer)) <= 1 + 1e-6
            torch.testing.assert_close(matrix(layer), capped(total), rtol=0, atol=1e-3 * total.abs().max())
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    # Saving computes the norms anew, within rtol of what they were.
    trained = logits(model)
    torch.testing.assert_close(trained, before, rtol=0, atol=5e-3)

    reloaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)
    assert all(norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(reloaded))

    merged = model.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-6)
    assert all(norm(layer.effective_weight) <= 1 + 1e-6 for layer in constrained_layers(merged))
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("mode", ["cap", "exact"])
@pytest.mark.parametrize("method", ["rescaling", "aol", "sll", "cpl"])
def test_every_method_keeps_its_adapters_inside(method: str, mode: str, tmp_path: Path) -> None:
    base = constrained("bert", method=method, mode=mode)
    base.save_pretrained(tmp_path / "base")
    before = logits(base)
    model = adapted("bert", base)
    assert torch.equal(logits(model), before)
    for _ in range(5):
        steps(model, 10)
        assert all(norm(raw_sum(layer, "default")) > 2 for layer in adapted_layers(model))
        assert all(norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(model))
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    reloaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-6)
    assert all(norm(layer.effective_weight) <= 1 + 1e-6 for layer in constrained_layers(merged))
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        lipschitzify(adapted("bert", merged))


def test_merged_model_trains_inside_the_ball() -> None:
    model = adapted()
    shake(model)
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=0.1)
    for _ in range(3):
        merged(**families.example(merged), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    weights = [layer.effective_weight for layer in constrained_layers(merged)]
    assert max(map(norm, weights)) <= 1 + 1e-6
    assert min(map(norm, weights)) > 0.999


def test_fresh_process(tmp_path: Path) -> None:
    base = constrained()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=base, task_type="SEQ_CLS")
    steps(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = f"""
import sys, torch, hf_lipschitz
from hf_lipschitz.integrations.lora import register_lora
from peft import PeftModel
from tests.integrations.adapters import adapted_layers, logits, matrix, norm
from transformers import AutoModelForSequenceClassification
register_lora()
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
assert torch.equal(logits(model), torch.load({str(tmp_path / "logits.pt")!r}))
assert len(adapted_layers(model)) == 9 and max(norm(matrix(layer)) for layer in adapted_layers(model)) <= 1 + 1e-6
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_start_is_the_base_model_bit_by_bit(family: str) -> None:
    base = constrained(family)
    before = logits(base)
    assert torch.equal(logits(adapted(family, base)), before)


def test_disabling_and_unloading_give_the_base_model_bit_by_bit(family: str) -> None:
    base = constrained(family)
    before = logits(base)
    model = adapted(family, base)
    steps(model, 2)
    after = logits(model)
    assert not torch.allclose(after, before)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), after)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied.unload()), before)
    assert torch.equal(logits(model), after)


def test_the_sum_of_active_adapters_is_what_is_constrained(family: str) -> None:
    model = adapted(family, use_rslora=True, lora_alpha=6, alpha_pattern={TARGETS[family][0]: 9})
    model.add_adapter("b", lipschitz_lora_config(LoraConfig(target_modules=TARGETS[family][:1], r=2)))
    model.add_adapter("c", lipschitz_lora_config(LoraConfig(target_modules=TARGETS[family], r=2)))
    shake(model)
    layer = adapted_layers(model)[0]
    assert layer.scaling["default"] == 4.5
    for names in (["default"], ["b"], ["default", "c"], ["c", "b", "default"], ["default"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(matrix(layer), capped(raw_sum(layer, *names)), rtol=0, atol=2e-3)
        assert 0.999 < norm(matrix(layer)) <= 1 + 1e-6
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.merge_adapter(["c"])
    torch.testing.assert_close(matrix(layer), capped(raw_sum(layer)), rtol=0, atol=2e-3)
    assert 0.999 < norm(matrix(layer)) <= 1 + 1e-6
    model.unmerge_adapter()
    model.add_weighted_adapter(["default", "c"], [0.5, 2.0], "mix", combination_type="cat")
    model.base_model.set_adapter("mix")
    assert all(0.999 < norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(model))


def test_scaling_an_adapter_is_seen() -> None:
    model = adapted()
    shake(model, 0.5)
    layer = adapted_layers(model)[0].eval()
    assert norm(matrix(layer)) > 0.999
    layer.scale_layer(3.0)
    torch.testing.assert_close(matrix(layer), capped(raw_sum(layer, "default")), rtol=0, atol=2e-3)
    assert 0.999 < norm(matrix(layer)) <= 1 + 1e-6


def test_bound_holds_whatever_moves_the_adapter() -> None:
    model = adapted()
    layer = adapted_layers(model)[0]
    model.eval()
    for size in (1e-3, 0.1, 10.0):
        with torch.no_grad():
            layer.lora_B["default"].weight.data += size * torch.randn_like(layer.lora_B["default"].weight)
        assert norm(matrix(layer)) <= 1 + 1e-6


def test_references_follow_the_optimizer() -> None:
    model = adapted()
    steps(model, 3)
    for layer in adapted_layers(model):
        assert norm(layer.base_layer.weight.detach()) > 0.999


def test_gradient_is_that_of_the_capped_sum(family: str) -> None:
    model = adapted(family).double().eval()
    shake(model)
    layer = adapted_layers(model)[0]
    layer.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, direction = torch.randn(7, layer.in_features).double(), torch.randn(7, layer.out_features).double()
    found = torch.autograd.grad((layer(x) * direction).sum(), (a, b))

    raw = layer.base_layer.parametrizations.weight.original.detach()
    raw = raw if layer.fan_in_fan_out else raw.mT
    total = raw + layer.scaling["default"] * (b @ a).mT
    value = x @ (total / torch.linalg.matrix_norm(total, 2))
    expected = torch.autograd.grad((value * direction).sum(), (a, b))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-3 * theirs.abs().max().item())


def test_dropout_is_on_the_input_of_the_branch_and_scaled_like_the_rest(family: str) -> None:
    model = adapted(family, lora_dropout=0.4).eval()
    shake(model)
    layer = adapted_layers(model)[0]
    x = torch.randn(5, layer.in_features)
    plain = layer(x).detach() - layer(torch.zeros_like(x)).detach()
    offset = layer(torch.zeros_like(x)).detach()
    layer.train()
    torch.manual_seed(3)
    found = (layer(x) - offset).detach().double()
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.4).double()
    raw, total = raw_sum(layer), raw_sum(layer, "default")
    expected = (x.double() @ raw + dropped @ (total - raw)) / norm(total)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found - plain).abs().max() > 0.05


def test_copies_and_materialized_weights_hold_the_adapters() -> None:
    model = adapted()
    shake(model)
    expected = logits(model)
    with materialized(model) as plain:
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    with materialized(model, copy=True) as plain:
        pass
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    steps(copied, 2)
    assert all(norm(layer.base_layer.weight.detach()) > 0.999 for layer in adapted_layers(copied))
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), expected)
    assert all(norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(copied))


def test_bfloat16(family: str) -> None:
    model = adapted(family, constrained(family).to(torch.bfloat16))
    shake(model)
    model.eval()
    assert adapted_layers(model)[0].lora_A["default"].weight.dtype == torch.float32
    weights = [layer.base_layer.weight for layer in adapted_layers(model)]
    assert all(weight.dtype == torch.bfloat16 for weight in weights)
    assert min(map(norm, weights)) > 0.9
    assert max(map(norm, weights)) <= 1 + 1e-6
    before = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), before)


def test_autocast_does_not_loosen_the_bound() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    model.train()
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**families.example(model.get_base_model()), labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
    weights = [layer.base_layer.weight.detach() for layer in adapted_layers(model)]
    assert max(map(norm, weights)) <= 1 + 1e-6
    assert min(map(norm, weights)) > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted_layers(model)[0].base_layer.weight, weights[0])


def test_weights_read_into_an_adapter_are_seen() -> None:
    source, model = adapted(), adapted().eval()
    shake(source, 1.0)
    layer = adapted_layers(model)[0]
    matrix(layer)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    torch.testing.assert_close(matrix(layer), capped(raw_sum(layer, "default")), rtol=0, atol=2e-3)
    assert 0.999 < norm(matrix(layer)) <= 1 + 1e-6


def test_nothing_is_left_on_an_unloaded_layer() -> None:
    model = adapted()
    shake(model)
    layers = [weakref.ref(layer) for layer in adapted_layers(model)]
    base = model.merge_and_unload()
    for layer in constrained_layers(base):
        assert not layer.parametrization._forward_pre_hooks
        assert layer.parametrization.original is layer.module.parametrizations.weight.original
    del model
    gc.collect()
    assert all(layer() is None for layer in layers)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_options(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    base = constrained()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=base, modules_to_save=["classifier"], init_lora_weights=False)
    steps(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        is_trainable=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert torch.equal(logits(reloaded), logits(model))
    steps(reloaded, 2)
    assert max(norm(matrix(layer)) for layer in adapted_layers(reloaded)) <= 1 + 1e-6


@pytest.mark.parametrize("is_trainable", [False, True])
def test_load_adapter_of_transformers(tmp_path: Path, is_trainable: bool) -> None:
    base = constrained()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=base)
    steps(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    reloaded.load_adapter(str(tmp_path / "adapter"), is_trainable=is_trainable)
    assert len(adapted_layers(reloaded)) == len(adapted_layers(model))
    assert torch.equal(logits(reloaded), logits(model))


def test_saved_adapter_is_refused_where_the_library_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LIPSCHITZ_LORA"
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LipschitzLoraConfig)
    assert isinstance(LoraConfig.from_pretrained(tmp_path), LipschitzLoraConfig)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LIPSCHITZ_LORA")
    with pytest.raises(KeyError, match="LIPSCHITZ_LORA"):
        PeftModel.from_pretrained(families.bert(), tmp_path)


def test_smaller_constant_of_saved_adapter_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    shake(model)
    for layer in constrained_layers(model):
        layer.parametrization.set_constant(0.7)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        reloaded = PeftModel.from_pretrained(constrained(), tmp_path)
    assert "was saved under the constant 0.7 and the base has 1" in caplog.text
    for mine, theirs in zip(adapted_layers(reloaded), adapted_layers(model), strict=True):
        assert 0.699 < norm(matrix(mine)) <= 0.7 * (1 + 1e-6)
        torch.testing.assert_close(matrix(mine), matrix(theirs), rtol=0, atol=1e-6)
    caplog.clear()
    tight = PeftModel.from_pretrained(constrained(layer_lipschitz=0.5), tmp_path)
    assert "saved under the constant 0.7 and the base has 0.5" in caplog.text
    assert all(0.499 < norm(matrix(layer)) <= 0.5 * (1 + 1e-6) for layer in adapted_layers(tight))


def test_trainer_with_schedule(tmp_path: Path) -> None:
    model = adapted(base=constrained(layer_lipschitz=None))
    start = max(norm(matrix(layer)) for layer in adapted_layers(model))
    assert start > 1.5
    arguments = LipschitzTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lipschitz_schedule="linear",
        lipschitz_target=1.0,
        eval_strategy="steps",
        eval_steps=3,
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": torch.randint(1, 60, (9,)), "labels": torch.tensor(i % 3)} for i in range(16)]
    trainer = LipschitzTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert all(0.999 < norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(model))
    trainer.save_model(str(tmp_path / "final"))
    reloaded = PeftModel.from_pretrained(constrained(layer_lipschitz=None), tmp_path / "final")
    assert all(0.999 < norm(matrix(layer)) <= 1 + 1e-6 for layer in adapted_layers(reloaded))


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 1)]},
        {"target_parameters": ["weight"]},
    ],
)
def test_options_that_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported within the ball"):
        lipschitz_lora_config(LoraConfig(target_modules=["query"], **option))


def test_configurations_that_are_refused() -> None:
    with pytest.raises(TypeError, match="peft.LoraConfig, got AdaLoraConfig"):
        lipschitz_lora_config(AdaLoraConfig(total_step=10))
    with pytest.raises(TypeError, match="got dict"):
        lipschitz_lora_config({})
    with pytest.raises(ValueError, match="plain peft.LoraConfig"):
        LipschitzLoraConfig(lipschitz=False)
    custom = LoraConfig()
    custom._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(ValueError, match="_register_custom_module"):
        lipschitz_lora_config(custom)


def test_configuration_is_a_copy() -> None:
    config = LoraConfig(r=3, target_modules=["query"], rank_pattern={"a": 2})
    ours = lipschitz_lora_config(config)
    assert type(config) is LoraConfig
    assert config._custom_modules is None
    assert {**ours.to_dict(), "peft_type": "LORA", "lipschitz": None} == {**config.to_dict(), "lipschitz": None}
    assert lipschitz_lora_config(ours) == ours


def test_layers_without_a_ball_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer.0.attention.self.query is not constrained.*lipschitzify\(model\)"):
        adapted(base=families.bert())
    with pytest.raises(ValueError, match="word_embeddings is a Embedding"):
        adapted(target_modules=["word_embeddings"])
    with pytest.raises(ValueError, match="pooler.dense is not constrained"):
        adapted(base=constrained(exclude_modules=["pooler.dense"]), target_modules=["pooler.dense"])
    with pytest.raises(ValueError, match="Conv2d"):
        get_peft_model(lipschitzify(families.vit()), lipschitz_lora_config(LoraConfig(target_modules=["projection"])))


def test_adapters_of_another_kind_are_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"'x' is plain LoRA .*lipschitz_lora_config"):
        model.add_adapter("x", LoraConfig(target_modules=["query"]))
    plain = get_peft_model(families.bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        lipschitzify(plain)
    with pytest.raises(ValueError, match="lipschitz"):
        plain.add_adapter("x", lipschitz_lora_config(LoraConfig(target_modules=["query"])))


def test_constant_of_an_adapter_that_was_not_used_is_saved_again(tmp_path: Path) -> None:
    model = adapted()
    for layer in constrained_layers(model):
        layer.parametrization.set_constant(0.7)
    model.save_pretrained(tmp_path / "first")
    other = adapted()
    other.load_adapter(tmp_path / "first", "idle")
    other.save_pretrained(tmp_path / "second", selected_adapters=["idle"])
    reloaded = PeftModel.from_pretrained(constrained(), tmp_path / "second" / "idle")
    assert {layer.constraint.lipschitz.item() for layer in adapted_layers(reloaded)} == {0.7}
    assert {layer.constraint.lipschitz.item() for layer in adapted_layers(other)} == {1.0}


def test_models_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match="has no data here"):
        adapted(base=constrained().to("meta"))


def test_mixed_batches_are_refused() -> None:
    model = adapted().eval()
    with pytest.raises(ValueError, match="set_adapter"):
        model(**families.example(model.get_base_model()), adapter_names=["default", "__base__"])


def test_merging_nan_is_refused() -> None:
    model = adapted()
    layer = adapted_layers(model)[0]
    logits(model)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(torch.nan)
    before = layer.raw_weight.clone()
    with pytest.raises(ValueError, match=r"query: adapters default make NaN"):
        layer.merge()
    assert torch.equal(layer.raw_weight, before)
