"""Norms with a floor: their constants against exact Jacobians, and equality with the originals above the floor."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.nn.gains import centred_gain_norm
from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm
from tests.jacobians import attacked_norm, jacobian_norm


WIDTH = 6


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def floored(kind: str, s_min: float | None = None, eps: float = 1e-3) -> nn.Module:
    if kind == "layer":
        norm = FloorStdLayerNorm(WIDTH, eps, weight=parameter(WIDTH), bias=parameter(WIDTH))
    elif kind == "rms":
        norm = FloorStdRMSNorm(parameter(WIDTH), eps)
    elif kind == "gemma":
        norm = FloorStdRMSNorm(parameter(WIDTH), eps, offset=1.0, gain_in_float32=True)
    else:
        norm = FloorStdGroupNorm(2, WIDTH, eps, weight=parameter(WIDTH), bias=parameter(WIDTH))
    if s_min is not None:
        norm.set_floor(s_min)
    return norm


def shape(kind: str) -> tuple[int, ...]:
    return (1, WIDTH, 2) if kind == "group" else (1, WIDTH)


def exact_centred_norm(gain: Tensor) -> float:
    d = gain.numel()
    centring = torch.eye(d, dtype=torch.float64) - torch.full((d, d), 1 / d, dtype=torch.float64)
    return torch.linalg.matrix_norm(torch.diag(gain.double().flatten()) @ centring, 2).item()


@given(
    st.lists(st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 1.0, -1.0, 1e-20, 1e20, 2.5])), min_size=1, max_size=12)
)
def test_gain_after_centring_is_exact(values: list[float]) -> None:
    gain = torch.tensor(values, dtype=torch.float64)
    exact, bound = exact_centred_norm(gain), centred_gain_norm(gain)
    # The dense norm has roundings of its own.
    assert bound == pytest.approx(exact, rel=1e-9, abs=1e-12 * gain.abs().max().item())


def test_gain_after_centring_lies_above_every_quotient() -> None:
    gain = torch.randn(300, dtype=torch.float64)
    v = torch.randn(300, dtype=torch.float64)
    for _ in range(3000):
        v = gain.square() * v
        v = v - v.mean()
        v = v / v.norm()
    lower = (gain * v).norm().item()
    assert lower * (1 - 1e-9) <= centred_gain_norm(gain) <= lower * (1 + 1e-6)
    with pytest.raises(ValueError, match="NaN"):
        centred_gain_norm(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("s_min", [None, 0.05, 0.7, 4.0])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma", "group"])
def test_no_jacobian_exceeds_the_constant_and_one_attains_it(kind: str, s_min: float | None) -> None:
    norm = floored(kind, s_min).double()
    bound = norm.lipschitz()
    assert attacked_norm(norm, shape(kind), starts=3, steps=8) <= bound * (1 + 1e-9)
    attained = jacobian_norm(norm, torch.zeros(shape(kind), dtype=torch.float64)).item()
    assert attained == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma", "group"])
def test_pairs_across_the_floor_keep_the_constant(kind: str) -> None:
    norm = floored(kind, 0.7).double()
    scales = torch.logspace(-2, 1, 4000, dtype=torch.float64).reshape(-1, *[1] * (len(shape(kind)) - 1))
    x = torch.randn(4000, *shape(kind)[1:], dtype=torch.float64) * scales
    y = x + torch.randn_like(x) * scales * 0.1
    with torch.no_grad():
        quotient = (norm(x) - norm(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert quotient.max().item() <= norm.lipschitz() * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_above_the_floor_the_originals_are_met_bit_by_bit(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, 9, WIDTH)).to(dtype)
    layer = floored("layer", 0.5).to(dtype)
    assert torch.equal(layer(x), F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, layer.eps))
    rms = floored("rms", 0.5).to(dtype)
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + rms.eps)
    assert torch.equal(rms(x), rms.weight * normalised.to(dtype))
    gemma = floored("gemma", 0.5).to(dtype)
    assert torch.equal(gemma(x), (normalised * (1.0 + gemma.weight.float())).to(dtype))
    group = floored("group", 0.1).to(dtype)
    maps = x.transpose(1, 2)
    assert torch.equal(group(maps), F.group_norm(maps, 2, group.weight, group.bias, group.eps))


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma", "group"])
def test_below_the_floor_the_divisor_is_the_floor(kind: str) -> None:
    norm = floored(kind, 50.0).double()
    x = torch.randn(3, *shape(kind)[1:], dtype=torch.float64)
    columns = (1, -1) + (1,) * (x.dim() - 2)
    gain = (norm.weight + getattr(norm, "offset", 0.0)).reshape(columns)
    bias = 0.0 if getattr(norm, "bias", None) is None else norm.bias.reshape(columns)
    centred = x
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
    if kind == "group":
        grouped = x.reshape(3, 2, -1)
        centred = (grouped - grouped.mean(-1, keepdim=True)).reshape(x.shape)
    torch.testing.assert_close(norm(x), gain * centred / norm.s_min + bias, rtol=1e-12, atol=1e-12)


def test_features_on_another_axis_and_gain_stored_from_one() -> None:
    weight, bias = parameter(WIDTH), parameter(WIDTH)
    maps = torch.randn(2, WIDTH, 3, 4) * torch.tensor([0.1, 5.0]).reshape(2, 1, 1, 1)
    first = FloorStdLayerNorm(WIDTH, weight=weight, bias=bias, axis=1, offset=1.0)
    first.set_floor(1.0)
    last = FloorStdLayerNorm(WIDTH, weight=nn.Parameter(1 + weight.detach()), bias=bias)
    last.set_floor(1.0)
    torch.testing.assert_close(first(maps), last(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert first.lipschitz() == pytest.approx(exact_centred_norm(1 + weight.detach()), rel=1e-6)
    with pytest.raises(ValueError, match="axis=1"):
        FloorStdLayerNorm((3, 4), axis=1)


def test_centred_norm_is_linear_with_its_norm() -> None:
    for is_centred in (True, False):
        norm = CentredNorm(WIDTH, weight=parameter(WIDTH), bias=parameter(WIDTH), is_centred=is_centred).double()
        jacobian = jacobian_norm(norm, torch.randn(WIDTH, dtype=torch.float64)).item()
        assert norm.lipschitz() == pytest.approx(jacobian, rel=1e-12)
        assert norm.lipschitz() >= jacobian * (1 - 1e-14)
    assert CentredNorm(1).lipschitz() == 0
    assert CentredNorm((2, 3)).lipschitz() == 1


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_calibration_takes_the_least_deviation(kind: str) -> None:
    norm = floored(kind, 20.0)
    x = torch.randn(50, *shape(kind)[1:])
    before = norm(x)
    norm.begin_calibration()
    seen = norm(x)
    assert not torch.allclose(before, seen)
    norm(10 * x)
    norm.end_calibration(0.25)
    rows = x.double().reshape(50, 2, -1) if kind == "group" else x.double()
    if kind != "rms":
        rows = rows - rows.mean(-1, keepdim=True)
    least = (rows.square().mean(-1) + norm.eps).sqrt().min().item()
    assert norm.s_min.item() == pytest.approx(least / 1.25, rel=1e-5)
    assert torch.equal(norm(x), seen)


def test_calibration_refuses_what_cannot_set_a_floor() -> None:
    norm = floored("layer", 0.3)
    with pytest.raises(RuntimeError, match="begin_calibration"):
        norm.end_calibration(0.1)
    norm.begin_calibration()
    with pytest.raises(RuntimeError, match="nothing passed"):
        norm.end_calibration(0.1)
    assert norm.s_min.item() == pytest.approx(0.3)
    for bad in (math.nan, math.inf):
        norm.begin_calibration()
        norm(torch.full((2, WIDTH), bad))
        with pytest.raises(ValueError, match="not finite"):
            norm.end_calibration(0.1)
    norm.begin_calibration()
    with pytest.raises(ValueError, match="margin"):
        norm.end_calibration(-0.1)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="s_min"):
            norm.set_floor(bad)
    norm.s_min.fill_(math.nan)
    with pytest.raises(ValueError, match="s_min"):
        norm.lipschitz()
    with pytest.raises(ValueError, match="eps"):
        FloorStdLayerNorm(WIDTH, eps=0.0)


def test_floor_is_saved_and_survives_casts_and_copies() -> None:
    norm = floored("rms", 0.1234)
    value = norm.s_min.item()
    assert norm.s_min.dtype == torch.float64
    twin = floored("rms")
    assert twin.s_min.item() <= math.sqrt(twin.eps)
    twin.load_state_dict(norm.state_dict())
    assert set(norm.state_dict()) == {"weight", "s_min"}
    assert copy.deepcopy(twin).to(torch.bfloat16).s_min.item() == value
    assert twin.half().s_min.dtype == torch.float64


def test_gradients_are_finite_at_a_constant_input() -> None:
    for kind in ("layer", "rms", "group"):
        norm = floored(kind, 0.5)
        x = torch.ones(shape(kind)).requires_grad_()
        norm(x).square().sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_in_half_precision_count_as_they_are_added_up(dtype: torch.dtype) -> None:
    """1 + 0.0039 is 1 in bfloat16, and more where the sum is taken in float32, as in Gemma."""
    weight = nn.Parameter(torch.full((4,), 0.0039).to(dtype))
    for wide in (False, True):
        norm = FloorStdRMSNorm(weight, 1e-6, offset=1.0, gain_in_float32=wide)
        norm.set_floor(0.5)
        exact = (1 + weight[0].double()).item() / 0.5
        assert exact <= norm.lipschitz() <= 1.01 * exact
