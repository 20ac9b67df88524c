"""How `from_pretrained` brings a constrained model back: transformers' quantizer interface used as a loading hook."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import apply_config, layer_obstacles
from hf_lipschitz.matching import is_meant
from hf_lipschitz.nn.attachment import constrained_layers


RAW_SUFFIX = ".parametrizations.weight.original"


class LipschitzConfigReader(QuantizationConfigMixin):
    """What transformers asks to read `quantization_config` of `config.json`: it hands back a [`LipschitzConfig`]."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = LipschitzConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class LipschitzLoader(HfQuantizer):
    """Parametrizes the empty model before its weights are read, and steps aside once they are.

    The layers to parametrize are those that the configuration names. A layer that the saved model did not have, such
    as a new head, is initialised by transformers as in any model and constrained afterwards if the configuration
    means it; so is a head of another size, where `ignore_mismatched_sizes=True` allows it.
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
        self._keys: set[str] = set()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if checkpoint_files is None:
            raise ValueError("a lipschitzified model loads from a directory or a hub id, not from state_dict=")
        self._keys = {key for file in checkpoint_files for key in _keys(file)}
        if not any(key.endswith(RAW_SUFFIX) for key in self._keys):
            raise ValueError(
                "config.json names a lipschitzified model, but the weights hold none of its raw tensors "
                f"(*{RAW_SUFFIX}): save it again with save_pretrained, or delete quantization_config from config.json "
                "to load the plain weights"
            )
        able = [name for name, reason in layer_obstacles(model).items() if reason is None]
        meant = {n for n in able if is_meant(model, n, config.target_modules, config.exclude_modules)}
        stored = [name for name in able if any(n in (config.layers or meant) for n in _spellings(name, model))]
        self._new_layers = [name for name in able if name in meant and name not in stored]
        apply_config(model, config, stored)
        # So that transformers initialises the raw weight of a head whose size changed, through `module.weight`.
        for layer in constrained_layers(model):
            layer.parametrization.is_suspended = True
        plain = {rf"(^|\.){re.escape(min(_spellings(name, model), key=len))}\.weight$" for name in stored}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | plain

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for layer in constrained_layers(model):
            parametrization = layer.parametrization
            parametrization.is_suspended = False
            in_checkpoint = any(name + RAW_SUFFIX in self._keys for name in _spellings(layer.name, model))
            is_raw_loaded = _is_loaded(parametrization.original)
            if not (is_raw_loaded or in_checkpoint) or not _is_loaded(parametrization.lipschitz):
                raise ValueError(
                    f"the checkpoint has no raw weight or no constant for {layer.name}: it is incomplete, save it "
                    "again with save_pretrained"
                )
            if is_raw_loaded:
                parametrization.check_constant()
                parametrization.refresh(anew=True)
            else:
                parametrization.keep_or_set_constant(self.quantization_config.layer_lipschitz)
        apply_config(model, self.quantization_config, self._new_layers)
        names = tuple(layer.name for layer in constrained_layers(model))
        model.config.quantization_config = dataclasses.replace(self.quantization_config, layers=names or None)
        if not names:
            del model.config.quantization_config
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        del model.hf_quantizer, model.quantization_method

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


def _spellings(name: str, model: PreTrainedModel) -> set[str]:
    """The names that a layer may have in a model with or without a head."""
    prefix = model.base_model_prefix
    return {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")} if prefix else {name}


def _is_loaded(tensor: torch.Tensor) -> bool:
    """transformers marks what it has read; what is offloaded to disk stays on the meta device."""
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
