"""Circular convolutions that contain a convolution on inputs of a known size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_lipschitz.functional.boundary import most_copies, smallest_size
from hf_lipschitz.functional.geometry import AxisFold, ConvGeometry


def check_input_size(
    kernel_shape: Sequence[int], geometry: ConvGeometry, input_size: int | Sequence[int]
) -> tuple[int, ...]:
    """The size of each spatial axis; raises a ValueError where torch itself refuses inputs of that size."""
    axes = len(geometry.stride)
    sizes = (input_size,) * axes if isinstance(input_size, int) else tuple(input_size)
    if len(sizes) != axes or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"input_size must be a positive int or {axes} of them, got {input_size!r}")
    for axis, (n, k) in enumerate(zip(sizes, kernel_shape[2:], strict=True)):
        reach, pads = geometry.dilation[axis] * (k - 1) + 1, geometry.padding[axis]
        if geometry.transposed:
            if _output_of_transposed(n, k, geometry, axis) < 1:
                raise ValueError(
                    f"input size {n} on axis {axis} leaves no output: enlarge input_size or lower padding"
                )
        elif n < smallest_size(geometry.padding_mode, pads, reach):
            if n + sum(pads) < reach:
                raise ValueError(
                    f"the kernel reaches over {reach} points on axis {axis} and the padded input has {n + sum(pads)}: "
                    "enlarge input_size or padding"
                )
            raise ValueError(
                f"{geometry.padding_mode} padding {pads} does not fit input size {n} on axis {axis}: enlarge "
                "input_size or lower padding"
            )
    return sizes


def known_size_folds(
    kernel_shape: Sequence[int], geometry: ConvGeometry, sizes: Sequence[int]
) -> list[tuple[AxisFold, ...]]:
    """Ways to fold the kernel, each of which gives a sound bound on inputs of `sizes`.

    With circular padding there are up to three: each padded axis as what it is, a circulant matrix, exact where its
    rows are used equally often; as an unpadded one times the norm of the padding; and the first only where the stride
    divides the size.
    """
    arguments = list(zip(range(len(sizes)), kernel_shape[2:], sizes, strict=True))
    embedded = tuple(_embedded(geometry, axis, k, n) for axis, k, n in arguments)
    if geometry.padding_mode != "circular":
        return [embedded]
    padded = [geometry.padding[axis] != (0, 0) for axis, _, _ in arguments]
    circular = tuple(_circular(geometry, axis, k, n) if padded[axis] else embedded[axis] for axis, k, n in arguments)
    mixed = tuple(circular[axis] if n % geometry.stride[axis] == 0 else embedded[axis] for axis, n in enumerate(sizes))
    return list(dict.fromkeys([circular, mixed, embedded]))


def _circular(geometry: ConvGeometry, axis: int, k: int, n: int) -> AxisFold:
    r"""Circular padding as a circulant matrix.

    Row i is row s·i of the stride-1 circulant matrix on n points. With g = gcd(s, n) it is row (s/g)·i of the one that
    is folded by g on n/g points, and s/g is prime to n/g: each row is used at most ⌈n_out g/n⌉ times.
    """
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    rows = (n + sum(geometry.padding[axis]) - dilation * (k - 1) - 1) // stride + 1
    common = math.gcd(stride, n)
    return AxisFold(0, k, dilation, common, n // common, math.sqrt(-(-rows * common // n)))


def _embedded(geometry: ConvGeometry, axis: int, k: int, n: int) -> AxisFold:
    stride, dilation, (before, after) = geometry.stride[axis], geometry.dilation[axis], geometry.padding[axis]
    if geometry.transposed:
        return embedding(k, stride, dilation, before, _output_of_transposed(n, k, geometry, axis), n)
    rows = (n + before + after - dilation * (k - 1) - 1) // stride + 1
    if geometry.padding_mode == "zeros" or (before, after) == (0, 0):
        return embedding(k, stride, dilation, before, n, rows)
    copies = most_copies(geometry.padding_mode, (before, after), n)
    return embedding(k, stride, dilation, 0, n + before + after, rows)._replace(factor=math.sqrt(copies))


def _output_of_transposed(n: int, k: int, geometry: ConvGeometry, axis: int) -> int:
    reach = geometry.dilation[axis] * (k - 1) + 1
    return (n - 1) * geometry.stride[axis] - sum(geometry.padding[axis]) + reach + geometry.output_padding[axis]


def embedding(k: int, stride: int, dilation: int, before: int, columns: int, rows: int) -> AxisFold:
    r"""The smallest circulant matrix that has the convolution of `columns` inputs and `rows` outputs as a block.

    By the splitting of [`folded_kernel`], part r has M rows m and reads columns z = s' m + j of its own, those in
    [z_0, z_1] holding input and the others padding. Taps that only meet padding are left out. After folding, columns
    Q_0 to Q_1 meet rows I_0 to I_1, and entry (i, q) is tap q - i where there is one. The circulant matrix on N points
    holds the same entries as long as no other tap is congruent to q - i modulo N, so for

    N ≥ max(k' + I_1 - Q_0, Q_1 - I_0 + 1), hence for N ≥ rows + k' - 1 always,

    and such an N is at least the number of these rows and of these columns. One output a part is a dense matrix, exact
    on one point.
    """
    common = math.gcd(stride, dilation)
    step, parts = stride // common, dilation // common
    spans = []
    for part in range(min(parts, rows)):
        own_rows = -(-(rows - part) // parts)
        offset = stride * part - before
        low = max(0, -(offset // dilation))
        high = min(step * (own_rows - 1) + k - 1, (columns - 1 - offset) // dilation)
        if low <= high:
            spans.append((own_rows, low, high))
    met = [tap for tap in range(k) if any(_meets_input(tap, step, *span) for span in spans)]
    if not met:
        return AxisFold(0, 0, 1, 1, 1, 1.0)
    first, last = met[0], met[-1]
    if all(own_rows == 1 for own_rows, _, _ in spans):
        return AxisFold(first, last + 1, 1, last - first + 1, 1, 1.0)
    taps = -(-(last - first + 1) // step)
    points = 1
    for own_rows, low, high in spans:
        left = (max(low, first) - first) // step
        right = (min(high, step * (own_rows - 1) + last) - first) // step
        top, bottom = max(0, left - taps + 1), min(own_rows - 1, right)
        points = max(points, taps + bottom - left, right - top + 1)
    return AxisFold(first, last + 1, 1, step, points, 1.0)


def _meets_input(tap: int, step: int, rows: int, low: int, high: int) -> bool:
    """Whether step·m + tap is in [low, high] for a row m."""
    return max(0, -((tap - low) // step)) <= min(rows - 1, (high - tap) // step)
