"""Upper bounds of the spectral norm of a convolution, for every input size at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.gram import UNIT_ROUNDOFF, GramBracket, largest_gram_bracket


# A grid of 8(k - 1) frequencies an axis costs at most a factor 1/cos(π/16) = 1.0196 an axis.
OVERSAMPLING = 8


class ConvGeometry(NamedTuple):
    """How `torch.nn.ConvNd` applies a kernel; one entry a spatial axis, `padding` as (before, after) pairs."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


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
        matrix = _transfer_matrices(_folded(leaf, geometry))[where]
        left, right = (vector.to(matrix.dtype) for vector in (bracket.left, bracket.right))
        value = (left.conj() @ (matrix @ right)).real * factor
        (direction,) = torch.autograd.grad(value, leaf)
    return bracket.upper * factor, direction


def conv_geometry(
    kernel_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> ConvGeometry:
    """Checks the arguments of a convolution and puts them in one form."""
    axes = len(kernel_shape) - 2
    if axes not in (1, 2, 3):
        raise ValueError(
            f"kernel must have shape (c_out, c_in / groups, k_1[, k_2[, k_3]]), got {tuple(kernel_shape)}"
        )
    if groups < 1 or kernel_shape[0] % groups:
        raise ValueError(f"groups={groups} does not divide the {kernel_shape[0]} output channels of the kernel")
    if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(f"padding_mode must be zeros, reflect, replicate or circular, got {padding_mode!r}")
    strides = _per_axis(stride, axes, "stride", 1)
    dilations = _per_axis(dilation, axes, "dilation", 1)
    if padding == "valid":
        pads: tuple[tuple[int, int], ...] = ((0, 0),) * axes
    elif padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got {strides}")
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_shape[2:], strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be an int, a tuple, 'same' or 'valid', got {padding!r}")
    else:
        pads = tuple((p, p) for p in _per_axis(padding, axes, "padding", 0))
    return ConvGeometry(strides, pads, dilations, groups, padding_mode)


def _per_axis(value: int | Sequence[int], axes: int, name: str, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be an int of at least {least} or {axes} of them, got {value!r}")
    return values


def _worst_frequency(
    kernel: Tensor, geometry: ConvGeometry, rtol: float, certified: bool
) -> tuple[GramBracket, float, tuple[Tensor, ...]]:
    """The bracket at the frequency and group of largest upper end, the factor on it, and the index of that matrix."""
    if kernel.is_complex():
        raise TypeError("kernel is complex; no torch convolution layer has one, so take its real and imaginary parts")
    dtype = torch.promote_types(kernel.dtype, torch.float64 if certified else torch.float32)
    folded = _folded(kernel.detach().to(dtype), geometry)
    matrices = _transfer_matrices(folded)
    bracket, index = largest_gram_bracket(matrices.flatten(0, -3), rtol)
    where = torch.unravel_index(index, matrices.shape[:-2])
    factor = math.prod(
        [_riesz_factor(taps) for taps in folded.shape[3:]] + [_padding_norm(p, geometry) for p in geometry.padding]
    )
    worst = bracket._replace(upper=bracket.upper + _transform_loss(folded))
    return worst, factor * (1 + 1e-14), where


def _folded(kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    """The stride-1, dilation-1 kernel of the same operator: (groups, c_out/g, c_in/g · ∏s, k'_1, ...)."""
    for axis, (dilation, stride) in enumerate(zip(geometry.dilation, geometry.stride, strict=True), start=2):
        kernel = _spread(kernel, axis, dilation)
        missing = -kernel.shape[axis] % stride
        if missing:
            shape = list(kernel.shape)
            shape[axis] = missing
            kernel = torch.cat([kernel, kernel.new_zeros(shape)], dim=axis)
    g = geometry.groups
    out_channels, in_channels = kernel.shape[0] // g, kernel.shape[1]
    pairs = [(k // s, s) for k, s in zip(kernel.shape[2:], geometry.stride, strict=True)]
    kernel = kernel.reshape(g, out_channels, in_channels, *(size for pair in pairs for size in pair))
    taps = [3 + 2 * i for i in range(len(pairs))]
    phases = [axis + 1 for axis in taps]
    kernel = kernel.permute(0, 1, 2, *phases, *taps)
    return kernel.reshape(g, out_channels, in_channels * math.prod(geometry.stride), *(k for k, _ in pairs))


def _spread(kernel: Tensor, axis: int, dilation: int) -> Tensor:
    if dilation == 1 or kernel.shape[axis] == 1:
        return kernel
    stacked = torch.stack([kernel, *[torch.zeros_like(kernel)] * (dilation - 1)], dim=axis + 1)
    spread = stacked.flatten(axis, axis + 1)
    return spread.narrow(axis, 0, spread.shape[axis] - dilation + 1)


def _transfer_matrices(folded: Tensor) -> Tensor:
    """K̂ on the half grid, (groups, n_1, ..., c_out/g, c_in'); the other half are the complex conjugates."""
    taps = folded.shape[3:]
    if all(k == 1 for k in taps):
        matrices = folded.reshape(folded.shape[:3])
        return matrices[(slice(None), *[None] * len(taps))]
    axes = tuple(range(3, folded.dim()))
    transformed = torch.fft.rfftn(folded, s=[_grid(k) for k in taps], dim=axes)
    return transformed.permute(0, *axes, 1, 2)


def _transform_loss(folded: Tensor) -> Tensor:
    """What rounding in the Fourier transform can take from a norm: 8u log₂(n)·√n ‖K‖_F, zero in float32."""
    points = math.prod(_grid(k) for k in folded.shape[3:])
    if folded.dtype != torch.float64 or points == 1:
        return folded.new_zeros((), dtype=torch.float64)
    return 8 * UNIT_ROUNDOFF * math.log2(points) * math.sqrt(points) * torch.linalg.vector_norm(folded)


def kernel_to_operator(shape: Sequence[int], geometry: ConvGeometry) -> float:
    """√taps times the padding norms: the operator of a kernel E has norm at most this times ‖E‖_F."""
    taps = 1
    for k, stride, dilation in zip(shape[2:], geometry.stride, geometry.dilation, strict=True):
        taps *= min(k, -(-(dilation * (k - 1) + 1) // stride))
    padding = math.prod(_padding_norm(p, geometry) for p in geometry.padding)
    return math.sqrt(taps) * padding * (1 + 1e-14)


def _grid(taps: int) -> int:
    return 1 if taps == 1 else OVERSAMPLING * (taps - 1)


def _riesz_factor(taps: int) -> float:
    return 1.0 if taps == 1 else 1 / math.cos(math.pi * (taps - 1) / (2 * _grid(taps)))


def _padding_norm(padding: tuple[int, int], geometry: ConvGeometry) -> float:
    if geometry.padding_mode == "zeros" or padding == (0, 0):
        return 1.0
    return math.sqrt(1 + sum(padding)) if geometry.padding_mode == "replicate" else math.sqrt(3)
