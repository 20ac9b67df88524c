"""Upper bounds of the spectral norm of a convolution, for every input size at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry, folded_kernel, padding_norm
from hf_lipschitz.functional.gram import GramBracket
from hf_lipschitz.functional.products import computation_dtype
from hf_lipschitz.functional.transfer import largest_transfer_norm, transfer_matrices


# A grid of 8(k - 1) frequencies an axis costs at most a factor 1/cos(π/16) = 1.0196 an axis.
OVERSAMPLING = 8


def conv_spectral_norm_bound(
    kernel: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    rtol: float = 1e-3,
    certified: bool = False,
) -> Tensor:
    r"""Bounds the spectral norm of a 1-D, 2-D or 3-D convolution, whatever the size of its input.

    Dilation inserts zeros into the kernel, a stride s folds it by space-to-depth into a stride-1 kernel of c_in·∏s
    input channels and k' = ⌈k_e/s⌉ taps an axis, k_e = d(k-1)+1; both are exact. The folded operator with zero
    padding of any amount is a compression of the convolution on the infinite grid, whose norm is the supremum over
    frequencies of the norm of its transfer matrix \(\hat K(\omega)\), a trigonometric polynomial of degree k'-1 an
    axis, so (M. Riesz)

    \(\sigma_1 \le \max_{\omega \in \text{grid } n_1 \times \dots} \|\hat K(\omega)\| \prod_i
    1/\cos(\pi(k'_i-1)/(2n_i))\), n_i > k'_i - 1.

    Here n_i = 8(k'_i - 1), at most 2 % an axis. With k' = 1 (1×1 kernels and kernels no longer than their stride,
    such as patch embeddings) the value is the norm of one dense matrix, exact to `rtol` unless the stride never fits
    the input. Groups give the maximum over groups. Other padding modes multiply the bound by the norm of the padding,
    an axis at a time: √(1 + p_l + p_r) for replicate, √3 for reflect and circular, each index being copied at most
    that often.

    Args:
        kernel (`Tensor` of shape `(c_out, c_in / groups, k_1[, k_2[, k_3]])`):
            As torch stores it.
        stride, padding, dilation, groups, padding_mode:
            As in `torch.nn.Conv1d/2d/3d`; `padding` may be `"same"` or `"valid"`.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Asked width of the Gram bracket at each frequency.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64, with a term for the rounding of the Fourier transform and of every product.

    Returns:
        `Tensor`, 0-dim float64: a **sound bound**, for zero padding of any amount and every input size; up to the
        stated float32 allowance of [`spectral_norm_bound`] unless `certified` or float64.

    Raises:
        ValueError: kernel axes, groups, stride, dilation, padding or padding mode that no convolution has; NaN or inf.
        TypeError: `kernel` is not a floating-point tensor.
    """
    check_weight(kernel, "kernel")
    geometry = conv_geometry(
        kernel.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode
    )
    return geometry_bound(kernel, geometry, rtol, certified=certified)


def geometry_bound(kernel: Tensor, geometry: ConvGeometry, rtol: float = 1e-3, *, certified: bool = False) -> Tensor:
    """[`conv_spectral_norm_bound`] for a geometry that was checked before."""
    bracket, factor, _ = _worst_frequency(kernel, geometry, rtol, certified)
    return bracket.upper * factor


def conv_bound_and_direction(kernel: Tensor, geometry: ConvGeometry, rtol: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""The bound of [`conv_spectral_norm_bound`] and its gradient with respect to the kernel.

    The gradient is that of \(\mathrm{Re}(u^H \hat K(\omega) v)\) times the Riesz and padding factors, at the frequency
    and the leading pair (u, v) where the maximum is; an estimate, as singular vectors are.

    Returns:
        `tuple[Tensor, Tensor]`: 0-dim float64 sound bound, and a tensor of the shape of `kernel`.
    """
    bracket, factor, where = _worst_frequency(kernel, geometry, rtol, certified=False)
    with torch.enable_grad():
        leaf = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32)).requires_grad_()
        folded = folded_kernel(leaf, geometry)
        matrix = transfer_matrices(folded, [_grid(k) for k in folded.shape[3:]])[where]
        left, right = (vector.to(matrix.dtype) for vector in (bracket.left, bracket.right))
        value = (left.conj() @ (matrix @ right)).real * factor
        (direction,) = torch.autograd.grad(value, leaf)
    return bracket.upper * factor, direction


def _worst_frequency(
    kernel: Tensor, geometry: ConvGeometry, rtol: float, certified: bool
) -> tuple[GramBracket, float, tuple[Tensor, ...]]:
    """The bracket at the frequency and group of largest upper end, the factor on it, and the index of that matrix."""
    if kernel.is_complex():
        raise TypeError("kernel is complex; no torch convolution layer has one, so take its real and imaginary parts")
    folded = folded_kernel(kernel.detach().to(computation_dtype(kernel.dtype, certified)), geometry)
    taps = folded.shape[3:]
    bracket, where = largest_transfer_norm(folded, [_grid(k) for k in taps], rtol)
    factor = math.prod([_riesz_factor(k) for k in taps] + [padding_norm(p, geometry) for p in geometry.padding])
    return bracket, factor * (1 + 1e-14), where


def _grid(taps: int) -> int:
    return 1 if taps == 1 else OVERSAMPLING * (taps - 1)


def _riesz_factor(taps: int) -> float:
    return 1.0 if taps == 1 else 1 / math.cos(math.pi * (taps - 1) / (2 * _grid(taps)))
