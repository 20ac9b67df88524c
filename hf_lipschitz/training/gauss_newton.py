"""The penalty on the trace of the Gauss-Newton matrix of the cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.training.counting import (
    IGNORED,
    counted_rows,
    is_cross_entropy,
    logits_gradient,
    loss_shifts_labels,
    shifted,
)
from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.head import find_head
from hf_lipschitz.training.head_calls import HeadCall, captured
from hf_lipschitz.training.hessian import rademacher, square_norm, widened


INSTEAD = "use curvature='trace' or 'hutchinson', which take any loss"


def gauss_newton(problem: CurvatureProblem) -> Tensor:
    r"""
    [`gauss_newton_square`] for one draw of signs: an **unbiased estimate** of the trace of the Gauss-Newton matrix of
    the mean cross-entropy of the model's logits, never negative.

    The matrix is the part \\(\frac1N \sum_i J_i^T S_i J_i\\) of the Hessian that does not come from the curvature of
    the logits, and the Fisher matrix of the model's own distribution (Martens 2014, arXiv:1412.1193). It does not
    depend on which labels there are, and is the same for smoothed ones; labels only say which rows count, as for
    activation decay. What a loss of one's own does to the cross-entropy (temperatures, weights) is not looked at.

    The trace is a mean over examples or tokens, and so is its estimate in expectation: micro-batches of one size and
    processes average to that of the whole batch.

    Raises:
        ValueError: the outputs have no row of logits for each label, or the loss is no cross-entropy over classes.
    """
    with _captured_head(problem) as calls:
        loss, outputs = problem.task_loss(problem.inputs)
    logits = _logits(outputs)
    _check_shapes(logits, problem.inputs)
    gradient = _loss_gradient(calls, loss, logits)
    if not is_cross_entropy(gradient):
        raise ValueError(
            "curvature='gauss_newton' is that of a cross-entropy over classes, and the loss is another one (several "
            f"labels an example, or a regression): {INSTEAD}"
        )
    rows = widened(counted_logits(problem.model, logits, gradient, problem.inputs))
    (signs,) = rademacher([rows], problem.generator)
    return gauss_newton_square(rows, problem.weights, signs)


def gauss_newton_square(logits: Tensor, weights: Sequence[Tensor], signs: Tensor) -> Tensor:
    r"""
    \\(\frac1N \|\sum_i J_i^T A_i u_i\|^2\\) with \\(A = \mathrm{diag}(\sqrt p) - p \sqrt p^T\\), J the Jacobian of a
    row of logits with respect to the weights and p its softmax.

    \\(A A^T = \mathrm{diag}(p) - p p^T = S\\), the Hessian of the cross-entropy in the logits. For independent signs u
    the products of different rows have mean zero, and the expectation is \\(\frac1N \sum_i \mathrm{tr} J_i^T S_i
    J_i\\).

    Labels drawn from p, of which the gradients \\(J^T(p - e_y)\\) have the same covariance, would estimate the same
    trace. Signs do it better in two ways. On a confident row, p = (1 - δ, δ), the relative variance is of the order
    1/δ for a drawn label and at most 1 for signs. And signs do not depend on the weights: p is part of the graph here,
    so that the gradient of the estimate is an **unbiased estimate** of the gradient of the trace, which is not so for
    drawn labels.

    Args:
        logits (`Tensor` of shape `(N, K)`):
            Differentiable functions of the weights.
        weights (`Sequence[Tensor]`):
            Leaves or intermediate tensors of the graph of the logits. One that they do not use counts as zero.
        signs (`Tensor` of shape `(N, K)`):
            u.

    Returns:
        `Tensor`: 0-dim, part of the autograd graph.
    """
    log_p = torch.log_softmax(logits, -1)
    # The root by its logarithm, since that of a p that underflows has no derivative.
    spread = (log_p / 2).exp() * signs
    probes = spread - log_p.exp() * spread.sum(-1, keepdim=True)
    gradients = torch.autograd.grad(logits, weights, probes, create_graph=True, materialize_grads=True)
    return square_norm(gradients) / len(logits)


def counted_logits(model: nn.Module, logits: Tensor, gradient: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The rows of logits that the mean cross-entropy is over: those with a label other than -100.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        logits (`Tensor` of shape `(B, K)` or `(B, T, K)`):
            Of its forward.
        gradient (`Tensor` of shape `(B * T, K)`):
            Of the loss with respect to the logits of tokens, which tells whether the loss shifts the labels; zero
            where it is not known.
        inputs (`Mapping[str, Any]`):
            Of the same forward: `labels` as the model gets them, or `shift_labels`.

    Returns:
        `Tensor` of shape `(N, K)`, part of the autograd graph.
    """
    labels = _labels(inputs)
    if "labels" in inputs and labels is inputs["labels"] and logits.ndim == 3 and labels.shape == logits.shape[:2]:
        is_open = gradient.numel() != logits.numel() or not bool((labels != IGNORED).any())
        asked = torch.zeros_like(logits) if is_open else gradient.view_as(logits)
        labels = shifted(labels) if loss_shifts_labels(model, asked, labels) else labels
    rows = counted_rows(labels, logits)
    return logits.flatten(0, -2) if rows is None else logits[rows.to(logits.device)]


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, dict):
        return outputs.get("logits")
    return outputs[1] if isinstance(outputs, (tuple, list)) else None


def _labels(inputs: Mapping[str, Any]) -> Tensor | None:
    given = inputs.get("shift_labels")
    return inputs.get("labels") if given is None else given


def _check_shapes(logits: Tensor | None, inputs: Mapping[str, Any]) -> None:
    labels = _labels(inputs)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    fits = shape is not None and len(shape) in (2, 3) and shape[-1] > 1
    if fits and labels is None:
        fits = len(shape) == 2
    elif fits:
        fits = isinstance(labels, Tensor) and (tuple(labels.shape) == shape or labels.numel() == math.prod(shape[:-1]))
    if not fits:
        of_labels = tuple(labels.shape) if isinstance(labels, Tensor) else None
        raise ValueError(
            f"curvature='gauss_newton' needs a row of two logits or more for each label, got logits of shape {shape} "
            f"and labels of shape {of_labels}: {INSTEAD}"
        )


def _captured_head(problem: CurvatureProblem) -> AbstractContextManager[list[HeadCall]]:
    """Under autocast the logits may be a copy, and only what comes out of the head is in the graph of the loss."""
    try:
        return captured(find_head(problem.model, problem.head_module)[1])
    except ValueError:
        if problem.head_module is not None:
            raise
        return nullcontext([])


def _loss_gradient(calls: Sequence[HeadCall], loss: Tensor, logits: Tensor) -> Tensor:
    num_classes = logits.shape[-1]
    is_known = len(calls) == 1 and calls[0].outputs.requires_grad and calls[0].outputs.shape[-1] == num_classes
    return logits_gradient(loss, calls[0].outputs if is_known else logits, num_classes)
