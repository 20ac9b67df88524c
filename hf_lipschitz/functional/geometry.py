"""How a convolution uses its kernel, and the stride-1, dilation-1 kernel of the same operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ConvGeometry(NamedTuple):
    """How `torch.nn.ConvNd` applies a kernel; one entry a spatial axis, `padding` as (before, after) pairs."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


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


def folded_kernel(kernel: Tensor, geometry: ConvGeometry) -> Tensor:
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


def kernel_to_operator(shape: Sequence[int], geometry: ConvGeometry) -> float:
    """√taps times the padding norms: the operator of a kernel E has norm at most this times ‖E‖_F."""
    taps = 1
    for k, stride, dilation in zip(shape[2:], geometry.stride, geometry.dilation, strict=True):
        taps *= min(k, -(-(dilation * (k - 1) + 1) // stride))
    padding = math.prod(padding_norm(p, geometry) for p in geometry.padding)
    return math.sqrt(taps) * padding * (1 + 1e-14)


def padding_norm(padding: tuple[int, int], geometry: ConvGeometry) -> float:
    if geometry.padding_mode == "zeros" or padding == (0, 0):
        return 1.0
    return math.sqrt(1 + sum(padding)) if geometry.padding_mode == "replicate" else math.sqrt(3)
