"""Brackets of the largest singular value, by the fastest of the sound methods."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_entries, check_matrix_kind, check_rtol
from hf_lipschitz.functional.eigenvalue import eigenvalue_brackets
from hf_lipschitz.functional.gram import GramBracket, gram_bracket
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import (
    FLOAT32_BLOCK,
    allowance_of,
    computation_dtype,
    gram_loss,
    is_double,
    matrix_exponent,
    product,
    unit,
    wide_dtype,
)
from hf_lipschitz.functional.scaling import scale_by_power_of_two


# ‖W‖_F² between this and its inverse: no entry that matters has a square outside float32.
SAFE_SQUARE = 2.0**-60
METHODS = ("auto", "gram", "cholesky")


def spectral_norm_bound(
    w: Tensor, rtol: float = 1e-3, *, certified: bool = False, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Brackets the largest singular value of a matrix, or of each matrix of a batch.

    `"cholesky"`: one Gram matrix \(G = W^HW\), a Lanczos vector v for the lower end \(\sqrt{v^HGv}\), and for the
    upper end a c just above it for which a Cholesky factorisation shows \(cI - G \succeq 0\) (after Rump 2006).
    `"gram"`: Gram iteration (Delattre et al. 2023), with Samuelson's and the Kato-Temple ends; see [`gram_bracket`].
    `"auto"` takes the Cholesky factorisation on the CPU, where it is faster, and Gram iteration elsewhere.

    In float64 the rounding of every product, and of the factorisation, is bounded by analysis and added: a computed
    Gram matrix differs from the exact one by at most γ_m‖G‖_F² in norm, γ_m = mu/(1 - mu) with m the inner dimension
    and u = 2⁻⁵³ (Higham 2002, eq. 3.13), and [`semidefinite_defect`] measures what the factor misses. For float32
    that worst case would say nothing: sums are cut into blocks of 256 terms that are added up in float64, and the ends
    are widened by 3e-5, which covers sums of one sign. Below the normal numbers of float64 nothing is promised.

    Args:
        w (`Tensor` of shape `(..., m, n)`):
            Real or complex, float16 to float64. Half precision is computed in float32.
        rtol (`float`, *optional*, defaults to `1e-3`):
            The bracket is as narrow as `upper <= lower * (1 + rtol)` for every matrix of the batch, before widening.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64 whatever the dtype of `w` is, so that the rounding analysis applies.
        method (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"cholesky"` or `"gram"`.

    Returns:
        `tuple[Tensor, Tensor]`: `(lower, upper)`, float64, of shape `(...)`. `upper` is a **sound bound** and `lower`
        a lower bound: proved in float64 or with `certified=True`, up to the stated allowance in float32.

    Raises:
        ValueError: `w` is empty, has less than two axes, holds NaN or inf, `rtol` is not positive, or the method is
            unknown.
        TypeError: `w` is not a floating-point or complex tensor.
    """
    bracket = norm_bracket(w, rtol, certified=certified, method=method)
    return bracket.lower, bracket.upper


def norm_bracket(
    w: Tensor, rtol: float = 1e-3, *, certified: bool = False, method: str = "auto", start: Tensor | None = None
) -> GramBracket:
    """The bracket of [`spectral_norm_bound`] with the leading pair of singular vectors, which are estimates.

    `start`, of shape `(..., n)` or `(..., m)` as the shorter axis is, makes it faster where it is near the singular
    vector of that axis; any other value costs time only.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if method == "auto":
        method = "cholesky" if isinstance(w, Tensor) and w.device.type == "cpu" else "gram"
    if method == "gram":
        return gram_bracket(w, rtol, certified=certified)
    return cholesky_bracket(w, rtol, certified=certified, start=start)


@torch.no_grad()
def cholesky_bracket(
    w: Tensor, rtol: float = 1e-3, *, certified: bool = False, start: Tensor | None = None
) -> GramBracket:
    """The `"cholesky"` method; a matrix whose top Lanczos misses again and again goes to Gram iteration."""
    check_matrix_kind(w)
    check_rtol(rtol)
    matrix = w.detach().to(computation_dtype(w.dtype, certified))
    is_tall = matrix.shape[-2] >= matrix.shape[-1]
    tall = matrix if is_tall else matrix.mH
    batch = tall.shape[:-2]
    tall = tall.reshape(-1, *tall.shape[-2:])
    with full_precision(w.device.type):
        exponent, h, g = _gram_matrices(tall)
        double = is_double(h)
        loss = gram_loss(g, h.shape[-2]) if double else torch.zeros(len(g), dtype=torch.float64, device=g.device)
        if start is not None:
            start = start.reshape(-1, start.shape[-1])
        found = eigenvalue_brackets(g, loss, rtol, verify=double, start=start)
        allowance = allowance_of(h)
        lower = scale_by_power_of_two(found.lower.sqrt() * (1 - allowance), exponent)
        upper = scale_by_power_of_two(found.upper.sqrt() * (1 + allowance), exponent)
        v = found.vector.to(h.dtype)
        u = unit(h @ v.unsqueeze(-1)).squeeze(-1)
    missed = torch.nonzero(~torch.isfinite(found.upper)).flatten()
    if len(missed):
        other = gram_bracket(tall[missed], rtol)
        lower[missed], upper[missed], u[missed], v[missed] = other.lower, other.upper, other.left, other.right
    shaped = GramBracket(lower.reshape(batch), upper.reshape(batch), u.reshape(*batch, -1), v.reshape(*batch, -1))
    return shaped if is_tall else shaped._replace(left=shaped.right, right=shaped.left)


def _gram_matrices(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e, H, HᴴH) with H = 2^{-e}W, e = 0 wherever the squares of W itself are in range.

    Raises:
        ValueError: an entry is NaN or inf.
    """
    g = _product_with_itself(tall)
    # NaN, inf and overflow all reach the trace; a zero may be one that underflowed.
    trace = g.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    if bool(((trace > SAFE_SQUARE) & (trace < 1 / SAFE_SQUARE)).all()):
        return torch.zeros(len(g), dtype=torch.int32, device=g.device), tall, g
    check_entries(tall, "w")
    exponent = matrix_exponent(tall)
    h = scale_by_power_of_two(tall, -exponent)
    return exponent[..., 0, 0], h, _product_with_itself(h)


def _product_with_itself(h: Tensor) -> Tensor:
    g = product(h.mH, h, keep_wide=True)
    # A factorisation has sums as long as a row.
    return g.to(h.dtype if h.shape[-1] <= FLOAT32_BLOCK else wide_dtype(h.dtype))
