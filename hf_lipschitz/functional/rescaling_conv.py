"""Spectral rescaling of convolutions: one number an output channel, for every input size at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as cartesian

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.geometry import ConvGeometry, boundary_factor, conv_geometry, folded_kernel
from hf_lipschitz.functional.precision import full_precision
from hf_lipschitz.functional.products import computation_dtype, product
from hf_lipschitz.functional.rescaling import check_num_iterations, rescaling_of_rows, row_weights


MAX_ITERATIONS = 3


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
    num_iterations: int = 1,
    q: Tensor | None = None,
    certified: bool = False,
) -> Tensor:
    r"""One number t an output channel, such that a convolution with each output channel divided by its t has norm at
    most 1, whatever the size of its input; differentiable.

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

    Args:
        kernel (`Tensor` of shape `(c_out, c_in / groups, k_1[, k_2[, k_3]])`, or `(c_in, c_out / groups, k_1, ...)`):
            As torch stores it, for a convolution or a transposed one. Real, float16 to float64.
        stride, padding, dilation, groups, padding_mode, output_padding:
            As in `torch.nn.Conv1d/2d/3d` or `torch.nn.ConvTranspose1d/2d/3d`.
        transposed (`bool`, *optional*, defaults to `False`):
            The kernel is used by a transposed convolution.
        num_iterations (`int`, *optional*, defaults to 1):
            N, 1 to 3: the kernel of the last iterate has 2^N (k - 1) + 1 taps an axis.
        q (`Tensor`, *optional*):
            Positive weights of the output channels, broadcastable to `(c_out,)`.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64, so that the rounding analysis applies.

    Returns:
        `Tensor` of shape `(c_out,)`, in the dtype of the computation, 0 for channels of zeros: a **sound bound** of
        the rescaled operator by 1, hence `max(t)` one of the operator; proved in float64 or with `certified=True`, up
        to the stated allowance of [`spectral_rescaling`] in float32.

    Raises:
        ValueError: a geometry that no convolution has, `num_iterations` outside 1 to 3, `q` not positive, NaN or inf.
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
    geometry = _with_free_circular_padding(kernel.shape, geometry)
    rows = folded_kernel(kernel.to(computation_dtype(kernel.dtype, certified)), geometry)
    rows = rows.transpose(1, 2) if transposed else rows
    channels = kernel.shape[1] if transposed else rows.shape[1]
    # Those of the output grid that the kernel reaches.
    phases = rows.shape[1] // channels
    weights = row_weights(q, torch.Size([groups * channels]))
    if weights is not None:
        weights = weights.reshape(groups, channels).repeat_interleave(phases, dim=1)
    with full_precision(kernel.device.type):
        t = rescaling_of_rows(rows, weights, num_iterations, 1, autocorrelation)
    factor = boundary_factor(kernel.shape, geometry) * (1 + 1e-14)
    t = t.reshape(groups * channels, phases).amax(-1) * factor
    return t.to(rows.dtype)


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
