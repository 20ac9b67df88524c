"""Operators that order entries, of which the values move as little as the entries do, and operators that jump."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lipschitz.bounds.regions import Region
from hf_lipschitz.bounds.registry import Call, NoRule, rule
from hf_lipschitz.bounds.values import Dependent


_aten = torch.ops.aten


@rule(_aten.sort.default, _aten.sort.stable, _aten.topk.default, _aten.max.dim, _aten.min.dim)
def ordered(call: Call) -> list[Dependent]:
    """1: sorted tuples are no further apart than the tuples (rearrangement inequality), and their first k no further.

    Positions jump where two entries meet: an operator that uses them has no constant.
    """
    value = call.only("self")
    ends = [run(call, end, value) for end in (value.region.lower, value.region.upper)]
    positions = Dependent(math.inf, call.shape)
    return [call.gives(value, 1.0, Region(*ends)), positions]


def run(call: Call, end: Tensor | None, value: Dependent) -> Tensor | None:
    """Sorted ends are ends of the sorted entries."""
    if end is None:
        return None
    rest = {name: part for name, part in call.arguments.items() if name != "self"}
    return call.operator(end.expand(value.shape).contiguous(), **rest)[0]


@rule(
    *(_aten.floor.default, _aten.ceil.default, _aten.round.default, _aten.trunc.default, _aten.sign.default),
    *(_aten.floor_divide.default, _aten.div.Tensor_mode, _aten.remainder.Scalar, _aten.histc.default),
    *(_aten.argmax.default, _aten.argmin.default, _aten.argsort.default, _aten.bucketize.Tensor),
    *(_aten.gt.Scalar, _aten.lt.Scalar, _aten.ge.Scalar, _aten.le.Scalar, _aten.eq.Scalar, _aten.ne.Scalar),
    *(_aten.gt.Tensor, _aten.lt.Tensor, _aten.ge.Tensor, _aten.le.Tensor, _aten.eq.Tensor, _aten.ne.Tensor),
)
def jumping(call: Call) -> Dependent:
    """No constant."""
    raise NoRule("its value jumps as the input moves")
