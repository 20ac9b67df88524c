"""Matrix products and norms with a bound of what rounding may have taken from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lipschitz.functional.scaling import exponent_of


# In float32 a sum of b terms of one sign loses at most (b - 1)/2 units of 2⁻²⁴, half of it in the norm: 8e-6 for a
# Gram matrix summed in blocks of 256, as much for a factorisation of that size, 4e-6 for 128 lags. Longer ones are
# summed in float64. With mixed signs the worst case is larger, and not what happens. Products in float64 are bounded
# by analysis, and the allowance covers the few dozen scalar operations after them.
FLOAT32_ALLOWANCE = 3e-5
FLOAT64_ALLOWANCE = 1e-13
UNIT_ROUNDOFF = 2.0**-53
FLOAT32_BLOCK = 256
FLOAT32_LAGS = 128


def product(a: Tensor, b: Tensor, keep_wide: bool = False) -> Tensor:
    """a @ b. In float32 long sums of one sign drift low, so blocks of the inner dimension are added up in float64."""
    if is_double(a) or a.shape[-1] <= FLOAT32_BLOCK:
        return a @ b
    wide = wide_dtype(a.dtype)
    blocks = zip(a.split(FLOAT32_BLOCK, dim=-1), b.split(FLOAT32_BLOCK, dim=-2), strict=True)
    total = sum((x @ y).to(wide) for x, y in blocks)
    return total if keep_wide else total.to(a.dtype)


def product_loss(h: Tensor) -> Tensor:
    square = square_norm(h, dim=(-2, -1))
    if not is_double(h):
        return torch.zeros_like(square)
    m, n = h.shape[-2:]
    underflow = m * n * torch.finfo(torch.float64).tiny * (square > 0)
    return gamma(m, h.is_complex()) * square * (1 + 2 * m * n * UNIT_ROUNDOFF) + underflow


def gamma(m: int, is_complex: bool) -> float:
    """γ_m of a real inner product of length m; a complex one is two real ones of length 2m, hence √2 γ_{2m+2}."""
    length = 2 * m + 2 if is_complex else m
    value = length * UNIT_ROUNDOFF / (1 - length * UNIT_ROUNDOFF)
    return math.sqrt(2) * value if is_complex else value


def frobenius(g: Tensor) -> Tensor:
    return square_norm(g, dim=(-2, -1)).sqrt()


def square_norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Σ|x|² over `dim`, float64."""
    if x.is_complex():
        # Of complex entries the norm takes the modulus first, many times as slow.
        axes = (dim,) if isinstance(dim, int) else dim
        return square_norm(torch.view_as_real(x.resolve_conj()), dim=(*(d - 1 for d in axes), -1))
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64) ** 2


def computation_dtype(dtype: torch.dtype, certified: bool) -> torch.dtype:
    return torch.promote_types(dtype, torch.float64 if certified else torch.float32)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def is_double(x: Tensor) -> bool:
    return x.dtype in (torch.float64, torch.complex128)


def allowance_of(x: Tensor) -> float:
    return FLOAT64_ALLOWANCE if is_double(x) else FLOAT32_ALLOWANCE


def frobenius_ceiling(x: Tensor, dtype: torch.dtype, batch: int = 0) -> Tensor:
    """An upper bound of ‖x‖_F of a real x, float64, that is 0 where x is 0; of each entry of the first `batch` axes.

    Rows are summed in `dtype`, float32 or float64, or in that of x if it is wider; n of their terms lose less than nu
    of the sum. Squares that leave the range of `dtype` are the caller's business.
    """
    dtype = torch.promote_types(x.dtype, dtype)
    one_row = x.dim() < batch + 2
    rows = torch.linalg.vector_norm(x[..., None, :] if one_row else x.flatten(batch + 1), dim=-1, dtype=dtype)
    length = x.numel() // max(1, rows.numel())
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64) * (1 + (length + 16) * torch.finfo(dtype).eps)


def gram_loss(g: Tensor, m: int) -> Tensor:
    """[`product_loss`] of G = HᴴH from its trace, which is ‖H‖_F² up to rounding; m is the length of the products."""
    n = g.shape[-1]
    trace = g.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    underflow = m * n * torch.finfo(torch.float64).tiny * (trace > 0)
    return gamma(m, g.is_complex()) * trace * (1 + 4 * (m + n) * UNIT_ROUNDOFF) + underflow


def unit(columns: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    return columns / torch.where(norm > 0, norm, torch.ones_like(norm))


def matrix_exponent(g: Tensor) -> Tensor:
    if g.is_complex():
        return exponent_of(g.abs().amax(dim=(-2, -1), keepdim=True))
    least, largest = g.aminmax() if g.dim() == 2 else torch.aminmax(g.flatten(-2), dim=-1)
    return exponent_of(torch.maximum(-least, largest))[..., None, None]
