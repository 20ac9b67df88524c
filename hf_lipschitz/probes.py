"""Inputs made from a model's configuration, to see how its modules are connected."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


_BATCH, _TOKENS, _FRAMES = 2, 9, 16
# Of images for models that take any size.
_SIDE = 64


def probe_inputs(model: nn.Module) -> dict[str, Any]:
    """A small batch of random inputs that `model` can run on, the same at each call.

    Texts: `input_ids` without special tokens but for the end token that encoder-decoder models ask for, and
    `decoder_input_ids`. Images: `pixel_values` of `config.image_size`, 64 where any size will do. Audio:
    `input_values`, as samples or spectrograms, or `input_features`. Models of texts and images get both.

    Raises:
        ValueError: the inputs of the family are not known, or `model` is no `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no PreTrainedModel, so that no configuration tells what it reads: pass inputs"
        )
    config, taken = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    makers = {"input_ids": _ids, "pixel_values": _pixels, "input_values": _samples, "input_features": _features}
    wanted = {name for name in ("input_ids", "pixel_values") if name in taken and _has_tower(config, name)}
    made: dict[str, Any] = {}
    for name in [name for name in makers if name in {model.main_input_name, *wanted}]:
        value = makers[name](config, generator)
        if value is not None:
            made[name] = value.to(model.device, model.dtype if value.is_floating_point() else None)
    if model.main_input_name not in made:
        raise ValueError(
            f"no probe inputs are known for {config.model_type} ({type(model).__name__}), which reads "
            f"{model.main_input_name!r}"
        )
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        ids = made.get("input_ids")
        made["decoder_input_ids"] = _ids(config, generator).to(model.device) if ids is None else ids.clone()
    if "use_cache" in taken:
        made["use_cache"] = False
    return made


def _has_tower(config: Any, name: str) -> bool:
    return hasattr(config, "text_config") and (name == "input_ids" or hasattr(config, "vision_config"))


def _ids(config: Any, generator: torch.Generator) -> Tensor | None:
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None)
    if size is None:
        return None
    special = {
        token
        for name in ("pad", "bos", "eos", "cls", "sep", "unk", "mask", "decoder_start")
        for token in _as_list(getattr(text, f"{name}_token_id", None))
    }
    special |= {v for c in (config, text) for n, v in vars(c).items() if n.endswith("token_index") and v is not None}
    ordinary = [token for token in range(min(size, 1000)) if token not in special]
    if not ordinary:
        return None
    ids = torch.tensor(ordinary)[torch.randint(0, len(ordinary), (_BATCH, _TOKENS), generator=generator)]
    ends = _as_list(getattr(text, "eos_token_id", None))
    if config.is_encoder_decoder and ends:
        ids[:, -1] = ends[0]
    return ids


def _pixels(config: Any, generator: torch.Generator) -> Tensor | None:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or _SIDE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.rand(_BATCH, getattr(config, "num_channels", None) or 3, height, width, generator=generator)


def _samples(config: Any, generator: torch.Generator) -> Tensor | None:
    config = getattr(config, "audio_config", config)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(_BATCH, config.max_length, config.num_mel_bins, generator=generator)
    if not hasattr(config, "conv_stride") or not hasattr(config, "conv_kernel"):
        return None
    length = _FRAMES
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return torch.randn(_BATCH, length, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor | None:
    config = getattr(config, "audio_config", config)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # The first convolutions of Whisper halve the number of frames.
        return torch.randn(_BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    width = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", None)
    return None if width is None else torch.randn(_BATCH, math.prod((4, _FRAMES)), width, generator=generator)


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
