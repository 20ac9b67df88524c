"""Brackets of the largest eigenvalue of Gram matrices: a Rayleigh quotient below, a Cholesky factorisation above."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.lanczos import leading_pairs, leading_vectors
from hf_lipschitz.functional.products import UNIT_ROUNDOFF, frobenius, gamma
from hf_lipschitz.functional.semidefinite import semidefinite_defect


# Lanczos starts over this often, from where it stood and stopping later, before the upper end is given up.
ATTEMPTS = 4
# In each, the matrices that are above c show a larger one; only ever fewer of them are left.
ROUNDS = 12


class EigenvalueBracket(NamedTuple):
    """Ends of λ₁ and the vector whose Rayleigh quotient is the lower one; `upper` is infinite where none was found."""

    lower: Tensor
    upper: Tensor
    vector: Tensor


def eigenvalue_brackets(
    g: Tensor, loss: Tensor, rtol: float, *, verify: bool, start: Tensor | None = None
) -> EigenvalueBracket:
    r"""Brackets the largest eigenvalue of each matrix S of a batch, of which G is known with ‖G - S‖₂ <= loss.

    If \(cI - G + \delta I \succeq 0\) by [`semidefinite_defect`], then \(\lambda_1(S) \le c + \delta + loss\), up to
    the rounding of the diagonal, u·max|c - G_ii| (the idea is Rump's, 2006). c is the lower end, the Rayleigh quotient
    of a Lanczos vector, times (1 + rtol/4)², and (1 + rtol)² after more steps where the factorisation breaks down.

    Args:
        g (`Tensor` of shape `(batch, n, n)`):
            float64 or complex128, Hermitian and positive semi-definite up to rounding.
        loss (`Tensor` of shape `(batch,)`):
            What rounding took from G, in norm.
        rtol (`float`):
            Width of the bracket of √λ₁ to reach.
        verify (`bool`):
            Whether the upper end covers the rounding of the factorisation.
        start (`Tensor` of shape `(batch, n)`, *optional*):
            Approximate eigenvectors.

    Returns:
        `EigenvalueBracket`: of shapes `(batch,)`, `(batch,)`, `(batch, n)`. **Sound** with `verify`.
    """
    if g.shape[-1] == 1:
        return _scalars(g, loss)
    # From nowhere Lanczos may rest at the second vector for a while; more steps cost less than a second factorisation.
    tolerance = rtol / 100 if start is None else rtol / 10
    vector = leading_vectors(g if verify else _in_single(g), tolerance, start=start, max_steps=96).to(g.dtype)
    lower = rayleigh_lower(g, vector, loss)
    upper = _ceiling(g, lower, loss, rtol / 4, verify)
    for attempt in range(1, ATTEMPTS):
        missed = torch.nonzero(~torch.isfinite(upper)).flatten()
        if len(missed) == 0:
            break
        part, part_loss = g[missed], loss[missed]
        v = leading_vectors(part, rtol / 10 ** (1 + 2 * attempt), start=vector[missed], max_steps=64 << attempt)
        low = rayleigh_lower(part, v, part_loss)
        vector[missed], lower[missed], upper[missed] = v, low, _ceiling(part, low, part_loss, 0.99 * rtol, verify)
    return EigenvalueBracket(lower, upper, vector)


def largest_eigenvalue_bracket(
    g: Tensor, loss: Tensor, rtol: float, *, verify: bool, floor: Tensor | None = None
) -> tuple[EigenvalueBracket, Tensor]:
    """Bracket of the largest eigenvalue in a batch and the index of the matrix it belongs to.

    One c serves all matrices: that of the best lower end, which may be the `floor` known from elsewhere. Matrices
    whose Frobenius norm is below it need no factorisation.

    Args:
        g, loss, rtol, verify:
            As in [`eigenvalue_brackets`].
        floor (`Tensor`, *optional*, 0-dim):
            A lower bound of the number that is looked for.

    Returns:
        `tuple[EigenvalueBracket, Tensor]`: 0-dim ends and a vector, and the index, -1 where the floor is above every
        matrix. The upper end covers every matrix of the batch.
    """
    if g.shape[-1] == 1:
        all_of_them = _scalars(g, loss)
        index = all_of_them.lower.argmax()
        best, vector = all_of_them.lower[index], all_of_them.vector[index]
        return EigenvalueBracket(best, all_of_them.upper.amax(), vector), index
    best = loss.new_zeros(()) if floor is None else floor
    upper, vector, index = best, torch.zeros_like(g[0, :, 0]), torch.full((), -1, device=g.device)
    ceiling = frobenius(g) * (1 + 1e-9) + loss
    candidates = torch.arange(len(g), device=g.device)
    for round_ in range(ROUNDS):
        if round_ > 0 or floor is None:
            part = _rows(g, candidates)
            estimate, v = leading_pairs(part)
            top = estimate.topk(min(len(estimate), 4)).indices
            v = leading_vectors(part[top], rtol / 100, start=v[top])
            low = rayleigh_lower(part[top], v, loss[candidates][top])
            here = low.argmax()
            if low[here] > best:
                best, vector, index = low[here], v[here], candidates[top[here]]
        candidates = candidates[ceiling[candidates] > best]
        part = _rows(g, candidates)
        high = _ceiling(part, best.expand(len(part)), loss[candidates], rtol, verify)
        passed = torch.isfinite(high)
        upper = torch.cat([upper[None], high[passed]]).amax()
        candidates = candidates[~passed]
        if len(candidates) == 0:
            break
    else:
        upper = torch.full_like(best, torch.inf)
    return EigenvalueBracket(best, torch.maximum(upper, best), vector), index


def _in_single(g: Tensor) -> Tensor:
    return g.to(torch.complex64 if g.is_complex() else torch.float32)


def _scalars(g: Tensor, loss: Tensor) -> EigenvalueBracket:
    value = g[..., 0, 0].real.double()
    return EigenvalueBracket((value - loss).clamp_min(0), value.clamp_min(0) + loss, torch.ones_like(g[..., 0]))


def _rows(g: Tensor, indices: Tensor) -> Tensor:
    return g if len(indices) == len(g) else g[indices]


def rayleigh_lower(g: Tensor, v: Tensor, loss: Tensor) -> Tensor:
    """A lower bound of λ₁ from the Rayleigh quotient of v, rounding and loss taken off; at least 0."""
    image = (g @ v.unsqueeze(-1)).squeeze(-1)
    square = (v.conj() * v).real.sum(-1)
    theta = (v.conj() * image).real.sum(-1) / torch.where(square > 0, square, torch.ones_like(square))
    return (theta - 8 * gamma(g.shape[-1], g.is_complex()) * _trace(g) - loss).clamp_min(0)


def _ceiling(g: Tensor, low: Tensor, loss: Tensor, rtol: float, verify: bool) -> Tensor:
    """c + δ + loss where cI - G is shown to be positive semi-definite up to δ; infinite elsewhere."""
    if len(g) == 0:
        return low
    is_zero = _trace(g) == 0
    # Where rounding ate the lower end, c still has to be positive.
    c = torch.where(is_zero, torch.ones_like(low), low * (1 + rtol) ** 2)
    shifted = -g
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal += c[..., None].to(g.dtype)
    defect = semidefinite_defect(shifted, verify=verify)
    rounding = 2 * UNIT_ROUNDOFF * diagonal.abs().amax(-1)
    return torch.where(is_zero, g.shape[-1] * loss, c + defect + rounding + loss)


def _trace(g: Tensor) -> Tensor:
    """‖G‖_F and more, for a positive semi-definite G up to rounding."""
    return g.diagonal(dim1=-2, dim2=-1).real.sum(-1)
