"""How `from_pretrained` brings a constrained model back: transformers' quantizer interface used as a loading hook."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lipschitz.blocks import block_layers
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import apply_config, layer_obstacles, mark_replaced
from hf_lipschitz.holders import weight_layouts
from hf_lipschitz.matching import is_meant
from hf_lipschitz.methods import layer_constant
from hf_lipschitz.model_config import set_config
from hf_lipschitz.nn.attachment import ConstrainedLayer, constrained_layers
from hf_lipschitz.nn.blocks import TiedParametrization
from hf_lipschitz.nn.calibration import calibrated_modules
from hf_lipschitz.nn.constraint import Constraint
from hf_lipschitz.nn.weight_norm import plain_names
from hf_lipschitz.replacements import BLOCKS, SEPARATOR, apply_replacements


RAW_KEY = re.compile(r"\.parametrizations\.\w+\.original$")


class LipschitzConfigReader(QuantizationConfigMixin):
    """What transformers asks to read `quantization_config` of `config.json`: it hands back a [`LipschitzConfig`]."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = LipschitzConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class LipschitzLoader(HfQuantizer):
    """Parametrizes the empty model before its weights are read, and steps aside once they are.

    What was replaced, and the layers to parametrize, are those that the configuration names. A layer that the saved
    model did not have, such as a new head, is initialised by transformers as in any model and constrained afterwards
    if the configuration means it; so is a head of another size, where `ignore_mismatched_sizes=True` allows it.
    """

    requires_calibration = False

    def __init__(self, quantization_config: LipschitzConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "LipschitzConfig is no argument of from_pretrained. Load the plain model, then constrain it: "
                "model = AutoModelForX.from_pretrained(...); hf_lipschitz.lipschitzify(model, config)"
            )
        self._new_layers: list[str] = []
        self._replaced: dict[str, tuple[str, ...]] = {}
        self._keys: set[str] = set()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if checkpoint_files is None:
            raise ValueError("a lipschitzified model loads from a directory or a hub id, not from state_dict=")
        self._keys = {key for file in checkpoint_files for key in _keys(file)}
        if not any(RAW_KEY.search(key) for key in self._keys):
            raise ValueError(
                "config.json names a lipschitzified model, but the weights hold none of its raw tensors "
                "(*.parametrizations.*.original): save it again with save_pretrained, or delete quantization_config "
                "from config.json to load the plain weights"
            )
        self._replaced = _present(config.replaced, model)
        apply_replacements(model, config, self._replaced)
        obstacles = layer_obstacles(model)
        in_blocks = block_layers(model, self._replaced.get(BLOCKS, ()))
        able = [name for name, reason in obstacles.items() if reason is None and name not in in_blocks]
        meant = {n for n in able if is_meant(model, n, config.target_modules, config.exclude_modules)}
        stored = [name for name in able if any(n in (config.layers or meant) for n in spellings(name, model))]
        self._new_layers = [name for name in able if name in meant and name not in stored]
        _empty(model, stored)
        apply_config(model, config, stored)
        mark_replaced(model, self._replaced)
        # So that transformers initialises the raw weight of a head whose size changed, through `module.weight`.
        for layer in constrained_layers(model):
            layer.parametrization.is_suspended = True
        plain = {_pattern(key) for layer in constrained_layers(model) for key in _plain_keys(layer, model)}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | plain

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        self._check_replacements(model)
        for layer in constrained_layers(model):
            constraint = layer.parametrization
            constraint.is_suspended = False
            in_checkpoint = any(f"{key}.original" in self._keys for key in _raw_keys(layer, model))
            own = list(constraint.parameters())
            own += [] if layer.stage is None else list(layer.stage.parameters())
            is_raw_loaded = _is_loaded(layer.module.parametrizations[layer.tensor_name].original)
            # The weights q of a head whose size changed are made anew with it.
            missing = {
                "raw weight": not (is_raw_loaded or in_checkpoint),
                "constant": not _is_loaded(constraint.lipschitz),
                "other tensor": is_raw_loaded and not all(map(_is_loaded, own)),
            }
            for what, is_missing in missing.items():
                if is_missing:
                    raise ValueError(
                        f"the checkpoint has no {what} for {layer.full_name}: it is incomplete, save it again with "
                        "save_pretrained"
                    )
            if is_raw_loaded:
                constraint.check_constant()
                constraint.refresh(anew=True)
            else:
                _start_anew(constraint)
                constraint.keep_or_set_constant(layer_constant(layer.module, config))
        apply_config(model, config, self._new_layers)
        mark_replaced(model, self._replaced)
        names = tuple(dict.fromkeys(layer.name for layer in constrained_layers(model)))
        found = dataclasses.replace(config, layers=names or None, replaced=self._replaced)
        set_config(model, found if names or self._replaced else None)
        if not names and not self._replaced:
            del model.config.quantization_config
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        del model.hf_quantizer, model.quantization_method

    def _check_replacements(self, model: PreTrainedModel) -> None:
        """What was replaced has tensors of its own, which have to come from the checkpoint."""
        for name, module in calibrated_modules(model):
            if not all(map(_is_loaded, module.buffers(recurse=False))):
                raise ValueError(f"the checkpoint has no constants for {name}: it is incomplete, save it again")
            module.check()
        for name, module in model.named_modules():
            if any(isinstance(stage, TiedParametrization) for stage in module.children()):
                tensors = [*module.parameters(recurse=False), *module[0].parameters()]
                if not all(map(_is_loaded, tensors)):
                    raise ValueError(f"the checkpoint has no weights q for {name}: it is incomplete, save it again")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _keys(file: str) -> list[str]:
    if str(file).endswith(".safetensors"):
        with safe_open(file, framework="pt") as checkpoint:
            return list(checkpoint.keys())
    return list(torch.load(file, map_location="meta", weights_only=True))


def spellings(name: str, model: PreTrainedModel) -> set[str]:
    """The names that a layer may have in a model with or without a head."""
    prefix = model.base_model_prefix
    return {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")} if prefix else {name}


def _present(replaced: Mapping[str, tuple[str, ...]], model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The entries whose modules this model has, under the names that they have here."""
    modules = {name for name, _ in model.named_modules()}

    def spelled(part: str) -> str | None:
        if part.isdigit():
            return part
        return next((name for name in sorted(spellings(part, model), key=len) if name in modules), None)

    found: dict[str, tuple[str, ...]] = {}
    for kind, entries in replaced.items():
        translated = [[spelled(part) for part in entry.split(SEPARATOR)] for entry in entries]
        names = tuple(SEPARATOR.join(parts) for parts in translated if None not in parts)
        if names:
            found[kind] = names
    return found


def _plain_keys(layer: ConstrainedLayer, model: PreTrainedModel) -> list[str]:
    """What a plain model calls the tensors of a layer, without the prefix that it may have."""
    name = min(spellings(layer.name, model), key=len)
    return [f"{name}.{key}" for key in plain_names(layer.tensor_name, layer.stage)]


def _raw_keys(layer: ConstrainedLayer, model: PreTrainedModel) -> set[str]:
    return {f"{name}.parametrizations.{layer.tensor_name}" for name in spellings(layer.name, model)}


def _pattern(key: str) -> str:
    return rf"(^|\.){re.escape(key)}$"


def _empty(model: PreTrainedModel, names: list[str]) -> None:
    """Takes off the memory of layers that made their tensors past the meta device, as XLNet's attention does."""
    for name in names:
        module = model.get_submodule(name)
        for tensor_name in weight_layouts(module):
            weight = module._parameters.get(tensor_name)
            if weight is not None and not weight.is_meta:
                module._parameters[tensor_name] = nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad)


@torch.no_grad()
def _start_anew(constraint: Constraint) -> None:
    for parameter in constraint.parameters():
        parameter.zero_()


def _is_loaded(tensor: torch.Tensor) -> bool:
    """transformers marks what it has read; what is offloaded to disk stays on the meta device."""
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
