"""What the forward of a training step sees: noisy copies of the batch, around it or around adversarial examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.training.augmentation import (
    PIXELS,
    TOKENS,
    check_noise,
    moved_inputs,
    moved_tensor,
    pixel_scale,
    repeated,
)
from hf_lipschitz.training.example_draws import ExampleDraws
from hf_lipschitz.training.outputs import logits_of
from hf_lipschitz.training.smoothing_attack import smooth_adversary


@contextmanager
def noisy_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    draws: ExampleDraws,
    processor: Any = None,
    *,
    sigma: float,
    copies: int = 1,
    attack_radius: float = 0.0,
    attack_steps: int = 1,
) -> Iterator[dict[str, Any]]:
    """Inside the block, forwards of `model` on the batch that it yields see x' + δ for each copy δ of the noise.

    δ is Gaussian, keyed by the example ([`ExampleDraws`]), and zero at tokens that the attention mask leaves out. x'
    is x, or with an `attack_radius` what [`smooth_adversary`] finds in the ball around x, for the same noise. Pixels
    are not clipped to [0, 1]: smoothing is over all of R^d.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        inputs (`Mapping[str, Any]`):
            A batch of B examples, labels included.
        draws (`ExampleDraws`):
            Advanced to this micro-batch already.
        processor:
            The image processor that made the pixels; not used for text.
        sigma (`float`):
            Standard deviation, for pixels in [0, 1] before normalisation, or for word embeddings.
        copies (`int`, *optional*, defaults to 1):
            m; the batch that is yielded has mB rows, copy after copy.
        attack_radius (`float`, *optional*, defaults to 0.0), attack_steps (`int`, *optional*, defaults to 1):
            ℓ2 radius of the ball, in the unit of sigma, and steps of the attack; 0 is no attack.

    Raises:
        ValueError: the input has no noise, the unit of pixels is not known, or the attack meets labels that are not
            one class each.
    """
    is_of_pixels = check_noise(model, processor) == PIXELS
    scale = pixel_scale(processor) if is_of_pixels else 1.0
    like = moved_tensor(model, inputs, scale)
    noise = sigma * draws.standard_normal(like, copies, mask=None if is_of_pixels else _mask(inputs))
    batch = repeated(inputs, len(like), copies)
    shift = noise.flatten(0, 1)
    if attack_radius > 0:
        away = _adversarial_shift(model, batch, inputs.get("labels"), noise, scale, attack_radius, attack_steps)
        shift = shift + away.repeat(copies, *[1] * (away.dim() - 1))
    with moved_inputs(model, batch, shift, scale) as moved:
        yield moved


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == inputs[TOKENS].shape else None


def _adversarial_shift(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor | None,
    noise: Tensor,
    scale: Tensor | float,
    radius: float,
    num_steps: int,
) -> Tensor:
    """x' - x, which is an attack of the moved model at zero."""
    if labels is None:
        raise ValueError(f"attack_radius needs labels in the batch, which has {', '.join(batch)}")
    unlabelled = {name: x for name, x in batch.items() if name != "labels"}

    def logits_at(shifts: Tensor) -> Tensor:
        with moved_inputs(model, unlabelled, shifts, scale) as moved:
            return logits_of(model(**moved), has_loss=False)

    with parametrize.cached(), evaluating(model):
        zeros = torch.zeros_like(noise[0])
        return smooth_adversary(logits_at, zeros, labels, noise, radius=radius, num_steps=num_steps)
