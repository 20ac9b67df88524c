"""The parametrizations of one module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize


def own_parametrizations(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    """By tensor. Not by torch's `is_parametrized`, which wrappers of PEFT answer for the module that they wrap."""
    return module._modules.get("parametrizations", {})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a parametrized module without its parametrizations, and without what FSDP2 puts in front of it."""
    present = type(module)
    # `fully_shard` makes a class (FSDPModule, present), of which torch would take the first for the original one.
    parametrized = present.__bases__[1] if issubclass(present, FSDPModule) else present
    return parametrized.__bases__[0]
