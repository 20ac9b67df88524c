"""replace="norms" on models: functions that do not change, parameters that stay, norms that are refused."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from hf_lipschitz.calibration import calibrate
from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm
from hf_lipschitz.replacements import norms
from hf_lipschitz.replacements.batch_norms import fuse
from hf_lipschitz.replacements.recognition import bounded_norm
from tests.families import FAMILIES, HEADLESS, example, output


ALL = {**FAMILIES, **HEADLESS}
FLOORS = (FloorStdLayerNorm, FloorStdRMSNorm, FloorStdGroupNorm)


def config(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{"norm": "floor", "strict": False, **fields})


def replaced(model: nn.Module, **fields: object) -> tuple[str, ...]:
    names = norms.find(model, config(**fields))
    norms.apply(model, config(**fields), names)
    return names


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("family", ALL)
def test_no_logit_changes_and_every_norm_is_bounded(family: str) -> None:
    model = ALL[family]().eval()
    inputs, tolerance = example(model), 1e-6
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        # Folded into a convolution, the same function is rounded elsewhere, which float32 would let us see.
        inputs, tolerance = {name: value.double() for name, value in inputs.items()}, 1e-12
        model.double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        expected = output(model, inputs)
        replaced(model)
        torch.testing.assert_close(output(model, inputs), expected, rtol=tolerance, atol=tolerance)
        floors = [module for module in model.modules() if isinstance(module, FLOORS)]
        if floors:
            before = [norm.lipschitz() for norm in floors]
            assert calibrate(model, [inputs]) is model
            assert all(norm.lipschitz() <= old for norm, old in zip(floors, before, strict=True))
            torch.testing.assert_close(output(model, inputs), expected, rtol=1e-6, atol=1e-6)
    left = [type(module).__name__ for module in model.modules() if type(module).__name__.endswith(("Norm", "Norm2d"))]
    assert {*left} <= {kind.__name__ for kind in FLOORS} | {"_WeightNorm"}
    kept = {name for name in parameters if "normalization" not in name}
    assert all(dict(model.named_parameters())[name] is parameters[name] for name in kept)


@pytest.mark.parametrize("family", ["bert", "llama", "wav2vec2", "resnet", "convnext"])
def test_the_same_structure_comes_of_names_alone_on_meta(family: str) -> None:
    model = ALL[family]().eval()
    empty = copy.deepcopy(model).to("meta")
    names = replaced(model)
    norms.apply(empty, config(), names)
    assert [type(m) for m in empty.modules()] == [type(m) for m in model.modules()]
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    twin = empty.to_empty(device="cpu")
    twin.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in model.state_dict():
            twin.get_buffer(name).copy_(buffer)
    inputs = example(model)
    with torch.no_grad():
        assert torch.equal(output(twin.eval(), inputs), output(model, inputs))


@pytest.mark.parametrize(
    "module",
    [
        LlamaRMSNorm(12),
        T5LayerNorm(12),
        GemmaRMSNorm(12),
        nn.RMSNorm(12, eps=1e-5),
        CohereLayerNorm(12),
        NemotronLayerNorm1P(12),
        SqueezeBertLayerNorm(12, 1e-12),
        ConvNextLayerNorm(12, data_format="channels_first"),
        ConvNextLayerNorm(12),
        nn.LayerNorm((3, 12)),
        nn.LayerNorm(12, elementwise_affine=False),
        nn.GroupNorm(3, 12),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_kind_of_norm_is_recognised(module: nn.Module, dtype: torch.dtype) -> None:
    module = randomised(copy.deepcopy(module)).to(dtype)
    twin = bounded_norm(module, "floor")
    taken = 0
    for shape in [(4, 12), (4, 3, 12), (4, 12, 5), (4, 12, 5, 7), (4, 5, 7, 12)]:
        scale = torch.tensor([10.0, 1.0, 1e-2, 1e-4]).reshape(-1, *[1] * (len(shape) - 1))
        x = (torch.randn(shape) * scale).to(dtype)
        try:
            expected = module(x)
        except RuntimeError:
            continue
        taken += 1
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(twin(x), expected, rtol=tolerance, atol=tolerance)
        if isinstance(twin, FloorStdRMSNorm) and type(module) is not nn.RMSNorm:
            assert torch.equal(twin(x), expected)
    assert taken
    assert all(getattr(twin, name) is parameter for name, parameter in module.named_parameters())


class ScaledRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.001 * super().forward(hidden_states)


class OtherEpsLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-7)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ScaledRMSNorm(12), "neither"),
        (OtherEpsLayerNorm(12), "neither"),
        (Zamba2RMSNormGated(12, 12), "more than one argument"),
        (nn.RMSNorm(12), "eps"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_that_computes_something_else_is_named(
    module: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=reason):
        bounded_norm(randomised(module), "floor")
    model = nn.ModuleDict({"odd": module, "usual": nn.LayerNorm(12)})
    with caplog.at_level(logging.WARNING):
        assert norms.find(model, config()) == ("usual",)
    assert f"odd ({type(module).__name__})" in caplog.text
    with pytest.raises(ValueError, match="strict.*odd"):
        norms.find(model, config(strict=True))
    with pytest.raises(ValueError, match="no norm that can be replaced"):
        norms.find(nn.ModuleDict({"odd": module}), config())
    with pytest.raises(ValueError, match="odd.*cannot be replaced"):
        norms.apply(model, config(), ("odd",))


def test_centred_norms_take_the_place_of_layer_and_rms_norms(caplog: pytest.LogCaptureFixture) -> None:
    for family, is_centred in (("bert", True), ("llama", False)):
        model = FAMILIES[family]()
        with caplog.at_level(logging.WARNING):
            replaced(model, norm="centred")
        found = [module for module in model.modules() if isinstance(module, CentredNorm)]
        assert len(found) == 5
        assert all(module.is_centred == is_centred for module in found)
        assert "changes what the model computes" in caplog.text
        output(model.eval(), example(model))
    with pytest.raises(ValueError, match="no centred form"):
        bounded_norm(nn.GroupNorm(2, 4), "centred")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: (nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=bias), nn.BatchNorm2d(6), (2, 4, 7, 7)),
        lambda bias: (nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d(6), (2, 4, 7)),
        lambda bias: (nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=bias), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        lambda bias: (nn.ConvTranspose1d(4, 6, 3, bias=bias), nn.BatchNorm1d(6), (2, 4, 7)),
        lambda bias: (nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, affine=False), (3, 4)),
    ],
)
def test_a_folded_batch_norm_computes_the_same(layer: object, has_bias: bool) -> None:
    before, norm, shape = layer(has_bias)
    norm = randomised(norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1e-3, 2.0)
    both = nn.Sequential(before, norm).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    expected, weight = both(x), before.weight
    fuse(norm, before)
    assert before.weight is weight
    torch.testing.assert_close(before(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="5 features"):
        fuse(nn.BatchNorm1d(5), before)


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_folding_is_exact_in_double(family: str) -> None:
    model = ALL[family]().double().eval()
    inputs = {name: value.double() for name, value in example(model).items()}
    with torch.no_grad():
        expected = output(model, inputs)
        replaced(model)
        assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-9, atol=1e-12)


def test_batch_norms_without_probe_inputs_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    with caplog.at_level(logging.WARNING):
        assert norms.find(model, config()) == ("2",)
    assert "1 (BatchNorm2d)" in caplog.text


def test_a_norm_under_two_names_is_replaced_under_both() -> None:
    norm = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleDict({"c": norm})})
    assert replaced(model) == ("a",)
    assert isinstance(model["a"], FloorStdLayerNorm)
    assert model["a"] is model["b"]["c"]
