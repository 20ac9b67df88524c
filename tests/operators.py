"""Exact norms, the slow way: the operator as a dense matrix, its largest singular value in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dense_norm(w: Tensor) -> float:
    return torch.linalg.matrix_norm(w.detach().to(torch.promote_types(w.dtype, torch.float64)), 2).max().item()


def conv_norm(module: nn.Module, size: Sequence[int]) -> float:
    """Norm of the linear part of a convolution on inputs of the given spatial size."""
    double = module.double()
    channels = module.in_channels
    basis = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    with torch.no_grad():
        matrix = (double(basis) - double(torch.zeros_like(basis[:1]))).flatten(1)
    return torch.linalg.matrix_norm(matrix, 2).item()
