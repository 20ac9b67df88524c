"""Sharpness-aware minimisation as a penalty (Foret et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.hessian import square_norm
from hf_lipschitz.training.weights import replaced


def sam(problem: CurvatureProblem) -> Tensor:
    r"""
    \\(L(w + \varepsilon) - L(w)\\) with \\(\varepsilon = \rho\, g/\|g\|\\), g the gradient of the mean loss L of the
    micro-batch and ρ the radius of the problem (Foret et al. 2021, arXiv:2010.01412, equation 2): to first order the
    largest rise of L within ρ, of which it is a **lower bound**. It is negative where L falls that far uphill.

    ε is constant to the gradient, so that loss plus penalty has SAM's gradient, that of L at w + ε with respect to all
    trained weights. Only first derivatives are taken. As for SAM on parts of a batch, ε belongs to the micro-batch,
    and to the process; the loss that it is added to may differ by dropout, which the penalty has not.

    The effective weight of a constrained layer is moved, by ε of the chosen weights together; other weights, and those
    made of chosen ones, keep their values. In half precision, or under autocast, the difference of the two losses is
    rounded as they are, but its gradient is not such a difference.
    """
    loss = problem.loss()
    gradients = torch.autograd.grad(loss, problem.weights, retain_graph=True, materialize_grads=True)
    moved = [w + step for w, step in zip(problem.weights, ascent(gradients, problem.radius), strict=True)]
    with replaced(problem.model, problem.weights, moved):
        return problem.loss() - loss


def ascent(gradients: Sequence[Tensor], radius: float) -> list[Tensor]:
    r"""\\(\rho\, g/\|g\|\\), with one norm for all parts of g together; zero where g is."""
    norm = square_norm(gradients).sqrt()
    factor = torch.where(norm > 0, radius / norm, 0.0)
    return [(factor * g).to(g.dtype) for g in gradients]
