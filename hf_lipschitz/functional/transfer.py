"""The largest norm of the transfer matrices of a stride-1 kernel on a grid of frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.functional.gram import GramBracket, largest_gram_bracket
from hf_lipschitz.functional.products import UNIT_ROUNDOFF


def largest_transfer_norm(
    folded: Tensor, grid: Sequence[int], rtol: float = 1e-3
) -> tuple[GramBracket, tuple[Tensor, ...]]:
    r"""Bracket of \(\max_\omega \|\hat K(\omega)\|_2\) over the frequencies \(2\pi j_i/n_i\), and where it is.

    Args:
        folded (`Tensor` of shape `(groups, c_out, c_in, k_1, ...)`):
            A stride-1, dilation-1 kernel, of real float32 or float64. Taps beyond the grid are wrapped around it.
        grid (`Sequence[int]`):
            Frequencies an axis, n_i.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Asked width of the bracket.

    Returns:
        `tuple[GramBracket, tuple[Tensor, ...]]`: the bracket of the largest norm over groups and frequencies, a sound
        one as in [`spectral_norm_bound`], and the index (group, j_1, ...) of its matrix; as K is real, the last
        frequency is at most half the grid.
    """
    wrapped = wrap_taps(folded, grid)
    matrices = transfer_matrices(wrapped, grid)
    bracket, index = largest_gram_bracket(matrices.flatten(0, -3), rtol)
    where = torch.unravel_index(index, matrices.shape[:-2])
    return bracket._replace(upper=bracket.upper + _transform_loss(wrapped, grid)), where


def wrap_taps(folded: Tensor, grid: Sequence[int]) -> Tensor:
    """The kernel with taps k and k + n added up on each axis of n frequencies: the same matrices on the grid."""
    for axis, points in enumerate(grid, start=3):
        taps = folded.shape[axis]
        if taps > points:
            shape = list(folded.shape)
            shape[axis] = -taps % points
            padded = torch.cat([folded, folded.new_zeros(shape)], dim=axis)
            folded = padded.unflatten(axis, (-1, points)).sum(axis)
    return folded


def transfer_matrices(folded: Tensor, grid: Sequence[int]) -> Tensor:
    """K̂ on the half grid, (groups, n_1, ..., c_out, c_in); the other half are the complex conjugates."""
    axes = tuple(range(3, folded.dim()))
    if all(n == 1 for n in grid):
        return folded.permute(0, *axes, 1, 2)
    transformed = torch.fft.rfftn(folded, s=list(grid), dim=axes)
    return transformed.permute(0, *axes, 1, 2)


def _transform_loss(folded: Tensor, grid: Sequence[int]) -> Tensor:
    """What rounding in the Fourier transform can take from a norm: 8u log₂(n)·√n ‖K‖_F, zero in float32."""
    points = math.prod(grid)
    if folded.dtype != torch.float64 or points == 1:
        return folded.new_zeros((), dtype=torch.float64)
    return 8 * UNIT_ROUNDOFF * math.log2(points) * math.sqrt(points) * torch.linalg.vector_norm(folded)
