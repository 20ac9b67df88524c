"""SDP-based layers (SLL): the linear layer, the convolution, and the residual blocks (Araujo et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry
from hf_lipschitz.functional.rescaling import check_num_iterations
from hf_lipschitz.functional.rescaling_conv import MAX_ITERATIONS
from hf_lipschitz.nn.activations import SlopeCorrected
from hf_lipschitz.nn.aol import rescale_channels
from hf_lipschitz.nn.blocks import sll_root


class SLLLinear(nn.Linear):
    r"""x ↦ W T^{-1/2}x + b, T_ii = Σ_j|WᵀW|_ij q_j/q_i with learned q: at most `lipschitz`-Lipschitz.

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
        rescale_channels(self, side="input", lipschitz=lipschitz, num_iterations=num_iterations, learns_weights=True)


class SLLConv1d(nn.Conv1d):
    """[`SLLLinear`] for sequences; the arguments are those of `torch.nn.Conv1d` and of [`SLLConv2d`]."""

    def __init__(self, *args: Any, lipschitz: float = 1.0, num_iterations: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rescale_channels(self, side="input", lipschitz=lipschitz, num_iterations=num_iterations, learns_weights=True)


class SLLConv2d(nn.Conv2d):
    """[`SLLLinear`] for images: any stride, padding, dilation, groups and padding mode.

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
        rescale_channels(self, side="input", lipschitz=lipschitz, num_iterations=num_iterations, learns_weights=True)


class DenseBlock(nn.Module):
    """x ↦ x - Vᵀ(2/T) s(Vx + b), with T left to a subclass; V is `weight`, of shape (hidden, features)."""

    def __init__(self, features: int, hidden: int, activation: nn.Module | None, bias: bool) -> None:
        super().__init__()
        # T has the scale of V, so that only its shape matters: orthogonal rows would fold every feature at each block.
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, features)))
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.activation = SlopeCorrected(nn.ReLU() if activation is None else activation)

    def root(self) -> Tensor:
        """√(2/T), 0-dim or one entry a row."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        root = self.root()
        change = self.activation(F.linear(x, self.weight, self.bias))
        return x - F.linear(root * change, (root.reshape(-1, 1) * self.weight).mT)


class SLLBlock(DenseBlock):
    r"""x ↦ x - 2VᵀT⁻¹s(Vx + b), T_ii = Σ_j|VVᵀ|_ij q_j/q_i with learned q, 1-Lipschitz (Araujo et al. 2023).

    Args:
        features (`int`):
            Of the input and of the output, on the last axis.
        hidden (`int`):
            Rows of V.
        activation (`torch.nn.Module`, *optional*, defaults to `nn.ReLU()`):
            s, elementwise; its slopes are corrected into [0, 1] where need be ([`SlopeCorrected`]).
        bias (`bool`, *optional*, defaults to `True`):
            Whether there is a b.
        num_iterations (`int`, *optional*, defaults to 1):
            N of [`sll_root`].

    A **sound bound**, up to rounding, for weights in float32 or float64.

    Raises:
        ValueError: `MaxMin` or `GroupSort` as the activation, which are not elementwise and make the block up to
            3-Lipschitz; an activation whose slopes are not known; `num_iterations < 1`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        activation: nn.Module | None = None,
        *,
        bias: bool = True,
        num_iterations: int = 1,
    ) -> None:
        super().__init__(features, hidden, activation, bias)
        check_num_iterations(num_iterations)
        self.num_iterations = num_iterations
        self.log_q = nn.Parameter(torch.zeros(hidden))

    def root(self) -> Tensor:
        return sll_root(self.weight, self.log_q, self.num_iterations)


class ConvBlock2d(nn.Module):
    """[`DenseBlock`] with a convolution of stride 1 and its exact adjoint; V is the kernel `weight`."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int,
        activation: nn.Module | None,
        padding: int | None,
        dilation: int,
        padding_mode: str,
        bias: bool,
    ) -> None:
        super().__init__()
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(
                f"padding_mode={padding_mode!r} in a block: the transposed convolution is not the adjoint of one that "
                "copies its border, so use 'zeros' or 'circular'"
            )
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, channels, kernel_size, kernel_size)))
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.activation = SlopeCorrected(nn.ReLU() if activation is None else activation)
        self.padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.dilation, self.padding_mode = dilation, padding_mode

    @property
    def geometry(self) -> ConvGeometry:
        """How the kernel is used."""
        return conv_geometry(
            self.weight.shape, padding=self.padding, dilation=self.dilation, padding_mode=self.padding_mode
        )

    def root(self) -> Tensor:
        """√(2/T), 0-dim or one entry a hidden channel."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        p, is_circular = self.padding, self.padding_mode == "circular"
        padded = F.pad(x, (p, p, p, p), mode="circular") if is_circular and p else x
        inside = 0 if is_circular else p
        u = F.conv2d(padded, self.weight, self.bias, padding=inside, dilation=self.dilation)
        root = self.root().reshape(-1, 1, 1)
        kernel = root[..., None] * self.weight
        back = F.conv_transpose2d(root * self.activation(u), kernel, padding=inside, dilation=self.dilation)
        if is_circular and p:
            back = _unwrapped(_unwrapped(back, -1, p), -2, p)
        return x - back


class SLLConvBlock2d(ConvBlock2d):
    r"""[`SLLBlock`] with a convolution K of stride 1: x ↦ x - 2KᵀT⁻¹s(Kx + b), 1-Lipschitz for every image size.

    T_ii = Σ_j (q_j/q_i) Σ_lags |K⋆K|_ij: the weights act after the sum over space, so that they do train.

    Args:
        channels, hidden (`int`):
            Of the image and inside.
        kernel_size (`int`, *optional*, defaults to 3).
        activation (`torch.nn.Module`, *optional*, defaults to `nn.ReLU()`):
            As in [`SLLBlock`].
        padding (`int`, *optional*):
            Half the kernel's extent when left out.
        dilation (`int`, *optional*, defaults to 1).
        padding_mode (`str`, *optional*, defaults to `"zeros"`):
            Or `"circular"`; Kᵀ is the exact adjoint of both.
        bias (`bool`, *optional*, defaults to `True`).
        num_iterations (`int`, *optional*, defaults to 1):
            1 to 3.

    A **sound bound**, up to rounding, for weights in float32 or float64.

    Raises:
        ValueError: another padding mode, an activation as in [`SLLBlock`], `num_iterations` out of range.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int = 3,
        activation: nn.Module | None = None,
        *,
        padding: int | None = None,
        dilation: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        num_iterations: int = 1,
    ) -> None:
        super().__init__(channels, hidden, kernel_size, activation, padding, dilation, padding_mode, bias)
        check_num_iterations(num_iterations)
        if num_iterations > MAX_ITERATIONS:
            raise ValueError(
                f"num_iterations must be at most {MAX_ITERATIONS} for a convolution, got {num_iterations}"
            )
        self.num_iterations = num_iterations
        self.log_q = nn.Parameter(torch.zeros(hidden))

    def root(self) -> Tensor:
        return sll_root(self.weight, self.log_q, self.num_iterations, self.geometry)


def _unwrapped(padded: Tensor, axis: int, pad: int) -> Tensor:
    """The adjoint of circular padding: what the margins hold is added where they were copied from."""
    size = padded.shape[axis] - 2 * pad
    inside = padded.narrow(axis, pad, size)
    left, right = padded.narrow(axis, 0, pad), padded.narrow(axis, pad + size, pad)
    rest = list(padded.shape)
    rest[axis] = size - pad
    zeros = padded.new_zeros(rest)
    return inside + torch.cat([zeros, left], dim=axis) + torch.cat([right, zeros], dim=axis)
