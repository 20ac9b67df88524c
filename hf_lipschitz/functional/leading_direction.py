"""The direction u vᴴ of the leading pair of singular vectors, as a differentiable function of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import matrix_exponent, unit
from hf_lipschitz.functional.scaling import scale_by_power_of_two


def leading_pair(w: Tensor, power: Tensor, num_products: int = 4) -> tuple[Tensor, Tensor]:
    """Estimates of u and v for a tall W, from a high power of WᴴW: its largest column, then products with it.

    Args:
        w (`Tensor` of shape `(..., m, n)`):
            m ≥ n, entries near one.
        power (`Tensor` of shape `(..., n, n)`):
            A multiple of (WᴴW)^k of entries near one; each product divides the error by (σ₁/σ₂)^{2k}.
        num_products (`int`, *optional*, defaults to 4):
            Products with `power`.

    Returns:
        `tuple[Tensor, Tensor]`: u of shape `(..., m)` and v of shape `(..., n)`, with u = Wv/‖Wv‖ so that Re uᴴWv is
        at most σ₁ and close to it even where v is some mixture of singular vectors; zeros where W = 0. **Estimates**.
    """
    largest = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    v = power.gather(-1, largest[..., None, None].expand(*power.shape[:-1], 1))
    for _ in range(num_products):
        v = unit(power @ unit(v))
    v = unit(w.mH @ unit(w @ unit(v)))
    return unit(w @ v).squeeze(-1), v.squeeze(-1)


class LeadingDirection(torch.autograd.Function):
    r"""u vᴴ of a given leading pair of W, with the closed form of its derivative, itself differentiable.

    Differentiating Wv = σu and Wᴴu = σv, with R the pseudo-inverse of σ²I - WᴴW, a change E of W gives

    dv = R (σEᴴu + WᴴEv), du = ((I - uuᴴ)Ev + W dv)/σ, up to phases of which u vᴴ keeps i Im(uᴴEv)/σ.

    The adjoint takes a cotangent C of u vᴴ to

    \(q v^H + \sigma u p^H, \quad p = R(C^Hu + W^HCv/\sigma), \quad q = (Cv - \mathrm{Re}(u^HCv)\,u)/\sigma + Wp\).

    Where σ₁ is repeated u vᴴ is not differentiable; R then leaves out the whole eigenspace, which keeps everything
    finite. Where W = 0 the derivative is 0.
    """

    @staticmethod
    def forward(ctx, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(w, u, v)
        return u.unsqueeze(-1) * v.conj().unsqueeze(-2)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, None, None]:
        w, u, v = ctx.saved_tensors
        with full_precision(w.device.type):
            if w.shape[-2] >= w.shape[-1]:
                return _adjoint(w, u, v, cotangent), None, None
            return _adjoint(w.mH, v, u, cotangent.mH).mH, None, None


def _adjoint(w: Tensor, fixed_u: Tensor, fixed_v: Tensor, cotangent: Tensor) -> Tensor:
    """The adjoint of [`LeadingDirection`] for a tall W, in operations that autograd follows.

    u and v are read from u vᴴ, whose derivative is known, with the phase in which the fixed u is real and positive.
    """
    exponent = matrix_exponent(w.detach())
    x = scale_by_power_of_two(w, -exponent)
    direction = LeadingDirection.apply(w, fixed_u, fixed_v)
    v = unit(direction.mH @ fixed_u.unsqueeze(-1))
    u = direction @ v
    sigma = (u.conj() * (x @ v)).real.sum(dim=(-2, -1), keepdim=True)
    divisor = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    a, b = cotangent @ v, cotangent.mH @ u
    p = _complement_inverse(x, sigma) @ _without(v, b + x.mH @ a / divisor)
    p = _without(v, p)
    q = (a - u * (u.conj() * a).real.sum(-2, keepdim=True)) / divisor + x @ p
    return scale_by_power_of_two(q @ v.mH + sigma * u @ p.mH, -exponent)


def _complement_inverse(x: Tensor, sigma: Tensor) -> Tensor:
    """Pseudo-inverse of σ²I - XᴴX, eigenvalues within rounding of zero left out."""
    n = x.shape[-1]
    square = sigma**2
    shifted = square * torch.eye(n, dtype=x.dtype, device=x.device) - x.mH @ x
    tolerance = 10 * n * torch.finfo(x.dtype).eps * square.detach()[..., 0, 0]
    return torch.linalg.pinv(shifted, atol=tolerance, rtol=torch.zeros_like(tolerance), hermitian=True)


def _without(v: Tensor, y: Tensor) -> Tensor:
    return y - v @ (v.mH @ y)
