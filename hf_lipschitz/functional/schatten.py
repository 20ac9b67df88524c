"""The Schatten norm after a fixed number of Gram iterations, with its closed-form gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_matrix
from hf_lipschitz.functional.gram import back_to_scale, gram_step
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import UNIT_ROUNDOFF, allowance_of, computation_dtype, frobenius


def gram_norm(w: Tensor, num_iterations: int = 7) -> Tensor:
    r"""Upper bound of the largest singular value after a fixed number of Gram iterations; differentiable twice and
    more.

    \(b_N = \|W\|_{S_p}\), the Schatten norm of order \(p = 2^{N+1}\) (Delattre et al. 2023, theorem 2): for W of rank
    r,
    \(r^{-1/p} b_N \le \sigma_1 \le b_N\). Its gradient is the closed form \(b^{1-p} W (W^HW)^{p/2-1}\), a matrix of
    zeros where W = 0. Use [`spectral_norm_bound`] for a bracket of asked width.

    Args:
        w (`Tensor` of shape `(..., m, n)`):
            Real or complex, float16 to float64. Half precision is computed in float32.
        num_iterations (`int`, *optional*, defaults to 7):
            N ≥ 1.

    Returns:
        `Tensor` of shape `(...)`, in the real dtype of the computation: a **sound bound**, with the rounding treated
        as in [`spectral_norm_bound`].

    Raises:
        ValueError: `w` is empty, has less than two axes, holds NaN or inf, or `num_iterations < 1`.
        TypeError: `w` is not a floating-point or complex tensor.
    """
    check_matrix(w)
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    return _SchattenNorm.apply(w.to(computation_dtype(w.dtype, certified=False)), num_iterations)


class _SchattenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, num_iterations: int) -> Tensor:
        g = w if w.shape[-2] >= w.shape[-1] else w.mH
        exponents, losses = [], []
        with full_precision(w.device.type):
            for _ in range(num_iterations):
                g, exponent, loss = gram_step(g)
                exponents.append(exponent)
                losses.append(loss)
            high = frobenius(g) * (1 + g.shape[-1] ** 2 * UNIT_ROUNDOFF) + losses[-1]
            _, high = back_to_scale(torch.zeros_like(high), high, exponents, losses)
        bound = (high * (1 + allowance_of(w))).to(w.real.dtype)
        ctx.save_for_backward(w)
        ctx.bound, ctx.num_iterations = bound.detach(), num_iterations
        return bound

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        with full_precision(w.device.type):
            direction = _schatten_gradient(w, ctx.bound, ctx.num_iterations)
        return grad_output[..., None, None] * direction, None


def _schatten_gradient(w: Tensor, bound: Tensor, num_iterations: int) -> Tensor:
    """∇‖W‖_{S_p} in plain differentiable operations: D ⟨D, X⟩^{1/p - 1}, X = W/b, D = X (XᴴX)^{p/2 - 1}, b a constant.

    Homogeneity makes it the same for every b; the bound itself keeps ⟨D, X⟩ = tr (XᴴX)^{p/2} near one.
    """
    scale = torch.where(bound > 0, bound, torch.ones_like(bound))[..., None, None]
    x = w / scale
    x = x if x.shape[-2] >= x.shape[-1] else x.mH
    power = x.mH @ x
    product = power
    for _ in range(num_iterations - 1):
        power = power @ power
        product = product @ power
    d = x @ product
    inner = (d.conj() * x).real.sum(dim=(-2, -1), keepdim=True)
    p = 2.0 ** (num_iterations + 1)
    is_zero = inner == 0
    factor = torch.where(is_zero, torch.ones_like(inner), inner) ** (1 / p - 1)
    d = d * torch.where(is_zero, torch.zeros_like(factor), factor)
    return d if w.shape[-2] >= w.shape[-1] else d.mH
