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


# Between these bounds of the norm, a distance that float32 squares would lose or overflow on does not matter.
FLOAT32_SQUARES = (2.0**-30, 2.0**30)


class Reference(NamedTuple):
    """A weight, a bound of its norm once it is stored in its own dtype, and the direction in which the norm grows."""

    weight: Tensor
    bound: Tensor
    left: Tensor
    right: Tensor
    # In which the distance of other weights is summed.
    sum_dtype: torch.dtype


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
    return [_rounded(weight, row, geometry) for weight, row in zip(weights, found, strict=True)]


def _rounded(weight: Tensor, found: NormAndDirection, geometry: ConvGeometry | None) -> Reference:
    bound, left, right = found
    least, most = FLOAT32_SQUARES
    sum_dtype = left.dtype if least <= bound <= most else torch.float64
    rounding = torch.finfo(weight.dtype).eps / 2 * frobenius_ceiling(weight, sum_dtype)
    factor = operator_to_frobenius(weight.shape, geometry)
    bound = (bound + factor * rounding) * (1 + SCALAR_ALLOWANCE[left.dtype])
    return Reference(weight.clone(), bound, left, right, sum_dtype)


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
    return Reference(weight, bound, left, right, reference.sum_dtype)


def constrain(
    weight: Tensor, reference: Reference, constant: Tensor, *, exact: bool, operator_factor: float = 1.0
) -> Tensor:
    """The value of [`GramParametrization`], in tensor operations only: it compiles, and runs under any transform.

    `operator_factor` is that of [`operator_to_frobenius`]. NaN in the weight or in a bound gives NaN, never a weight
    that is not constrained.
    """
    with torch.autocast(weight.device.type, enabled=False):
        value = weight.to(reference.left.dtype)
        with torch.no_grad():
            distance = frobenius_ceiling(value - reference.weight, reference.sum_dtype)
            if weight.dtype != reference.weight.dtype:
                distance = distance + torch.finfo(weight.dtype).eps / 2 * frobenius_ceiling(value, reference.sum_dtype)
            bound = reference.bound + operator_factor * distance * (1 + 2 * torch.finfo(weight.dtype).eps)
        left, right = reference.left, reference.right
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
