"""Gaussian noise on the inputs of training, in the unit in which they are certified."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


PIXELS, TOKENS = "pixel_values", "input_ids"


@contextmanager
def gaussian_noise(
    model: nn.Module, inputs: Mapping[str, Any], sigma: float, processor: Any, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Inside the block, forwards of `model` on the inputs that it yields see noise.

    Pixels are replaced by noisy ones. Token ids stay, and the output of the model's input embeddings, which is what
    `inputs_embeds` would be, gets the noise from a hook: the forward keeps its ordinary arguments, so data parallelism
    sees every parameter used.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        inputs (`Mapping[str, Any]`):
            Keyword arguments of its forward.
        sigma (`float`):
            Standard deviation, for pixels in [0, 1] before normalisation, or for word embeddings.
        processor:
            The image processor that made the pixels; not used for text.
        generator (`torch.Generator`):
            Where the noise comes from. Every forward in the block sees the same noise.

    Raises:
        ValueError: the kind of input has no noise, or the unit of the pixels is not known.
    """
    inputs = dict(inputs)
    kind = check_noise(model, processor)
    if kind not in inputs:
        raise ValueError(f"noise_sigma needs {kind} in the batch, which has {', '.join(inputs)}")
    if kind == PIXELS:
        inputs[PIXELS] = add_pixel_noise(inputs[PIXELS], pixel_scale(processor) * sigma, generator)
        yield inputs
        return
    start = generator.get_state()

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        generator.set_state(start)
        return output + sigma * _standard_normal(output, generator)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield inputs
    finally:
        handle.remove()


def check_noise(model: nn.Module, processor: Any) -> str:
    """Name of the input that gets the noise; raises what [`gaussian_noise`] would, before there is a batch."""
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


def add_pixel_noise(pixel_values: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """`pixel_values` of shape `(..., C, H, W)` plus noise of the standard deviation `std`, of shape `(C, 1, 1)`.

    Raises:
        ValueError: the pixel values are cut into patches, or have another number of channels.
    """
    if pixel_values.ndim < 4 or len(std) not in (1, pixel_values.shape[-3]):
        raise ValueError(
            f"noise_sigma needs pixel_values of shape (B, {len(std)}, H, W), got {tuple(pixel_values.shape)}: set "
            "noise_sigma=0"
        )
    return pixel_values + std.to(pixel_values) * _standard_normal(pixel_values, generator)


def _standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return noise.to(like.dtype)
