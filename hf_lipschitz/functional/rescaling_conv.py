"""Spectral rescaling of convolutions: one number an output or input channel, for every input size at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as cartesian
from typing import Literal

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.geometry import ConvGeometry, boundary_factor, conv_geometry, folded_kernel
from hf_lipschitz.functional.products import computation_dtype, product
from hf_lipschitz.functional.rescaling import (
    check_num_iterations,
    exact_products,
    rescale_rows,
    rescaling_of_rows,
    row_weights,
)


MAX_ITERATIONS = 3

Side = Literal["output", "input"]


def conv_spectral_rescaling(
    kernel: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    side: Side = "output",
    num_iterations: int = 1,
    q: Tensor | None = None,
    certified: bool = False,
) -> Tensor:
    r"""One number t a channel, such that a convolution with each output channel (or each input channel) divided by its
    t has norm at most 1, whatever the size of its input; differentiable.

    With P the autocorrelation of the kernel, \(P_{ij}[l] = \sum_{c,k} K_{ic}[k + l] K_{jc}[k]\) over all lags l, which
    is the kernel of AAᵀ for the convolution A on the infinite grid, \(P^m\) its m-fold convolution with itself,
    m = 2^{N-1}, and weights q > 0 of the channels,

    \(t_i = \big(\sum_j \frac{q_j}{q_i} \sum_l |P^m_{ij}[l]|\big)^{1/(2m)}\).

    The proof is that of [`spectral_rescaling`] for the block Toeplitz operator AAᵀ, whose rows at output channel i all
    have this sum; so is the treatment of rounding, a row having one entry for each channel and lag. Zero padding of
    any amount and every input size are compressions of A, which commute with the division. N = 1 is AOL (Prach &
    Lampert 2022).

    A stride s folds the kernel by space-to-depth, which leaves the lags that are multiples of s. For a transposed
    convolution the rows are pairs of an output channel and one of ∏s phases of the output grid; t is the largest over
    the phases. Replicate and reflect padding multiply t by the norm of the padding; circular padding by no more than
    the kernel's extent is a compression of a circulant operator, whose frequencies are some of those of A, and costs
    nothing (with the lags of stride 1, as a stride need not divide the period).

    With `side="input"` the rows are those of the adjoint, the transposed convolution of the same stored kernel: the
    phases then belong to a convolution and a transposed one has none. Padding copies points of space and the division
    acts on channels, so they commute, and the boundary costs what it costs on the output side. This is the side of
    the SLL layer, \(W T^{-1/2}\) with \(T \succeq W^TW\) (Araujo et al. 2023).

    Args:
        kernel (`Tensor` of shape `(c_out, c_in / groups, k_1[, k_2[, k_3]])`, or `(c_in, c_out / groups, k_1, ...)`):
            As torch stores it, for a convolution or a transposed one. Real, float16 to float64.
        stride, padding, dilation, groups, padding_mode, output_padding:
            As in `torch.nn.Conv1d/2d/3d` or `torch.nn.ConvTranspose1d/2d/3d`.
        transposed (`bool`, *optional*, defaults to `False`):
            The kernel is used by a transposed convolution.
        side (`str`, *optional*, defaults to `"output"`):
            Which channels are divided, `"output"` or `"input"` ones of the layer.
        num_iterations (`int`, *optional*, defaults to 1):
            N, 1 to 3: the kernel of the last iterate has 2^N (k - 1) + 1 taps an axis.
        q (`Tensor`, *optional*):
            Positive weights of the channels of that side, broadcastable to `(channels,)`.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64, so that the rounding analysis applies.

    Returns:
        `Tensor` of shape `(c_out,)`, or `(c_in,)` with `side="input"`, in the dtype of the computation, 0 for
        channels of zeros: a **sound bound** of the rescaled operator by 1, hence `max(t)` one of the operator; proved
        in float64 or with `certified=True`, up to the stated allowance of [`spectral_rescaling`] in float32.
        [`rescale_kernel`] divides a kernel by it.

    Raises:
        ValueError: a geometry that no convolution has, `num_iterations` outside 1 to 3, `side` unknown, `q` not
            positive, NaN or inf.
        TypeError: `kernel` is not a real floating-point tensor.
    """
    check_weight(kernel, "kernel")
    if kernel.is_complex():
        raise TypeError("kernel is complex; no torch convolution layer has one, so take its real and imaginary parts")
    check_num_iterations(num_iterations)
    if num_iterations > MAX_ITERATIONS:
        raise ValueError(
            f"num_iterations must be at most {MAX_ITERATIONS} for a convolution, got {num_iterations}: the kernel of "
            "the iterate doubles its extent at each step; conv_spectral_norm_bound is the cheaper way to a tight bound"
        )
    geometry = conv_geometry(
        kernel.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    check_side(side)
    weights = row_weights(q, torch.Size([num_channels(kernel.shape, geometry, side)]))
    wide = kernel.to(computation_dtype(kernel.dtype, certified))
    t = rescaling_of_kernel(wide, geometry, side=side, num_iterations=num_iterations, q=weights)
    return t.to(wide.dtype)


def rescaling_of_kernel(
    kernel: Tensor,
    geometry: ConvGeometry,
    *,
    side: Side = "output",
    num_iterations: int = 1,
    q: Tensor | None = None,
) -> Tensor:
    """[`conv_spectral_rescaling`] in tensor operations only, without a look at the entries.

    Args:
        kernel (`Tensor`):
            As torch stores it; half precision is computed in float32, NaN and inf give NaN. A float64 one compiles as
            a single graph.
        geometry (`ConvGeometry`):
            How the layer uses it.
        side (`str`, *optional*, defaults to `"output"`):
            `"output"` or `"input"`.
        num_iterations (`int`, *optional*, defaults to 1):
            1 to 3; not checked.
        q (`Tensor` of shape `(channels,)`, *optional*):
            Positive float64 weights within 2^-400 and 2^400; not checked.

    Returns:
        `Tensor` of shape `(channels,)`, float64: **sound** as [`conv_spectral_rescaling`].
    """
    free = _with_free_circular_padding(kernel.shape, geometry)
    rows = folded_kernel(kernel.to(computation_dtype(kernel.dtype, False)), free)
    rows = rows.transpose(1, 2) if is_on_second_axis(geometry, side) else rows
    channels = num_channels(kernel.shape, geometry, side) // geometry.groups
    # Those of the larger grid that the kernel reaches.
    phases = rows.shape[1] // channels
    if q is not None:
        q = q.reshape(geometry.groups, channels).repeat_interleave(phases, dim=1)
    with exact_products(rows):
        t = rescaling_of_rows(rows, q, num_iterations, 1, autocorrelation)
    factor = boundary_factor(kernel.shape, free) * (1 + 1e-14)
    return t.reshape(geometry.groups * channels, phases).amax(-1) * factor


def rescale_kernel(kernel: Tensor, geometry: ConvGeometry, t: Tensor, *, side: Side = "output") -> Tensor:
    """The kernel with each channel of the side divided by its t, and zeros where t = 0.

    Args:
        kernel (`Tensor`):
            As torch stores it.
        geometry (`ConvGeometry`):
            How the layer uses it.
        t (`Tensor` of shape `(channels,)`):
            From [`conv_spectral_rescaling`] of the same side.
        side (`str`, *optional*, defaults to `"output"`):
            `"output"` or `"input"`.

    Returns:
        `Tensor` of the shape of `kernel`, in the wider dtype of both.

    Raises:
        ValueError: `t` does not have one entry a channel.
    """
    channels = num_channels(kernel.shape, geometry, side)
    if t.shape != (channels,):
        raise ValueError(f"t must have one entry a channel of the {side}, shape ({channels},), got {tuple(t.shape)}")
    if not is_on_second_axis(geometry, side):
        return rescale_rows(kernel.flatten(1), t).reshape(kernel.shape)
    groups = geometry.groups
    stored = kernel.reshape(groups, kernel.shape[0] // groups, kernel.shape[1], -1)
    each = t.reshape(groups, 1, kernel.shape[1]).expand(stored.shape[:-1])
    return rescale_rows(stored, each).reshape(kernel.shape)


def num_channels(kernel_shape: Sequence[int], geometry: ConvGeometry, side: Side) -> int:
    """Channels on a side of the layer."""
    return kernel_shape[1] * geometry.groups if is_on_second_axis(geometry, side) else kernel_shape[0]


def is_on_second_axis(geometry: ConvGeometry, side: Side) -> bool:
    """Whether the channels of a side are on the second axis of the stored kernel, group by group."""
    return geometry.transposed != (side == "input")


def check_side(side: str) -> None:
    """Raises a ValueError unless `side` is `"output"` or `"input"`."""
    if side not in ("output", "input"):
        raise ValueError(f"side must be 'output' or 'input', got {side!r}")


def autocorrelation(h: Tensor) -> Tensor:
    """P_ij[l] = Σ_c Σ_k h_ic[k + l] h_jc[k] for a stack of kernels, by one product of matrices a pair of lags ±l.

    Args:
        h (`Tensor` of shape `(groups, r, c, k_1, ...)`).

    Returns:
        `Tensor` of shape `(groups, r, r, 2 k_1 - 1, ...)`, with lag 0 in the middle and P_ij[l] = P_ji[-l] exactly.
    """
    taps = h.shape[3:]
    lags = list(cartesian(*(range(1 - k, k) for k in taps)))
    middle = len(lags) // 2
    before = [_at_lag(h, lag) for lag in lags[:middle]]
    centre = _at_lag(h, lags[middle])
    after = [p.mT for p in reversed(before)]
    stacked = torch.stack([*before, (centre + centre.mT) / 2, *after], dim=-1)
    return stacked.reshape(*stacked.shape[:3], *(2 * k - 1 for k in taps))


def _at_lag(h: Tensor, lag: tuple[int, ...]) -> Tensor:
    ahead = behind = h
    for axis, shift in enumerate(lag, start=3):
        length = h.shape[axis] - abs(shift)
        ahead = ahead.narrow(axis, max(shift, 0), length)
        behind = behind.narrow(axis, max(-shift, 0), length)
    return product(ahead.flatten(2), behind.flatten(2).mT)


def _with_free_circular_padding(shape: Sequence[int], geometry: ConvGeometry) -> ConvGeometry:
    """Stride 1 on the axes whose circular padding then costs nothing: fewer outputs of the same operator."""
    axes = zip(geometry.stride, geometry.padding, geometry.dilation, shape[2:], strict=True)
    stride = tuple(1 if 0 < sum(pads) <= d * (k - 1) else s for s, pads, d, k in axes)
    return geometry._replace(stride=stride) if geometry.padding_mode == "circular" else geometry
