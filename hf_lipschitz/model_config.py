"""Where a model keeps the configuration that it was lipschitzified with."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from hf_lipschitz.configuration import LipschitzConfig


_ATTRIBUTE = "_lipschitz_config"


def config_of(model: nn.Module) -> LipschitzConfig | None:
    """The configuration of a lipschitzified model. A model of transformers, or one that wraps it, has it in its own,
    under the name by which transformers lets a library take part in loading; another module as an attribute."""
    config = getattr(model, _ATTRIBUTE, None)
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, LipschitzConfig) else None


def set_config(model: nn.Module, config: LipschitzConfig | None) -> None:
    """Sets it, or takes it away."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        setattr(model, _ATTRIBUTE, config)
    elif config is not None:
        model.config.quantization_config = config
    elif config_of(model) is not None:
        del model.config.quantization_config
