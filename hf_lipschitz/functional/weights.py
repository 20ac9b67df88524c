"""The operator norm of a stored weight, dense or convolutional, and its leading direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.conv import conv_bound_and_direction, geometry_bound
from hf_lipschitz.functional.geometry import ConvGeometry, kernel_to_operator
from hf_lipschitz.functional.spectral_norm import norm_bracket, spectral_norm_bound


# Entries of the matrices that are bounded in one call.
STACKED = 2**24


class NormAndDirection(NamedTuple):
    """A bound of the operator norm, and u, v such that u vᵀ, in the shape of the weight, estimates its gradient.

    For a matrix (u, v) is the leading singular pair; for a kernel u = (1) and v is the whole gradient, flattened.
    """

    bound: Tensor
    left: Tensor
    right: Tensor


def weight_norm_bound(
    weight: Tensor, geometry: ConvGeometry | None, rtol: float = 1e-3, *, certified: bool = False
) -> Tensor:
    """Sound bound of the spectral norm of the operator that a layer makes of its weight.

    Args:
        weight (`Tensor`):
            A matrix, stored either way round, or a convolution kernel.
        geometry (`ConvGeometry`, *optional*):
            `None` for a matrix.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Asked relative width of the Gram bracket.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64 with the rounding bounded by analysis.

    Returns:
        `Tensor`: 0-dim float64.
    """
    check_weight(weight)
    if geometry is None:
        return spectral_norm_bound(weight, rtol, certified=certified)[1]
    return geometry_bound(weight, geometry, rtol, certified=certified)


def norms_and_directions(
    weights: Sequence[Tensor],
    geometry: ConvGeometry | None,
    rtol: float = 1e-3,
    starts: Sequence[Tensor | None] | None = None,
) -> list[NormAndDirection]:
    """Bounds of the norms of weights of one shape, dtype and device, with the directions in which they grow.

    Matrices are stacked and bounded in one batched call.

    Args:
        weights (`Sequence[Tensor]`):
            Finite matrices, or kernels of one geometry.
        geometry (`ConvGeometry`, *optional*):
            `None` for matrices.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Asked relative width of the brackets.
        starts (`Sequence[Tensor | None]`, *optional*):
            For each matrix an earlier singular vector of its shorter axis, which saves time where it is still near.

    Returns:
        `list[NormAndDirection]`: one a weight; the bounds are **sound** as in [`spectral_norm_bound`].
    """
    if geometry is not None:
        return [_of_kernel(weight, geometry, rtol) for weight in weights]
    found = []
    at_once = max(1, STACKED // weights[0].numel())
    for first in range(0, len(weights), at_once):
        chunk = weights[first : first + at_once]
        start = None if starts is None else starts[first : first + at_once]
        if start is not None:
            start = None if any(x is None for x in start) else torch.stack(list(start))
        bracket = norm_bracket(torch.stack(list(chunk)), rtol, start=start)
        found += [NormAndDirection(*row) for row in zip(*(x.unbind() for x in bracket[1:]), strict=True)]
    return found


def _of_kernel(kernel: Tensor, geometry: ConvGeometry, rtol: float) -> NormAndDirection:
    check_weight(kernel, "kernel")
    bound, direction = conv_bound_and_direction(kernel, geometry, rtol)
    return NormAndDirection(bound, torch.ones_like(direction.flatten()[:1]), direction.flatten())


def operator_to_frobenius(shape: torch.Size, geometry: ConvGeometry | None) -> float:
    """Least f with ‖operator of E‖₂ <= f ‖E‖_F for every change E of a weight of this shape; a sound bound.

    1 for a matrix. The transfer matrix of a kernel is a sum over its taps, so that f is the square root of their
    number (Cauchy-Schwarz), once the stride has folded taps into channels, times the norm of the padding.
    """
    return 1.0 if geometry is None else kernel_to_operator(shape, geometry)
