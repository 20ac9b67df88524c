"""Almost-orthogonal layers, and what standalone layers share: a weight divided channel by channel, and its start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry
from hf_lipschitz.functional.products import frobenius_ceiling
from hf_lipschitz.functional.rescaling import check_num_iterations, rescale_rows, rescaling_of_matrix
from hf_lipschitz.functional.rescaling_conv import (
    MAX_ITERATIONS,
    Side,
    num_channels,
    rescale_kernel,
    rescaling_of_kernel,
)
from hf_lipschitz.functional.weights import operator_to_frobenius


# Keeps q = exp(log_q) within 2^-400 and 2^400.
_LARGEST_LOG = 277.0


class ChannelRescaling(nn.Module):
    r"""W ↦ c diag(t)⁻¹W (`side="output"`) or c W diag(t)⁻¹ (`side="input"`), of spectral norm at most c at every read.

    t is that of [`spectral_rescaling`] or [`conv_spectral_rescaling`], computed at each read in float64. Rounding to
    the dtype of W is an error of norm at most f u‖W‖_F, f of [`operator_to_frobenius`] and u the unit roundoff, by
    which the value is made smaller: a **sound bound** in every dtype.

    Args:
        weight (`Tensor`):
            Only its shape is used.
        geometry (`ConvGeometry`, *optional*):
            Of the convolution; `None` for a matrix of shape (out, in).
        side (`str`):
            Which channels are divided.
        lipschitz (`float`):
            c, finite and at least 0.
        num_iterations (`int`):
            N, at most 3 for a convolution.
        learns_weights (`bool`):
            Whether the weights q = exp(`log_q`) of the channels are trained, as in SLL; 1 otherwise, as in AOL.

    Raises:
        ValueError: c or N is out of range.
    """

    def __init__(
        self,
        weight: Tensor,
        geometry: ConvGeometry | None,
        *,
        side: Side,
        lipschitz: float,
        num_iterations: int,
        learns_weights: bool,
    ) -> None:
        super().__init__()
        if not 0 <= lipschitz < math.inf:
            raise ValueError(f"lipschitz must be finite and >= 0, got {lipschitz}")
        check_num_iterations(num_iterations)
        if geometry is not None and num_iterations > MAX_ITERATIONS:
            raise ValueError(
                f"num_iterations must be at most {MAX_ITERATIONS} for a convolution, got {num_iterations}"
            )
        self.geometry, self.side = geometry, side
        self.lipschitz, self.num_iterations = lipschitz, num_iterations
        if geometry is None:
            channels = weight.shape[0] if side == "output" else weight.shape[1]
        else:
            channels = num_channels(weight.shape, geometry, side)
        self.log_q = nn.Parameter(weight.new_zeros(channels)) if learns_weights else None

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            wide = weight.double()
            value = self._divided(wide) * self.lipschitz
            with torch.no_grad():
                unit = torch.finfo(weight.dtype).eps / 2
                rounding = (
                    unit * operator_to_frobenius(weight.shape, self.geometry) * frobenius_ceiling(value, torch.float64)
                )
                scale = self.lipschitz / (self.lipschitz + rounding) if self.lipschitz else 1.0
            return (value * scale).to(weight.dtype)

    def _divided(self, wide: Tensor) -> Tensor:
        q = None if self.log_q is None else self.log_q.double().clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        if self.geometry is not None:
            t = rescaling_of_kernel(wide, self.geometry, side=self.side, num_iterations=self.num_iterations, q=q)
            return rescale_kernel(wide, self.geometry, t, side=self.side)
        rows = wide if self.side == "output" else wide.mT
        divided = rescale_rows(rows, rescaling_of_matrix(rows, num_iterations=self.num_iterations, q=q))
        return divided if self.side == "output" else divided.mT

    def extra_repr(self) -> str:
        return f"side={self.side}, lipschitz={self.lipschitz:g}, num_iterations={self.num_iterations}"


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


def layer_geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
    """How a convolution uses its kernel."""
    return conv_geometry(
        module.weight.shape,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def rescale_channels(
    module: nn.Module, *, side: Side, lipschitz: float, num_iterations: int, learns_weights: bool
) -> None:
    """Gives a new layer an orthogonal weight under a [`ChannelRescaling`]."""
    orthogonal_start_(module)
    geometry = None if isinstance(module, nn.Linear) else layer_geometry(module)
    parametrize.register_parametrization(
        module,
        "weight",
        ChannelRescaling(
            module.weight,
            geometry,
            side=side,
            lipschitz=lipschitz,
            num_iterations=num_iterations,
            learns_weights=learns_weights,
        ),
    )


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
