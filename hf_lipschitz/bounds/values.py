"""What is known of a node: its Lipschitz constant, where its value lies, and how it came about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hf_lipschitz.bounds.regions import UNKNOWN, Region
from hf_lipschitz.functional.geometry import ConvGeometry


class Origin(NamedTuple):
    """The entries of a value are sums of multiples of entries of an earlier one, and constants.

    Args:
        base (`object`):
            Stands for the earlier value.
        log_lipschitz (`float`):
            Its constant.
        size (`int`):
            Its number of entries.
        terms (`tuple`):
            Of [`Term`], see there.
    """

    base: object
    log_lipschitz: float
    size: int
    terms: tuple[Any, ...]


class Weighted(NamedTuple):
    """The value is W x + b for a value x of constant exp(`log_lipschitz`); channels are on `axis`, rows of W."""

    log_lipschitz: float
    weight: Tensor
    geometry: ConvGeometry | None
    axis: int


class Gained(NamedTuple):
    """The value is g z + b entry by entry along the last axis, for a z of constant exp(`log_lipschitz`)."""

    log_lipschitz: float
    gain: Tensor


@dataclass(frozen=True, eq=False)
class Dependent:
    """A tensor that depends on the chosen input x.

    Args:
        log_lipschitz (`float`):
            log L where ‖v(x) - v(y)‖ ≤ L ‖x - y‖ in Frobenius norms of whole tensors; -inf is a constant.
        shape (`tuple[int]`):
            Of the value.
        region (`Region`, *optional*):
            Where the value lies.
        origin (`Origin`, *optional*):
            Where its entries come from, if they are entries of an earlier value.
        weighted (`Weighted`, *optional*):
            The linear layer that it comes from.
        gained (`Gained`, *optional*):
            The gain of the norm that it comes from.
        log_blur (`float`, *optional*):
            On a ball, log of what rounding may have moved the center by, in the Frobenius norm.
    """

    log_lipschitz: float
    shape: tuple[int, ...] = ()
    region: Region = UNKNOWN
    origin: Origin | None = None
    weighted: Weighted | None = None
    gained: Gained | None = None
    log_blur: float = -math.inf

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)
