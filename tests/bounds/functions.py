"""Modules from functions, and exact norms of their Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Function(nn.Module):
    """`body(x)` as a module; modules that it uses are given by name."""

    def __init__(self, body: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)
        self.parts = list(modules)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, *(getattr(self, name) for name in self.parts))


def exact(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Norm of the Jacobian of all outputs together at x."""
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v).flatten(), x.double(), vectorize=True)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2).item()


def in_ball(center: Tensor, radius: float, count: int) -> list[Tensor]:
    """Points on the sphere, half-way and near its center."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(center.shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [center + radius * (1.0, 0.5, 0.01)[i % 3] * x / x.norm() for i, x in enumerate(noise)]
