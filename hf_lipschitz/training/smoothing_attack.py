"""SmoothAdv: adversarial examples of the smoothed classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lipschitz.training.loss_checks import check_positive
from hf_lipschitz.training.smoothing_losses import smoothed_cross_entropy


def smooth_adversary(
    logits_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    radius: float,
    num_steps: int,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    r"""
    Projected gradient ascent in the ℓ2 ball on \\(-\log \frac1m \sum_i p_y(x' + \delta_i)\\), with the same noise δ at
    every step (SmoothAdv_PGD, Salman et al. 2019, arXiv:1906.04584): from x, steps of length `step_size` along the
    gradient of each example, back to the `bounds`, and back to the ball. Training then goes on at x' + δ_i.

    An attack finds some x' near the worst one; that it fails certifies nothing. It draws no random number, and leaves
    the gradients of parameters alone. An example with gradient zero stays where it is.

    Args:
        logits_of (`Callable[[Tensor], Tensor]`):
            From inputs of shape `(mB, ...)`, copy after copy, to logits `(mB, K)`; differentiable. Under data
            parallelism it calls the model that is not wrapped, in evaluation mode (`evaluating(model)`), so that
            neither batch statistics nor dropout change.
        inputs (`Tensor` of shape `(B, ...)`):
            x, in the unit in which the radius and the noise are meant.
        labels (`Tensor` of shape `(B,)`):
            y, in [0, K).
        noise (`Tensor` of shape `(m, B, ...)`):
            δ, what is added to the inputs: σ times standard normal numbers.
        radius (`float`):
            ε > 0 of the ball.
        num_steps (`int`):
            At least 1.
        step_size (`float`, *optional*, defaults to 2ε / `num_steps`):
            As in the published code.
        bounds (`tuple[float, float]`, *optional*):
            Least and largest value of an entry of x', such as `(0.0, 1.0)` for pixels; x is to be within them.

    Returns:
        `Tensor` of shape `(B, ...)`: x', detached, in the dtype of `inputs` and at least float32.

    Raises:
        ValueError: a parameter, a shape or a label is out of range, logits are NaN or inf, or do not depend on the
            inputs.
        TypeError: inputs or logits are no floating-point tensors, or labels no integers.

    Example::

        scale = pixel_scale(image_processor).to(pixel_values)  # how far normalised values move for a pixel
        with evaluating(core):
            adversarial = scale * smooth_adversary(
                lambda pixels: core(pixel_values=scale * pixels).logits, pixel_values / scale, labels, noise,
                radius=0.5, num_steps=4,
            )
    """
    check_positive("radius", radius)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}: leave the attack out instead")
    step_size = 2 * radius / num_steps if step_size is None else step_size
    check_positive("step_size", step_size)
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (least, largest) with least < largest, got {bounds}")
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be a floating-point tensor, got a tensor of {inputs.dtype}; attack embeddings")
    if noise.dim() != inputs.dim() + 1 or noise.shape[1:] != inputs.shape or len(noise) < 1:
        raise ValueError(f"noise must have shape (m, {', '.join(map(str, inputs.shape))}), got {tuple(noise.shape)}")
    x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    noise = noise.detach().to(x)
    moved = x
    for _ in range(num_steps):
        gradient = _gradient(logits_of, moved, labels, noise)
        moved = moved + step_size * _unit(gradient)
        if bounds is not None:
            moved = moved.clamp(*bounds)
        shift = moved - x
        moved = x + shift * (radius / _norms(shift).clamp_min(radius))
    return moved


def _gradient(logits_of: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = logits_of((leaf + noise).flatten(0, 1))
        if len(logits) != noise.shape[0] * noise.shape[1]:
            raise ValueError(f"logits_of returned {len(logits)} rows for {noise.shape[0] * noise.shape[1]} inputs")
        # A sum over examples: the gradient of each is that of its own loss.
        loss = smoothed_cross_entropy(logits.unflatten(0, noise.shape[:2]), labels) * len(x)
        if not loss.requires_grad:
            raise ValueError("the logits do not depend on the inputs: call the model without torch.no_grad()")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).reshape(-1, *[1] * (rows.dim() - 1))


def _unit(rows: Tensor) -> Tensor:
    # The squares of the gradient at a confident prediction underflow.
    largest = rows.flatten(1).abs().amax(1).reshape(-1, *[1] * (rows.dim() - 1))
    rows = rows / torch.where(largest > 0, largest, 1.0)
    return rows / _norms(rows).clamp_min(1.0)
