"""Spectral rescaling: one number a row that makes a matrix 1-Lipschitz, as in almost-orthogonal layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_matrix
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import allowance_of, computation_dtype, gamma, is_double, product
from hf_lipschitz.functional.scaling import exponent_of, scale_by_power_of_two


# Ratios of weights of the rows, and their sums, stay far inside float64 within these.
_LEAST_WEIGHT, _LARGEST_WEIGHT = 2.0**-400, 2.0**400


def spectral_rescaling(
    w: Tensor, num_iterations: int = 1, q: Tensor | None = None, *, certified: bool = False
) -> Tensor:
    r"""One number t a row, such that the matrix of rows w_i / t_i has spectral norm at most 1; differentiable.

    With \(M = WW^H\), \(m = 2^{N-1}\) and weights q > 0 of the rows,

    \(t_i = \big(\sum_j |M^m|_{ij}\, q_j/q_i\big)^{1/(2m)}\).

    By Gershgorin's theorem \(M^m \preceq \mathrm{diag}(t^{2m})\), and as the power 1/m keeps the order of positive
    semi-definite matrices (Löwner-Heinz), \(M \preceq \mathrm{diag}(t^2)\). N = 1 with q = 1 is AOL (Prach & Lampert
    2022), with q and \(T = \mathrm{diag}(t^2)\) of Wᵀ the SLL layer (Araujo et al. 2023). N → ∞ is division by the
    spectral norm, of each block where the rows fall into orthogonal blocks, as long as the 2m-th power of the ratio of
    their norms does not underflow (Delattre et al. 2024).

    The largest t never grows with N; that of a small row may, as all rows tend to the same number.

    Rounding. With H a scaled iterate, G the computed and symmetrised HHᴴ, r rows, inner length c and u = 2⁻⁵³, each
    entry of the error E = HHᴴ - G is at most \(\gamma_{c+2} d_i d_j + \eta\), where d_i² = (HHᴴ)_ii (Cauchy-Schwarz on
    |H||H|ᴴ; Higham 2002, eq. 3.13) and η covers underflow. Gershgorin with the weights 1/d gives
    \(E \preceq \ell = \mathrm{diag}(r\gamma_{c+2} d_i^2 + r\eta)\). So if G as computed is at most
    \(\mathrm{diag}(s)\), then \(HH^H \preceq \mathrm{diag}(s + \ell)\) and
    \(|H| \preceq \mathrm{diag}(s + \ell)^{1/2}\), a new diagonal for the iterate before: t starts from the row sums of
    the last G and goes back to W one square root at a time. As no d_i² exceeds s_i, float64 adds about rγ_c to t in
    relative terms (2e-9 at 4096 × 4096). For float32 that worst case would say nothing: γ is left out, sums are cut
    into blocks of 256 terms, and t is widened by 3e-5; η is in both, so that a row which is tiny beside the others
    gets a t that is too large, never too small.

    Args:
        w (`Tensor` of shape `(..., r, c)`):
            Real or complex, float16 to float64. Half precision is computed in float32.
        num_iterations (`int`, *optional*, defaults to 1):
            N ≥ 1.
        q (`Tensor`, *optional*):
            Positive weights of the rows, broadcastable to `(..., r)`; all ones when left out. The result depends on
            their ratios only, and the bound holds for every q.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64 whatever the dtype of `w` is, so that the rounding analysis applies.

    Returns:
        `Tensor` of shape `(..., r)`, in the real dtype of the computation: \(\|\mathrm{diag}(t)^{-1}W\|_2 \le 1\) is a
        **sound bound**, proved in float64 or with `certified=True`, up to the stated allowance in float32. It is
        about `w` as stored and exact division: storing the quotient rounds again. Rows of zeros, and only those, have
        t = 0; [`rescale_rows`] divides with that in mind.

    Raises:
        ValueError: `w` is empty, has less than two axes, holds NaN or inf; `num_iterations < 1`; `q` is not positive
            or does not broadcast.
        TypeError: `w` or `q` is not a floating-point tensor (`w` may be complex).
    """
    check_matrix(w)
    check_num_iterations(num_iterations)
    weights = row_weights(q, w.shape[:-1])
    matrix = w.to(computation_dtype(w.dtype, certified))
    return rescaling_of_matrix(matrix, num_iterations=num_iterations, q=weights).to(matrix.real.dtype)


def rescaling_of_matrix(w: Tensor, *, num_iterations: int = 1, q: Tensor | None = None) -> Tensor:
    """[`spectral_rescaling`] in tensor operations only, without a look at the entries.

    Args:
        w (`Tensor` of shape `(..., r, c)`):
            Half precision is computed in float32, NaN and inf give NaN. A float64 one compiles as a single graph.
        num_iterations (`int`, *optional*, defaults to 1):
            N ≥ 1; not checked.
        q (`Tensor` of shape `(..., r)`, *optional*):
            Positive float64 weights within 2^-400 and 2^400; not checked.

    Returns:
        `Tensor` of shape `(..., r)`, float64: **sound** as [`spectral_rescaling`].
    """
    matrix = w.to(computation_dtype(w.dtype, False))
    with exact_products(matrix):
        return rescaling_of_rows(matrix, q, num_iterations, w.dim() - 2, _gram_of_rows)


def rescale_rows(w: Tensor, t: Tensor) -> Tensor:
    r"""\(\mathrm{diag}(t)^{-1} W\), with zeros where t = 0.

    Never an epsilon added to t: that breaks either the bound or rows of small weight.

    Args:
        w (`Tensor` of shape `(..., r, c)`):
            The matrix, or a kernel flattened to one row an output channel.
        t (`Tensor` of shape `(..., r)`):
            From [`spectral_rescaling`] or [`conv_spectral_rescaling`].

    Returns:
        `Tensor` of the shape of `w`, in the wider dtype of both: of norm at most 1 up to the rounding of the
        quotients, which is that of the dtype; rounding them further to half precision can add several per cent.

    Raises:
        ValueError: `t` does not have one entry a row of `w`.
    """
    if w.dim() < 2 or t.shape != w.shape[:-1]:
        raise ValueError(f"t must have one entry a row of w, shape {tuple(w.shape[:-1])}, got {tuple(t.shape)}")
    nonzero = t != 0
    quotient = w / torch.where(nonzero, t, torch.ones_like(t))[..., None]
    return torch.where(nonzero[..., None], quotient, torch.zeros_like(quotient))


def exact_products(w: Tensor) -> AbstractContextManager[None]:
    """[`full_precision`] for products of the dtype of `w`; no setting reduces those of float64, so none is touched."""
    return nullcontext() if is_double(w) else full_precision(w.device.type)


def check_num_iterations(num_iterations: int) -> None:
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")


def row_weights(q: Tensor | None, rows: torch.Size) -> Tensor | None:
    """`q` in float64 and of shape `rows`, once it is known to be positive."""
    if q is None:
        return None
    if not (isinstance(q, Tensor) and q.is_floating_point()):
        raise TypeError(
            f"q must be a floating-point torch.Tensor or None, got {getattr(q, 'dtype', type(q).__name__)}"
        )
    try:
        weights = q.double().expand(rows)
    except RuntimeError as error:
        raise ValueError(f"q must have one entry a row, shape {tuple(rows)}, got {tuple(q.shape)}") from error
    if not bool(((weights >= _LEAST_WEIGHT) & (weights <= _LARGEST_WEIGHT)).all()):
        raise ValueError("q must be positive and within 2^-400 and 2^400, e.g. the exponential of a free parameter")
    return weights


def rescaling_of_rows(
    w: Tensor, q: Tensor | None, num_iterations: int, batch: int, gram: Callable[[Tensor], Tensor]
) -> Tensor:
    """The recursion of [`spectral_rescaling`] for anything with rows.

    Args:
        w (`Tensor` of shape `(*batch, r, ...)`):
            float32, float64 or complex; each row is all that follows the row index.
        q (`Tensor` of shape `(*batch, r)`, *optional*):
            float64 weights.
        num_iterations (`int`):
            N.
        batch (`int`):
            Number of batch axes.
        gram (`Callable`):
            The products of all pairs of rows at all lags, `(*batch, r, r, ...)`, exactly symmetric under exchange of
            the rows and reversal of the lags, each a sum of at most as many terms as a row has entries.

    Returns:
        `Tensor` of shape `(*batch, r)`, float64.
    """
    # NaN is no zero: it has to reach the result.
    nonzero = w.detach().abs().flatten(batch + 1).amax(-1) != 0
    x, exponents, losses = w, [], []
    for _ in range(num_iterations):
        exponent = exponent_of(x.detach().abs().flatten(batch).amax(-1, keepdim=True))
        h = scale_by_power_of_two(x, -exponent.reshape(*exponent.shape, *[1] * (x.dim() - batch - 1)))
        x = gram(h)
        exponents.append(exponent)
        losses.append(_row_loss(x, h[(0,) * (batch + 1)].numel(), batch))
    bound = torch.where(nonzero, _row_sums(x, q, batch), 1.0)
    for exponent, loss in zip(reversed(exponents), reversed(losses), strict=True):
        bound = scale_by_power_of_two((bound + loss).sqrt(), exponent)
    return torch.where(nonzero, bound, 0.0) * (1 + allowance_of(w))


def _gram_of_rows(h: Tensor) -> Tensor:
    g = product(h, h.mH)
    return (g + g.mH) / 2


def _row_sums(g: Tensor, q: Tensor | None, batch: int) -> Tensor:
    """s_i = Σ_j Σ_lag |g_ij| q_j/q_i in float64, rounded up."""
    magnitudes = g.abs()
    pairs = magnitudes.flatten(batch + 2).sum(-1, dtype=torch.float64) if g.dim() > batch + 2 else magnitudes
    if q is None:
        sums = pairs.sum(-1, dtype=torch.float64)
    else:
        underflow = g.shape[batch] * torch.finfo(torch.float64).tiny
        sums = ((pairs.double() @ q[..., None]).squeeze(-1) + underflow) / q
    terms = g[(0,) * (batch + 1)].numel()
    return sums * (1 + 2 * gamma(terms + 10, is_complex=False))


@torch.no_grad()
def _row_loss(g: Tensor, terms: int, batch: int) -> Tensor:
    """A diagonal ℓ with HHᴴ - G ⪯ diag(ℓ), G the computed product of rows of `terms` entries of at most one."""
    row_length = g[(0,) * (batch + 1)].numel()
    matrices = g.reshape(*g.shape[: batch + 2], -1)
    squares = matrices[..., matrices.shape[-1] // 2].diagonal(dim1=-2, dim2=-1).real.double()
    underflow = 8 * terms * torch.finfo(g.dtype).tiny
    relative = 1.01 * gamma(terms + 2, g.is_complex()) if is_double(g) else 0.0
    return row_length * (relative * squares + underflow)
