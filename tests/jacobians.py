"""Exact Jacobian norms in float64, at random points and where gradient ascent on the norm leads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = False) -> Tensor:
    """Spectral norm of the Jacobian at one point."""
    jacobian = torch.autograd.functional.jacobian(function, x, create_graph=create_graph)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)


def attacked_norm(
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    starts: int = 3,
    steps: int = 12,
    rate: float = 0.3,
) -> float:
    """Largest Jacobian norm met on the way up from random points of several sizes."""
    largest = 0.0
    for start in range(starts):
        x = (10.0 ** (start - 1) * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=rate)
        for _ in range(steps):
            norm = jacobian_norm(function, x, create_graph=True)
            largest = max(largest, norm.item())
            # The Jacobian of a piecewise linear function is constant almost everywhere.
            (gradient,) = torch.autograd.grad(norm, x, allow_unused=True) if norm.requires_grad else (None,)
            x.grad = torch.randn_like(x) if gradient is None or not gradient.any() else -gradient
            optimizer.step()
    return largest
