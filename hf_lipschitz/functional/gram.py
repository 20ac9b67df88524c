"""Spectral norms of dense matrices by Gram iteration (Delattre et al., 2023, 2024)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_matrix, check_rtol
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import (
    UNIT_ROUNDOFF,
    allowance_of,
    computation_dtype,
    frobenius,
    gamma,
    is_double,
    matrix_exponent,
    product,
    product_loss,
    square_norm,
    unit,
    wide_dtype,
)
from hf_lipschitz.functional.scaling import scale_by_power_of_two


MAX_ITERATIONS = 24


class GramBracket(NamedTuple):
    """Both ends of σ₁ with the leading pair of singular vectors; zero vectors where the matrix is zero."""

    lower: Tensor
    upper: Tensor
    left: Tensor
    right: Tensor


@torch.no_grad()
def gram_bracket(
    w: Tensor, rtol: float = 1e-3, *, certified: bool = False, max_iterations: int = MAX_ITERATIONS
) -> GramBracket:
    r"""Brackets σ₁ of a matrix, or of each matrix of a batch, by Gram iteration.

    Gram iteration \(G \leftarrow G^HG\) squares the singular values at each step. After a step, three upper ends hold
    for the top eigenvalue of the symmetric G of size n, with A = tr G and B = ‖G‖_F²: √B (the Schatten norm of order
    2^{N+1} of W after N steps; Delattre et al. 2023, theorem 2), A/n + √((n-1)/n)·‖G - (A/n)I‖_F (Samuelson 1968) and
    θ + r²/(θ - ν) (Kato-Temple, with θ = vᴴGv, r = ‖Gv - θv‖, ν² = B - θ², where ν < θ). The least of them is the
    upper end and θ the lower end; both go back to the scale of W through the square roots. In float64 the rounding of
    every product is carried through those square roots; in float32 the ends are widened by 3e-5.

    Args:
        w (`Tensor` of shape `(..., m, n)`):
            Real or complex, float16 to float64. Half precision is computed in float32.
        rtol (`float`, *optional*, defaults to `1e-3`):
            The iteration stops once `upper <= lower * (1 + rtol)` for every matrix of the batch, before widening.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64 whatever the dtype of `w` is.
        max_iterations (`int`, *optional*, defaults to 24):
            Stops there at the latest; the bracket holds all the same.

    Returns:
        `GramBracket`: ends of shape `(...)` as in [`spectral_norm_bound`], with the leading pair of singular vectors,
        which are estimates.

    Raises:
        ValueError, TypeError: as [`spectral_norm_bound`].
    """
    _check_arguments(w, rtol, max_iterations)
    matrix = w.detach().to(computation_dtype(w.dtype, certified))
    is_tall = matrix.shape[-2] >= matrix.shape[-1]
    tall = matrix if is_tall else matrix.mH
    with full_precision(w.device.type):
        lower, upper, v = _iterate(tall, rtol, max_iterations)
        u = _image(tall, v)
    return GramBracket(lower, upper, u, v) if is_tall else GramBracket(lower, upper, v, u)


@torch.no_grad()
def largest_gram_bracket(
    w: Tensor, rtol: float = 1e-3, *, certified: bool = False, max_iterations: int = MAX_ITERATIONS
) -> tuple[GramBracket, Tensor]:
    """Bracket of the largest norm in a batch `(batch, m, n)`, and the index of the matrix whose upper end it is.

    A matrix leaves the batch as soon as its upper end is below the lower end of another one, so that most of them cost
    one or two steps.
    """
    _check_arguments(w, rtol, max_iterations)
    matrix = w.detach().to(computation_dtype(w.dtype, certified))
    is_tall = matrix.shape[-2] >= matrix.shape[-1]
    tall = matrix if is_tall else matrix.mH
    with full_precision(w.device.type):
        lower, upper, v, index = _iterate_largest(tall, rtol, max_iterations)
        u = _image(tall[index], v)
    left, right = (u, v) if is_tall else (v, u)
    return GramBracket(lower, upper, left, right), index


def _iterate(g: Tensor, rtol: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    allowance = allowance_of(g)
    exponents: list[Tensor] = []
    losses: list[Tensor] = []
    for _ in range(max_iterations):
        g, exponent, loss = gram_step(g)
        exponents.append(exponent)
        losses.append(loss)
        low, high, v = _top_eigenvalue(g, loss)
        lower, upper = back_to_scale(low, high, exponents, losses)
        if bool((upper <= lower * (1 + rtol)).all()):
            break
    return lower * (1 - allowance), upper * (1 + allowance), v


def _iterate_largest(g: Tensor, rtol: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    allowance = allowance_of(g)
    exponents: list[Tensor] = []
    losses: list[Tensor] = []
    indices = torch.arange(g.shape[0], device=g.device)
    for _ in range(max_iterations):
        g, exponent, loss = gram_step(g)
        exponents.append(exponent)
        losses.append(loss)
        low, high, v = _top_eigenvalue(g, loss)
        lower, upper = back_to_scale(low, high, exponents, losses)
        best, worst = lower.max(), upper.argmax()
        if bool(upper[worst] <= best * (1 + rtol)):
            break
        # Compared widened, so that the matrix of the best lower end stays whatever float32 did to its ends.
        keep = upper * (1 + allowance) >= best * (1 - allowance)
        g, indices = g[keep], indices[keep]
        exponents, losses = [e[keep] for e in exponents], [x[keep] for x in losses]
    return best * (1 - allowance), upper[worst] * (1 + allowance), v[worst], indices[worst]


def gram_step(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HᴴH with H = 2^{-e}G of entries near one, with e and a bound of the rounding of the product."""
    exponent = matrix_exponent(g)
    h = scale_by_power_of_two(g, -exponent)
    return product(h.mH, h), exponent[..., 0, 0], product_loss(h)


def _image(w: Tensor, v: Tensor) -> Tensor:
    return unit(scale_by_power_of_two(w, -matrix_exponent(w)) @ v.unsqueeze(-1)).squeeze(-1)


def _check_arguments(w: Tensor, rtol: float, max_iterations: int) -> None:
    check_matrix(w)
    check_rtol(rtol)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")


def back_to_scale(low: Tensor, high: Tensor, exponents: list[Tensor], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """From a bracket of the top eigenvalue of the last HᴴH to one of σ₁ of the first matrix."""
    for k in reversed(range(len(exponents))):
        low = scale_by_power_of_two(low.sqrt(), exponents[k])
        high = scale_by_power_of_two(high.sqrt(), exponents[k])
        if k > 0:
            low = (low - losses[k - 1]).clamp_min(0)
            high = high + losses[k - 1]
    return low, high


def _top_eigenvalue(g: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bracket of λ₁(S) for the positive semi-definite S with ‖G - S‖₂ ≤ loss, and an approximate eigenvector of G."""
    n = g.shape[-1]
    double = is_double(g)
    diagonal = g.diagonal(dim1=-2, dim2=-1).real.double()
    trace = diagonal.sum(-1)
    total = frobenius(g)
    shifted = g.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_((trace / n)[..., None].to(g.dtype))
    summation = (n * n + 100) * UNIT_ROUNDOFF * (trace.abs() + total) if double else torch.zeros_like(trace)
    samuelson = trace / n + math.sqrt((n - 1) / n) * frobenius(shifted)
    high = torch.minimum(samuelson, total) + summation + loss

    v = g.gather(-1, diagonal.argmax(-1)[..., None, None].expand(*g.shape[:-1], 1))
    for _ in range(2):
        v = unit(g @ unit(v))
    gv = product(g, v, keep_wide=True).squeeze(-1).to(wide_dtype(g.dtype))
    v_wide = v.squeeze(-1).to(wide_dtype(g.dtype))
    square = square_norm(v_wide, dim=-1)
    square = torch.where(square > 0, square, torch.ones_like(square))
    theta = (v_wide.conj() * gv).real.sum(-1) / square
    residual = torch.linalg.vector_norm(gv - theta[..., None] * v_wide, dim=-1) / square.sqrt()
    error = (4 * gamma(n, g.is_complex()) * total + summation if double else 0.0) + loss
    low = (theta - error).clamp_min(0)
    top = total + summation + loss
    others = ((top - low) * (top + low)).clamp_min(0).sqrt()
    gap = low - others
    temple = theta + error + (residual + error) ** 2 / torch.where(gap > 0, gap, torch.ones_like(gap))
    high = torch.where(gap > 0, torch.minimum(high, temple), high)
    return low, torch.maximum(low, high), v.squeeze(-1)
