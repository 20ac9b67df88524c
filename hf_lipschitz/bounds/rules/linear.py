"""Linear layers and products of matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_lipschitz.bounds.logs import log_sum, scaled
from hf_lipschitz.bounds.regions import Region, length
from hf_lipschitz.bounds.registry import Call, NoRule, rule
from hf_lipschitz.bounds.values import Dependent, Weighted
from hf_lipschitz.functional.geometry import conv_geometry


_aten = torch.ops.aten
# Covers the rounding of a float64 sum of squares of 2^20 entries.
_SUM_ALLOWANCE = 1 + 2.0**-32


@rule(_aten.linear.default)
def linear(call: Call) -> Dependent:
    """σ₁(W), from the certified bracket."""
    value, weight = call.only("input"), call["weight"]
    return dense(call, value, weight, call["bias"], call.norms.of(weight))


@rule(_aten.addmm.default)
def matrix_product_and_bias(call: Call) -> Dependent:
    """|α| σ₁ of the constant factor on the right, as in transformers' Conv1D."""
    value = call.only("mat1")
    norm = call.norms.of(call["mat2"])
    if call["alpha"] == 1 and call["beta"] == 1:
        return dense(call, value, call["mat2"].mT, call["self"], norm)
    return call.gives(value, abs(call["alpha"]) * norm)


@rule(_aten.mm.default, _aten.matmul.default, _aten.bmm.default)
def matrix_product(call: Call) -> Dependent:
    r"""σ₁ of the one factor that is constant, the largest of a stack.

    Two values on ranges: \(\|A\|_2 L_B + \|B\|_2 L_A\), with \(\|A\|_2\) at most the Frobenius norm, and at most
    \(\sqrt{\|A\|_1\|A\|_\infty}\), of what is known of |A|.
    """
    left, right = list(call.arguments.values())[:2]
    if isinstance(left, Dependent) and isinstance(right, Dependent):
        terms = []
        for value, other in ((left, right), (right, left)):
            if min(len(value.shape), len(other.shape)) < 2:
                raise NoRule("it multiplies vectors that depend on the input")
            copies = math.prod(call.shape[:-2]) / max(math.prod(value.shape[:-2]), 1)
            terms.append(scaled(value.log_lipschitz, math.sqrt(copies) * _largest_norm(other)))
        return Dependent(log_sum(terms), call.shape)
    value, factor = (left, right) if isinstance(left, Dependent) else (right, left)
    if factor.dim() < 2 or len(value.shape) < 2:
        # The Frobenius norm; of a vector and a matrix it is their norm or above it.
        return call.gives(value, length(factor.detach().double(), None).item() * _SUM_ALLOWANCE)
    if factor.dim() == 2:
        if value is left:
            return dense(call, value, factor.mT, None, call.norms.of(factor))
        return call.gives(value, call.norms.of(factor))
    norms = [call.norms.of(matrix) for matrix in factor.reshape(-1, *factor.shape[-2:])]
    copies = math.prod(call.shape[:-2]) / max(math.prod(value.shape[:-2]), 1)
    return call.gives(value, math.sqrt(copies) * max(norms, default=0.0))


def dense(call: Call, value: Dependent, weight: Tensor, bias: Tensor | None, norm: float) -> Dependent:
    """W x + b along the last axis; for x = g z + b' also the norm of W diag(g) times the constant of z."""
    region = _dense_region(value, weight, bias, norm) if value.region.is_known else Region()
    log, weighted = scaled(value.log_lipschitz, norm), Weighted(value.log_lipschitz, weight, None, -1)
    if value.gained is not None:
        product = weight.detach().to("cpu", torch.float64) * value.gained.gain
        other = scaled(value.gained.log_lipschitz, call.norms.of_product(weight, value.gained.gain, product))
        if other < log:
            log, weighted = other, Weighted(value.gained.log_lipschitz, product, None, -1)
    return Dependent(log, call.shape, region, weighted=weighted)


def _dense_region(value: Dependent, weight: Tensor, bias: Tensor | None, norm: float) -> Region:
    region, wide = value.region, weight.detach().to("cpu", torch.float64)
    shift = torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().to("cpu", torch.float64)
    rows = length(wide, 1, keepdim=False)
    parts: dict[str, Any] = {"lower": None, "upper": None}
    candidates = []
    if region.norm is not None:
        parts["norm"] = norm * region.norm + length(shift, None)
        half = rows * region.norm
        candidates.append((shift - half, shift + half))
    if region.radius is not None and region.center is not None:
        parts["radius"] = norm * region.radius
        half = rows * region.radius
        offsets = region.offsets()
        if offsets is not None and bool(torch.isfinite(offsets).all()):
            half = torch.minimum(half, functional.linear(offsets.expand(value.shape), wide.abs()))
        middle = functional.linear(region.center, wide) + shift
        candidates.append((middle - half, middle + half))
    for lower, upper in candidates:
        parts["lower"] = lower if parts["lower"] is None else torch.maximum(parts["lower"], lower)
        parts["upper"] = upper if parts["upper"] is None else torch.minimum(parts["upper"], upper)
    return Region(**parts)


@rule(
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
)
def convolution(call: Call) -> Dependent:
    """Norm of the operator for any size of its input, from the certified bracket over frequencies."""
    value, kernel = call.only("input"), call["weight"]
    is_transposed = "output_padding" in call.arguments
    options = {name: _one_or_all(call[name]) for name in ("stride", "padding", "dilation")}
    if is_transposed:
        options["output_padding"] = _one_or_all(call["output_padding"])
    geometry = conv_geometry(kernel.shape, groups=call["groups"], transposed=is_transposed, **options)
    weighted = None
    if not is_transposed:
        weighted = Weighted(value.log_lipschitz, kernel, geometry, len(call.shape) - kernel.dim() + 1)
    return call.gives(value, call.norms.of(kernel, geometry), _convolved(call, value), weighted=weighted)


def _convolved(call: Call, value: Dependent) -> Region:
    """Interval arithmetic: the kernel on the middle, its absolute values on the half width."""
    low, high = value.region.lower, value.region.upper
    if low is None or high is None:
        return Region()
    middle, half = ((high + low) / 2).expand(value.shape), ((high - low) / 2).expand(value.shape)
    if not bool(torch.isfinite(half).all()):
        return Region()
    rest = {name: part for name, part in call.arguments.items() if name not in ("input", "weight", "bias")}
    kernel = call["weight"].detach().to("cpu", torch.float64)
    bias = call["bias"]
    center = call.operator(middle, kernel, None if bias is None else bias.detach().to("cpu", torch.float64), **rest)
    width = call.operator(half, kernel.abs(), None, **rest)
    return Region(center - width, center + width)


def _one_or_all(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _largest_norm(value: Dependent) -> float:
    """Bound of the spectral norm of each matrix of a stack."""
    found = []
    if value.region.norm is not None:
        found.append(length(value.region.norm.expand(*value.shape[:-1], 1), -2).max().item() * _SUM_ALLOWANCE)
    sizes = value.region.magnitude()
    if sizes is not None:
        sizes = sizes.expand(value.shape)
        largest = sizes.sum(-1).amax(-1).sqrt() * sizes.sum(-2).amax(-1).sqrt()
        found.append(largest.max().item() * _SUM_ALLOWANCE)
    least = min((x for x in found if not math.isnan(x)), default=math.inf)
    if not math.isfinite(least):
        raise NoRule("it multiplies two values that depend on the input, and the range of one is not known")
    return least
