"""The parametrizations of one module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize


def own_parametrizations(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    """By tensor. Not by torch's `is_parametrized`, which wrappers of PEFT answer for the module that they wrap."""
    return module._modules.get("parametrizations", {})
