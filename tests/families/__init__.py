"""Tiny models of many families, from configurations: name -> model. Each call gives new random weights.

Every model of `FAMILIES` returns `.logits`; those of `HEADLESS` return `.pooler_output`. [`output`] reads either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tests.families.audio import ast, wav2vec2, whisper
from tests.families.text import (
    albert,
    bert,
    deberta_v2,
    distilbert,
    electra,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    modernbert,
    roberta,
    t5,
    xlnet,
)
from tests.families.vision import (
    clip,
    convnext,
    mobilenet_v2,
    resnet,
    segformer,
    siglip,
    siglip_vision,
    swin,
    vit,
)


TEXT: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "albert": albert,
    "electra": electra,
    "deberta_v2": deberta_v2,
    "modernbert": modernbert,
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "xlnet": xlnet,
}
# Apart from `TEXT`, for its classifier takes no `inputs_embeds`.
ENCODER_DECODER: dict[str, Callable[[], PreTrainedModel]] = {"t5": t5}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": vit,
    "swin": swin,
    "resnet": resnet,
    "convnext": convnext,
    "mobilenet_v2": mobilenet_v2,
    "clip": clip,
    "segformer": segformer,
    "siglip": siglip,
}
AUDIO: dict[str, Callable[[], PreTrainedModel]] = {
    "wav2vec2": wav2vec2,
    "ast": ast,
    "whisper": whisper,
}
FAMILIES = {**TEXT, **ENCODER_DECODER, **VISION, **AUDIO}
HEADLESS: dict[str, Callable[[], PreTrainedModel]] = {"siglip_vision": siglip_vision}


def example(model: PreTrainedModel, batch: int = 2) -> dict[str, Tensor]:
    """A batch of inputs for any model above."""
    generator = torch.Generator().manual_seed(1)
    config, key = model.config, model.main_input_name
    if key == "input_ids":
        tokens = torch.randint(1, 60, (batch, 9), generator=generator)
        if config.model_type == "t5":
            eos = config.eos_token_id
            tokens = torch.where(tokens == eos, eos + 1, tokens)
            tokens[:, -1] = eos
        return {key: tokens}
    if key == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", 32)
        size = min(size, 32) if isinstance(size, int) else 32
        return {key: torch.rand(batch, 3, size, size, generator=generator)}
    if key == "input_features":
        return {key: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    shape = (config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (400,)
    return {key: torch.randn(batch, *shape, generator=generator)}


def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or what a model without a head returns in their place."""
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.pooler_output


def auto_class(model: PreTrainedModel) -> type:
    """The `AutoModelForX` whose `from_pretrained` gives a model of this class back."""
    if model.config.model_type == "siglip_vision_model":
        return AutoModel
    if model.main_input_name == "input_ids":
        return AutoModelForSequenceClassification
    is_image = model.main_input_name == "pixel_values"
    return AutoModelForImageClassification if is_image else AutoModelForAudioClassification
