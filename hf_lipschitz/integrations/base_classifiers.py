"""Base classifiers from transformers models: the space in which noise is added, and the way from there to logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lipschitz.integrations.preprocessing import normalisation


PIXEL_UNIT = "pixels in [0, 1]"
EMBEDDING_UNIT = "input embeddings"
# Resampling of floating-point images goes beyond their values by as much.
OVERSHOOT = 0.25


class PixelClassifier(nn.Module):
    """Logits from images in [0, 1] at the model's own resolution: mean and std of the processor are part of it.

    Args:
        model (`PreTrainedModel`):
            An image classifier.
        image_processor (`BaseImageProcessor`):
            Its processor.

    Raises:
        ValueError: with `do_normalize=False` the processor does not give pixels in [0, 1], or its normalisation is not
            (x - mean) / std, on probe images.
    """

    unit = PIXEL_UNIT

    def __init__(self, model: PreTrainedModel, image_processor: Any) -> None:
        super().__init__()
        mean, std = normalisation(image_processor)
        self.image_processor = image_processor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.num_channels = getattr(model.config, "num_channels", 3)
        _check_processor(self)
        self.train(model.training)
        self.model = model
        self.to(model.device)

    def encode(self, image: Any) -> Tensor:
        """One image, as the processor takes it, to a tensor of shape (channels, height, width) in [0, 1].

        Raises:
            ValueError: its values are not in 0 .. 255, which the processor divides by 255.
        """
        pixels = self._process(image, do_normalize=False)
        _check_range(image, pixels)
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, channels, height, width) in [0, 1], noise included, to logits (B, num_labels)."""
        normalised = (pixels - self.mean) / self.std
        return self.model(pixel_values=normalised.to(self.model.dtype)).logits

    def _process(self, image: Any, **options: Any) -> Tensor:
        image = _with_channels(image, self.num_channels)
        return self.image_processor(image, return_tensors="pt", **options)["pixel_values"][0].float()


def _check_range(image: Any, pixels: Tensor) -> None:
    least, largest = float(pixels.min()), float(pixels.max())
    if least < -OVERSHOOT or largest > 1 + OVERSHOOT:
        raise ValueError(
            f"The image has pixels from {least:.3g} to {largest:.3g} after the processor's division by 255, outside "
            "[0, 1]; pass values in 0 .. 255, or a PIL image."
        )
    is_floating = isinstance(image, (np.ndarray, Tensor)) and "float" in str(image.dtype)
    if is_floating and 0 < largest <= (1 + OVERSHOOT) / 255:
        raise ValueError(
            "The image seems to be in [0, 1] already, and the processor divides by 255 once more; pass values in "
            "0 .. 255, or a PIL image."
        )


class EmbeddingClassifier(nn.Module):
    """Logits from the output of the word embeddings of one unpadded text, of shape (tokens, hidden size).

    Args:
        model (`PreTrainedModel`):
            A text classifier that takes `inputs_embeds`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.

    Raises:
        ValueError: on a probe text the logits from `inputs_embeds` are not those from `input_ids`.
    """

    unit = EMBEDDING_UNIT

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.train(model.training)
        self.model = model
        _check_embeddings(self)

    def encode(self, text: Any) -> Tensor:
        """One text to its word embeddings; longer texts are cut at the model's length."""
        if not isinstance(text, str):
            raise TypeError(f"a text classifier certifies strings, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("the text is empty; there is nothing to certify")
        with torch.no_grad():
            return self.model.get_input_embeddings()(self._token_ids(text))[0].float()

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, tokens, hidden size), noise included, to logits (B, num_labels)."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.model(inputs_embeds=embeddings.to(self.model.dtype), attention_mask=mask).logits

    def _token_ids(self, text: str) -> Tensor:
        limit = min(self.tokenizer.model_max_length, _positions(self.model))
        encoded = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        if encoded["input_ids"].numel() == 0:
            raise ValueError("the text has no token; there is nothing to certify")
        return encoded["input_ids"].to(self.model.device)


def base_classifier(
    model: PreTrainedModel, tokenizer: Any, image_processor: Any
) -> PixelClassifier | EmbeddingClassifier:
    """The base classifier of a model, by what it takes as its main input.

    Raises:
        TypeError: `model` is not a `PreTrainedModel`.
        ValueError: the model is no single-label classifier of texts or images, or what prepares its inputs is missing.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if model.config.num_labels < 2 or model.config.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{type(model).__name__} has num_labels={model.config.num_labels} and problem_type="
            f"{model.config.problem_type!r}: certificates are for one label out of at least two"
        )
    if model.main_input_name == "pixel_values":
        if image_processor is None:
            raise ValueError("an image classifier needs its image_processor; pass image_processor=...")
        return PixelClassifier(model, image_processor)
    if model.main_input_name == "input_ids":
        if tokenizer is None:
            raise ValueError("a text classifier needs its tokenizer; pass tokenizer=...")
        return EmbeddingClassifier(model, tokenizer)
    raise ValueError(
        f"{type(model).__name__} takes {model.main_input_name!r}: certificates are for pixel_values (images) and "
        "input_ids (texts)"
    )


def _check_processor(classifier: PixelClassifier) -> None:
    name = type(classifier.image_processor).__name__
    shape = (67, 59, classifier.num_channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for probe in (noise, np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)):
        pixels = classifier._process(probe, do_normalize=False)
        normalised = classifier._process(probe)
        if pixels.min() < -1e-6 or pixels.max() > 1 + 1e-6 or (probe.min() == 255 and pixels.max() < 1 - 1e-6):
            raise ValueError(
                f"{name} with do_normalize=False gives values in [{pixels.min():.3g}, {pixels.max():.3g}] instead of "
                "pixels in [0, 1], so sigma and the radius would have no unit; use a processor that rescales by 1/255"
            )
        forth = (pixels - classifier.mean) / classifier.std
        back = normalised * classifier.std + classifier.mean
        if (
            forth.shape != normalised.shape
            or max((forth - normalised).abs().max(), (back - pixels).abs().max()) > 1e-4
        ):
            raise ValueError(
                f"{name} does not normalise by (x - image_mean) / image_std, so its pixel unit cannot be "
                "folded into the model; use a processor that does"
            )


def _check_embeddings(classifier: EmbeddingClassifier) -> None:
    name = type(classifier.model).__name__
    with torch.no_grad():
        ids = classifier._token_ids("a probe of the embeddings")
        embeddings = classifier.model.get_input_embeddings()(ids)
        was_training = classifier.training
        classifier.eval()
        try:
            expected = classifier.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits = classifier(embeddings)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} does not classify from inputs_embeds ({error}): it cannot be certified"
            ) from error
        finally:
            classifier.train(was_training)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{name} gives other logits from inputs_embeds than from input_ids: noise on its embeddings would certify "
            "another function, so it is refused"
        )


def _positions(model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if positions and positions > 2 else 2**31


def _with_channels(image: Any, num_channels: int) -> Any:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
    if num_channels == 1 and getattr(image, "ndim", None) == 2:
        return image[:, :, None]
    return image
