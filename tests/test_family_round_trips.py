from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from hf_lipschitz.conversion import lipschitzify, merge
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import FAMILIES, HEADLESS, auto_class, example, output
from tests.families.linear_maps import exact_norm, linear_maps


MODELS = {**FAMILIES, **HEADLESS}
METHODS = ("rescaling", "aol", "sll", "cpl")
# One for each way of holding weights.
HOLDERS = ("bert", "gpt2", "mixtral", "gpt_oss", "xlnet", "siglip_vision", "wav2vec2", "convnext")

WITHOUT_THE_LIBRARY = """
import sys, torch, transformers
from pathlib import Path
torch.set_num_threads(1)
results = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    auto, inputs, _ = torch.load(directory / "inputs.pt")
    outputs = getattr(transformers, auto).from_pretrained(directory)(**inputs)
    results[directory.name] = (outputs.logits if "logits" in outputs else outputs.pooler_output).detach()
assert "hf_lipschitz" not in sys.modules
torch.save(results, sys.argv[2])
"""


def constants(model: nn.Module) -> dict[str, float]:
    return {f"{x.name}.{x.tensor_name}": x.parametrization.lipschitz.item() for x in constrained_layers(model)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"{x.name}.{x.tensor_name}": x.effective_weight for x in constrained_layers(model)}


def random_step(model: nn.Module) -> None:
    """One step of training, then back to evaluation."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(model.named_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    model.eval()


def load(directory: Path, model: PreTrainedModel, **options: object) -> PreTrainedModel:
    return auto_class(model).from_pretrained(directory, **options)


CASES = [(family, "gram") for family in MODELS] + [(f, m) for m in METHODS for f in HOLDERS[:1] + HOLDERS[3:]]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_two_generations_are_bit_equal_and_train_alike(family: str, method: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family](), layer_lipschitz=0.1, method=method).eval()
    random_step(model)
    inputs = example(model)
    evaluated, first = output(model, inputs), constants(model)
    model.save_pretrained(tmp_path / "first")
    expected = output(model, inputs)
    torch.testing.assert_close(expected, evaluated, rtol=1e-6, atol=1e-6)
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        loaded = load(tmp_path / generation, model)
        assert type(loaded) is type(model)
        assert torch.equal(output(loaded, inputs), expected)
        assert constants(loaded) == first
        assert loaded.config.quantization_config.method == method
        saved = load_file(tmp_path / generation / "model.safetensors")
        assert not {key for key in saved if key.endswith("$")}
        model = loaded
    fresh = lipschitzify(MODELS[family](), layer_lipschitz=0.3, method=method).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, inputs), expected)
    random_step(fresh)
    random_step(loaded)
    assert all(torch.equal(w, weights(loaded)[name]) for name, w in weights(fresh).items())
    assert torch.equal(output(fresh, inputs), output(loaded, inputs))


@pytest.mark.parametrize("family", HOLDERS)
def test_shards_and_device_map(family: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family](), layer_lipschitz=0.1).eval()
    inputs = example(model)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(output(load(tmp_path, model), inputs), expected)
    placed = load(tmp_path, model, device_map={"": "cpu"})
    assert torch.equal(output(placed, inputs), expected)
    assert constants(placed) == constants(model)


# A plain XLNet keeps its projections in float32 whatever dtype is asked for, and then cannot run.
@pytest.mark.parametrize("family", [family for family in HOLDERS if family != "xlnet"])
def test_bfloat16_stays_under_the_constant(family: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family](), layer_lipschitz=0.1).eval()
    model.save_pretrained(tmp_path)
    half = load(tmp_path, model, dtype=torch.bfloat16)
    layers = list(constrained_layers(half))
    assert len(layers) == len(weights(model))
    for layer in layers:
        assert layer.effective_weight.dtype == torch.bfloat16
        assert layer.parametrization.lipschitz.item() == 0.1
        norm = exact_norm(layer.module, layer.tensor_name, layer.effective_weight)
        assert 0.05 < norm <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_merge_saves_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    model = MODELS[family]().eval()
    inputs, keys, maps = example(model), set(model.state_dict()), linear_maps(model)
    lipschitzify(model, layer_lipschitz=0.1)
    random_step(model)
    expected = output(model, inputs)
    merge(model).save_pretrained(tmp_path)
    assert set(model.state_dict()) == keys
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = load(tmp_path, model)
    assert set(plain.state_dict()) == keys
    assert list(constrained_layers(plain)) == []
    torch.testing.assert_close(output(plain, inputs), expected, rtol=1e-6, atol=1e-6)
    modules = dict(plain.named_modules())
    for name in maps:
        owner, _, tensor_name = name.rpartition(".")
        weight = getattr(modules[owner], tensor_name)
        assert exact_norm(modules[owner], tensor_name, weight) <= 0.1 * (1 + 1e-6)


def test_without_the_library_every_family_gives_the_same(tmp_path: Path) -> None:
    for family, make in MODELS.items():
        model = lipschitzify(make(), layer_lipschitz=0.1).eval()
        random_step(model)
        inputs, directory = example(model), tmp_path / "models" / family
        model.save_pretrained(directory)
        torch.save((auto_class(model).__name__, inputs, output(model, inputs).detach()), directory / "inputs.pt")
    arguments = [sys.executable, "-c", WITHOUT_THE_LIBRARY, tmp_path / "models", tmp_path / "out.pt"]
    subprocess.run(arguments, check=True, capture_output=True)
    for family, found in torch.load(tmp_path / "out.pt").items():
        _, _, expected = torch.load(tmp_path / "models" / family / "inputs.pt")
        # Weight norm takes the weight apart and puts it together again.
        tolerance = 1e-6 if family == "wav2vec2" else 0.0
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, f=family: f"{f}: {m}"
        )


@pytest.mark.parametrize("family", HOLDERS)
@pytest.mark.parametrize("part", ["raw", "constant"])
def test_a_missing_tensor_is_refused(family: str, part: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    model.save_pretrained(tmp_path / "plain")
    lipschitzify(model, layer_lipschitz=0.1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    complete = load_file(file)
    own = sorted(set(complete) - set(load_file(tmp_path / "plain" / "model.safetensors")))
    own = [key for key in own if key.endswith("lipschitz") == (part == "constant")]
    special = [key for key in own if re.search(r"experts|rel_attn\.|in_proj|pos_conv", key)] or own
    for key in {special[0], special[-1], own[-1]}:
        save_file({k: v for k, v in complete.items() if k != key}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="incomplete"):
            load(tmp_path, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_another_size_is_initialised_and_constrained(family: str, tmp_path: Path) -> None:
    model = lipschitzify(FAMILIES[family](), layer_lipschitz=0.01).eval()
    model.save_pretrained(tmp_path)
    labels = {"id2label": {i: str(i) for i in range(7)}, "label2id": {str(i): i for i in range(7)}}
    wider = load(tmp_path, model, **labels, ignore_mismatched_sizes=True)
    assert output(wider, example(model)).shape == (2, 7)
    old, new = weights(model), weights(wider)
    assert set(old) == set(new)
    (changed,) = [name for name in old if old[name].shape != new[name].shape]
    (head,) = [layer for layer in constrained_layers(wider) if f"{layer.name}.{layer.tensor_name}" == changed]
    assert 0.005 < exact_norm(head.module, head.tensor_name, new[changed]) <= 0.01 * (1 + 1e-6)
    assert all(torch.equal(old[name], new[name]) for name in old if name != changed)


@pytest.mark.parametrize("family", ["bert", "mixtral", "xlnet", "vit", "segformer", "wav2vec2"])
def test_an_encoder_grows_a_head(family: str, tmp_path: Path) -> None:
    model = lipschitzify(FAMILIES[family](), layer_lipschitz=0.01).eval()
    model.save_pretrained(tmp_path / "classifier")
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    encoder.save_pretrained(tmp_path / "encoder")
    grown = load(tmp_path / "encoder", model)
    old, new = weights(model), weights(grown)
    assert set(old) == set(new)
    prefix = model.base_model_prefix + "."
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith(prefix))
    for layer in constrained_layers(grown):
        assert torch.isfinite(layer.effective_weight).all()
        assert 0.005 < exact_norm(layer.module, layer.tensor_name, layer.effective_weight) <= 0.01 * (1 + 1e-6)
