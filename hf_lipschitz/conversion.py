"""lipschitzify and merge: putting the constraint on a model, and baking it into a plain one."""

from __future__ import annotations

import copy as copy_module
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.matching import matching_names
from hf_lipschitz.methods import CONVOLUTIONS, DENSE, METHODS
from hf_lipschitz.nn.attachment import bake, constrained_layers, swap_in, swap_out


logger = logging.getLogger(__name__)


def lipschitzify(model: nn.Module, config: LipschitzConfig | None = None, **overrides: Any) -> nn.Module:
    """Constrains the spectral norm of each Linear, convolution and transformers `Conv1D` layer of a model, in place.

    Convolutions are Conv1d/2d/3d and ConvTranspose1d/2d/3d.

    Each weight W is replaced by a parametrization whose value has spectral norm at most the layer's constant at every
    read, during training as well. What is bounded is each layer by itself. That is no bound for the whole model:
    norms, attention, activations and residual sums stay as they are, and [`inspect`] lists them.

    Args:
        model (`torch.nn.Module`):
            Any model, usually a `PreTrainedModel`.
        config (`LipschitzConfig`, *optional*):
            Defaults to `LipschitzConfig()`: Gram iteration, every supported layer capped at 1. That changes a
            pretrained model; `layer_lipschitz=None` does not.
        overrides:
            Fields of `LipschitzConfig`, in the place of those of `config`.

    Returns:
        `torch.nn.Module`: the same object. Tied weights are left alone. `save_pretrained` then writes a directory that
        `AutoModelForX.from_pretrained` restores.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: no layer is supported or matches, a weight holds NaN or inf, the model is constrained or quantized
            already, or carries adapters.

    Example::

        model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        lipschitzify(model, layer_lipschitz=None)   # same function, ready for LipschitzTrainer
        print(hf_lipschitz.inspect(model))
    """
    config = dataclasses.replace(config or LipschitzConfig(), **overrides)
    _check_model(model, config)
    names = targets(model, config)
    for name in names:
        check_named_weight(name, model.get_submodule(name).weight)
    apply_config(model, config, names)
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = dataclasses.replace(config, layers=tuple(names))
    _log_changes(model, config)
    return model


def apply_config(model: nn.Module, config: LipschitzConfig, names: list[str]) -> None:
    """Runs the handler of the method on the named modules."""
    handler = METHODS[config.method]
    modules = dict(model.named_modules())
    for name in names:
        module = modules[name]
        replacement = handler(module, name, config)
        if replacement is not module:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, replacement)


def targets(model: nn.Module, config: LipschitzConfig) -> list[str]:
    """Names of the layers that `config` means and that can be constrained.

    Raises:
        ValueError: there are none, or `config.strict` and one of those asked for cannot be constrained.
    """
    obstacles = layer_obstacles(model)
    candidates = [name for name, reason in obstacles.items() if reason is None]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be constrained: lipschitzify covers nn.Linear, "
            "nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d and transformers' Conv1D with weights of their own"
        )
    if config.strict:
        asked = matching_names(model, list(obstacles), config.target_modules, config.exclude_modules)
        refused = [f"{name}: {obstacles[name]}" for name in asked if obstacles[name] is not None]
        if refused:
            raise ValueError(f"strict=True, and {refused[0]}; exclude it by exclude_modules or set strict=False")
    return matching_names(model, candidates, config.target_modules, config.exclude_modules)


def layer_obstacles(model: nn.Module) -> dict[str, str | None]:
    """Why each Linear or convolution cannot be constrained, in a few words; `None` for those that can."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied.keys(), *tied.values()}
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    def obstacle(name: str, module: nn.Module) -> str | None:
        if parametrize.is_parametrized(module):
            return "parametrized by something else"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is no parameter of its own"
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return "lazy and not initialised: run the model once first"
        if not weight.is_floating_point():
            return f"weight of dtype {weight.dtype}"
        return "tied weight" if f"{name}.weight" in tied_names or holders[id(weight)] > 1 else None

    return {name: obstacle(name, module) for name, module in model.named_modules() if _is_layer(module)}


def merge(model: nn.Module) -> nn.Module:
    """Bakes the effective weights into plain parameters, in place, so that the model loads without this library.

    Args:
        model (`torch.nn.Module`):
            A model that [`lipschitzify`] constrained.

    Returns:
        `torch.nn.Module`: the same object with its original classes; same outputs. The constraint is gone: further
        training moves the norms freely. `config.lipschitz` keeps where the weights come from.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: nothing is constrained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge takes a torch.nn.Module, got {type(model).__name__}")
    layers = list(constrained_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no constrained layer: nothing to merge")
    for layer in layers:
        bake(layer)
    config = _pop_config(model)
    if config is not None:
        model.config.lipschitz = {"merged": True, **config.to_dict()}
    return model


@contextmanager
def materialized(model: nn.Module, *, copy: bool = False) -> Iterator[nn.Module]:
    """Inside the block the constrained layers hold plain effective weights; no norm is computed and none is needed.

    Evaluation, export, bounds and certification run on it. The weights are frozen there.

    Args:
        model (`torch.nn.Module`):
            Any model; one without constrained layers is yielded as it is.
        copy (`bool`, *optional*, defaults to `False`):
            Yields a deep copy that outlives the block, instead of `model` itself changed for its duration.

    Yields:
        `torch.nn.Module`: computes the same function as `model` outside the block.
    """
    plain = copy_module.deepcopy(model) if copy else model
    swapped = [(layer, swap_out(layer)) for layer in list(constrained_layers(plain))]
    config = _pop_config(plain)
    try:
        yield plain
    finally:
        if not copy:
            for layer, parametrized in swapped:
                swap_in(layer, parametrized)
            if config is not None:
                plain.config.quantization_config = config


def _pop_config(model: nn.Module) -> LipschitzConfig | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, LipschitzConfig):
        del model.config.quantization_config
        return config
    return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, DENSE + CONVOLUTIONS)


def _check_model(model: Any, config: LipschitzConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"lipschitzify takes a torch.nn.Module, got {type(model).__name__}; load one first, e.g. "
            "AutoModelForSequenceClassification.from_pretrained(...)"
        )
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; registered: {', '.join(METHODS)}")
    if next(constrained_layers(model), None) is not None:
        raise ValueError("the model is lipschitzified already; call merge(model) first to constrain it anew")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is quantized; dequantize it first, for norms of quantized weights are not covered")
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ValueError("the model carries PEFT adapters; call merge_and_unload() first, or lipschitzify before PEFT")


def _log_changes(model: nn.Module, config: LipschitzConfig) -> None:
    layers = list(constrained_layers(model))
    if config.layer_lipschitz is None:
        logger.info("lipschitzify: %d layers keep their present norms; the function is unchanged", len(layers))
        return
    with torch.no_grad():
        scales = {layer.name: layer.parametrization.scale() for layer in layers}
    moved = {name: scale for name, scale in scales.items() if scale != 1.0}
    if moved:
        name, scale = max(moved.items(), key=lambda item: abs(math.log(item[1])))
        logger.warning(
            "lipschitzify(layer_lipschitz=%g) rescaled %d of %d layers, %s the most, by %.3g: the model's outputs "
            "change. To start from the same function, pass layer_lipschitz=None and let LipschitzTrainer anneal.",
            config.layer_lipschitz,
            len(moved),
            len(layers),
            name,
            scale,
        )
