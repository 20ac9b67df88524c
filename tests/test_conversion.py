from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import hf_lipschitz
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import lipschitzify, merge
from hf_lipschitz.methods import METHODS, register_method
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import FAMILIES, bert, example, gpt2, mobilenet_v2


# As plain models: torch refuses weight norm, and transformers leaves a local function behind.
CANNOT_BE_PICKLED = ("wav2vec2", "whisper")


def names(model: nn.Module) -> set[str]:
    return {layer.name for layer in constrained_layers(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_is_plain_and_computes_the_same(family: str) -> None:
    model = FAMILIES[family]().eval()
    inputs, classes = example(model), [type(m) for m in model.modules()]
    keys, frozen = set(model.state_dict()), {n for n, p in model.named_parameters() if not p.requires_grad}
    lipschitzify(model, layer_lipschitz=0.1)
    twin = copy.deepcopy(model)
    expected = model(**inputs).logits
    assert merge(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert set(model.state_dict()) == keys
    # Weight norm takes the weight apart and puts it together again.
    tolerance = 1e-6 if family == "wav2vec2" else 0.0
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=tolerance, atol=tolerance)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    if family not in CANNOT_BE_PICKLED:
        torch.save(model, io.BytesIO())
    assert torch.equal(twin(**inputs).logits, expected)
    assert names(twin)
    assert model.config.lipschitz["merged"]
    lipschitzify(model, layer_lipschitz=0.05)


def test_mobilenet_depthwise_convolutions_are_covered() -> None:
    model = lipschitzify(mobilenet_v2(), layer_lipschitz=0.01)
    grouped = [layer for layer in constrained_layers(model) if getattr(layer.module, "groups", 1) > 1]
    assert len(grouped) >= 17


def test_gpt2_conv1d_is_covered() -> None:
    model = lipschitzify(gpt2())
    assert "transformer.h.0.mlp.c_fc" in names(model)


def test_tied_and_shared_weights_are_left_alone() -> None:
    masked = BertForMaskedLM(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))
    lipschitzify(masked)
    assert "cls.predictions.decoder" not in names(masked)
    assert masked.cls.predictions.decoder.weight is masked.bert.embeddings.word_embeddings.weight
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=20, num_layers=1, num_heads=2, d_kv=8, vocab_size=50, tie_word_embeddings=True)
    )
    lipschitzify(t5)
    assert "lm_head" not in names(t5)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    pair = lipschitzify(nn.Sequential(first, second, nn.Linear(4, 4)))
    assert names(pair) == {"2"}


@pytest.mark.parametrize(
    ("target", "exclude"),
    [
        (["query", "value"], None),
        (["attention.self.query"], None),
        (["bert.pooler.dense"], None),
        (r".*\.layer\.1\..*dense", None),
        (["dense"], ["pooler.dense"]),
        (["dense"], r".*intermediate.*"),
    ],
)
def test_targets_mean_what_they_mean_to_peft(target: object, exclude: object) -> None:
    theirs = get_peft_model(bert(), LoraConfig(target_modules=target, exclude_modules=exclude))
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in theirs.named_modules()
        if name.endswith(".lora_A")
    }
    assert names(lipschitzify(bert(), target_modules=target, exclude_modules=exclude)) == expected


def test_all_linear_leaves_output_embeddings_out() -> None:
    model = lipschitzify(gpt2(), target_modules="all-linear")
    assert "transformer.h.1.attn.c_attn" in names(model)


def test_the_default_says_how_many_layers_moved(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    model.classifier.weight.data.mul_(1000)
    with caplog.at_level(logging.WARNING):
        lipschitzify(model)
    (message,) = [r.getMessage() for r in caplog.records if "rescaled" in r.getMessage()]
    assert "rescaled 1 of 14 layers, classifier the most" in message
    assert "layer_lipschitz=None" in message


def test_a_registered_method_is_called_and_may_replace_the_module() -> None:
    @register_method("halved")
    def halved(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
        replacement = copy.deepcopy(module)
        replacement.weight.data.mul_(0.5)
        return replacement

    try:
        model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(1, 1, 1))
        before = model[0].weight.clone()
        lipschitzify(model, method="halved", target_modules=["0"])
        assert torch.equal(model[0].weight, before / 2)
        with pytest.raises(ValueError, match="registered already"):
            register_method("halved")(halved)
    finally:
        del METHODS["halved"]


def test_bad_models_are_named() -> None:
    with pytest.raises(TypeError, match="takes a torch.nn.Module, got str"):
        lipschitzify("bert-base-uncased")
    with pytest.raises(ValueError, match="no layer that can be constrained"):
        lipschitzify(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="did you mean .*query"):
        lipschitzify(bert(), target_modules=["qurey"])
    with pytest.raises(ValueError, match="leaves no layer"):
        lipschitzify(bert(), target_modules=["query"], exclude_modules=["query"])
    with pytest.raises(ValueError, match="unknown method 'grem'; registered: gram"):
        lipschitzify(bert(), method="grem")
    model = bert()
    model.bert.pooler.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer bert.pooler.dense: weight holds NaN"):
        lipschitzify(model)
    with pytest.raises(ValueError, match=r"call merge\(model\) first"):
        lipschitzify(lipschitzify(bert()), layer_lipschitz=0.5)
    with pytest.raises(ValueError, match="merge_and_unload"):
        lipschitzify(get_peft_model(bert(), LoraConfig(target_modules=["query"])))
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(bert())
    with pytest.raises(TypeError, match="merge takes"):
        merge(3)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = bert()
    keys = list(model.state_dict())
    model.classifier.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="classifier"):
        lipschitzify(model)
    assert list(model.state_dict()) == keys
    assert names(model) == set()


def test_the_same_configuration_again_changes_nothing() -> None:
    for model in (bert(), nn.Sequential(nn.Linear(3, 3))):
        lipschitzify(model, layer_lipschitz=0.5)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert lipschitzify(model, LipschitzConfig(layer_lipschitz=0.5)) is model
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(ValueError, match="another configuration"):
            lipschitzify(model, layer_lipschitz=0.5, mode="exact")


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        lipschitzify(bert().to("meta"))


def test_frozen_weights_are_constrained_and_stay_frozen() -> None:
    model = bert().requires_grad_(False)
    lipschitzify(model, layer_lipschitz=0.1)
    assert not any(p.requires_grad for p in model.parameters())
    merge(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_foreign_parametrizations_are_left_alone_or_refused() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert names(lipschitzify(model)) == {"1"}
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="strict=True, and 0: parametrized by something else"):
        lipschitzify(model, strict=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_lipschitz", 0.0, "layer_lipschitz must be positive"),
        ("layer_lipschitz", float("nan"), "layer_lipschitz must be positive"),
        ("mode", "clip", "Unknown mode 'clip'; known: cap, exact"),
        ("refresh_every", 0, "refresh_every must be at least 1"),
        ("rtol", 0.0, "rtol must be in"),
        ("target_modules", [], "non-empty list"),
    ],
)
def test_bad_configurations_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LipschitzConfig(**{field: value})


def test_configuration_round_trips(tmp_path: object) -> None:
    config = LipschitzConfig(layer_lipschitz=0.1 + 0.2, target_modules=["query"], exclude_modules=".*1.*")
    assert LipschitzConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert LipschitzConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ValueError, match="has no field layer_lipshitz"):
        LipschitzConfig.from_dict({"layer_lipshitz": 1.0})
    with pytest.raises(ValueError, match=r"holds no lipschitz_config\.json"):
        LipschitzConfig.from_pretrained("/nonexistent")


def test_public_names() -> None:
    assert set(hf_lipschitz.__all__) >= {"lipschitzify", "merge", "materialized", "LipschitzConfig", "register_method"}
    assert "inspect" not in hf_lipschitz.__all__
    assert callable(hf_lipschitz.inspect)


def test_quantized_models_are_refused() -> None:
    model = bert()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="the model is quantized; dequantize it first"):
        lipschitzify(model)


def test_weights_that_are_no_float_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert names(lipschitzify(model)) == {"1"}
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="no layer that can be constrained"):
        lipschitzify(model)


def test_a_weight_shared_with_a_part_that_is_kept_is_named() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "other": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    with pytest.raises(ValueError, match="strict=True, and head: tied weight"):
        lipschitzify(model, strict=True)
    assert names(lipschitzify(model)) == {"other"}


def test_what_other_parametrizations_share_with_us_is_checked_by_tensor() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    model = lipschitzify(nn.Sequential(attention), layer_lipschitz=0.1)
    found = {layer.full_name for layer in constrained_layers(model)}
    assert found == {f"0.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}
    query, key, value = torch.randn(3, 1, 8), torch.randn(5, 1, 6), torch.randn(5, 1, 4)
    expected = attention(query, key, value)[0]
    plain = merge(model)[0]
    assert torch.equal(plain(query, key, value)[0], expected)


def test_a_trained_weight_norm_keeps_its_magnitude() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(torch.tensor([[0.5], [1.0], [2.0], [3.0]]))
        layer.parametrizations.weight.original1.mul_(0.7)
    model, x = torch.nn.Sequential(layer), torch.randn(3, 5)
    before = model(x).detach()
    lipschitzify(model, layer_lipschitz=None)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-6)
