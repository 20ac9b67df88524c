"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_lipschitz.bounds.regions import Region
from hf_lipschitz.bounds.registry import RULES, Call, NoRule
from hf_lipschitz.bounds.values import Dependent


_aten = torch.ops.aten
# Covers a dense float64 singular value decomposition of a matrix of some hundred rows.
_SVD_ALLOWANCE = 1 + 1e-11


def _max_pool(call: Call, axes: int) -> Dependent:
    """An entry is in at most ∏ ⌈k / (s / gcd(s, d))⌉ windows, each of which takes a maximum: the root of that."""
    value = call.only("self")
    kernel = _all_axes(call["kernel_size"], axes)
    stride = _all_axes(call["stride"] or kernel, axes)
    dilation = _all_axes(call["dilation"], axes)
    windows = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return call.gives(value, math.sqrt(windows), _monotone(call, value))


def _average_pool(call: Call, axes: int) -> Dependent:
    """Product over axes of the exact norms of the 1-D averaging matrices: the divisor is a product over axes, too."""
    if call.arguments.get("divisor_override") is not None:
        raise NoRule("divisor_override has no rule yet")
    value = call.only("self")
    kernel = _all_axes(call["kernel_size"], axes)
    stride = _all_axes(call["stride"] or kernel, axes)
    padding = _all_axes(call["padding"], axes)
    shared = {"ceil_mode": call["ceil_mode"], "count_include_pad": call["count_include_pad"]}
    gain = 1.0
    for size, k, s, p in zip(value.shape[-axes:], kernel, stride, padding, strict=True):
        gain *= _norm_of_rows(functional.avg_pool1d(_basis(size), k, s, p, **shared))
    return call.gives(value, gain, _monotone(call, value))


def _adaptive_average_pool(call: Call, axes: int) -> Dependent:
    """As [`_average_pool`]: windows and divisors are products over axes."""
    value = call.only("self")
    gain = 1.0
    for size, out in zip(value.shape[-axes:], call.shape[-axes:], strict=True):
        gain *= _norm_of_rows(functional.adaptive_avg_pool1d(_basis(size), out))
    return call.gives(value, gain, _monotone(call, value))


_POOLS: dict[Callable[[Call, int], Dependent], tuple[Any, Any, Any]] = {
    _max_pool: (_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default),
    _average_pool: (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default),
    _adaptive_average_pool: (
        *(_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default),
        _aten.adaptive_avg_pool3d.default,
    ),
}
for _pool, _operators in _POOLS.items():
    for _axes, _operator in enumerate(_operators, start=1):
        RULES[_operator] = partial(_pool, axes=_axes)


def _monotone(call: Call, value: Dependent) -> Region:
    """Pools of the ends: each grows with every entry."""
    if value.region.lower is None or value.region.upper is None:
        return Region()
    rest = {name: part for name, part in call.arguments.items() if name != "self"}
    ends = (call.operator(end.expand(value.shape), **rest) for end in (value.region.lower, value.region.upper))
    return Region(*ends)


def _all_axes(value: Sequence[int], axes: int) -> list[int]:
    return list(value) * axes if len(value) == 1 else list(value)


def _basis(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).unsqueeze(1)


def _norm_of_rows(images: Tensor) -> float:
    return torch.linalg.matrix_norm(images.squeeze(1), ord=2).item() * _SVD_ALLOWANCE
