"""`lipschitzify(replace=...)`, `calibrate`, and what becomes of such models when they are saved and loaded."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import hf_lipschitz
from hf_lipschitz import LipschitzConfig, calibrate, lipschitzify, materialized, merge
from hf_lipschitz.blocks import block_layers
from hf_lipschitz.nn.activations import Bounded, MaxMin, SlopeCorrected, slope_range
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.attention import BallRadii
from hf_lipschitz.nn.calibration import calibrated_modules
from tests.families import FAMILIES, HEADLESS, auto_class, bert, example, output, resnet, vit
from tests.families.linear_maps import exact_norm


MODELS = {**FAMILIES, **HEADLESS}
# Their attention is computed past transformers' registry.
BYPASSING = {"deberta_v2": "DisentangledSelfAttention", "xlnet": "XLNetRelativeAttention"}
BYPASSING |= dict.fromkeys(("siglip", "siglip_vision"), "MultiheadAttention")
WITHOUT_NORMS_TO_FLOOR = ("resnet", "mobilenet_v2")
BLOCKS = {"bert": 2, "albert": 1, "gpt2": 2, "vit": 2, "t5": 4, "xlnet": 2, "wav2vec2": 2, "whisper": 2, "swin": 2}


def all_that_go(family: str) -> tuple[str, ...]:
    kinds = ("weights", "norms", "activations", "residuals")
    is_free = family in BYPASSING or family in ("resnet", "mobilenet_v2", "convnext")
    kinds = kinds if is_free else (*kinds, "attention")
    without = ("resnet", "mobilenet_v2", "t5", "gpt_oss")
    return tuple(kind for kind in kinds if kind != "activations" or family not in without)


def replaced(family: str, **config: object) -> PreTrainedModel:
    return lipschitzify(MODELS[family]().eval(), replace=all_that_go(family), **config)


def in_the_dtype_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in example(model).items()}


@pytest.mark.parametrize("family", MODELS)
def test_norms_and_attention_leave_the_function_as_it_was(family: str) -> None:
    model = MODELS[family]().eval()
    if family in WITHOUT_NORMS_TO_FLOOR:
        # So that batch norms folded into the layers before them leave no rounding to speak of.
        model.double()
    inputs = in_the_dtype_of(model)
    before = output(model, inputs)
    kinds = tuple(kind for kind in all_that_go(family) if kind in ("weights", "norms", "attention"))
    lipschitzify(model, layer_lipschitz=None, replace=kinds)
    scale = before.abs().max().item()
    torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=1e-6 * scale)
    if family not in WITHOUT_NORMS_TO_FLOOR:
        calibrate(model, [inputs])
        torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=1e-6 * scale)
        constants = [part.lipschitz for part in hf_lipschitz.inspect(model).replacements if part.lipschitz is not None]
        assert constants
        # Every norm saw more than its eps.
        assert all(module.s_min > module.eps**0.5 for _, module in calibrated_modules(model) if hasattr(module, "eps"))
        for _, module in calibrated_modules(model):
            assert not isinstance(module, BallRadii) or module.is_finite
    with materialized(model) as plain:
        assert not [name for name, module in plain.named_modules() if module.training]


@pytest.mark.parametrize("family", MODELS)
def test_two_generations_are_bit_equal_and_a_plain_model_refuses(family: str, tmp_path: Path) -> None:
    model = replaced(family, layer_lipschitz=0.5)
    inputs = example(model)
    if family not in WITHOUT_NORMS_TO_FLOOR:
        calibrate(model, [inputs], margin=0.0)
    expected = output(model, inputs)
    first = model.config.quantization_config
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = auto_class(model).from_pretrained(tmp_path)
        assert torch.equal(output(model, inputs), expected)
        assert model.config.quantization_config == first
    shares = {
        name: module.lipschitz_share for name, module in model.named_modules() if hasattr(module, "lipschitz_share")
    }
    assert set(shares) == set(first.replaced["residuals"])
    for layer in constrained_layers(model):
        norm = exact_norm(layer.module, layer.tensor_name, layer.effective_weight)
        assert norm <= 0.5 * shares.get(layer.name, 1.0) * (1 + 1e-6)
    config = model.config
    del config.quantization_config
    with pytest.raises(RuntimeError, match="(?i)size|shape|mismatch"):
        auto_class(model).from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "t5", "siglip", "whisper"])
def test_every_dtype_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family]().to(dtype).eval(), replace=all_that_go(family), layer_lipschitz=None)
    inputs = in_the_dtype_of(model)
    calibrate(model, [inputs])
    model.save_pretrained(tmp_path)
    loaded = auto_class(model).from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    # T5 keeps some of its layers in float32 when it is loaded in float16.
    tolerance = 5e-3 if (family, dtype) == ("t5", torch.float16) else 0.0
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["sll", "cpl"])
@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_train_save_and_load(family: str, kind: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family](), method=kind, sll_blocks=True).train()
    blocks = model.config.quantization_config.replaced["blocks"]
    assert len(blocks) == BLOCKS[family]
    assert not set(block_layers(model, blocks)) & {layer.name for layer in constrained_layers(model)}
    rows = {part.name: part for part in hf_lipschitz.inspect(model).replacements}
    assert all(rows[name].lipschitz == 1.0 and "tied to" in rows[name].note for name in blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    model.eval()
    inputs = example(model)
    expected = output(model, inputs)
    with materialized(model) as plain:
        torch.testing.assert_close(output(plain, inputs), expected, rtol=1e-6, atol=1e-6)
    # What is saved has bounds that depend on the weights alone, not on the steps before.
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-6, atol=1e-6)
    expected = output(model, inputs)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = auto_class(model).from_pretrained(tmp_path)
        assert torch.equal(output(model, inputs), expected)
    with pytest.raises(ValueError, match="blocks of .* were replaced.*would compute something else"):
        merge(model)


def test_other_parts_of_blocks_are_replaced_once() -> None:
    model = lipschitzify(MODELS["gpt2"]().eval(), method="sll", sll_blocks=True, replace="all")
    found = model.config.quantization_config.replaced
    assert not {name for name in found["norms"] if name.endswith("ln_2")}
    assert {name for name in found["norms"] if name.endswith(("ln_1", "ln_f"))}
    assert "activations" not in found
    assert not {name for name in found["residuals"] if ".mlp." in name}
    assert isinstance(model.transformer.h[0].mlp.act, SlopeCorrected)
    assert isinstance(model.transformer.h[0].ln_2, nn.Identity)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_without_the_library_a_replaced_model_fails_loudly(family: str, tmp_path: Path) -> None:
    model = lipschitzify(MODELS[family](), method="sll", sll_blocks=True)
    model.save_pretrained(tmp_path)
    script = "import sys, transformers; getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])"
    arguments = [sys.executable, "-c", script, tmp_path, auto_class(model).__name__]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "mismatch" in process.stderr
    assert "Unknown quantization type, got lipschitz" in process.stderr


def test_an_encoder_of_a_replaced_model_grows_a_head(tmp_path: Path) -> None:
    model = replaced("bert", layer_lipschitz=0.5)
    calibrate(model, [example(model)])
    model.save_pretrained(tmp_path / "classifier")
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    names = encoder.config.quantization_config.replaced
    assert not {entry for entries in names.values() for entry in entries if entry.startswith("bert.")}
    encoder.save_pretrained(tmp_path / "encoder")
    grown = auto_class(model).from_pretrained(tmp_path / "encoder")
    assert grown.config.quantization_config.replaced == model.config.quantization_config.replaced
    inputs = example(model)
    assert torch.equal(grown.bert(**inputs).pooler_output, model.bert(**inputs).pooler_output)


@pytest.mark.parametrize("buffer", ["s_min", "radii", "log_q"])
def test_a_missing_constant_is_refused(buffer: str, tmp_path: Path) -> None:
    model = lipschitzify(bert(), method="sll", sll_blocks=True, replace=("weights", "norms", "attention"))
    model.save_pretrained(tmp_path)
    complete = load_file(tmp_path / "model.safetensors")
    key = next(key for key in complete if key.endswith(buffer))
    save_file({k: v for k, v in complete.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="incomplete"):
        auto_class(model).from_pretrained(tmp_path)


def test_a_missing_block_weight_is_refused(tmp_path: Path) -> None:
    model = lipschitzify(bert(), method="sll", sll_blocks=True)
    model.save_pretrained(tmp_path)
    complete = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.0.output.dense.parametrizations.weight.original"
    save_file({k: v for k, v in complete.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="incomplete"):
        auto_class(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(("family", "kind"), BYPASSING.items())
def test_attention_past_the_registry_is_refused_by_name(family: str, kind: str) -> None:
    model = MODELS[family]()
    keys = set(model.state_dict())
    for asked in (("weights", "attention"), "all"):
        with pytest.raises(ValueError, match=f"cannot clip .*{kind}"):
            lipschitzify(model, replace=asked)
    assert set(model.state_dict()) == keys
    assert not list(constrained_layers(model))


def test_all_is_what_the_model_has(caplog: pytest.LogCaptureFixture) -> None:
    model = lipschitzify(resnet().eval(), replace="all")
    found = model.config.quantization_config.replaced
    assert set(found) == {"norms", "residuals"}
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.config.quantization_config.replace == LipschitzConfig(replace="all").replace
    with pytest.raises(ValueError, match="no attention to replace"):
        lipschitzify(resnet(), replace=("weights", "attention"))
    caplog.set_level(logging.INFO, logger="hf_lipschitz")
    lipschitzify(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), replace="all")
    assert "replaced 1 norms, 1 activations" in caplog.text
    assert "leaves out residuals" in caplog.text


def test_activations_and_maxmin() -> None:
    model = lipschitzify(vit().eval(), replace=("weights", "activations"))
    swapped = [module for module in model.modules() if isinstance(module, Bounded)]
    assert len(swapped) == 2
    assert all(max(map(abs, slope_range(module))) <= 1 for module in swapped)
    inputs = example(model)
    model = lipschitzify(vit().eval(), replace=("weights", "activations"), activation="maxmin")
    assert sum(isinstance(module, MaxMin) for module in model.modules()) == 2
    assert torch.isfinite(output(model, inputs)).all()


def test_the_report_tells_what_became_of_each_part() -> None:
    model = replaced("bert", layer_lipschitz=None)
    before = hf_lipschitz.inspect(model)
    assert any("run calibrate" in part.note for part in before.replacements)
    assert any(module.kind == "BertSelfAttention" for module in before.uncovered)
    calibrate(model, [example(model)])
    report = hf_lipschitz.inspect(model)
    uncovered = {module.kind for module in report.uncovered}
    assert not uncovered & {"LayerNorm", "FloorStdLayerNorm", "GELUActivation", "BertSelfAttention", "Bounded"}
    rows = {(part.name, part.kind): part for part in report.replacements}
    norm = model.bert.encoder.layer[0].output.LayerNorm
    row = rows["bert.encoder.layer.0.output.LayerNorm", "FloorStdLayerNorm"]
    weight = norm.weight.detach().double()
    centring = torch.eye(len(weight), dtype=torch.float64) - 1 / len(weight)
    exact = torch.linalg.matrix_norm(torch.diag(weight) @ centring, 2).item() / norm.s_min.item()
    assert exact * (1 - 1e-9) <= row.lipschitz <= exact * (1 + 1e-6)
    ends = rows["bert.encoder.layer.0.output.dense", "residual branch"]
    assert "constants times 0.25" in ends.note
    text = str(report)
    assert "Replaced" in text
    assert "NOT a bound for the model" in text


def test_a_copy_and_a_failed_calibration_change_nothing() -> None:
    model = replaced("bert", layer_lipschitz=None)
    inputs = example(model)
    twin = copy.deepcopy(model)
    calibrate(twin, [inputs])
    assert not any(isinstance(m, BallRadii) and m.is_finite for m in model.modules())
    calibrated = {
        name: [b.clone() for b in module.buffers(recurse=False)] for name, module in calibrated_modules(twin)
    }
    with pytest.raises(ValueError, match="NaN or inf"):
        calibrate(twin, [inputs, {"inputs_embeds": torch.full((1, 3, 24), torch.nan)}])
    for name, module in calibrated_modules(twin):
        for before, after in zip(calibrated[name], module.buffers(recurse=False), strict=True):
            assert torch.equal(before, after)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(bert(), [inputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace": ("weights", "norm")}, "Unknown replace 'norm'"),
        ({"replace": ("norms",)}, "must hold 'weights'"),
        ({"replace": "everything"}, "Unknown replace 'everything'"),
        ({"norm": "batch"}, "Unknown norm 'batch'"),
        ({"activation": "relu"}, "Unknown activation 'relu'"),
        ({"residual_budget": 0.0}, "residual_budget must be positive"),
        ({"sll_blocks": True}, "sll_blocks=True needs method='sll' or 'cpl'"),
        ({"num_iterations": 0, "method": "sll"}, "num_iterations must be at least 1"),
        ({"num_iterations": 2, "method": "aol"}, "does not go with method='aol'"),
        ({"num_iterations": 2}, "does not go with method='gram'"),
        ({"method": "sll", "mode": "exact", "layer_lipschitz": None}, "use mode='cap', or give a constant"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitzify(bert(), **options)


def test_half_precision_blocks_and_experts_of_different_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="load the model in float32"):
        lipschitzify(bert().to(torch.bfloat16), method="sll", sll_blocks=True)
    with pytest.raises(ValueError, match="holds 3 matrices of different norms"):
        lipschitzify(MODELS["mixtral"](), mode="exact", layer_lipschitz=None)


@pytest.mark.parametrize("options", [{"replace": "all"}, {"method": "sll", "sll_blocks": True}], ids=["all", "blocks"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_materialized_models_export(family: str, options: dict[str, object]) -> None:
    model = lipschitzify(MODELS[family]().eval(), **options)
    inputs = example(model)
    if "replace" in options:
        calibrate(model, [dict(inputs)])
    if family == "gpt2":
        inputs["use_cache"] = False
    with materialized(model) as plain, torch.no_grad():
        exported = torch.export.export(plain, (), kwargs=inputs).module()
        assert torch.equal(exported(**inputs).logits, plain(**inputs).logits)


def test_a_base_model_without_a_constrained_layer_is_not_replaced() -> None:
    """A plain encoder would load the file of such a model, and compute something else."""
    model = bert()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="would be replaced, and no layer of bert is constrained"):
        lipschitzify(model, target_modules=["classifier"], replace=("weights", "norms"), norm="centred")
    assert set(model.state_dict()) == keys
    lipschitzify(model, target_modules=["classifier", "query"], replace=("weights", "norms"), norm="centred")


def test_bfloat16_norms_keep_the_memory_layout() -> None:
    for family in ("siglip_vision", "whisper", "swin", "segformer"):
        model = MODELS[family]().to(torch.bfloat16).eval()
        inputs = in_the_dtype_of(model)
        before = output(model, inputs)
        lipschitzify(model, layer_lipschitz=None, replace=("weights", "norms"))
        torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=0, msg=lambda m, f=family: f"{f}: {m}")
