"""replace="activations": activations of slope at most 1, or MaxMin."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.holders import CONVOLUTIONS, DENSE
from hf_lipschitz.nn.activations import Bounded, MaxMin, SlopeCorrected, slope_range
from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.probes import probe_inputs
from hf_lipschitz.replacements.swap import swap


logger = logging.getLogger(__name__)

# Between the name of an activation and the axis of its features, where that is not the last one.
_AXIS = "<"
_MARKS = ("Activation", "GELU", "SiLU", "Mish", "SELU", "Hardswish", "ReLU", "ELU")
_FUNCTIONS = (F.gelu, F.silu, F.mish, F.hardswish, F.selu, F.elu, torch.selu)


@dataclass
class _Calls:
    """What a forward pass showed: inputs of activation modules, and activations called as plain functions."""

    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    axes: dict[str, set[int | None]] = field(default_factory=dict)
    functions: dict[str, set[str]] = field(default_factory=dict)


def find(model: nn.Module, config: LipschitzConfig) -> tuple[str, ...]:
    """The activation modules whose slope exceeds 1: GELU, SiLU and the like.

    `config.activation` chooses what becomes of them: `"bounded"` divides each by its largest slope, at most 1.76 (1.13
    for GELU); `"maxmin"` puts [`MaxMin`] in their place. The latter sorts pairs of features, so the model runs once to
    see which axis holds them (the entry is `"name<1"` for feature maps) and that there is an even number.

    Activations without a bounded slope, and those that are called as functions and are no modules, keep their place
    and are named in a warning.

    Args:
        model (`torch.nn.Module`):
            Plain, with its weights.
        config (`LipschitzConfig`):
            `activation`, and `strict`, which makes what cannot be replaced an error.

    Returns:
        `tuple[str]`: for [`apply`]; empty where every slope is at most 1 already.

    Raises:
        ValueError: something cannot be replaced, and `config.strict` or nothing else can; or `"maxmin"`, and the model
            cannot be run on inputs made from its configuration.
    """
    steep, done, refused = [], [], {}
    for name, module in model.named_modules():
        if isinstance(module, (Bounded, SlopeCorrected)):
            done.append(name)
        if any(name == other or name.startswith(f"{other}.") for other in (*steep, *done)):
            continue
        try:
            if max(abs(slope) for slope in slope_range(module)) > 1:
                steep.append(name)
        except ValueError as error:
            if _is_activation(module):
                refused[name] = str(error)
    calls = _observed(model, config, steep)
    for name, functions in calls.functions.items():
        refused[name] = f"calls {', '.join(sorted(functions))} as a function; make it a module to have it replaced"
    names = []
    for name in steep:
        why = _maxmin_obstacle(calls, name) if config.activation == "maxmin" else None
        if why is not None:
            refused[name] = why
            continue
        on_channels = config.activation == "maxmin" and calls.axes.get(name) == {1}
        names.append(f"{name}{_AXIS}1" if on_channels else name)
    if refused:
        named = "; ".join(f"{name or type(model).__name__}: {why}" for name, why in refused.items())
        if config.strict or not names:
            raise ValueError(f"activations cannot be replaced: {named}")
        logger.warning("replace=activations leaves some as they are: %s", named)
    return tuple(names)


def apply(model: nn.Module, config: LipschitzConfig, names: tuple[str, ...]) -> None:
    """Replaces the named activations, in place; also on the meta device.

    Both replacements change what the model computes: `"bounded"` by a factor of at most 1.13 for GELU, SiLU and Mish,
    `"maxmin"` altogether.

    Raises:
        ValueError: a name is not that of an activation as [`find`] gives them.
    """
    for entry in names:
        name, _, axis = entry.partition(_AXIS)
        module = model.get_submodule(name)
        if isinstance(module, (Bounded, MaxMin)):
            # One module under two names, replaced under the first.
            continue
        new = MaxMin(int(axis or -1)) if config.activation == "maxmin" else Bounded(module)
        swap(model, module, new)
    if names and config.activation == "maxmin":
        logger.warning("activation='maxmin' puts MaxMin in the place of %d activations: it needs training", len(names))


def _is_activation(module: nn.Module) -> bool:
    return any(mark in type(module).__name__ for mark in _MARKS) and not list(module.children())


def _maxmin_obstacle(calls: _Calls, name: str) -> str | None:
    axes, shapes = calls.axes.get(name), calls.shapes.get(name)
    if not shapes:
        return "the model does not call it, so that the axis of its features is not known"
    if len(axes) != 1 or None in axes:
        return "it does not follow one Linear or convolution, so that the axis of its features is not known"
    (axis,) = axes
    return f"MaxMin needs an even number of features, and it gets {shapes[0][axis]}" if shapes[0][axis] % 2 else None


def _feature_axis(shape: torch.Size, last: tuple[nn.Module, torch.Size] | None = None) -> int | None:
    """Where the outputs of the layer that ran last are: 1 on feature maps, -1 else, None where neither fits.

    A gated layer gives several times the features that the activation gets.
    """
    if last is None:
        return None
    layer, of_layer = last
    if not isinstance(layer, CONVOLUTIONS):
        return -1 if of_layer[-1] % shape[-1] == 0 else None
    axes = (1, -1) if len(shape) == len(of_layer) else (-1, 1)
    return next((axis for axis in axes if len(shape) > 1 and shape[axis] == of_layer[1]), None)


def _observed(model: nn.Module, config: LipschitzConfig, steep: list[str]) -> _Calls:
    """Runs the model once. For `"bounded"` that only finds functions, so a family without probe inputs is no error."""
    calls = _Calls()
    try:
        inputs = probe_inputs(model)
    except ValueError as error:
        if config.activation == "maxmin":
            raise
        logger.info("replace=activations cannot look for activations called as functions: %s", error)
        return calls
    with _watched(model, steep, calls), evaluating(model), torch.no_grad():
        model(**inputs)
    return calls


@contextmanager
def _watched(model: nn.Module, steep: list[str], calls: _Calls) -> Iterator[None]:
    stack: list[str] = []
    last: list[tuple[nn.Module, torch.Size]] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[module]
        stack.append(name)
        if name in steep and args and isinstance(args[0], Tensor):
            calls.shapes.setdefault(name, []).append(args[0].shape)
            calls.axes.setdefault(name, set()).add(_feature_axis(args[0].shape, *last[-1:]))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack.pop()
        if isinstance(module, DENSE + CONVOLUTIONS):
            last[:] = [(module, output.shape)]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            where = stack[-1] if stack else ""
            if func in _FUNCTIONS and where not in steep and not _is_activation(model.get_submodule(where)):
                calls.functions.setdefault(where, set()).add(func.__name__)
            return func(*args, **(kwargs or {}))

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with Functions():
            yield
    finally:
        for handle in handles:
            handle.remove()
