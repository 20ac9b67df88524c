"""Norms of the padding of one axis, with inputs of a known size or of any size that torch accepts."""

from __future__ import annotations

import math


BOUNDARIES = ("zeros", "reflect", "replicate", "circular")


def smallest_size(mode: str, pads: tuple[int, int], reach: int) -> int:
    """The least input size that torch accepts on an axis over which the kernel reaches `reach` points."""
    allowed = {"reflect": max(pads) + 1, "circular": max(pads)}
    return max(1, reach - sum(pads), allowed.get(mode, 1))


def most_copies(mode: str, pads: tuple[int, int], size: int) -> int:
    """How often one entry of an axis of `size` entries occurs on the padded axis; its root is the norm of padding."""
    before, after = pads
    if mode == "zeros" or pads == (0, 0):
        return 1
    if mode == "replicate":
        return 1 + (before + after if size == 1 else max(pads))
    if mode == "reflect":
        return 3 if min(pads) > 0 and 3 <= size <= before + after + 1 else 2
    return 3 if size < before + after else 2


def boundary_norm(mode: str, pads: tuple[int, int], reach: int, stride: int) -> float:
    """Least proved c such that padding an axis by `mode` gives at most c times the norm without padding, at any size.

    [`most_copies`] is largest on the smallest input, or for reflect padding on three points, the fewest on which both
    sides copy one entry. With circular padding and stride 1 the rows of the convolution are those of a circulant
    matrix of no larger norm, each used at most ⌈n_out/n⌉ times.
    """
    if mode == "zeros" or pads == (0, 0):
        return 1.0
    least = smallest_size(mode, pads, reach)
    copies = most_copies(mode, pads, max(least, 3) if mode == "reflect" else least)
    if mode == "circular" and stride == 1:
        copies = min(copies, -(-(least + sum(pads) - reach + 1) // least))
    return math.sqrt(copies)
