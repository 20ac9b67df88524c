"""Where the value of a node lies, entry by entry and token by token, for all inputs that are asked about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# Outward, for what float64 loses in centers and ranges: relative to their size, generously, and where it underflows.
_SLACK, _TINY = 1e-9, 1e-300


@dataclass(frozen=True)
class Region:
    r"""A set that holds the value v of a node; `None` says nothing. All tensors are float64.

    Args:
        lower, upper (`Tensor`, *optional*):
            Of each entry; they broadcast to the shape of v.
        norm (`Tensor`, *optional*):
            Of each token: \(\|v_{t,:}\| \le\) `norm` along the last axis, of shape `(..., 1)`.
        center (`Tensor`, *optional*):
            v at the center of the ball of inputs, where there is a ball.
        radius (`Tensor`, *optional*):
            \(\|v_{t,:} - c_{t,:}\| \le\) `radius`, of shape `(..., 1)`.
    """

    lower: Tensor | None = None
    upper: Tensor | None = None
    norm: Tensor | None = None
    center: Tensor | None = None
    radius: Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything is known."""
        return any(part is not None for part in (self.lower, self.upper, self.norm, self.center))

    def magnitude(self) -> Tensor | None:
        """Upper bounds of |v|, entry by entry."""
        if self.lower is None or self.upper is None:
            return None
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def offsets(self) -> Tensor | None:
        """Upper bounds of |v - c|, entry by entry."""
        if self.center is None or self.lower is None or self.upper is None:
            return None
        offsets = torch.maximum(self.upper - self.center, self.center - self.lower).clamp(min=0)
        # Of an entry that is infinite nothing is known.
        return offsets.nan_to_num(nan=math.inf, posinf=math.inf)


UNKNOWN = Region()


def length(x: Tensor, dim: int | tuple[int, ...] | None = -1, *, keepdim: bool = True) -> Tensor:
    """Euclidean norm along axes, of all of them with `None`; squares of small or large entries are not lost."""
    if not x.numel():
        return torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    axes = tuple(range(x.dim())) if dim is None else dim
    largest = x.abs().amax(axes, keepdim=True)
    is_usual = (largest > 0) & (largest < math.inf)
    norm = torch.linalg.vector_norm(x / torch.where(is_usual, largest, 1.0), dim=dim, keepdim=keepdim)
    largest = largest if keepdim else largest.reshape(norm.shape)
    return torch.where(is_usual.reshape(norm.shape), norm * largest, norm)


def settled(region: Region, shape: Sequence[int], reach: float) -> Region:
    """What the parts of a region say together, rounded outward.

    Args:
        region (`Region`):
            From a rule, with its center.
        shape (`Sequence[int]`):
            Of the value.
        reach (`float`):
            Bound of the Frobenius norm of v - c as a whole: the Lipschitz constant times the radius of the ball.
    """
    region = _without_nan(region)
    lower, upper, norm, radius = region.lower, region.upper, region.norm, region.radius
    center = region.center
    if center is not None:
        radius = _least(radius, center.new_full(_tokens(shape), reach))
        offsets = dataclasses.replace(region, lower=lower, upper=upper).offsets()
        radius = _least(radius, _along_tokens(offsets, shape))
        radius = radius * (1 + _SLACK) + _SLACK * _along_tokens(center, shape) + _TINY
        away = torch.where(center.isinf(), math.inf, radius)
        low, high = center - away, center + away
        lower = _most(lower, torch.where(low.isnan(), -math.inf, low))
        upper = _least(upper, torch.where(high.isnan(), math.inf, high))
        norm = _least(norm, _along_tokens(center, shape) + radius)
    magnitude = Region(lower=lower, upper=upper).magnitude()
    norm = _least(norm, _along_tokens(magnitude, shape))
    if norm is not None:
        norm = norm * (1 + _SLACK) + _TINY
        lower, upper = _most(lower, -norm), _least(upper, norm)
    if lower is not None:
        lower = lower - _SLACK * lower.abs() - _TINY
    if upper is not None:
        upper = upper + _SLACK * upper.abs() + _TINY
    return _without_inf(_without_nan(Region(lower, upper, norm, center, radius)))


def _tokens(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if shape else ()


def _along_tokens(x: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    if x is None:
        return None
    if not shape:
        return x.abs()
    return length(x.expand(*shape))


def _least(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.minimum(a, b)


def _most(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.maximum(a, b)


def _without_nan(region: Region) -> Region:
    """NaN, as of inf - inf, says nothing."""
    fills = {"lower": -math.inf, "upper": math.inf, "norm": math.inf, "radius": math.inf}
    parts = {name: getattr(region, name) for name in fills}
    filled = {
        name: None if part is None else torch.where(part.isnan(), fills[name], part) for name, part in parts.items()
    }
    return dataclasses.replace(region, **filled)


def _without_inf(region: Region) -> Region:
    def kept(part: Tensor | None) -> Tensor | None:
        return None if part is None or bool(part.isinf().all()) else part

    return dataclasses.replace(
        region, **{name: kept(getattr(region, name)) for name in ("lower", "upper", "norm", "radius")}
    )
