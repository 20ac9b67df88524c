"""Functions of single entries, by their slopes on the range of the entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_lipschitz.bounds.logs import scaled
from hf_lipschitz.bounds.regions import Region
from hf_lipschitz.bounds.registry import Call, NoRule, norm_of, rule
from hf_lipschitz.bounds.values import Dependent, Weighted


_aten = torch.ops.aten
# Share of the largest square that the mean square of the channels may have, for another norm to be computed.
_WORTH_IT = 0.9
# Slopes that underflow are not zero.
_TINY = 1e-300
_Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curve:
    """A function f of one entry.

    Args:
        function (`Callable`):
            f itself.
        slope (`float`):
            sup |f'|; inf where there is none.
        on (`Callable`, *optional*):
            sup |f'| on [a, b], given the two ends, at most inf.
        turning (`tuple[float]`, *optional*):
            Points outside of which f is monotone, in order: extremes of f.
    """

    function: _Function
    slope: float
    on: Callable[[Tensor, Tensor], Tensor] | None = None
    turning: tuple[float, ...] = ()


def through(value: Dependent, curve: Curve, shape: tuple[int, ...]) -> Dependent:
    r"""\(\|f(x) - f(y)\| \le \max_i \sup|f'|\,\|x - y\|\), over the range of each entry.

    Where channels differ in slope and x = Wz + b, the constant is at most that of z times ‖diag(d) W‖, with d the
    largest slope of each channel: entries that a ReLU holds at zero on the whole ball take their row with them.
    """
    lower, upper = value.region.lower, value.region.upper
    slopes = torch.tensor(curve.slope, dtype=torch.float64)
    if lower is not None and upper is not None and curve.on is not None:
        slopes = torch.minimum(curve.on(lower, upper).nan_to_num(nan=math.inf, posinf=math.inf), slopes)
    steepest = slopes.max().item() if slopes.numel() else 0.0
    if not math.isfinite(steepest):
        raise NoRule("its slope grows without bound, and no range of its argument is known")
    log = scaled(value.log_lipschitz, steepest)
    if value.weighted is not None and slopes.dim():
        log = min(log, channelwise(value.weighted, slopes.expand(value.shape)))
    return Dependent(log, shape, _image(value, curve, slopes))


def channelwise(weighted: Weighted, slopes: Tensor) -> float:
    """log of L ‖diag(d) W‖, d the largest of |slopes| in each channel; inf where they are much alike."""
    axis = weighted.axis % slopes.dim()
    largest = slopes.abs().movedim(axis, -1).reshape(-1, slopes.shape[axis]).amax(0)
    is_even = largest.numel() == 0 or largest.square().mean() > _WORTH_IT * largest.square().max()
    if not bool(torch.isfinite(largest).all()) or is_even:
        return math.inf
    fused = with_rows_times(weighted, largest)
    return scaled(weighted.log_lipschitz, norm_of(fused.weight, weighted.geometry))


def with_rows_times(weighted: Weighted, factors: Tensor) -> Weighted:
    """diag(c) W, c one factor or one a channel, with their signs."""
    factors = factors.reshape(-1, *[1] * (weighted.weight.dim() - 1))
    return weighted._replace(weight=weighted.weight.detach().to("cpu", torch.float64) * factors)


def _image(value: Dependent, curve: Curve, slopes: Tensor) -> Region:
    lower, upper = value.region.lower, value.region.upper
    low = torch.tensor(-math.inf, dtype=torch.float64) if lower is None else lower
    high = torch.tensor(math.inf, dtype=torch.float64) if upper is None else upper
    points = [curve.function(low), curve.function(high)]
    for point in curve.turning:
        at = torch.tensor(point, dtype=torch.float64)
        inside = (low <= at) & (at <= high)
        points.append(torch.where(inside, curve.function(at), points[0]))
    points = torch.stack(torch.broadcast_tensors(*points))
    region = {"lower": points.amin(0), "upper": points.amax(0)}
    steepest = slopes.amax(-1, keepdim=True) if slopes.dim() else slopes
    if value.region.radius is not None:
        region["radius"] = value.region.radius * steepest
    # |f(u)| is at most |f(0)| + sup |f'| |u|, with the slope between 0 and u.
    at_zero = curve.function(torch.zeros((), dtype=torch.float64)).abs()
    if value.region.norm is not None and math.isfinite(curve.slope) and bool(torch.isfinite(at_zero)):
        width = value.shape[-1] if value.shape else 1
        region["norm"] = value.region.norm * curve.slope + at_zero * math.sqrt(width)
    return Region(**region)


def peaks(derivative: _Function, *at: float) -> Callable[[Tensor, Tensor], Tensor]:
    """sup |f'| on [a, b] for an f' that is monotone between the points `at`, where it has its extremes."""

    def on(lower: Tensor, upper: Tensor) -> Tensor:
        found = torch.maximum(derivative(lower).abs(), derivative(upper).abs())
        for point in at:
            # A little early, for the points are rounded; f' is flat there.
            inside = (lower <= point + 1e-4) & (point - 1e-4 <= upper)
            peak = derivative(torch.tensor(point, dtype=torch.float64)).abs() * (1 + 1e-7)
            found = torch.where(inside, torch.maximum(found, peak), found)
        return found * (1 + 1e-12) + _TINY

    return on


def _gelu_slope(u: Tensor) -> Tensor:
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(u) + torch.where(u.isinf(), 0.0, u * density)


def _silu_slope(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s + torch.where(u.isinf(), 0.0, u * s * torch.sigmoid(-u))


def _tanh_gelu_slope(u: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    w = 2 * root * (u + 0.044715 * u**3)
    inner = root * (1 + 3 * 0.044715 * u.square())
    # (1 + tanh(w/2))/2 and 1 - tanh(w/2)² without what cancels.
    bell = torch.sigmoid(w) * torch.sigmoid(-w)
    return torch.sigmoid(w) + torch.where(u.isinf() | (bell == 0), 0.0, 2 * u * bell * inner)


def _relu_slope(lower: Tensor, upper: Tensor) -> Tensor:
    return (~(upper <= 0)).double()


def _finite(function: _Function, at_minus: float, at_plus: float) -> _Function:
    """With its limits at infinity."""

    def extended(u: Tensor) -> Tensor:
        value = function(u)
        value = torch.where(u == -math.inf, at_minus, value)
        return torch.where(u == math.inf, at_plus, value)

    return extended


GELU = Curve(
    _finite(functional.gelu, 0.0, math.inf),
    1.128904146,
    peaks(_gelu_slope, -math.sqrt(2), math.sqrt(2)),
    turning=(-0.7517915246935645,),
)
TANH_GELU = Curve(
    _finite(lambda u: functional.gelu(u, approximate="tanh"), 0.0, math.inf),
    1.128993069,
    peaks(_tanh_gelu_slope, -1.41850400879, 1.41850400879),
    turning=(-0.752461422071,),
)
SILU = Curve(
    _finite(functional.silu, 0.0, math.inf),
    1.099839321,
    peaks(_silu_slope, -2.3993572805154, 2.3993572805154),
    turning=(-1.2784645427610738,),
)
RELU = Curve(torch.relu, 1.0, _relu_slope)

_CURVES: dict[object, Curve] = {
    _aten.relu.default: RELU,
    _aten.relu6.default: Curve(functional.relu6, 1.0, lambda a, b: (~((b <= 0) | (a >= 6))).double()),
    _aten.tanh.default: Curve(torch.tanh, 1.0, peaks(lambda u: 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u), 0.0)),
    _aten.sigmoid.default: Curve(torch.sigmoid, 0.25, peaks(lambda u: torch.sigmoid(u) * torch.sigmoid(-u), 0.0)),
    _aten.abs.default: Curve(torch.abs, 1.0, turning=(0.0,)),
    _aten.silu.default: SILU,
    _aten.hardswish.default: Curve(_finite(functional.hardswish, 0.0, math.inf), 1.5, turning=(-3.0, -1.5)),
    _aten.mish.default: Curve(_finite(functional.mish, 0.0, math.inf), 1.088498162, turning=(-1.192431214515,)),
    _aten.erf.default: Curve(
        torch.erf, 1.128379168, peaks(lambda u: 2 / math.sqrt(math.pi) * torch.exp(-u.square()), 0.0)
    ),
    _aten.exp.default: Curve(torch.exp, math.inf, lambda a, b: torch.exp(b) * (1 + 1e-12) + _TINY),
    _aten.log.default: Curve(torch.log, math.inf, lambda a, b: torch.where(a > 0, 1 / a, math.inf)),
    _aten.sqrt.default: Curve(torch.sqrt, math.inf, lambda a, b: torch.where(a > 0, 0.5 * a.rsqrt(), math.inf)),
    _aten.rsqrt.default: Curve(torch.rsqrt, math.inf, lambda a, b: torch.where(a > 0, 0.5 * a.pow(-1.5), math.inf)),
    _aten.reciprocal.default: Curve(
        torch.reciprocal,
        math.inf,
        lambda a, b: torch.where((a > 0) | (b < 0), 1 / torch.minimum(a.abs(), b.abs()).square(), math.inf),
    ),
    _aten.square.default: Curve(torch.square, math.inf, lambda a, b: 2 * torch.maximum(a.abs(), b.abs()), (0.0,)),
}


def _register(operator: object, curve: Curve) -> None:
    @rule(operator)
    def apply(call: Call) -> Dependent:
        return through(call.only("self"), curve, call.shape)


for _operator, _curve in _CURVES.items():
    _register(_operator, _curve)


@rule(_aten.sin.default, _aten.cos.default)
def wave(call: Call) -> Dependent:
    """Slopes and values in [-1, 1]."""
    one = torch.ones((), dtype=torch.float64)
    value = call.only("self")
    return call.gives(value, 1.0, Region(lower=-one, upper=one, radius=value.region.radius))


@rule(_aten.gelu.default)
def gelu(call: Call) -> Dependent:
    """Slopes up to 1.1290."""
    curve = {"none": GELU, "tanh": TANH_GELU}[call["approximate"]]
    return through(call.only("self"), curve, call.shape)


@rule(_aten.leaky_relu.default)
def leaky_relu(call: Call) -> Dependent:
    """Slope 1 above zero and `negative_slope` below."""
    low = float(call["negative_slope"])

    def on(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum((~(b <= 0)).double(), torch.where(a >= 0, 0.0, abs(low)))

    curve = Curve(lambda u: functional.leaky_relu(u, low), max(1.0, abs(low)), on, (0.0,))
    return through(call.only("self"), curve, call.shape)


@rule(_aten.elu.default)
def elu(call: Call) -> Dependent:
    """scale · u above zero and scale · α (exp(βu) - 1) below: the larger of scale and scale α β."""
    alpha, scale, below = (float(call[name]) for name in ("alpha", "scale", "input_scale"))

    def function(u: Tensor) -> Tensor:
        return torch.where(u > 0, scale * u, scale * alpha * torch.expm1(below * u.clamp(max=0)))

    return through(
        call.only("self"), Curve(function, abs(scale) * max(1.0, abs(alpha * below)), None, (0.0,)), call.shape
    )


@rule(_aten.softplus.default)
def softplus(call: Call) -> Dependent:
    """Slopes in [0, 1]; below a threshold of 20 the jump to the identity is no rounding any more."""
    if float(call["beta"]) <= 0 or float(call["threshold"]) < 20:
        raise NoRule(f"softplus with beta={call['beta']} and threshold={call['threshold']} jumps")
    beta = float(call["beta"])
    curve = Curve(
        lambda u: functional.softplus(u, beta), 1.0, lambda a, b: torch.sigmoid(beta * b) * (1 + 1e-12) + _TINY
    )
    return through(call.only("self"), curve, call.shape)


@rule(_aten.pow.Tensor_Scalar)
def power(call: Call) -> Dependent:
    """p|u|^(p-1) at an end of the range; where p is no positive integer, of ranges above zero only."""
    p = float(call["exponent"])
    is_natural = p >= 1 and p == int(p)

    def on(a: Tensor, b: Tensor) -> Tensor:
        steepest = abs(p) * torch.maximum(a.abs().pow(p - 1), b.abs().pow(p - 1))
        return steepest if is_natural else torch.where(a > 0, steepest, math.inf)

    turning = (0.0,) if is_natural and int(p) % 2 == 0 else ()
    curve = Curve(lambda u: torch.pow(u, p), 1.0 if p == 1 else math.inf, on, turning)
    return through(call.only("self"), curve, call.shape)


@rule(_aten.clamp.default, _aten.hardtanh.default, _aten.clamp_min.default, _aten.clamp_max.default)
def clamped(call: Call) -> Dependent:
    """Slope 1 between the limits and 0 outside."""
    given = call.arguments
    low, high = (
        next((float(given[name]) for name in names if given.get(name) is not None), default)
        for names, default in ((("min", "min_val"), -math.inf), (("max", "max_val"), math.inf))
    )
    curve = Curve(lambda u: u.clamp(low, high), 1.0, lambda a, b: (~((b <= low) | (a >= high))).double())
    return through(call.only("self"), curve, call.shape)
