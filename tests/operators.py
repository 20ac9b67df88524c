"""Exact norms, the slow way: the operator as a dense matrix, its largest singular value in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def dense_norm(w: Tensor) -> float:
    return torch.linalg.matrix_norm(w.detach().to(torch.promote_types(w.dtype, torch.float64)), 2).max().item()


def conv_norm(module: nn.Module, size: Sequence[int]) -> float:
    """Norm of the linear part of a convolution, transposed or not, on inputs of the given spatial size."""
    double = module.double()
    basis = unit_inputs(module.in_channels, size)
    with torch.no_grad():
        matrix = (double(basis) - double(torch.zeros_like(basis[:1]))).flatten(1)
    return dense_norm(matrix)


def kernel_norm(
    kernel: Tensor,
    size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[Sequence[int]] | Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sequence[int] | int = 0,
) -> float:
    """Norm of the operator that torch makes of the kernel; `padding` may be (before, after) pairs, done by `F.pad`."""
    axes, kernel = kernel.dim() - 2, kernel.detach().double()
    if transposed:
        inputs = unit_inputs(kernel.shape[0], size)
        outputs = TRANSPOSED[axes](inputs, kernel, None, stride, padding, output_padding, groups, dilation)
        return dense_norm(outputs.flatten(1))
    inputs = unit_inputs(kernel.shape[1] * groups, size)
    if not isinstance(padding, str):
        pairs = [padding] * axes if isinstance(padding, int) else padding
        flat = [p for pair in reversed(pairs) for p in ((pair, pair) if isinstance(pair, int) else pair)]
        inputs = F.pad(inputs, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
        padding = 0
    return dense_norm(CONVOLUTIONS[axes](inputs, kernel, None, stride, padding, dilation, groups).flatten(1))


def unit_inputs(channels: int, size: Sequence[int]) -> Tensor:
    return torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)


def large_input_norm(kernel: Tensor, size: int, iterations: int = 150, **options: int) -> float:
    """Norm of a convolution with zero padding on inputs too large for a matrix, from below, by power iteration."""
    axes, kernel = kernel.dim() - 2, kernel.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, kernel.shape[1], *[size] * axes, dtype=torch.float64, generator=generator).requires_grad_()
    norm = 0.0
    for _ in range(iterations):
        y = CONVOLUTIONS[axes](x / x.norm().detach(), kernel, **options)
        norm = y.norm().item()
        (gradient,) = torch.autograd.grad(y.square().sum() / 2, x)
        x = (gradient / gradient.norm()).requires_grad_()
    return norm
