from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import nn
from transformers import activations as hf

from hf_lipschitz.nn.activations import Bounded, GroupSort, MaxMin, SlopeCorrected, slope_range
from tests.operators import dense_norm


SIGMOID: Callable[[mpmath.mpf], mpmath.mpf] = lambda u: 1 / (1 + mpmath.exp(-u))  # noqa: E731


def tanh_gelu(u: mpmath.mpf) -> mpmath.mpf:
    return u / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (u + mpmath.mpf("0.044715") * u**3)))


def laplace(u: mpmath.mpf) -> mpmath.mpf:
    deviation = mpmath.mpf("0.282095")
    return mpmath.erf((u - mpmath.mpf("0.707107")) / (deviation * mpmath.sqrt(2))) / 2


SMOOTH = {
    "gelu": (nn.GELU(), lambda u: u * mpmath.ncdf(u)),
    "hf gelu": (hf.GELUActivation(), lambda u: u * mpmath.ncdf(u)),
    "tanh gelu": (nn.GELU("tanh"), tanh_gelu),
    "hf tanh gelu": (hf.GELUTanh(), tanh_gelu),
    "new gelu": (hf.NewGELUActivation(), tanh_gelu),
    "fast gelu": (hf.FastGELUActivation(), tanh_gelu),
    "accurate gelu": (hf.AccurateGELUActivation(), tanh_gelu),
    "silu": (nn.SiLU(), lambda u: u * SIGMOID(u)),
    "hf silu": (hf.SiLUActivation(), lambda u: u * SIGMOID(u)),
    "quick gelu": (hf.QuickGELUActivation(), lambda u: u * SIGMOID(mpmath.mpf("1.702") * u)),
    "mish": (nn.Mish(), lambda u: u * mpmath.tanh(mpmath.log1p(mpmath.exp(u)))),
    "hf mish": (hf.MishActivation(), lambda u: u * mpmath.tanh(mpmath.log1p(mpmath.exp(u)))),
    "sigmoid": (nn.Sigmoid(), SIGMOID),
    "laplace": (hf.LaplaceActivation(), laplace),
    "sqrt softplus": (hf.SqrtSoftplusActivation(), lambda u: mpmath.sqrt(mpmath.log1p(mpmath.exp(u)))),
}
# The ends of these are limits, or sharp corners.
OTHERS: dict[str, tuple[nn.Module, tuple[float, float]]] = {
    "identity": (nn.Identity(), (1.0, 1.0)),
    "hf linear": (hf.LinearActivation(), (1.0, 1.0)),
    "relu": (nn.ReLU(), (0.0, 1.0)),
    "relu6": (nn.ReLU6(), (0.0, 1.0)),
    "leaky": (nn.LeakyReLU(0.1), (0.1, 1.0)),
    "steep": (nn.LeakyReLU(3.0), (1.0, 3.0)),
    "negative": (nn.LeakyReLU(-0.5), (-0.5, 1.0)),
    "tanh": (nn.Tanh(), (0.0, 1.0)),
    "hardtanh": (nn.Hardtanh(-2, 3), (0.0, 1.0)),
    "tanhshrink": (nn.Tanhshrink(), (0.0, 1.0)),
    "softsign": (nn.Softsign(), (0.0, 1.0)),
    "softshrink": (nn.Softshrink(), (0.0, 1.0)),
    "log sigmoid": (nn.LogSigmoid(), (0.0, 1.0)),
    "hardsigmoid": (nn.Hardsigmoid(), (0.0, 1 / 6)),
    "hardswish": (nn.Hardswish(), (-0.5, 1.5)),
    "softplus": (nn.Softplus(), (0.0, 1.0)),
    "sharp softplus": (nn.Softplus(beta=3), (0.0, 1.0)),
    "elu": (nn.ELU(), (0.0, 1.0)),
    "elu 2": (nn.ELU(2.0), (0.0, 2.0)),
    "negative elu": (nn.ELU(-0.5), (-0.5, 1.0)),
    "celu": (nn.CELU(0.5), (0.0, 1.0)),
    "selu": (nn.SELU(), (0.0, 1.0507009873554805 * 1.6732632423543772)),
    "clipped gelu": (hf.ClippedGELUActivation(-10, 10), (-0.1289041452, 1.1289041452)),
}
KNOWN = {name: pair[0] for name, pair in {**SMOOTH, **OTHERS}.items()}


def measured_slopes(activation: nn.Module) -> torch.Tensor:
    """Derivatives on a dense grid: inside the range up to rounding, and near both of its ends."""
    u = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    # Some work in place.
    (slopes,) = torch.autograd.grad(activation(u + 0.0).sum(), u)
    return slopes


@pytest.mark.parametrize("name", SMOOTH)
def test_ranges_of_smooth_activations_are_the_extremes_rounded_outward(name: str) -> None:
    activation, function = SMOOTH[name]
    least, largest = slope_range(activation)
    with mpmath.workdps(30):
        grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
        torch.testing.assert_close(
            activation(grid),
            torch.tensor([float(function(mpmath.mpf(u.item()))) for u in grid], dtype=torch.float64)
            + (0.5 if name == "laplace" else 0.0),
            rtol=1e-7,
            atol=1e-9,
        )
        slope = lambda u: mpmath.diff(function, u)  # noqa: E731
        for sign, end in ((1, largest), (-1, -least)):
            best = max((mpmath.mpf(i) / 20 for i in range(-120, 121)), key=lambda u: sign * slope(u))
            left, right = best - mpmath.mpf("0.1"), best + mpmath.mpf("0.1")
            for _ in range(60):
                a, b = (2 * left + right) / 3, (left + 2 * right) / 3
                left, right = (a, right) if sign * slope(a) < sign * slope(b) else (left, b)
            extreme = sign * slope((left + right) / 2)
            assert extreme <= end or (end == 0 and extreme < 0) or math.isclose(extreme, end, abs_tol=1e-18)
            assert end - max(extreme, 0) < 2e-9 or (end == 0 and extreme <= 0)


@pytest.mark.parametrize("name", OTHERS)
def test_ranges_of_other_activations(name: str) -> None:
    activation, expected = OTHERS[name]
    assert slope_range(activation) == pytest.approx(expected, abs=6e-9)
    slopes, (least, largest) = measured_slopes(activation), slope_range(activation)
    assert least - 1e-13 <= slopes.min() < least + 0.002
    assert largest - 0.002 < slopes.max() <= largest + 1e-13


@pytest.mark.parametrize("name", KNOWN)
def test_corrected_slopes_are_within_0_and_1(name: str) -> None:
    corrected = SlopeCorrected(KNOWN[name])
    slopes = measured_slopes(corrected)
    assert slopes.min() >= -1e-13
    assert slopes.max() <= 1 + 1e-13
    assert slope_range(corrected)[0] >= 0
    assert slope_range(corrected)[1] <= 1
    assert not corrected.state_dict()
    least, largest = slope_range(KNOWN[name])
    if least >= 0 and largest <= 1:
        u = torch.randn(50)
        assert torch.equal(corrected(u), KNOWN[name](u))
    else:
        assert slopes.max() > 0.999
        assert slopes.min() < 0.001 or least > 0


@pytest.mark.parametrize("name", KNOWN)
def test_bounded_activations_are_1_lipschitz_and_no_smaller_than_they_must(name: str) -> None:
    bounded, constant = Bounded(KNOWN[name]), max(map(abs, slope_range(KNOWN[name])))
    slopes = measured_slopes(bounded).abs()
    assert slopes.max() <= 1 + 1e-13
    assert slopes.max() > min(1, constant) - 0.002
    assert max(map(abs, slope_range(bounded))) <= 1
    if constant <= 1:
        u = torch.randn(50)
        assert torch.equal(bounded(u), KNOWN[name](u))


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Hardswish, nn.SELU, nn.Mish])
def test_activations_that_work_in_place_are_corrected_all_the_same(kind: type[nn.Module]) -> None:
    u = torch.randn(20)
    torch.testing.assert_close(SlopeCorrected(kind(inplace=True))(u.clone()), SlopeCorrected(kind())(u))


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (MaxMin(), "MaxMin is not elementwise.*3-Lipschitz.*between layers"),
        (GroupSort(4), "GroupSort is not elementwise"),
        (hf.ReLUSquaredActivation(), "ReLUSquaredActivation: its slope grows"),
        (nn.PReLU(), "PReLU: its slopes are trained"),
        (nn.RReLU(), "RReLU"),
        (nn.Hardshrink(), "it jumps"),
        (nn.CELU(-1.0), "alpha > 0"),
        (nn.Softplus(threshold=2), "threshold"),
        (nn.GLU(), "GLU: its slopes are not known; use one with bounded slopes"),
        (nn.Softmax(-1), "Softmax"),
        (nn.Linear(2, 2), "Linear"),
    ],
)
def test_what_has_no_range_is_refused_by_name(activation: nn.Module, message: str) -> None:
    for use in (slope_range, SlopeCorrected, Bounded):
        with pytest.raises(ValueError, match=message):
            use(activation)


def test_only_the_very_classes_are_known() -> None:
    class GELUActivation(nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return 5 * u

    class Louder(nn.ReLU):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return 5 * u

    for activation in (GELUActivation(), Louder()):
        with pytest.raises(ValueError, match="not known"):
            slope_range(activation)


@pytest.mark.parametrize("dim", [-1, 1])
def test_sorting_against_a_loop(dim: int) -> None:
    x = torch.randn(3, 6, 4, 6)
    ours, pairs = GroupSort(3, dim)(x), MaxMin(dim)(x)
    rows, sorted_rows, pair_rows = (t.movedim(dim, -1).reshape(-1, 6) for t in (x, ours, pairs))
    for row, three, two in zip(rows.tolist(), sorted_rows.tolist(), pair_rows.tolist(), strict=True):
        assert three == sorted(row[:3]) + sorted(row[3:])
        assert two == [y for i in (0, 2, 4) for y in (max(row[i : i + 2]), min(row[i : i + 2]))]


def test_sorting_has_orthogonal_jacobians() -> None:
    for activation in (MaxMin(), GroupSort(4), GroupSort(1)):
        jacobian = torch.autograd.functional.jacobian(activation, torch.randn(8, dtype=torch.float64))
        torch.testing.assert_close(jacobian @ jacobian.mT, torch.eye(8, dtype=torch.float64))


def test_maxmin_in_a_block_is_3_lipschitz() -> None:
    """What the refusal is about: W with orthonormal columns and T = I."""
    x = torch.tensor([0.3, 0.1], dtype=torch.float64)
    block = lambda v: v - 2 * MaxMin()(v)  # noqa: E731
    assert dense_norm(torch.autograd.functional.jacobian(block, x)) <= 1 + 1e-12
    assert dense_norm(torch.autograd.functional.jacobian(block, x.flip(0))) > 2.99


def test_bad_groups_are_named() -> None:
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        GroupSort(0)
    with pytest.raises(ValueError, match="does not divide the 7 features"):
        MaxMin()(torch.randn(2, 7))
