"""CURE: the penalty on the curvature of the task loss with respect to the inputs (Moosavi-Dezfooli et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.training.augmentation import PIXELS, TOKENS
from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.hessian import widened


def cure(problem: CurvatureProblem) -> Tensor:
    r"""
    \\(\frac1B \sum_i \|\frac1h (\nabla \ell_i(x_i + h z_i) - \nabla \ell_i(x_i))\|^2\\) with \\(z_i\\) of
    [`sign_direction`] at \\(\nabla \ell_i(x_i)\\) and h the radius of the problem (Moosavi-Dezfooli et al. 2019,
    arXiv:1811.09716, who leave 1/h² to the weight of the penalty). For h → 0 it is the mean of ‖H_i z_i‖², H_i the
    Hessian of the loss of one example with respect to its input, a **lower bound** of the mean of its square spectral
    norm.

    x is `pixel_values`, in the unit that `input_scale` says, or the output of the model's input embeddings.
    \\(\ell_i\\) is B times what example i brings to the mean loss: its own loss, but where tokens are averaged over
    the batch. The penalty is a mean over examples, exact for the points it looks at: nothing is drawn.

    The gradient reaches every trained weight, embeddings included. It is exact too, since z does not change with the
    weights as long as no entry of the gradient changes its sign.

    Raises:
        ValueError: the model or the batch has no input that can be moved.
    """
    kind = input_kind(problem.model)
    here = _example_gradients(problem, kind, None)
    there = _example_gradients(problem, kind, problem.radius * sign_direction(here.detach()))
    change = (widened(there) - widened(here)) / problem.radius
    return change.flatten(1).pow(2).sum(1).mean()


def sign_direction(gradients: Tensor) -> Tensor:
    r"""
    \\(\mathrm{sign}(g_i) / \|\mathrm{sign}(g_i)\|\\) for each row g_i of a tensor of shape `(B, ...)`, the direction
    along which CURE found the curvature to be large; zero where the row is.
    """
    signs = gradients.sign()
    norms = torch.linalg.vector_norm(widened(signs).flatten(1), dim=1).clamp_min(1)
    return signs / norms.to(signs.dtype).view(-1, *[1] * (signs.ndim - 1))


def input_kind(model: nn.Module) -> str:
    """Name of the input that is moved, before there is a batch.

    Raises:
        ValueError: the model takes neither pixels, nor tokens once.
    """
    kind = getattr(model, "main_input_name", None)
    is_twice = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if kind not in (PIXELS, TOKENS) or (kind == TOKENS and is_twice):
        raise ValueError(
            f"curvature='cure' acts on pixel_values or on the embeddings of an encoder or decoder; "
            f"{type(model).__name__} takes {'tokens twice' if kind == TOKENS else kind}: use a curvature of weights, "
            "such as 'hutchinson'"
        )
    return kind


def _example_gradients(problem: CurvatureProblem, kind: str, offset: Tensor | None) -> Tensor:
    """∇ℓ_i at x_i + offset_i, of shape `(B, ...)`; differentiable in the weights."""
    with _moved(problem, kind, offset) as (inputs, offsets):
        loss, _ = problem.task_loss(inputs)
    if len(offsets) != 1:
        raise ValueError(
            f"curvature='cure' needs one call of the input embeddings a forward, and {type(problem.model).__name__} "
            f"makes {len(offsets)}: give {TOKENS} in the batch, or use a curvature of weights, such as 'hutchinson'"
        )
    (gradients,) = torch.autograd.grad(loss, offsets, create_graph=True)
    return len(gradients) * gradients


@contextmanager
def _moved(
    problem: CurvatureProblem, kind: str, offset: Tensor | None
) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """Inside the block, forwards on the inputs that it yields see x + offset.

    The list gets the offset, zero for `None`, as a leaf that requires a gradient. x keeps its own graph, through which
    the gradient of the penalty reaches the weights of the embeddings.
    """
    inputs = dict(problem.inputs)
    offsets: list[Tensor] = []

    def move(x: Tensor, scale: Tensor | float) -> Tensor:
        offsets.append((torch.zeros_like(x) if offset is None else offset).detach().requires_grad_())
        return x + scale * offsets[-1]

    if kind == PIXELS:
        scale = problem.input_scale
        pixels = _pixels(inputs)
        inputs[PIXELS] = move(pixels, scale.to(pixels) if isinstance(scale, Tensor) else scale)
        yield inputs, offsets
        return
    handle = problem.model.get_input_embeddings().register_forward_hook(lambda module, args, output: move(output, 1.0))
    try:
        yield inputs, offsets
    finally:
        handle.remove()


def _pixels(inputs: dict[str, Any]) -> Tensor:
    pixels = inputs.get(PIXELS)
    if pixels is None:
        raise ValueError(f"curvature='cure' needs {PIXELS} in the batch, which has {', '.join(inputs)}")
    if pixels.ndim < 4 or not pixels.is_floating_point():
        raise ValueError(
            f"curvature='cure' needs {PIXELS} of shape (B, C, H, W) in floating point, got {tuple(pixels.shape)} of "
            f"{pixels.dtype}: use a curvature of weights, such as 'hutchinson'"
        )
    return pixels
