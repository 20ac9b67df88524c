"""Estimates from products of the Hessian of the task loss with random vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_lipschitz.training.curvature_problem import CurvatureProblem


def hessian_vector_product(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r"""
    \\(Hv\\) with H the Hessian of `loss` with respect to all of `weights` together, exact and differentiable.

    Args:
        loss (`Tensor`):
            0-dim, a twice differentiable function of the weights.
        weights (`Sequence[Tensor]`):
            Leaves or intermediate tensors of the graph of the loss. One that the loss does not use counts as zero.
        vectors (`Sequence[Tensor]`):
            v, cut into the shapes of the weights.

    Returns:
        `tuple[Tensor, ...]`: in the shapes of the weights, part of the autograd graph.
    """
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(inner(gradients, vectors), weights, create_graph=True, materialize_grads=True)


def hutchinson(problem: CurvatureProblem) -> Tensor:
    r"""
    \\(\|Hv\|^2\\) for one Rademacher vector v: an **unbiased estimate** of \\(\|H\|_F^2 = \mathrm{tr} H^2\\)
    (Hutchinson 1990 with the matrix H²), never negative.

    H is the Hessian of the mean loss of a micro-batch, and so the penalty belongs to the micro-batch: the mean of
    ‖Hv‖² over micro-batches, or over processes, is at least ‖Hv‖² of the whole batch.
    """
    vectors = rademacher(problem.weights, problem.generator)
    return square_norm(hessian_vector_product(problem.loss(), problem.weights, vectors))


def trace(problem: CurvatureProblem) -> Tensor:
    r"""
    \\(v^T H v\\) for one Rademacher vector v: an **unbiased estimate** of \\(\mathrm{tr} H\\) (Hutchinson 1990), of
    variance \\(2(\|H\|_F^2 - \sum_j H_{jj}^2)\\).

    H is the Hessian of the mean loss of a micro-batch. The trace is a mean over examples, but may be negative and has
    no lower bound: a large weight of this penalty trains towards saddle points, where `gauss_newton` does not.
    """
    vectors = rademacher(problem.weights, problem.generator)
    return inner(hessian_vector_product(problem.loss(), problem.weights, vectors), vectors)


def rademacher(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A vector of independent signs, cut into the shapes of `weights`, drawn from `generator` only."""
    return [
        torch.randint(0, 2, w.shape, generator=generator, device=w.device).to(w.dtype).mul_(2).sub_(1) for w in weights
    ]


def inner(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """Inner product of two vectors that are cut alike, accumulated in at least float32."""
    return sum((widened(a) * b).sum() for a, b in zip(left, right, strict=True))


def square_norm(parts: Iterable[Tensor]) -> Tensor:
    """Square norm of a vector in parts, accumulated in at least float32."""
    return sum(widened(part).pow(2).sum() for part in parts)


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
