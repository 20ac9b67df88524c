"""The gain of a normalization: applying it, and how much it amplifies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


# Covers the roundings of one square root, one square and one division in float64.
INFLATION = 1 + 2.0**-48
_UNIT_ROUNDOFF = 2.0**-53


def centred_gain_norm(gain: Tensor) -> float:
    r"""\(\|\mathrm{diag}(\gamma) P\|_2\) with \(P = I - \frac1d \mathbf{1}\mathbf{1}^\top\), which takes off the mean.

    Its square is the largest value of \(v^\top \mathrm{diag}(\gamma^2) v\) over unit vectors of mean zero. With
    \(\gamma_{(1)}^2 > \gamma_{(2)}^2\) the two largest squares, it is the one root in between of
    \(f(\lambda) = \sum_i 1/(\lambda - \gamma_i^2)\), which decreases there (the secular equation of Golub 1973); where
    they are equal it is \(\gamma_{(1)}^2\). Bisection in float64 lowers an upper end only to a λ at which f is at most
    0 by more than the rounding of its sum, (d + 2) 2⁻⁵³ of the sum of its absolute terms.

    Args:
        gain (`Tensor`):
            γ, of any shape; its d entries are normalised together.

    Returns:
        `float`: a **sound bound**, a few float64 roundings above the exact norm. 0 for d = 1.

    Raises:
        ValueError: `gain` is empty or holds NaN or inf.
    """
    flat = gain.detach().to("cpu", torch.float64).flatten()
    if flat.numel() == 0 or not bool(torch.isfinite(flat).all()):
        raise ValueError("the gain of a norm is empty or holds NaN or inf: repair or reload its weight")
    scale = flat.abs().max()
    if len(flat) == 1 or scale == 0:
        return 0.0
    squares = (flat / scale).square().sort(descending=True).values
    high, low = squares[0], squares[1]
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        terms = 1 / (middle - squares)
        slack = (len(flat) + 2) * _UNIT_ROUNDOFF * terms.abs().sum()
        low, high = (low, middle) if terms.sum() + slack <= 0 else (middle, high)
    return (high.sqrt() * scale).item() * INFLATION


def gain_of(weight: Tensor | None, offset: float) -> Tensor | None:
    return weight if weight is None or offset == 0 else offset + weight


def affine(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = x if gain is None else x * gain
    return scaled if bias is None else scaled + bias


def centred_norm(weight: Tensor | None, offset: float, shape: tuple[int, ...]) -> float:
    if weight is None:
        return 1.0 if math.prod(shape) > 1 else 0.0
    return centred_gain_norm(_exact_gain(weight, offset))


def largest_gain(weight: Tensor | None, offset: float) -> float:
    if weight is None:
        return 1.0
    largest = _exact_gain(weight, offset).abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("the gain of a norm holds NaN or inf: repair or reload its weight")
    return largest


def _exact_gain(weight: Tensor, offset: float) -> Tensor:
    """The largest of the gains that a forward pass may add up, in the dtype of the weight, in float32 or wider."""
    weight = weight.detach()
    sums = torch.stack([gain_of(weight.to(dtype), offset).double() for dtype in (weight.dtype, torch.float32)])
    sums = torch.cat([sums, gain_of(weight.double(), offset)[None]])
    return sums.gather(0, sums.abs().argmax(0, keepdim=True)).squeeze(0)


def rounded_up(value: float) -> float:
    return value * INFLATION
