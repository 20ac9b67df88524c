"""Almost-orthogonal layers, and what standalone layers share: a weight divided channel by channel, and its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.functional.geometry import conv_geometry
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.functional.rescaling_conv import Side
from hf_lipschitz.nn.attachment import attach
from hf_lipschitz.nn.rescaling import RescalingParametrization


@torch.no_grad()
def orthogonal_start_(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """An orthogonal weight and a zero bias, so that a rescaling is the identity at first and depth costs nothing.

    A convolution whose kernels overlap gets the orthogonal matrix at the middle tap and zeros elsewhere (Xiao et al.
    2018); one whose kernels do not, such as a patch embedding, an orthogonal kernel.
    """
    weight = module.weight
    if not weight.is_meta:
        if isinstance(module, nn.Linear) or all(
            s >= d * (k - 1) + 1 for s, d, k in zip(module.stride, module.dilation, module.kernel_size, strict=True)
        ):
            groups = 1 if isinstance(module, nn.Linear) else module.groups
            for part in weight.chunk(groups):
                _orthogonal_(part.flatten(1))
        else:
            weight.zero_()
            middle = weight[(slice(None), slice(None), *(k // 2 for k in module.kernel_size))]
            for part in middle.chunk(module.groups):
                _orthogonal_(part)
    if module.bias is not None and not module.bias.is_meta:
        module.bias.zero_()


def layout_of(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> WeightLayout:
    """How a standalone layer uses its weight."""
    if isinstance(module, nn.Linear):
        return WeightLayout()
    geometry = conv_geometry(
        module.weight.shape,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )
    return WeightLayout(geometry)


def rescale_channels(
    module: nn.Module, *, side: Side, lipschitz: float, num_iterations: int, learns_weights: bool
) -> None:
    """Gives a new layer an orthogonal weight under an exact [`RescalingParametrization`]."""
    orthogonal_start_(module)
    constraint = RescalingParametrization(
        layout_of(module),
        module.weight,
        side=side,
        num_iterations=num_iterations,
        learns_weights=learns_weights,
        exact=True,
        name=type(module).__name__,
    )
    attach(module, "weight", constraint, lipschitz)


class AOLLinear(nn.Linear):
    r"""x ↦ diag(t)⁻¹Wx + b, t_i = (Σ_j|WWᵀ|_ij)^{1/2}: at most `lipschitz`-Lipschitz (Prach & Lampert 2022).

    Args:
        args:
            Those of `torch.nn.Linear`.
        lipschitz (`float`, *optional*, defaults to 1.0):
            A **sound bound** of the layer.
        num_iterations (`int`, *optional*, defaults to 1):
            N of [`spectral_rescaling`].
    """

    def __init__(self, *args: Any, lipschitz: float = 1.0, num_iterations: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rescale_channels(self, side="output", lipschitz=lipschitz, num_iterations=num_iterations, learns_weights=False)


class AOLConv2d(nn.Conv2d):
    """[`AOLLinear`] for images: any stride, padding, dilation, groups and padding mode.

    Args:
        args:
            Those of `torch.nn.Conv2d`.
        lipschitz (`float`, *optional*, defaults to 1.0):
            A **sound bound** of the layer, for every input size.
        num_iterations (`int`, *optional*, defaults to 1):
            N of [`conv_spectral_rescaling`], at most 3.
    """

    def __init__(self, *args: Any, lipschitz: float = 1.0, num_iterations: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rescale_channels(self, side="output", lipschitz=lipschitz, num_iterations=num_iterations, learns_weights=False)


def _orthogonal_(matrix: Tensor) -> None:
    matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape, device=matrix.device)))
