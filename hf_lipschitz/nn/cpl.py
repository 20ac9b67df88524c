"""Convex potential layers (CPL): the linear layer, the convolution, and the residual blocks (Meunier et al. 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from hf_lipschitz.nn.blocks import cpl_root
from hf_lipschitz.nn.sll import ConvBlock2d, DenseBlock
from hf_lipschitz.nn.spectral import SpectralConv2d, SpectralLinear


class CPLLinear(SpectralLinear):
    """x ↦ W T^{-1/2}x + b with T = σ²I, σ ≥ σ₁(W): the layer of [`SpectralLinear`]."""


class CPLConv2d(SpectralConv2d):
    """x ↦ W T^{-1/2}x + b with T = σ²I, σ ≥ σ₁(W): the layer of [`SpectralConv2d`]."""


class CPLBlock(DenseBlock):
    r"""x ↦ x - (2/σ²) Vᵀs(Vx + b), σ ≥ σ₁(V) from a bracket, 1-Lipschitz (Meunier et al. 2022).

    Args:
        features, hidden, activation, bias:
            As in [`SLLBlock`].
        rtol (`float`, *optional*, defaults to `1e-3`):
            Width of the bracket.

    A **sound bound**, up to rounding, for weights in float32 or float64.

    Raises:
        ValueError: as [`SLLBlock`].
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        activation: nn.Module | None = None,
        *,
        bias: bool = True,
        rtol: float = 1e-3,
    ) -> None:
        super().__init__(features, hidden, activation, bias)
        self.rtol = rtol

    def root(self) -> Tensor:
        return cpl_root(self.weight, rtol=self.rtol)


class CPLConvBlock2d(ConvBlock2d):
    r"""[`CPLBlock`] with a convolution of stride 1 and its exact adjoint; 1-Lipschitz for every image size.

    Args:
        channels, hidden, kernel_size, activation, padding, dilation, padding_mode, bias:
            As in [`SLLConvBlock2d`].
        rtol (`float`, *optional*, defaults to `1e-3`):
            Width of the bracket.

    A **sound bound**, up to rounding, for weights in float32 or float64.

    Raises:
        ValueError: as [`SLLConvBlock2d`].
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
        rtol: float = 1e-3,
    ) -> None:
        super().__init__(channels, hidden, kernel_size, activation, padding, dilation, padding_mode, bias)
        self.rtol = rtol

    def root(self) -> Tensor:
        return cpl_root(self.weight, self.geometry, self.rtol)
