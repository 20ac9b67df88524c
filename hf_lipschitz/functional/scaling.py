"""Exact scaling by powers of two, so that no product overflows or underflows and no bit is lost."""

from __future__ import annotations

import torch
from torch import Tensor


_LAYOUT = {torch.float32: (torch.int32, 127, 23), torch.float64: (torch.int64, 1023, 52)}


def exponent_of(magnitude: Tensor) -> Tensor:
    """The integer e with `magnitude` in [2^{e-1}, 2^e), and 0 for zero; int32, same shape."""
    return torch.frexp(magnitude).exponent


def scale_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent for float32, float64 and their complex types; exact wherever the result is a normal number.

    Args:
        x (`Tensor` of shape `(...)` + any trailing axes).
        exponent (`Tensor` of integers, broadcastable to `x`):
            Split in two halves, so that neither factor overflows.
    """
    half = exponent // 2
    real = x.real.dtype if x.is_complex() else x.dtype
    return x * _power_of_two(half, real) * _power_of_two(exponent - half, real)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    integer, bias, mantissa_bits = _LAYOUT[dtype]
    return ((exponent.to(integer) + bias) << mantissa_bits).view(dtype)
