"""Histograms of scores: integers that add exactly, from which bounds on the mean are computed."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


SMALLEST_BIN_EXPONENT = -24
LARGEST_RATIO = 1.02
BINS_PER_SIDE = math.ceil((-1 - SMALLEST_BIN_EXPONENT) * math.log(2) / math.log(LARGEST_RATIO))
NUM_SCORE_BINS = 2 * BINS_PER_SIDE + 3
# What one score adds to an interpolated histogram.
SCORE_WEIGHT = 2**30

Array = NDArray[np.float64]


def score_bins() -> Array:
    """
    Where scores are binned: 0, a geometric sequence from 2⁻²⁴ to 1/2 with ratio below 1.02, its mirror image up to
    1 - 2⁻²⁴, and 1. Two neighbours differ by less than 2 % of min(x, 1 - x) for every x between them, or are the two
    at an end, 2⁻²⁴ apart.

    Returns:
        array of shape `(NUM_SCORE_BINS,)`, float64, increasing, all multiples of 2⁻⁵³, so that `1 - score_bins()` is
        exactly its reverse.
    """
    return _bins().copy()


def interpolation_weights(scores: Tensor, *, are_checked: bool = False) -> tuple[Tensor, Tensor]:
    r"""
    The two bins around each score, and how much of it belongs to the upper one.

    Args:
        scores (`torch.Tensor`):
            In [0, 1], of any shape and floating-point type, on a device that has float64.
        are_checked (`bool`, *optional*, defaults to `False`):
            They are known to be in [0, 1], or will be checked later: nothing waits for the device then.

    Returns:
        `lower_bins`, `weights`: `torch.Tensor` of the same shape and device, int64. Weight \\(w\\) of `SCORE_WEIGHT`
        is for bin `lower_bins + 1` and the rest for bin `lower_bins`, w = ⌊2³⁰ (x - a) / (b - a)⌋ for bins a and b.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1].
    """
    scores = scores.double().contiguous()
    if not are_checked:
        _check(scores)
    bins = _bins_on(scores.device)
    below = (torch.bucketize(scores, bins, right=True) - 1).clamp_(max=NUM_SCORE_BINS - 2)
    left = bins[below]
    share = (scores - left) / (bins[below + 1] - left)
    return below, (share * SCORE_WEIGHT).floor_().to(torch.int64)


def interpolated_histogram(scores: Tensor) -> Tensor:
    r"""
    Histogram with each score x shared between the two bins around it, a ≤ x ≤ b, so that their weighted mean is x.

    `weights = histogram / SCORE_WEIGHT` stands for counts in every bound on the mean, and the bound is sound. The sum
    is kept. A sum of squares only grows, as a chord of a convex function lies above it. In [`betting_lower`] and
    [`betting_upper`] a log factor is concave in the sample, so its chord

    $$\frac{b - x}{b - a} \ln(1 + \lambda (a - m)) + \frac{x - a}{b - a} \ln(1 + \lambda (b - m))$$

    is never above \\(\ln(1 + \lambda (x - m))\\), nor the capital above the true one. To second order it loses at most
    \\(\lambda^2 (b - a)^2 / 8\\) a sample. The width of a betting bound grows by less than 1 % on softmax-like scores,
    10 000 samples; rounded to cells they give up to 6 times the width. Values are `bin_ends()`.

    Args:
        scores (`torch.Tensor` of shape `(n, K)`):
            In [0, 1].

    Returns:
        `torch.Tensor` of shape `(K, NUM_SCORE_BINS)`, int64, on the device of the scores; each row sums to
        `n * SCORE_WEIGHT`. Histograms add exactly up to 2³³ scores.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1].
    """
    below, weights = interpolation_weights(scores)
    return _added(below, SCORE_WEIGHT - weights, NUM_SCORE_BINS) + _added(below + 1, weights, NUM_SCORE_BINS)


def bin_ends() -> tuple[Array, Array]:
    r"""
    The bins, moved down and up by what the rounding of weights in [`interpolated_histogram`] can hide: the weighted
    mean of a score's two bins is at most the score by the first array, and at least the score by the second. A lower
    bound on the mean takes the first for values, an upper bound the second. Weights are rounded down by less than one
    unit of 2⁻³⁰, and not at all beside 1, whose bin cannot move.
    """
    bins = _bins()
    steps = np.diff(bins)
    unit = np.maximum(np.append(steps, 0.0), np.append(0.0, steps)) / SCORE_WEIGHT
    return bins * (1 - 2.0**-52), np.minimum(np.nextafter(bins + unit * (1 + 2.0**-20), 2), 1.0)


@cache
def _bins() -> Array:
    exponents = SMALLEST_BIN_EXPONENT + (-1 - SMALLEST_BIN_EXPONENT) * np.arange(BINS_PER_SIDE + 1) / BINS_PER_SIDE
    lower = np.round(np.exp2(exponents + 53)) / 2.0**53
    return np.concatenate([[0.0], lower, 1 - lower[-2::-1], [1.0]])


@cache
def _bins_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_bins()).to(device)


def _added(places: Tensor, weights: Tensor, size: int) -> Tensor:
    columns = torch.arange(places.shape[1], device=places.device)
    histogram = torch.zeros(places.shape[1] * size, dtype=torch.int64, device=places.device)
    histogram.index_add_(0, (columns * size + places).flatten(), weights.flatten())
    return histogram.view(-1, size)


def _check(scores: Tensor) -> None:
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("Scores must be in [0, 1] and not NaN.")
