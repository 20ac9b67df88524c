"""1-Lipschitz layers, blocks and activations, to be used on their own."""

from hf_lipschitz.nn.activations import Bounded, GroupSort, MaxMin, SlopeCorrected, slope_range
from hf_lipschitz.nn.aol import AOLConv2d, AOLLinear
from hf_lipschitz.nn.attention import BallRadii, clip_to_ball
from hf_lipschitz.nn.cpl import CPLBlock, CPLConv2d, CPLConvBlock2d, CPLLinear
from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm
from hf_lipschitz.nn.sll import SLLBlock, SLLConv1d, SLLConv2d, SLLConvBlock2d, SLLLinear
from hf_lipschitz.nn.spectral import SpectralConv2d, SpectralLinear


__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "BallRadii",
    "Bounded",
    "CPLBlock",
    "CPLConv2d",
    "CPLConvBlock2d",
    "CPLLinear",
    "CentredNorm",
    "FloorStdGroupNorm",
    "FloorStdLayerNorm",
    "FloorStdRMSNorm",
    "GroupSort",
    "MaxMin",
    "SLLBlock",
    "SLLConv1d",
    "SLLConv2d",
    "SLLConvBlock2d",
    "SLLLinear",
    "SlopeCorrected",
    "SpectralConv2d",
    "SpectralLinear",
    "clip_to_ball",
    "slope_range",
]
