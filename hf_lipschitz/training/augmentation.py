"""Moving the inputs of training, in the unit in which they are certified."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


PIXELS, TOKENS = "pixel_values", "input_ids"


@contextmanager
def moved_inputs(
    model: nn.Module, inputs: Mapping[str, Any], shift: Tensor, scale: Tensor | float = 1.0
) -> Iterator[dict[str, Any]]:
    """Inside the block, forwards of `model` on the inputs that it yields see x + shift.

    Pixels are replaced by moved ones. Token ids stay, and the output of the model's input embeddings, which is what
    `inputs_embeds` would be, is moved by a hook: the forward keeps its ordinary arguments, so data parallelism sees
    every parameter used.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        inputs (`Mapping[str, Any]`):
            Keyword arguments of its forward.
        shift (`Tensor`):
            Of the shape of the pixel values `(B, ..., C, H, W)` or embeddings `(B, T, d)`.
        scale (`Tensor` or `float`, *optional*, defaults to 1.0):
            How far pixel values move when the unit of the shift moves by one, see [`pixel_scale`].

    Raises:
        RuntimeError: embeddings of another shape come out of the model.
    """
    inputs = dict(inputs)
    if model.main_input_name == PIXELS:
        pixels = inputs[PIXELS]
        scale = scale.to(pixels) if isinstance(scale, Tensor) else scale
        inputs[PIXELS] = pixels + scale * shift.to(pixels.dtype)
        yield inputs
        return

    def move(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape != shift.shape:
            raise RuntimeError(
                f"noise_sigma: the input embeddings are called on {tuple(output.shape[:-1])} tokens, and the batch "
                f"has {tuple(shift.shape[:-1])}: set noise_sigma=0"
            )
        return output + shift.to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield inputs
    finally:
        handle.remove()


def moved_tensor(model: nn.Module, inputs: Mapping[str, Any], scale: Tensor | float = 1.0) -> Tensor:
    """A tensor with the shape and on the device of what [`moved_inputs`] moves.

    Raises:
        ValueError: the batch has no such input, or its pixels are cut into patches or have other channels.
    """
    kind = model.main_input_name
    if kind not in inputs:
        raise ValueError(f"noise_sigma needs {kind} in the batch, which has {', '.join(inputs)}")
    x = inputs[kind]
    if kind == TOKENS:
        embeddings = model.get_input_embeddings()
        is_plain = isinstance(embeddings, nn.Embedding)
        width = embeddings.embedding_dim if is_plain else embeddings(x[:1, :1]).shape[-1]
        return x.new_empty((*x.shape, width), dtype=torch.float32)
    channels = len(scale) if isinstance(scale, Tensor) else 1
    if x.ndim < 4 or channels not in (1, x.shape[-3]):
        raise ValueError(
            f"noise_sigma needs pixel_values of shape (B, {channels}, H, W), got {tuple(x.shape)}: set noise_sigma=0"
        )
    return x


def repeated(inputs: Mapping[str, Any], rows: int, copies: int) -> dict[str, Any]:
    """The batch `copies` times, copy after copy: each tensor of it with `rows` rows."""
    if copies == 1:
        return dict(inputs)
    return {
        name: x.repeat(copies, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) and x.dim() and len(x) == rows else x
        for name, x in inputs.items()
    }


def check_noise(model: nn.Module, processor: Any) -> str:
    """Name of the input that gets the noise; raises what noise would, before there is a batch."""
    kind = getattr(model, "main_input_name", None)
    if kind == PIXELS:
        pixel_scale(processor)
    elif kind != TOKENS or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"noise_sigma acts on pixel_values or on the embeddings of an encoder or decoder; {type(model).__name__} "
            f"takes {'tokens twice' if kind == TOKENS else kind}: set noise_sigma=0"
        )
    return kind


def pixel_scale(processor: Any) -> Tensor:
    """How far the model's pixel values move when a pixel in [0, 1] moves by one, for each channel.

    Args:
        processor:
            An image processor, or a processor that has one. One that does not rescale takes pixels in [0, 1].

    Returns:
        `Tensor` of shape `(C, 1, 1)`, or `(1, 1, 1)` where all channels are alike.

    Raises:
        ValueError: there is no image processor, or its pixel values are no affine map of pixels in [0, 1].
    """
    processor = getattr(processor, "image_processor", processor)
    if PIXELS not in getattr(processor, "model_input_names", ()):
        raise ValueError(
            "noise_sigma is in pixels of [0, 1] and needs the normalisation: pass processing_class=image_processor to "
            "LipschitzTrainer"
        )
    name = type(processor).__name__
    if any(getattr(processor, flag, None) for flag in ("rescale_offset", "include_top", "do_color_quantize")):
        raise ValueError(
            f"{name} does not map pixels of [0, 1] by one mean and one deviation a channel: set rescale_offset, "
            "include_top and do_color_quantize to False, or noise_sigma=0"
        )
    factor = getattr(processor, "rescale_factor", None)
    if getattr(processor, "do_rescale", False) and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{name} rescales by {factor}, so its pixels are not in [0, 1]: set rescale_factor=1/255")
    std = torch.as_tensor(processor.image_std if getattr(processor, "do_normalize", False) else 1.0)
    return (1 / std.double()).reshape(-1, 1, 1)
