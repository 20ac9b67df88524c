"""The largest norm of the transfer matrices of a stride-1 kernel on a grid of frequencies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.eigenvalue import EigenvalueBracket, largest_eigenvalue_bracket
from hf_lipschitz.functional.gram import GramBracket, largest_gram_bracket
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import (
    FLOAT32_BLOCK,
    FLOAT32_LAGS,
    UNIT_ROUNDOFF,
    allowance_of,
    gamma,
    is_double,
    product,
    unit,
)
from hf_lipschitz.functional.scaling import exponent_of, scale_by_power_of_two
from hf_lipschitz.functional.spectral_norm import norm_bracket


# Entries of the Gram matrices that are held at once, 16 bytes each: memory that stays in the caches and is reused.
CHUNK = 2**19


class _Lags(NamedTuple):
    """R_d of the lags d in one half of the autocorrelation, and what rounding took from their sum at any frequency."""

    zero: Tensor
    even: Tensor
    odd: Tensor
    lags: list[tuple[int, ...]]
    loss: Tensor


@torch.no_grad()
def largest_transfer_norm(
    folded: Tensor, grid: Sequence[int], rtol: float = 1e-3
) -> tuple[GramBracket, tuple[Tensor, ...]]:
    r"""Bracket of \(\max_\omega \|\hat K(\omega)\|_2\) over the frequencies \(2\pi j_i/n_i\), and where it is.

    \(\hat K(\omega)^H\hat K(\omega) = \sum_d R_d e^{i\omega d}\) with the autocorrelation
    \(R_d = \sum_t K_{t+d}^TK_t\): the products are made once a lag, not once a frequency. One Cholesky factorisation a
    frequency then shows that no eigenvalue exceeds c, just above the largest Rayleigh quotient
    ([`largest_eigenvalue_bracket`]).

    In float64 the rounding is bounded by analysis: every R_d sums products of length m = c·k_1·…, and the sum over the
    D lags has phases good to 17 units, so that \(\|\Delta G\| \le (\gamma_m + \gamma_{2D+64}) (\sum_t \|K_t\|_F)^2\).

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
    kernel, loss = wrap_taps(folded, grid)
    if all(n == 1 for n in grid):
        bracket, where = _one_frequency(kernel, rtol)
    elif folded.device.type == "cpu":
        bracket, where = _by_cholesky(kernel, grid, rtol)
    else:
        bracket, where = _by_gram_iteration(kernel, grid, rtol)
    return bracket._replace(lower=(bracket.lower - loss).clamp_min(0), upper=bracket.upper + loss), where


def _by_cholesky(kernel: Tensor, grid: Sequence[int], rtol: float) -> tuple[GramBracket, tuple[Tensor, ...]]:
    unscaled = kernel
    exponent = exponent_of(kernel.abs().amax())
    kernel = scale_by_power_of_two(kernel, -exponent)
    is_wide = kernel.shape[2] > kernel.shape[1]
    with full_precision(kernel.device.type):
        found, where = _largest_gram_matrix(kernel.transpose(1, 2) if is_wide else kernel, grid, rtol)
        matrix = _transfer_matrix(kernel, grid, where)
        # The Gram matrix of the transposed kernel is the conjugate of K̂K̂ᴴ.
        vector = found.vector.to(matrix.dtype).unsqueeze(-1)
        right = unit(matrix.mH @ vector.conj()) if is_wide else vector
        left = unit(matrix @ right)
    if not bool(torch.isfinite(found.upper)):
        return _by_gram_iteration(unscaled, grid, rtol)
    allowance = allowance_of(kernel)
    lower = scale_by_power_of_two(found.lower.sqrt() * (1 - allowance), exponent)
    upper = scale_by_power_of_two(found.upper.sqrt() * (1 + allowance), exponent)
    return GramBracket(lower, upper, left.squeeze(-1), right.squeeze(-1)), where


def transfer_gradient(folded: Tensor, grid: Sequence[int], where: tuple[Tensor, ...], pair: GramBracket) -> Tensor:
    r"""Gradient of \(\mathrm{Re}(u^H \hat K(\omega) v)\) with respect to the folded kernel, in its shape."""
    taps = torch.cartesian_prod(*(torch.arange(k) for k in folded.shape[3:])).reshape(-1, folded.dim() - 3)
    angles = _angles(torch.stack(where[1:])[None].cpu(), taps, grid)[0].to(folded.device)
    outer = torch.outer(pair.left.conj(), pair.right).to(torch.complex128)
    values = torch.outer(outer.real.flatten(), angles.cos()) + torch.outer(outer.imag.flatten(), angles.sin())
    gradient = torch.zeros_like(folded)
    gradient[where[0]] = values.reshape(folded.shape[1:]).to(folded.dtype)
    return gradient


def wrap_taps(folded: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The kernel with taps k and k + n added up on each axis of n frequencies, and what rounding took from a norm.

    The matrices on the grid are the same; the sums are in float64, for taps may cancel.
    """
    if all(k <= n for k, n in zip(folded.shape[3:], grid, strict=True)):
        return folded, folded.new_zeros((), dtype=torch.float64)
    wrapped = _wrapped(folded.double(), grid)
    sizes = _wrapped(folded.double().abs(), grid).movedim((1, 2), (-2, -1))
    size = torch.linalg.vector_norm(sizes, dim=(-2, -1)).flatten(1).sum(1).amax()
    return wrapped, math.prod(folded.shape[3:]) * UNIT_ROUNDOFF * (1 + 1e-6) * size


def _wrapped(folded: Tensor, grid: Sequence[int]) -> Tensor:
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


def _one_frequency(kernel: Tensor, rtol: float) -> tuple[GramBracket, tuple[Tensor, ...]]:
    """A dense matrix a group."""
    brackets = norm_bracket(kernel.reshape(kernel.shape[:3]), rtol)
    group = brackets.upper.argmax()
    where = (group, *[torch.zeros_like(group)] * (kernel.dim() - 3))
    return GramBracket(brackets.lower.amax(), *(end[group] for end in brackets[1:])), where


def _largest_gram_matrix(
    kernel: Tensor, grid: Sequence[int], rtol: float
) -> tuple[EigenvalueBracket, tuple[Tensor, ...]]:
    """The bracket of λ₁(K̂ᴴK̂) over groups and frequencies, chunk by chunk, and where it is."""
    lags = _autocorrelation(kernel)
    groups, n = kernel.shape[0], kernel.shape[2]
    at_once = max(1, CHUNK // (groups * n * n))
    # The first chunk is spread over the grid, so that its largest norm is near the largest of all.
    frequencies = _interleaved(half_grid(grid), at_once)
    double = is_double(kernel)
    best: EigenvalueBracket | None = None
    where: tuple[int, int] = (0, 0)
    for first in range(0, len(frequencies), at_once):
        g = _gram_matrices(lags, frequencies[first : first + at_once], grid)
        loss = lags.loss.repeat(len(g) // groups)
        floor = None if best is None else best.lower
        found, index = largest_eigenvalue_bracket(g, loss, rtol, verify=double, floor=floor)
        if index >= 0 and (best is None or found.lower > best.lower):
            where = divmod(int(index), groups)
            where = (where[0] + first, where[1])
            upper = found.upper if best is None else torch.maximum(found.upper, best.upper)
            best = found._replace(upper=upper)
        elif best is None:
            best = found
        else:
            best = best._replace(upper=torch.maximum(found.upper, best.upper))
    frequency = torch.tensor([where[1], *frequencies[where[0]].tolist()])
    return best, tuple(frequency)


def _interleaved(rows: Tensor, at_once: int) -> Tensor:
    chunks = -(-len(rows) // at_once)
    return torch.cat([rows[i::chunks] for i in range(chunks)])


def half_grid(grid: Sequence[int]) -> Tensor:
    """Indices (j_1, ...) of all frequencies with the last one at most half, of shape (points, axes)."""
    ranges = [torch.arange(n) for n in grid[:-1]] + [torch.arange(grid[-1] // 2 + 1)]
    return torch.cartesian_prod(*ranges).reshape(-1, len(grid))


def _autocorrelation(kernel: Tensor) -> _Lags:
    """R_d = Σ_t K_{t+d}ᵀK_t of the lags d >= 0 in lexicographic order, of shape (lags, groups, n, n)."""
    groups, m, n = kernel.shape[:3]
    taps = kernel.shape[3:]
    by_tap = kernel.movedim((1, 2), (-2, -1))
    # The sums of a factorisation are as long as a row, those over lags as long as there are lags.
    is_short = n <= FLOAT32_BLOCK and math.prod(2 * k - 1 for k in taps) <= FLOAT32_LAGS
    dtype = kernel.dtype if is_short else torch.float64
    zero, others, lags = None, [], []
    for lag in _half_lags(taps):
        ahead = by_tap[(slice(None), *(slice(max(d, 0), k + min(d, 0)) for d, k in zip(lag, taps, strict=True)))]
        behind = by_tap[(slice(None), *(slice(max(-d, 0), k - max(d, 0)) for d, k in zip(lag, taps, strict=True)))]
        r = product(ahead.reshape(groups, -1, n).mT, behind.reshape(groups, -1, n), keep_wide=True).to(dtype)
        if any(lag):
            others.append(r)
            lags.append(lag)
        else:
            zero = r
    stacked = torch.stack(others) if others else zero.new_zeros(0, groups, n, n)
    loss = kernel.new_zeros(groups, dtype=torch.float64)
    if is_double(kernel):
        size = torch.linalg.vector_norm(by_tap, dim=(-2, -1)).flatten(1).sum(1) ** 2
        length = m * math.prod(taps)
        loss = (gamma(length, False) + gamma(2 * len(lags) + 64, False)) * size * (1 + 1e-6)
        loss = loss + length * n * torch.finfo(torch.float64).tiny * (size > 0)
    return _Lags(zero, stacked + stacked.mT, stacked - stacked.mT, lags, loss)


def _half_lags(taps: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Lags d >= 0 in lexicographic order: of d and -d one."""
    origin = (0,) * len(taps)
    return (d for d in itertools.product(*(range(1 - k, k) for k in taps)) if d >= origin)


def _gram_matrices(lags: _Lags, frequencies: Tensor, grid: Sequence[int]) -> Tensor:
    """R_0 + Σ_d cos(ωd)(R_d + R_dᵀ) + i sin(ωd)(R_d - R_dᵀ), of shape (frequencies · groups, n, n)."""
    groups, n = lags.zero.shape[:2]
    points = len(frequencies)
    if not lags.lags:
        return lags.zero.expand(points, *lags.zero.shape).reshape(-1, n, n)
    angles, dtype = _angles(frequencies, torch.tensor(lags.lags), grid), lags.zero.dtype
    real = torch.addmm(lags.zero.flatten(), angles.cos().to(dtype), lags.even.flatten(1))
    imaginary = angles.sin().to(dtype) @ lags.odd.flatten(1)
    return torch.complex(real, imaginary).reshape(points * groups, n, n)


def _transfer_matrix(kernel: Tensor, grid: Sequence[int], where: tuple[Tensor, ...]) -> Tensor:
    """K̂(ω) = Σ_t K_t e^{-iωt} at one frequency of one group, complex128."""
    taps = torch.cartesian_prod(*(torch.arange(k) for k in kernel.shape[3:])).reshape(-1, kernel.dim() - 3)
    angles = _angles(torch.stack(where[1:])[None], taps, grid)[0]
    return kernel[where[0]].flatten(2).to(torch.complex128) @ torch.polar(torch.ones_like(angles), -angles)


def _angles(frequencies: Tensor, shifts: Tensor, grid: Sequence[int]) -> Tensor:
    """ω·d for each frequency and shift, reduced in integers to [0, 2π)."""
    points = math.prod(grid)
    turns = sum(
        (frequencies[:, i, None] * shifts[None, :, i]).remainder(n) * (points // n) for i, n in enumerate(grid)
    )
    return turns.remainder(points).double() * (2 * math.pi / points)


def _by_gram_iteration(kernel: Tensor, grid: Sequence[int], rtol: float) -> tuple[GramBracket, tuple[Tensor, ...]]:
    matrices = transfer_matrices(kernel, grid)
    bracket, index = largest_gram_bracket(matrices.flatten(0, -3), rtol)
    where = torch.unravel_index(index, matrices.shape[:-2])
    loss = _transform_loss(kernel, grid)
    return bracket._replace(lower=(bracket.lower - loss).clamp_min(0), upper=bracket.upper + loss), where


def _transform_loss(folded: Tensor, grid: Sequence[int]) -> Tensor:
    """What rounding in a Fourier transform, however it is done, can take from a norm: 4(n + 16)u·√n ‖K‖_F.

    Far more than any fast transform loses; zero in float32, where the allowance has to cover it.
    """
    points = math.prod(grid)
    if not is_double(folded) or points == 1:
        return folded.new_zeros((), dtype=torch.float64)
    return 4 * (points + 16) * UNIT_ROUNDOFF * math.sqrt(points) * torch.linalg.vector_norm(folded)
