"""How `from_pretrained` brings a constrained model back: transformers' quantizer interface used as a loading hook."""

from __future__ import annotations

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

    Which layers are constrained is read off the checkpoint: those with raw weights in it. A layer that the checkpoint
    does not know at all, such as a new head, is initialised by transformers as in any model and constrained
    afterwards.
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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if checkpoint_files is None:
            raise ValueError("a lipschitzified model loads from a directory or a hub id, not from state_dict=")
        keys = {key for file in checkpoint_files for key in _keys(file)}
        able = [name for name, reason in layer_obstacles(model).items() if reason is None]
        stored = [name for name in able if _in_checkpoint(name + RAW_SUFFIX, keys, model)]
        plain_only = [n for n in able if n not in stored and _in_checkpoint(f"{n}.weight", keys, model)]
        if not any(key.endswith(RAW_SUFFIX) for key in keys):
            raise ValueError(
                "config.json names a lipschitzified model, but the weights hold none of its raw tensors "
                f"(*{RAW_SUFFIX}): save it again with save_pretrained, or delete quantization_config from config.json "
                "to load the plain weights"
            )
        asked = {n for n in able if is_meant(model, n, config.target_modules, config.exclude_modules)}
        missing = [name for name in plain_only if name in asked]
        if missing:
            raise ValueError(
                f"the checkpoint holds {missing[0]}.weight and not {missing[0]}{RAW_SUFFIX}: it is incomplete, save "
                "it again with save_pretrained"
            )
        self._new_layers = [n for n in able if n in asked and n not in stored]
        apply_config(model, config, stored)
        plain = {rf"(^|\.){re.escape(_without_prefix(name, model))}\.weight$" for name in stored}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | plain

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        for layer in constrained_layers(model):
            if not torch.isfinite(layer.parametrization.lipschitz):
                raise ValueError(
                    f"the checkpoint has no constant for {layer.name}: save it again with save_pretrained"
                )
            layer.parametrization.refresh()
        apply_config(model, config, self._new_layers)
        if next(constrained_layers(model), None) is None:
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


def _in_checkpoint(key: str, keys: set[str], model: PreTrainedModel) -> bool:
    prefix = model.base_model_prefix
    return key in keys or f"{prefix}.{key}" in keys or (bool(prefix) and key.removeprefix(f"{prefix}.") in keys)


def _without_prefix(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name
