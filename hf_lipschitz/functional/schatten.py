"""The Schatten norm after a fixed number of Gram iterations, with closed-form gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_matrix
from hf_lipschitz.functional.gram import back_to_scale, gram_step
from hf_lipschitz.functional.leading_direction import LeadingDirection, leading_pair
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import (
    UNIT_ROUNDOFF,
    allowance_of,
    computation_dtype,
    frobenius,
    matrix_exponent,
)
from hf_lipschitz.functional.scaling import scale_by_power_of_two


GRADIENTS = ("dense", "rank_one")


def gram_norm(w: Tensor, num_iterations: int = 7, gradient: str = "dense") -> Tensor:
    r"""Upper bound of the largest singular value after a fixed number of Gram iterations, to be differentiated.

    \(b_N = \|W\|_{S_p}\), the Schatten norm of order \(p = 2^{N+1}\) (Delattre et al. 2023, theorem 2); W of rank r
    has \(r^{-1/p} b_N \le \sigma_1 \le b_N\). Use [`spectral_norm_bound`] for a bracket of asked width.

    Its gradient is \(b^{1-p} W (W^HW)^{p/2-1}\), which takes 2N products of matrices. As N grows it tends to
    \(uv^H\) of the leading pair of singular vectors, for which a few products with a column of the last Gram iterate
    are enough, so that the backward pass costs next to nothing; where σ₁ is repeated \(uv^H\) of any pair is a
    subgradient of σ₁. Both are zero where W = 0.

    Args:
        w (`Tensor` of shape `(..., m, n)`):
            Real or complex, float16 to float64. Half precision is computed in float32.
        num_iterations (`int`, *optional*, defaults to 7):
            N ≥ 1.
        gradient (`str`, *optional*, defaults to `"dense"`):
            `"dense"` is the exact gradient of the value. `"rank_one"` is an **estimate** of the gradient of σ₁, which
            differs from it by the slack of the bound. Its own derivative, for penalties on curvature, is the closed
            form in [`LeadingDirection`].

    Returns:
        `Tensor` of shape `(...)`, in the real dtype of the computation: a **sound bound** whatever `gradient` is, with
        the rounding treated as in [`spectral_norm_bound`].

    Raises:
        ValueError: `w` is empty, has less than two axes, holds NaN or inf; `num_iterations < 1`; `gradient` is
            unknown.
        TypeError: `w` is not a floating-point or complex tensor.
    """
    check_matrix(w)
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    return _SchattenNorm.apply(w.to(computation_dtype(w.dtype, certified=False)), num_iterations, gradient)


class _SchattenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, num_iterations: int, gradient: str) -> Tensor:
        g = w if w.shape[-2] >= w.shape[-1] else w.mH
        exponents, losses = [], []
        with full_precision(w.device.type):
            for _ in range(num_iterations):
                g, exponent, loss = gram_step(g)
                exponents.append(exponent)
                losses.append(loss)
            high = frobenius(g) * (1 + g.shape[-1] ** 2 * UNIT_ROUNDOFF) + losses[-1]
            _, high = back_to_scale(torch.zeros_like(high), high, exponents, losses)
            pair = _leading_pair(w, g) if gradient == "rank_one" and ctx.needs_input_grad[0] else ()
        bound = (high * (1 + allowance_of(w))).to(w.real.dtype)
        ctx.save_for_backward(w, *pair)
        ctx.bound, ctx.num_iterations = bound.detach(), num_iterations
        return bound

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        w, *pair = ctx.saved_tensors
        with full_precision(w.device.type):
            direction = (
                LeadingDirection.apply(w, *pair) if pair else _schatten_gradient(w, ctx.bound, ctx.num_iterations)
            )
        return grad_output[..., None, None] * direction, None, None


def _leading_pair(w: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    x = scale_by_power_of_two(w, -matrix_exponent(w))
    if w.shape[-2] >= w.shape[-1]:
        return leading_pair(x, power)
    v, u = leading_pair(x.mH, power)
    return u, v


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
