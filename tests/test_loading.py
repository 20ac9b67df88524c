from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    pipeline,
)

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import lipschitzify, materialized, merge
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import FAMILIES, auto_class, bert, example
from tests.operators import dense_norm


def load(directory: Path, model: PreTrainedModel, **options: object) -> PreTrainedModel:
    return auto_class(model).from_pretrained(directory, **options)


@pytest.mark.parametrize("options", [{"layer_lipschitz": 0.1}, {"layer_lipschitz": None}, {"mode": "exact"}])
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama", "t5", "swin", "resnet", "convnext", "whisper"])
def test_reload_is_bit_equal_and_goes_on(family: str, options: dict[str, object], tmp_path: Path) -> None:
    model = lipschitzify(FAMILIES[family]().eval(), **options)
    inputs = example(model)
    expected = model(**inputs).logits
    count = len(list(constrained_layers(model)))
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        model = load(tmp_path / generation, model)
        assert torch.equal(model(**inputs).logits, expected)
        assert replace(model.config.quantization_config, layers=None) == LipschitzConfig(**options)
        assert len(list(constrained_layers(model))) == count
    constants = [layer.parametrization.lipschitz.item() for layer in constrained_layers(model)]
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1)
    model(**inputs).logits.sum().backward()
    optimizer.step()
    for layer, constant in zip(constrained_layers(model), constants, strict=True):
        weight = layer.effective_weight
        if weight.dim() == 2:
            assert dense_norm(weight) <= constant * (1 + 1e-7)


def test_pipelines_of_transformers_take_the_directory(tmp_path: Path) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.1)
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    classifier = pipeline("text-classification", model=str(tmp_path), device="cpu")
    ids = classifier.tokenizer("a good film", return_tensors="pt")
    assert classifier("a good film")[0]["score"] == pytest.approx(
        model(**ids).logits.softmax(-1).max().item(), abs=1e-6
    )


def test_sharded_and_bfloat16(tmp_path: Path) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.1)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = example(model)
    assert torch.equal(load(tmp_path, model)(**inputs).logits, model(**inputs).logits)
    half = load(tmp_path, model, dtype=torch.bfloat16)
    for layer in constrained_layers(half):
        assert layer.effective_weight.dtype == torch.bfloat16
        assert layer.parametrization.lipschitz.item() == 0.1
        assert dense_norm(layer.effective_weight) <= 0.1


def test_a_new_head_is_initialised_and_constrained(tmp_path: Path) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.01)
    model.save_pretrained(tmp_path)
    labels = {"id2label": {i: str(i) for i in range(7)}, "label2id": {str(i): i for i in range(7)}}
    wider = load(tmp_path, model, **labels, ignore_mismatched_sizes=True)
    encoder = AutoModel.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path / "encoder")
    grown = load(tmp_path / "encoder", model, **labels)
    for classifier in (wider.classifier, grown.classifier):
        weight = classifier.weight.detach()
        assert weight.shape == (7, 24)
        assert torch.isfinite(weight).all()
        assert 0 < dense_norm(weight) <= 0.01
        raw = classifier.parametrizations.weight.original
        assert 0.01 < raw.std().item() < 0.04
    inputs = example(model)
    expected = model.bert(**inputs).last_hidden_state
    assert torch.equal(grown.bert(**inputs).last_hidden_state, expected)
    assert torch.equal(wider.bert(**inputs).last_hidden_state, expected)


def test_merged_and_materialized_models_save_plain_checkpoints(tmp_path: Path) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.1)
    inputs = example(model)
    expected = model(**inputs).logits
    with materialized(model):
        model.save_pretrained(tmp_path / "materialized")
    model.save_pretrained(tmp_path / "raw")
    merge(model).save_pretrained(tmp_path / "merged")
    for name in ("materialized", "merged"):
        keys = load_file(tmp_path / name / "model.safetensors")
        assert not any("parametrizations" in key for key in keys)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        plain = load(tmp_path / name, model)
        assert list(constrained_layers(plain)) == []
        assert torch.equal(plain(**inputs).logits, expected)
    assert torch.equal(load(tmp_path / "raw", model)(**inputs).logits, expected)


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    complete = load_file(file)

    def without(part: str) -> None:
        save_file({k: v for k, v in complete.items() if part not in k}, file, metadata={"format": "pt"})

    without("parametrizations")
    with pytest.raises(ValueError, match="hold none of its raw tensors"):
        load(tmp_path, model)
    without("pooler.dense.parametrizations")
    with pytest.raises(ValueError, match="incomplete"):
        load(tmp_path, model)
    without("pooler.dense.parametrizations.weight.0.lipschitz")
    with pytest.raises(ValueError, match="no constant for bert.pooler.dense.weight: it is incomplete"):
        load(tmp_path, model)
    for constant in (torch.nan, torch.inf, -0.1):
        key = "bert.pooler.dense.parametrizations.weight.0.lipschitz"
        spoiled = {**complete, key: torch.tensor(constant, dtype=torch.float64)}
        save_file(spoiled, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="layer bert.pooler.dense: the Lipschitz constant must be finite"):
            load(tmp_path, model)
    file.unlink()
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path, model)


def test_the_configuration_is_no_argument_of_from_pretrained(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Load the plain model, then constrain it"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=LipschitzConfig())


def test_memory_that_a_checkpoint_left_out_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said, whatever happens to be in the memory: `from_pretrained` calls `eval` before its end."""
    model = lipschitzify(FAMILIES["wav2vec2"](), layer_lipschitz=0.1)
    model.save_pretrained(tmp_path)
    complete = load_file(tmp_path / "model.safetensors")
    key = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.0.magnitude"
    save_file({k: v for k, v in complete.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kwargs: _spoilt(empty_like(t, **kwargs)))
    with pytest.raises(ValueError, match="no other tensor for .*pos_conv_embed.conv.weight: it is incomplete"):
        load(tmp_path, model)


def _spoilt(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta or not tensor.is_floating_point() else tensor.fill_(torch.nan)
