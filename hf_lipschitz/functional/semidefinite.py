"""A proof, in floating point, that a Hermitian matrix has no eigenvalue far below zero."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.products import UNIT_ROUNDOFF, gamma, square_norm


# Columns of the factor whose product is compared at once; zeros above the diagonal cost the more the wider they are.
PANEL = 64


def semidefinite_defect(a: Tensor, *, verify: bool = True) -> Tensor:
    r"""A number δ with \(A + \delta I \succeq 0\), infinite where the Cholesky factorisation breaks down.

    What the factor L misses is measured after the factorisation: \(A = LL^H + D\) gives \(A \succeq -\|D\|_2 I\), and
    \(\|D\|_2 \le \|fl(A - LL^H)\|_F + \gamma_{n+2} (\|A\|_F + \|L\|_F^2)\), where only the rounding of a conventional
    matrix product in float64 enters (Higham 2002, eq. 3.13), whatever the order of its sums. Nothing is assumed of how
    the library factorises. Both norms are at most tr A and n‖D‖₂, which has to be far smaller, or δ is infinite.

    Args:
        a (`Tensor` of shape `(batch, n, n)`):
            The lower triangle of a Hermitian matrix; float64 or complex128 for a sound result.
        verify (`bool`, *optional*, defaults to `True`):
            With `False` the factor is trusted, and δ is 0 or infinite: an estimate, good to the rounding of the
            factorisation.

    Returns:
        `Tensor` of shape `(batch,)`, float64: **sound** with `verify`.
    """
    factor, info = torch.linalg.cholesky_ex(a)
    if not verify:
        return torch.where(info == 0, 0.0, torch.inf).to(torch.float64)
    n = a.shape[-1]
    trace = a.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    squares = torch.zeros_like(trace)
    for first in range(0, n, PANEL):
        last = min(first + PANEL, n)
        panel = torch.baddbmm(
            a[:, first:, first:last], factor[:, first:, :last], factor[:, first:last, :last].mH, alpha=-1
        )
        # Below the diagonal block every entry stands for its mirror image too.
        squares += 2 * square_norm(panel, dim=(-2, -1))
    defect = squares.sqrt() + 2 * gamma(n + 2, a.is_complex()) * trace * (1 + 1e-3) + 4 * UNIT_ROUNDOFF * trace
    is_sound = (info == 0) & (defect * n <= 1e-4 * trace)
    # The norms and sums above are themselves good to far better than this.
    return torch.where(is_sound, defect * (1 + 1e-6), torch.inf)
