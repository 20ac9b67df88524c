"""Which weights a curvature penalty is about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_lipschitz.holders import CONVOLUTIONS, DENSE
from hf_lipschitz.training.head import find_head


def curvature_layers(
    model: nn.Module, names: Sequence[str] | None = None, head_module: str | None = None
) -> dict[str, nn.Module]:
    """The Linear and convolution layers in the named modules whose weights are trained.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        names (`Sequence[str]`, *optional*):
            Names of modules, or endings of names after a dot. By default the head, and the last entry of the last
            `ModuleList` that is in no other one: the last block of a transformer, the last stage of a convolutional
            network.
        head_module (`str`, *optional*):
            Name of the head, where it is not found by itself.

    Returns:
        `dict[str, torch.nn.Module]`: by dotted name.

    Raises:
        ValueError: a name matches nothing, or nothing there is trained.
    """
    if names is None:
        roots = _last_block_and_head(model, head_module)
    else:
        roots = [root for name in names for root in _named(model, name)]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DENSE + CONVOLUTIONS)
        and any(name == root or name.startswith(f"{root}.") for root in roots)
        and _is_trained(module)
    }
    if not layers:
        raise ValueError(
            f"curvature_modules: no Linear or convolution in {', '.join(roots)} has a trained weight; name others"
        )
    return layers


def _named(model: nn.Module, ending: str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name == ending or name.endswith(f".{ending}")]
    if not names:
        children = [name for name, _ in model.named_modules() if name][-5:]
        raise ValueError(
            f"curvature_modules: {type(model).__name__} has no module {ending!r}; the last are {', '.join(children)}"
        )
    return names


def _last_block_and_head(model: nn.Module, head_module: str | None) -> list[str]:
    lists: list[str] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not isinstance(module, parametrize.ParametrizationList)
            and len(module)
            and not any(name.startswith(f"{outer}.") for outer in lists)
        ):
            lists.append(name)
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks: name the modules by curvature_modules=[...]")
    blocks = lists[-1]
    return [f"{blocks}.{len(model.get_submodule(blocks)) - 1}", find_head(model, head_module)[0]]


def _is_trained(module: nn.Module) -> bool:
    with torch.enable_grad():
        return module.weight.requires_grad
