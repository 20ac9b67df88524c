"""Sums, products, quotients and means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_lipschitz.bounds.logs import log_sum, scaled
from hf_lipschitz.bounds.regions import Region
from hf_lipschitz.bounds.registry import Call, NoRule, rule
from hf_lipschitz.bounds.rules.elementwise import channelwise, with_rows_times
from hf_lipschitz.bounds.terms import added as added_terms
from hf_lipschitz.bounds.terms import log_of_terms, origin_of
from hf_lipschitz.bounds.terms import multiplied as multiplied_terms
from hf_lipschitz.bounds.values import Dependent, Origin


_aten = torch.ops.aten


@rule(_aten.add.Tensor, _aten.sub.Tensor, _aten.add.Scalar, _aten.sub.Scalar, _aten.rsub.Scalar)
def added(call: Call) -> Dependent:
    """Triangle inequality: L₁ + |α| L₂, each times √r where it is broadcast r-fold."""
    is_difference = "sub" in str(call.operator)
    alpha = float(call["alpha"])
    weights = {"self": 1.0, "other": -alpha if is_difference else alpha}
    if "rsub" in str(call.operator):
        weights = {"self": -alpha, "other": 1.0}
    terms, lower, upper, radius = [], _ZERO, _ZERO, _ZERO
    for name, weight in weights.items():
        value = call[name]
        if isinstance(value, Dependent):
            copies = math.prod(call.shape) / max(value.size, 1)
            terms.append(scaled(value.log_lipschitz, abs(weight) * math.sqrt(copies)))
            radius = _sum(radius, _token_radius(value, call.shape), abs(weight))
        low, high = ends(value)
        low, high = (low, high) if weight >= 0 else (high, low)
        lower, upper = _sum(lower, low, weight), _sum(upper, high, weight)
    weighted = None
    only = [value for value in (call["self"], call["other"]) if isinstance(value, Dependent)]
    if len(only) == 1 and only[0].shape == call.shape and weights["self" if only[0] is call["self"] else "other"] == 1:
        weighted = only[0].weighted
    log, origin = log_sum(terms), _origin_of_sum(call, weights)
    if origin is not None and len(origin.terms) > 1:
        log = min(log, log_of_terms(origin, origin.terms))
    return Dependent(log, call.shape, Region(lower, upper, radius=radius), origin, weighted)


def _origin_of_sum(call: Call, weights: dict[str, float]) -> Origin | None:
    """Of two values of one base, or of one value and a constant."""
    found = [
        multiplied_terms(origin_of(value), torch.tensor(weight, dtype=torch.float64), call.shape)
        for name, weight in weights.items()
        if isinstance(value := call[name], Dependent)
    ]
    return found[0] if len(found) == 1 else added_terms(found[0], found[1], call.shape)


@rule(_aten.mul.Tensor, _aten.mul.Scalar)
def multiplied(call: Call) -> Dependent:
    r"""diag(c) x for a constant c: the largest of √Σ c² over the entries of c that one entry of x meets, attained.

    For two values on ranges, \(\|A\|_\infty L_B + \|B\|_\infty L_A\), where |A| adds up in the same way over the
    entries of A that one of B meets.
    """
    dependent = [name for name in ("self", "other") if isinstance(call[name], Dependent)]
    lower, upper = _product(ends(call["self"]), ends(call["other"]))
    if len(dependent) == 1:
        value, factor = call[dependent[0]], call["other" if dependent == ["self"] else "self"]
        return times(call, value, factor, lower, upper)
    terms = []
    for value, other in ((call["self"], call["other"]), (call["other"], call["self"])):
        sizes = other.region.magnitude()
        if sizes is None or not bool(torch.isfinite(sizes).all()):
            raise NoRule("it multiplies two values that depend on the input, and the range of one is not known")
        terms.append(scaled(value.log_lipschitz, _met(sizes, value, call.shape)))
    return Dependent(log_sum(terms), call.shape, Region(lower, upper))


@rule(_aten.div.Tensor, _aten.div.Scalar)
def divided(call: Call) -> Dependent:
    r"""[`multiplied`] by 1/c. By a value B of range above b > 0, \(L_A/b + \|A\|_\infty L_B/b^2\)."""
    divisor = call["other"]
    if not isinstance(divisor, Dependent):
        factor = 1 / wide(divisor)
        lower, upper = _product(ends(call["self"]), (factor, factor))
        return times(call, call["self"], factor, lower, upper)
    low, high = ends(divisor)
    if not bool(((low > 0) | (high < 0)).all()):
        raise NoRule("it divides by a value that depends on the input and may be zero")
    inverse = Dependent(
        scaled(divisor.log_lipschitz, torch.minimum(low.abs(), high.abs()).pow(-2).max().item()),
        divisor.shape,
        Region(1 / high, 1 / low),
    )
    if not isinstance(call["self"], Dependent):
        lower, upper = _product(ends(call["self"]), ends(inverse))
        return times(call, inverse, call["self"], lower, upper)
    return multiplied(Call({"self": call["self"], "other": inverse}, call.shape))


@rule(_aten.sum.dim_IntList, _aten.sum.default)
def summed(call: Call) -> Dependent:
    """A sum of n entries: √n, by Cauchy-Schwarz, attained."""
    value = call.only("self")
    return call.gives(value, math.sqrt(_reduced(value, call.shape)), _reduced_region(call, value))


@rule(_aten.mean.dim, _aten.mean.default)
def averaged(call: Call) -> Dependent:
    """A mean of n entries: 1/√n."""
    value = call.only("self")
    return call.gives(value, 1 / math.sqrt(_reduced(value, call.shape)), _reduced_region(call, value))


@rule(_aten.amax.default, _aten.amin.default)
def extreme(call: Call) -> Dependent:
    """|max a - max b| ≤ max |a - b| ≤ ‖a - b‖ for each group of entries."""
    return call.gives(call.only("self"), 1.0, _reduced_region(call, call.only("self")))


@rule(_aten.maximum.default, _aten.minimum.default)
def larger(call: Call) -> Dependent:
    """An entry moves by at most the larger of the two moves: √(L₁² + L₂²), each with its copies."""
    logs, parts = [], []
    for name in ("self", "other"):
        value = call[name]
        parts.append(ends(value))
        if isinstance(value, Dependent):
            copies = math.prod(call.shape) / max(value.size, 1)
            logs.append(2 * scaled(value.log_lipschitz, math.sqrt(copies)))
    choose = torch.maximum if "maximum" in str(call.operator) else torch.minimum
    region = Region(choose(parts[0][0], parts[1][0]), choose(parts[0][1], parts[1][1]))
    return Dependent(log_sum(logs) / 2, call.shape, region)


def times(call: Call, value: Dependent, factor: Any, lower: Tensor, upper: Tensor) -> Dependent:
    """diag(c) x; rows of the layer before it where c differs by channel."""
    factor = wide(factor)
    gain = _met(factor, value, call.shape)
    if not math.isfinite(gain):
        raise NoRule("it is multiplied by a constant that is NaN or inf")
    log, weighted = scaled(value.log_lipschitz, gain), None
    if value.weighted is not None and value.shape == call.shape:
        log = min(log, channelwise(value.weighted, factor.expand(call.shape)))
        # Only what is one number a channel leaves a linear layer with other rows.
        axis = value.weighted.axis % len(call.shape)
        if all(size == 1 or i == axis for i, size in enumerate(_aligned(factor, call.shape))):
            weighted = with_rows_times(value.weighted, factor.flatten())
    origin = multiplied_terms(origin_of(value), factor, call.shape)
    if origin is not None:
        log = min(log, log_of_terms(origin, origin.terms))
    radius = None
    if value.region.radius is not None and value.shape == call.shape:
        largest = factor.abs().amax(-1, keepdim=True) if factor.dim() else factor.abs()
        radius = value.region.radius * largest
    return Dependent(log, call.shape, Region(lower, upper, radius=radius), origin, weighted)


@rule(_aten.neg.default)
def negated(call: Call) -> Dependent:
    """The product with -1."""
    value = call.only("self")
    low, high = ends(value)
    return times(call, value, -1.0, -high, -low)


def wide(constant: Any) -> Tensor:
    """A tensor or number in float64; numbers are not rounded to float32 on the way."""
    if isinstance(constant, Tensor):
        return constant.detach().to("cpu", torch.float64)
    return torch.tensor(constant, dtype=torch.float64)


def ends(value: Any) -> tuple[Tensor, Tensor]:
    """The range of a value or constant."""
    if isinstance(value, Dependent):
        low, high = value.region.lower, value.region.upper
        return (
            torch.tensor(-math.inf, dtype=torch.float64) if low is None else low,
            torch.tensor(math.inf, dtype=torch.float64) if high is None else high,
        )
    constant = wide(value)
    return constant, constant


_ZERO = torch.zeros((), dtype=torch.float64)
# Covers a float64 sum of squares of 2^20 entries.
_SUM_ALLOWANCE = 1 + 2.0**-32


def _aligned(factor: Tensor, shape: tuple[int, ...]) -> list[int]:
    return [1] * (len(shape) - factor.dim()) + list(factor.shape)


def _sum(total: Tensor | None, term: Tensor | None, weight: float) -> Tensor | None:
    if total is None or term is None:
        return None
    return total + term * weight if weight else total


def _token_radius(value: Dependent, shape: tuple[int, ...]) -> Tensor | None:
    if value.region.radius is None or not value.shape:
        return None
    # A broadcast last axis repeats the one entry.
    return value.region.radius * math.sqrt(shape[-1] / value.shape[-1])


def _met(sizes: Tensor, value: Dependent, shape: tuple[int, ...]) -> float:
    """√ of the largest sum of squares of the entries that one entry of `value` meets."""
    if not math.prod(shape):
        return 0.0
    if value.shape == shape:
        return sizes.abs().max().item()
    largest = sizes.abs().max().item()
    if not 0 < largest < math.inf:
        return largest
    squares = (sizes / largest).square().expand(shape)
    return squares.sum_to_size(value.shape).max().sqrt().item() * largest * _SUM_ALLOWANCE


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    corners = [x * y for x in a for y in b]
    # Zero times an end that is not known.
    corners = torch.stack(torch.broadcast_tensors(*corners))
    is_open = corners.isnan().any(0)
    return (
        torch.where(is_open, -math.inf, corners.amin(0)),
        torch.where(is_open, math.inf, corners.amax(0)),
    )


def _reduced(value: Dependent, shape: tuple[int, ...]) -> float:
    return max(value.size, 1) / max(math.prod(shape), 1)


def _reduced_region(call: Call, value: Dependent) -> Region:
    low, high = value.region.lower, value.region.upper
    arguments = {name: part for name, part in call.arguments.items() if name not in ("self", "dtype")}

    def run(x: Tensor | None) -> Tensor | None:
        return None if x is None else call.operator(x.expand(value.shape), **arguments)

    return Region(run(low), run(high))
