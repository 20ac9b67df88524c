"""Tiny models that read images. Each call gives new random weights."""

from __future__ import annotations

from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.families.weights import with_statistics, with_visible_vectors


IMAGE = {"num_labels": 4, "num_channels": 3}
TRANSFORMER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
TEXT_TOWER = {
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def vit() -> PreTrainedModel:
    return with_visible_vectors(ViTForImageClassification(ViTConfig(**TRANSFORMER, **IMAGE)))


def swin() -> PreTrainedModel:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, **IMAGE
    )
    return with_visible_vectors(SwinForImageClassification(config))


def resnet() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", **IMAGE)
    return with_statistics(with_visible_vectors(ResNetForImageClassification(config)), 32)


def convnext() -> PreTrainedModel:
    """Depthwise convolutions; `layer_scale_parameter` is a vector that multiplies each branch."""
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, **IMAGE)
    return with_visible_vectors(ConvNextForImageClassification(config))


def mobilenet_v2() -> PreTrainedModel:
    """17 depthwise convolutions."""
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, expand_ratio=2, finegrained_output=True, **IMAGE)
    return with_statistics(with_visible_vectors(MobileNetV2ForImageClassification(config)), 32)


def clip() -> PreTrainedModel:
    config = CLIPConfig(vision_config={**TRANSFORMER, "projection_dim": 8}, text_config=TEXT_TOWER, num_labels=4)
    return with_visible_vectors(CLIPForImageClassification(config))


def segformer() -> PreTrainedModel:
    """Strided convolutions that shorten the keys, and depthwise ones inside the feed-forward parts."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        **IMAGE,
    )
    return with_visible_vectors(SegformerForImageClassification(config))


def siglip() -> PreTrainedModel:
    """Its logits do not use the `nn.MultiheadAttention` head that it holds: see [`siglip_vision`]."""
    config = SiglipConfig(vision_config=TRANSFORMER, text_config=TEXT_TOWER, num_labels=4)
    return with_visible_vectors(SiglipForImageClassification(config))


def siglip_vision() -> PreTrainedModel:
    """No logits: `pooler_output` comes from an `nn.MultiheadAttention`, three matrices in one `in_proj_weight`."""
    return with_visible_vectors(SiglipVisionModel(SiglipVisionConfig(**TRANSFORMER)))
