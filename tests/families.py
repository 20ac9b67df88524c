"""Tiny models of many families, from configurations: name -> model. Each call gives new random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


ENCODER = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
IMAGE = {"num_labels": 4, "num_channels": 3}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**ENCODER))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER))


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(vocab_size=60, dim=24, n_layers=2, n_heads=2, hidden_dim=40, num_labels=3)
    return DistilBertForSequenceClassification(config)


def albert() -> PreTrainedModel:
    return AlbertForSequenceClassification(AlbertConfig(**ENCODER, embedding_size=16))


def electra() -> PreTrainedModel:
    return ElectraForSequenceClassification(ElectraConfig(**ENCODER, embedding_size=16))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=40, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def llama() -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(**ENCODER, num_key_value_heads=1, pad_token_id=0))


def vit() -> PreTrainedModel:
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        **IMAGE,
    )
    return ViTForImageClassification(config)


def swin() -> PreTrainedModel:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, **IMAGE
    )
    return SwinForImageClassification(config)


def resnet() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", **IMAGE)
    return ResNetForImageClassification(config)


def convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, **IMAGE))


def mobilenet_v2() -> PreTrainedModel:
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.35, **IMAGE))


TEXT: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "albert": albert,
    "electra": electra,
    "gpt2": gpt2,
    "llama": llama,
}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": vit,
    "swin": swin,
    "resnet": resnet,
    "convnext": convnext,
    "mobilenet_v2": mobilenet_v2,
}
FAMILIES = {**TEXT, **VISION}


def example(model: PreTrainedModel, batch: int = 2) -> dict[str, Tensor]:
    """A batch of inputs for any model above."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) else 32
        return {"pixel_values": torch.rand(batch, 3, min(size, 32), min(size, 32), generator=generator)}
    return {"input_ids": torch.randint(1, 60, (batch, 9), generator=generator)}
