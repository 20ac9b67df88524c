"""Penalties on the Hessian of the task loss with respect to weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.modes import evaluating


Curvature = Callable[[Tensor, Sequence[Tensor], torch.Generator], Tensor]


def hessian_vector_square(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    r"""
    \\(\|Hv\|^2\\) with H the Hessian of `loss` with respect to all of `weights` together, exact and differentiable.

    Args:
        loss (`Tensor`):
            0-dim, a twice differentiable function of the weights.
        weights (`Sequence[Tensor]`):
            Leaves or intermediate tensors of the graph of the loss. One that the loss does not use counts as zero.
        vectors (`Sequence[Tensor]`):
            v, cut into the shapes of the weights.

    Returns:
        `Tensor`: 0-dim, part of the autograd graph.
    """
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    inner = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    products = torch.autograd.grad(inner, weights, create_graph=True, materialize_grads=True)
    return sum(p.pow(2).sum() for p in products)


def rademacher(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A vector of independent signs, cut into the shapes of `weights`, drawn from `generator` only."""
    return [
        torch.randint(0, 2, w.shape, generator=generator, device=w.device).to(w.dtype).mul_(2).sub_(1) for w in weights
    ]


def hutchinson(loss: Tensor, weights: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    r"""
    \\(\|Hv\|^2\\) for one Rademacher vector v: an **unbiased estimate** of \\(\|H\|_F^2 = \mathrm{tr} H^2\\)
    (Hutchinson 1990 with the matrix H²).

    H is the Hessian of `loss`, so when `loss` is the mean over a micro-batch, so is H, and the penalty belongs to the
    micro-batch: the mean of ‖Hv‖² over micro-batches, or over processes, is at least ‖Hv‖² of the whole batch.
    """
    return hessian_vector_square(loss, weights, rademacher(weights, generator))


CURVATURES: dict[str, Curvature] = {"hutchinson": hutchinson}


def curvature_penalty(
    model: nn.Module,
    layers: Sequence[nn.Module],
    task_loss: Callable[[], Tensor],
    generator: torch.Generator,
    curvature: str,
) -> Tensor:
    """Runs `task_loss`, a forward of `model`, and returns its curvature with respect to the weights of `layers`.

    The forward runs in evaluation mode: the Hessian is then that of the function which is evaluated and certified,
    batch statistics are updated once a step only, and no dropout mask is drawn, so that the penalty leaves the masks
    of the task loss as they are. Attention runs in plain tensor operations, since the fused kernels cannot be
    differentiated twice.

    For a constrained layer the weight is the effective one. The raw one is scale-free: its Hessian would shrink
    whenever it grows, with the function unchanged.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism, nor compiled.
        layers (`Sequence[torch.nn.Module]`):
            Modules of the model with a `weight`.
        task_loss (`Callable`):
            No arguments, the 0-dim mean loss of the micro-batch.
        generator (`torch.Generator`):
            Where probes come from.
        curvature (`str`):
            A key of `CURVATURES`.

    Returns:
        `Tensor`: 0-dim; its gradient reaches the raw weights through the parametrizations.
    """
    with parametrize.cached(), evaluating(model), sdpa_kernel(SDPBackend.MATH):
        _fill_cache(model)
        weights = [layer.weight for layer in layers]
        return CURVATURES[curvature](task_loss(), weights, generator)


def _fill_cache(model: nn.Module) -> None:
    """Reads each effective weight with gradients: a first read under no_grad would cache it without them."""
    for layer in constrained_layers(model):
        getattr(layer.module, layer.tensor_name)
