"""Reference weights with a bound of their norm, and what reads of other weights owe to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.functional.geometry import ConvGeometry
from hf_lipschitz.functional.products import frobenius_ceiling
from hf_lipschitz.functional.weights import NormAndDirection, norms_and_directions, operator_to_frobenius


# Covers the scalar operations between a bound and the weight it rescales, each good to one unit of its dtype.
SCALAR_ALLOWANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


# Norms and constants with squares, and quotients, well inside float32. Others are handled in float64, within its own.
FLOAT32_RANGE = (2.0**-30, 2.0**30)
FLOAT64_RANGE = (2.0**-400, 2.0**400)


class Reference(NamedTuple):
    """A weight, a bound of its norm once it is stored in its own dtype, and the direction in which the norm grows."""

    weight: Tensor
    bound: Tensor
    left: Tensor
    right: Tensor
    # Whether reads of other weights go by float64.
    is_wide: bool


def new_references(
    names: Sequence[str],
    weights: Sequence[Tensor],
    geometry: ConvGeometry | None,
    rtol: float,
    starts: Sequence[Tensor | None],
) -> list[Reference]:
    """A reference for each of several weights of one shape; the weights are copied.

    Raises:
        ValueError: a weight is NaN or inf; the message names the layer.
    """
    try:
        found = norms_and_directions(weights, geometry, rtol, starts)
    except ValueError:
        for name, weight in zip(names, weights, strict=True):
            check_named_weight(name, weight)
        raise
    made = []
    for name, weight, row in zip(names, weights, found, strict=True):
        if row.bound != 0 and is_outside(row.bound, FLOAT64_RANGE):
            raise ValueError(f"layer {name}: its norm is about {row.bound.item():.1e}; rescale the weight first")
        made.append(_rounded(weight, row, geometry))
    return made


def is_outside(value: float | Tensor, limits: tuple[float, float]) -> bool:
    """Whether a number is not within two others; NaN is not."""
    return not limits[0] <= value <= limits[1]


def _rounded(weight: Tensor, found: NormAndDirection, geometry: ConvGeometry | None) -> Reference:
    bound, left, right = found
    is_wide = is_outside(bound, FLOAT32_RANGE)
    unit = torch.finfo(weight.dtype).eps / 2
    if weight.dtype != left.dtype:
        # Rounded twice: to the dtype of the computation, and to its own.
        unit += torch.finfo(left.dtype).eps
    rounding = unit * frobenius_ceiling(weight, torch.float64 if is_wide else left.dtype)
    factor = operator_to_frobenius(weight.shape, geometry)
    bound = (bound + factor * rounding) * (1 + SCALAR_ALLOWANCE[left.dtype])
    return Reference(weight.clone(), bound, left, right, is_wide)


def moved(reference: Reference, fn: Callable[[Tensor], Tensor], operator_factor: float) -> Reference | None:
    """The reference after `fn` moved or cast its weight: sound by Weyl's inequality whatever `fn` does."""
    weight = fn(reference.weight)
    if weight.is_meta:
        return None
    bound, left, right = (x.to(weight.device) for x in reference[1:4])
    wide = weight.to(reference.weight.device, torch.float64)
    change = torch.linalg.vector_norm(wide - reference.weight)
    if not torch.isfinite(change):
        return None
    if change != 0 or weight.dtype != reference.weight.dtype:
        rounding = torch.finfo(weight.dtype).eps / 2 * torch.linalg.vector_norm(wide)
        bound = bound + operator_factor * (change + rounding).to(bound.device)
    return Reference(weight, bound, left, right, reference.is_wide)


def constrain(
    weight: Tensor,
    reference: Reference,
    constant: Tensor,
    *,
    exact: bool,
    operator_factor: float = 1.0,
    is_wide: bool = False,
) -> Tensor:
    """The value of [`GramParametrization`], in tensor operations only: it compiles, and runs under any transform.

    `operator_factor` is that of [`operator_to_frobenius`]; `is_wide` is for constants that need float64. NaN in the
    weight or in a bound gives NaN, never a weight that is not constrained.
    """
    with torch.autocast(weight.device.type, enabled=False):
        value = weight.to(torch.float64 if is_wide or reference.is_wide else reference.left.dtype)
        with torch.no_grad():
            distance = frobenius_ceiling(value - reference.weight, value.dtype)
            if weight.dtype != reference.weight.dtype:
                distance = distance + torch.finfo(weight.dtype).eps / 2 * frobenius_ceiling(value, value.dtype)
            eps = max(torch.finfo(weight.dtype).eps, torch.finfo(value.dtype).eps)
            bound = reference.bound + operator_factor * distance * (1 + 2 * eps)
        left, right = reference.left.to(value.dtype), reference.right.to(value.dtype)
        # Zero, with the gradient of the norm; small, so that the products of no finite weight overflow.
        along = left @ (value.reshape(left.numel(), right.numel()) @ (right * 2.0**-20))
        bound = bound + (along - along.detach()).double() * 2.0**20
        # Entries below the normal numbers are rounded by up to this much, whatever their size.
        lost = operator_factor * _subnormal_unit(weight.dtype) * weight.numel() ** 0.5
        # The clone keeps autograd from saving the buffer itself, which data parallelism overwrites between forwards.
        scale = (constant.clone() - lost).clamp_min(0) / torch.where(bound == 0, torch.ones_like(bound), bound)
        if not exact:
            scale = torch.where(bound <= constant, torch.ones_like(scale), scale.clamp(max=1.0))
        return (value * scale).to(weight.dtype)


def _subnormal_unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
