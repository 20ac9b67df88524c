"""The operator norm of a stored weight, dense or convolutional, and its leading direction."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.conv import conv_bound_and_direction, geometry_bound
from hf_lipschitz.functional.geometry import ConvGeometry, kernel_to_operator
from hf_lipschitz.functional.spectral_norm import norm_bracket, spectral_norm_bound


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


def weight_norm_and_direction(
    weight: Tensor, geometry: ConvGeometry | None, rtol: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, and vectors u, v such that u vᵀ, in the shape of the weight, estimates its gradient.

    For a matrix (u, v) is the leading singular pair; for a kernel u = (1) and v is the whole gradient, flattened.
    """
    check_weight(weight)
    if geometry is None:
        bracket = norm_bracket(weight, rtol)
        return bracket.upper, bracket.left, bracket.right
    bound, direction = conv_bound_and_direction(weight, geometry, rtol)
    return bound, torch.ones_like(direction.flatten()[:1]), direction.flatten()


def operator_to_frobenius(shape: torch.Size, geometry: ConvGeometry | None) -> float:
    """Least f with ‖operator of E‖₂ <= f ‖E‖_F for every change E of a weight of this shape; a sound bound.

    1 for a matrix. The transfer matrix of a kernel is a sum over its taps, so that f is the square root of their
    number (Cauchy-Schwarz), once the stride has folded taps into channels, times the norm of the padding.
    """
    return 1.0 if geometry is None else kernel_to_operator(shape, geometry)
