"""How a convolution uses its kernel, and the stride-1, dilation-1 kernel of the same operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.boundary import BOUNDARIES, boundary_norm


Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


class ConvGeometry(NamedTuple):
    """How torch applies a kernel; one entry a spatial axis, `padding` as (before, after) pairs.

    A transposed convolution is the adjoint of the convolution of the same numbers with the kernel as it is stored,
    whatever its `output_padding`.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def reduced_stride(self) -> tuple[int, ...]:
        """s / gcd(s, d) an axis: the stride of each of the dilation-1 convolutions that the operator splits into."""
        return tuple([s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)])


class AxisFold(NamedTuple):
    """What becomes of one axis of a kernel: taps `first` to `stop` are kept, spread by `dilation`, folded by `stride`.

    `points` is the grid of frequencies for the result and `factor` what the norm on that grid is multiplied by.
    """

    first: int
    stop: int
    dilation: int
    stride: int
    points: int
    factor: float

    @property
    def taps(self) -> int:
        """k' = ⌈k_e / s⌉, the taps after folding."""
        kept = self.stop - self.first
        return -(-(self.dilation * (kept - 1) + 1) // self.stride) if kept > 0 else 0


def conv_geometry(
    kernel_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> ConvGeometry:
    """Checks the arguments of a convolution and puts them in one form."""
    axes = len(kernel_shape) - 2
    if axes not in (1, 2, 3):
        raise ValueError(
            f"kernel must have shape (c_out, c_in / groups, k_1[, k_2[, k_3]]), got {tuple(kernel_shape)}"
        )
    if not isinstance(groups, int) or groups < 1 or kernel_shape[0] % groups:
        side = "input" if transposed else "output"
        raise ValueError(f"groups={groups} does not divide the {kernel_shape[0]} {side} channels of the kernel")
    if padding_mode not in BOUNDARIES:
        raise ValueError(f"padding_mode must be one of {', '.join(BOUNDARIES)}, got {padding_mode!r}")
    strides = _per_axis(stride, axes, "stride", 1)
    dilations = _per_axis(dilation, axes, "dilation", 1)
    pads = _padding_pairs(padding, kernel_shape[2:], strides, dilations)
    extra = _per_axis(output_padding, axes, "output_padding", 0)
    if transposed:
        _check_transposed(padding, pads, padding_mode, strides, dilations, extra)
    elif any(extra):
        raise ValueError(f"output_padding={output_padding!r} belongs to transposed convolutions: pass transposed=True")
    return ConvGeometry(strides, pads, dilations, groups, padding_mode, transposed, extra)


def folded_kernel(kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    r"""The stride-1, dilation-1 kernel of the same norm: (groups, c_out/g, c_in/g · ∏s', k'_1, ...), k' = ⌈k/s'⌉.

    With g = gcd(s, d) a convolution of stride s and dilation d reads one input in g, and splits into d/g convolutions
    of stride s' = s/g and dilation 1 with the same kernel, on disjoint inputs and outputs: output i reads
    s i + d j = s r + d (s' m + j) for i = (d/g) m + r, and s r runs over different residues modulo d. So the norm over
    all input sizes is that of stride s' and dilation 1, and space-to-depth does the rest.
    """
    strides = geometry.reduced_stride
    folds = [AxisFold(0, k, 1, s, 0, 1.0) for k, s in zip(kernel.shape[2:], strides, strict=True)]
    return fold(kernel, folds, geometry.groups)


def fold(kernel: Tensor, folds: Sequence[AxisFold], groups: int) -> Tensor:
    """The kernel with each axis cut, spread and folded by space-to-depth, one group a batch entry."""
    strides = []
    for axis, part in enumerate(folds, start=2):
        kernel = _spread(kernel.narrow(axis, part.first, part.stop - part.first), axis, part.dilation)
        # Points of the input between the taps of a kernel and the next ones would be channels of zeros.
        strides.append(max(1, min(part.stride, kernel.shape[axis])))
        missing = -kernel.shape[axis] % strides[-1]
        if missing:
            shape = list(kernel.shape)
            shape[axis] = missing
            kernel = torch.cat([kernel, kernel.new_zeros(shape)], dim=axis)
    out_channels, in_channels = kernel.shape[0] // groups, kernel.shape[1]
    pairs = [(k // s, s) for k, s in zip(kernel.shape[2:], strides, strict=True)]
    kernel = kernel.reshape(groups, out_channels, in_channels, *(size for pair in pairs for size in pair))
    taps = [3 + 2 * i for i in range(len(pairs))]
    phases = [axis + 1 for axis in taps]
    kernel = kernel.permute(0, 1, 2, *phases, *taps)
    return kernel.reshape(groups, out_channels, in_channels * math.prod(strides), *(k for k, _ in pairs))


def kernel_to_operator(shape: Sequence[int], geometry: ConvGeometry) -> float:
    """√taps times the padding norms: the operator of a kernel E has norm at most this times ‖E‖_F."""
    taps = math.prod([-(-k // s) for k, s in zip(shape[2:], geometry.reduced_stride, strict=True)])
    return math.sqrt(taps) * boundary_factor(shape, geometry) * (1 + 1e-14)


def boundary_factor(shape: Sequence[int], geometry: ConvGeometry) -> float:
    """What padding other than zeros multiplies the norm of the convolution by, at most, on inputs of any size."""
    factors = [
        boundary_norm(geometry.padding_mode, pads, d * (k - 1) + 1, s)
        for k, pads, s, d in zip(shape[2:], geometry.padding, geometry.stride, geometry.dilation, strict=True)
    ]
    return math.prod(factors)


def _per_axis(value: int | Sequence[int], axes: int, name: str, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be an int of at least {least} or {axes} of them, got {value!r}")
    return values


def _padding_pairs(
    padding: Padding, taps: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    axes = len(taps)
    if padding == "valid":
        return ((0, 0),) * axes
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got {tuple(strides)}")
        totals = [d * (k - 1) for d, k in zip(dilations, taps, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, a tuple, 'same' or 'valid', got {padding!r}")
    if isinstance(padding, int) or any(isinstance(p, int) for p in padding):
        return tuple((p, p) for p in _per_axis(padding, axes, "padding", 0))
    if len(padding) != axes:
        raise ValueError(f"padding must be an int or {axes} ints or (before, after) pairs, got {padding!r}")
    return tuple(_per_axis(tuple(pair), 2, "each padding pair", 0) for pair in padding)


def _check_transposed(
    padding: Padding,
    pads: Sequence[tuple[int, int]],
    padding_mode: str,
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
) -> None:
    if padding_mode != "zeros":
        raise ValueError(f"a transposed convolution has padding_mode 'zeros' only, got {padding_mode!r}")
    if isinstance(padding, str) or any(before != after for before, after in pads):
        raise ValueError(f"a transposed convolution takes padding as an int or one int an axis, got {padding!r}")
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(
            f"output_padding must be smaller than the stride or the dilation of its axis: lower {tuple(extra)} below "
            f"stride {tuple(strides)} or dilation {tuple(dilations)}"
        )


def _spread(kernel: Tensor, axis: int, dilation: int) -> Tensor:
    if dilation == 1 or kernel.shape[axis] <= 1:
        return kernel
    stacked = torch.stack([kernel, *[torch.zeros_like(kernel)] * (dilation - 1)], dim=axis + 1)
    spread = stacked.flatten(axis, axis + 1)
    return spread.narrow(axis, 0, spread.shape[axis] - dilation + 1)
