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
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hf_lipschitz.blocks import block_layers, has_blocks
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.holders import uses_weight_otherwise, weight_layouts
from hf_lipschitz.matching import matching_names
from hf_lipschitz.methods import METHODS
from hf_lipschitz.model_config import config_of, set_config
from hf_lipschitz.nn.attachment import bake, constrained_layers, parametrized_modules, swap_out
from hf_lipschitz.nn.weight_norm import has_weight_norm
from hf_lipschitz.replacements import BLOCKS, Replaced, apply_replacements, find_replacements


logger = logging.getLogger(__name__)


def lipschitzify(model: nn.Module, config: LipschitzConfig | None = None, **overrides: Any) -> nn.Module:
    """Constrains the spectral norm of each linear map of a model, in place, and replaces what else it is asked to.

    Linear maps are `nn.Linear`, transformers' `Conv1D`, convolutions and transposed ones of one to three axes, those
    with torch's weight norm included, the projections in `nn.MultiheadAttention`, the experts and routers of mixtures
    and the projections of XLNet. Tied weights are left alone.

    Each weight W is replaced by a parametrization whose value has spectral norm at most the layer's constant at every
    read, during training as well. What is bounded is each layer by itself. That is no bound for the whole model:
    norms, attention, activations and residual sums stay as they are, and [`inspect`] lists them.

    Args:
        model (`torch.nn.Module`):
            Any model, usually a `PreTrainedModel`.
        config (`LipschitzConfig`, *optional*):
            Defaults to `LipschitzConfig()`: Gram iteration, every supported layer capped at 1. That changes a
            pretrained model; `layer_lipschitz=None` does not. `replace` names what is replaced besides weights;
            [`calibrate`] then sets the constants of norms and attention.
        overrides:
            Fields of `LipschitzConfig`, in the place of those of `config`.

    Returns:
        `torch.nn.Module`: the same object. `save_pretrained` then writes a directory that
        `AutoModelForX.from_pretrained` restores.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: no layer is supported or matches, a weight holds NaN or inf or has no data, something that is to be
            replaced cannot be, the model is constrained in another way or quantized already, or carries adapters. The
            model is then as it was. The same configuration again changes nothing and is no error.

    Example::

        model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        lipschitzify(model, layer_lipschitz=None)   # same function, ready for LipschitzTrainer
        print(hf_lipschitz.inspect(model))
    """
    config = dataclasses.replace(config or LipschitzConfig(), **overrides)
    if _is_done(model, config):
        return model
    replaced = find_replacements(model, config)
    names = targets(model, config, except_for=block_layers(model, replaced.get(BLOCKS, ())))
    for name in names:
        _check_weights(name, model.get_submodule(name))
    _check_that_plain_models_refuse(model, names, replaced)
    apply_replacements(model, config, replaced)
    apply_config(model, config, names)
    mark_replaced(model, replaced)
    set_config(model, dataclasses.replace(config, layers=tuple(names), replaced=replaced))
    _log_changes(model, config, replaced)
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


def mark_replaced(model: nn.Module, replaced: Replaced) -> None:
    """Tells the constraints of a model of which parts are replaced that a plain model with its weights differs."""
    for layer in constrained_layers(model):
        layer.parametrization.has_plain_form = not replaced


def targets(model: nn.Module, config: LipschitzConfig, except_for: tuple[str, ...] = ()) -> list[str]:
    """Names of the layers that `config` means and that can be constrained, but for some.

    Raises:
        ValueError: there are none, or `config.strict` and one of those asked for cannot be constrained.
    """
    obstacles = {name: reason for name, reason in layer_obstacles(model).items() if name not in except_for}
    candidates = [name for name, reason in obstacles.items() if reason is None]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be constrained: lipschitzify covers nn.Linear, "
            "nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.MultiheadAttention and transformers' Conv1D, experts, "
            "routers and XLNet attention, with weights of their own"
        )
    if config.strict:
        asked = matching_names(model, list(obstacles), config.target_modules, config.exclude_modules)
        refused = [f"{name}: {obstacles[name]}" for name in asked if obstacles[name] is not None]
        if refused:
            raise ValueError(f"strict=True, and {refused[0]}; exclude it by exclude_modules or set strict=False")
    return matching_names(model, candidates, config.target_modules, config.exclude_modules)


def layer_obstacles(model: nn.Module) -> dict[str, str | None]:
    """Why each module with linear maps cannot be constrained, in a few words; `None` for those that can."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied.keys(), *tied.values()}
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)

    def obstacle(name: str, module: nn.Module, tensor_name: str) -> str | None:
        if has_weight_norm(module, tensor_name):
            return None
        if parametrize.is_parametrized(module, tensor_name):
            return "parametrized by something else"
        weight = module._parameters.get(tensor_name)
        if weight is None:
            return f"its {tensor_name} is no parameter of its own"
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return "lazy and not initialised: run the model once first"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return f"{tensor_name} of dtype {weight.dtype}"
        is_tied = f"{name}.{tensor_name}" in tied_names or holders[id(weight)] > 1
        return f"tied {tensor_name}" if is_tied else None

    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        layouts = _layouts(module)
        reasons = [obstacle(name, module, tensor_name) for tensor_name in layouts]
        if uses_weight_otherwise(module):
            reasons = [f"{type(module).__name__} has a forward of its own, which may not use the weight as it is"]
        if layouts:
            found[name] = next((reason for reason in reasons if reason is not None), None)
    return found


def _layouts(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that are linear maps; of a lazy layer, whose shape is not known yet, its weight."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return ("weight",)
    try:
        return tuple(weight_layouts(module))
    except KeyError:
        # Its weight is something other than a parameter or a parametrized one.
        return ("weight",)


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
        ValueError: nothing is constrained, or parts were replaced, so that no plain model computes the same.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"merge takes a torch.nn.Module, got {type(model).__name__}")
    config = config_of(model)
    layers = list(constrained_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no constrained layer: nothing to merge")
    if has_blocks(model) or any(not layer.parametrization.has_plain_form for layer in layers):
        kinds = ", ".join(config.replaced) if config is not None else "some parts"
        raise ValueError(
            f"{kinds} of {type(model).__name__} were replaced, and a plain {type(model).__name__} with its weights "
            "would compute something else: only models with replace=('weights',) can be merged. Keep the directory "
            "that save_pretrained writes, which loads where hf_lipschitz is imported"
        )
    for module in {id(layer.module): layer.module for layer in layers}.values():
        bake(module)
    set_config(model, None)
    if config is not None and hasattr(model, "config"):
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
    swapped = [swap_out(module) for module in parametrized_modules(plain)]
    config = config_of(plain)
    set_config(plain, None)
    try:
        yield plain
    finally:
        if not copy:
            for module in swapped:
                module.swap_in()
            set_config(plain, config)


def _is_done(model: Any, config: LipschitzConfig) -> bool:
    """Whether the model is constrained as `config` asks already.

    Raises:
        TypeError, ValueError: it cannot be constrained at all.
    """
    _check_model(model, config)
    # A model may have been made from the configuration of one that is lipschitzified.
    if next(constrained_layers(model), None) is None:
        return False
    present = config_of(model)
    if present is None or not present.asks_like(config):
        raise ValueError(
            "the model is lipschitzified already, with another configuration; call merge(model) first to constrain it "
            "anew"
        )
    return True


def _check_that_plain_models_refuse(model: nn.Module, names: list[str], replaced: Replaced) -> None:
    """The tensors that make a plain model refuse the file have to be among those that it reads."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside = [entry for entries in replaced.values() for entry in entries if entry.startswith(prefix)]
    if inside and not any(name.startswith(prefix) for name in names):
        raise ValueError(
            f"{inside[0]} would be replaced, and no layer of {prefix[:-1]} is constrained: a plain model would load "
            "the saved weights and compute something else. Target at least one layer there"
        )


def _check_weights(name: str, module: nn.Module) -> None:
    for tensor_name in weight_layouts(module):
        weight = getattr(module, tensor_name)
        if weight.is_meta:
            raise ValueError(
                f"layer {name} is on the meta device and has no data to bound: load the model first, without "
                "offloading to disk"
            )
        if isinstance(weight, DTensor):
            raise ValueError(
                f"layer {name} is sharded already, and a constraint put on it now would not be: lipschitzify the "
                "model before fully_shard, or save it lipschitzified and load that with "
                "from_pretrained(distributed_config=...)"
            )
        check_named_weight(name, weight)


def _check_model(model: Any, config: LipschitzConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"lipschitzify takes a torch.nn.Module, got {type(model).__name__}; load one first, e.g. "
            "AutoModelForSequenceClassification.from_pretrained(...)"
        )
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; registered: {', '.join(METHODS)}")
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ValueError("the model carries PEFT adapters; call merge_and_unload() first, or lipschitzify before PEFT")
    if config_of(model) is None and getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is quantized; dequantize it first, for norms of quantized weights are not covered")


def _log_changes(model: nn.Module, config: LipschitzConfig, replaced: Replaced) -> None:
    if replaced:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in replaced.items())
        logger.info("lipschitzify replaced %s; print(hf_lipschitz.inspect(model)) names them", counts)
    if BLOCKS in replaced:
        logger.warning(
            "lipschitzify put 1-Lipschitz blocks in the place of %d trained feed-forward pairs: the model needs "
            "training",
            len(replaced[BLOCKS]),
        )
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
