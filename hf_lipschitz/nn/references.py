"""Reference weights with a bound of their norm, and what reads of other weights owe to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.functional.precision import subnormal_unit
from hf_lipschitz.functional.weights import NormAndDirection, norms_and_directions, operator_to_frobenius


# Covers the scalar operations between a bound and the weight it rescales, each good to one unit of its dtype.
SCALAR_ALLOWANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


# Norms and constants with squares, and quotients, well inside float32. Others are handled in float64, within its own.
FLOAT32_RANGE = (2.0**-30, 2.0**30)
FLOAT64_RANGE = (2.0**-400, 2.0**400)


class Reference(NamedTuple):
    """A weight, a bound of its norm once it is stored in its own dtype, and the direction in which the norm grows.

    Of a tensor that holds several matrices the bounds have shape (count,) and the directions (count, size).
    """

    weight: Tensor
    bound: Tensor
    left: Tensor
    right: Tensor
    # Whether reads of other weights go by float64.
    is_wide: bool


def new_references(
    names: Sequence[str],
    weights: Sequence[Tensor],
    layout: WeightLayout,
    rtol: float,
    starts: Sequence[Tensor | None],
) -> list[Reference]:
    """A reference for each of several weights of one shape and layout; the weights are copied.

    Raises:
        ValueError: a weight is NaN or inf; the message names the layer.
    """
    count = 1 if layout.count is None else layout.count
    # Products choose their kernels by the alignment of memory, and a mapped file has less of it than a copy.
    weights = [weight.clone() for weight in weights]
    pieces = [piece for weight in weights for piece in _pieces(layout.matrices(weight), layout)]
    pieces_of_starts = [piece for start in starts for piece in ([None] * count if start is None else _rows(start))]
    try:
        found = norms_and_directions(pieces, layout.geometry, rtol, pieces_of_starts)
    except ValueError:
        for name, weight in zip(names, weights, strict=True):
            check_named_weight(name, weight)
        raise
    made = []
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        rows = found[index * count : (index + 1) * count]
        for row in rows:
            if row.bound != 0 and is_outside(row.bound, FLOAT64_RANGE):
                raise ValueError(f"layer {name}: its norm is about {row.bound.item():.1e}; rescale the weight first")
        made.append(_rounded(weight, rows, layout))
    return made


def _pieces(matrices: Tensor, layout: WeightLayout) -> Sequence[Tensor]:
    return [matrices] if layout.count is None else matrices.unbind()


def _rows(start: Tensor) -> Sequence[Tensor]:
    return start.unbind() if start.dim() == 2 else [start]


def is_outside(value: float | Tensor, limits: tuple[float, float]) -> bool:
    """Whether a number, or any of several, is not within two others; NaN is not."""
    if isinstance(value, Tensor):
        return not bool(((limits[0] <= value) & (value <= limits[1])).all())
    return not limits[0] <= value <= limits[1]


def _rounded(weight: Tensor, rows: Sequence[NormAndDirection], layout: WeightLayout) -> Reference:
    if layout.count is None:
        bound, left, right = rows[0]
    else:
        bound, left, right = (torch.stack(column) for column in zip(*rows, strict=True))
    is_wide = is_outside(bound, FLOAT32_RANGE)
    unit = torch.finfo(weight.dtype).eps / 2
    if weight.dtype != left.dtype:
        # Rounded twice: to the dtype of the computation, and to its own.
        unit += torch.finfo(left.dtype).eps
    rounding = unit * layout.frobenius_ceilings(weight, torch.float64 if is_wide else left.dtype)
    factor = operator_to_frobenius(weight.shape, layout.geometry)
    bound = (bound + factor * rounding) * (1 + SCALAR_ALLOWANCE[left.dtype])
    return Reference(weight, bound, left, right, is_wide)


def moved(reference: Reference, fn: Callable[[Tensor], Tensor], layout: WeightLayout) -> Reference | None:
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
        operator_factor = operator_to_frobenius(weight.shape, layout.geometry)
        bound = bound + operator_factor * (change + rounding).to(bound.device)
    return Reference(weight, bound, left, right, reference.is_wide)


def constrain(
    weight: Tensor,
    reference: Reference,
    constant: Tensor,
    layout: WeightLayout,
    *,
    exact: bool,
    is_wide: bool = False,
) -> Tensor:
    """The value of [`GramParametrization`], in tensor operations only: it compiles, and runs under any transform.

    `is_wide` is for constants that need float64. NaN in the weight or in a bound gives NaN, never a weight that is not
    constrained.
    """
    operator_factor = operator_to_frobenius(weight.shape, layout.geometry)
    with torch.autocast(weight.device.type, enabled=False):
        value = weight.to(torch.float64 if is_wide or reference.is_wide else reference.left.dtype)
        with torch.no_grad():
            distance = layout.frobenius_ceilings(value - reference.weight, value.dtype)
            if weight.dtype != reference.weight.dtype:
                distance = distance + torch.finfo(weight.dtype).eps / 2 * layout.frobenius_ceilings(value, value.dtype)
            eps = max(torch.finfo(weight.dtype).eps, torch.finfo(value.dtype).eps)
            bound = reference.bound + operator_factor * distance * (1 + 2 * eps)
        left, right = reference.left.to(value.dtype), reference.right.to(value.dtype)
        # Zero, with the gradient of the norm; small, so that the products of no finite weight overflow.
        matrices, small = value.reshape(*left.shape, right.shape[-1]), right * 2.0**-20
        if layout.count is None:
            along = left @ (matrices @ small)
        else:
            along = (left.unsqueeze(-2) @ (matrices @ small.unsqueeze(-1))).reshape(-1)
        bound = bound + (along - along.detach()).double() * 2.0**20
        # Entries below the normal numbers are rounded by up to this much, whatever their size.
        lost = operator_factor * subnormal_unit(weight.dtype) * weight.numel() ** 0.5
        # The clone keeps autograd from saving the buffer itself, which data parallelism overwrites between forwards.
        scale = (constant.clone() - lost).clamp_min(0) / torch.where(bound == 0, torch.ones_like(bound), bound)
        if not exact:
            scale = torch.where(bound <= constant, torch.ones_like(scale), scale.clamp(max=1.0))
        # Of one dtype: a scale with axes would take the whole product to float64.
        return (matrices * scale.to(value.dtype)[..., None, None]).reshape(weight.shape).to(weight.dtype)
