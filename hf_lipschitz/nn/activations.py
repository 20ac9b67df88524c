"""Slopes of activations, activations corrected to slopes in [0, 1] or bounded by 1, and sorting activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


# Least and largest derivative, rounded outward.
_GELU = (-0.128904146, 1.128904146)
_TANH_GELU = (-0.128993069, 1.128993069)
_SILU = (-0.099839321, 1.099839321)
_MISH = (-0.112526123, 1.088498162)
_SELU = (0.0, 1.758099341)
_UNIT = (0.0, 1.0)

_TORCH: dict[type[nn.Module], tuple[float, float]] = {
    nn.Identity: (1.0, 1.0),
    nn.ReLU: _UNIT,
    nn.ReLU6: _UNIT,
    nn.Hardtanh: _UNIT,
    nn.Tanh: _UNIT,
    nn.Tanhshrink: _UNIT,
    nn.Softsign: _UNIT,
    nn.Softshrink: _UNIT,
    nn.LogSigmoid: _UNIT,
    nn.Sigmoid: (0.0, 0.25),
    # Of the derivative as torch computes it, with 1/6 in float32.
    nn.Hardsigmoid: (0.0, 0.166666672),
    nn.Hardswish: (-0.5, 1.5),
    nn.SiLU: _SILU,
    nn.Mish: _MISH,
    nn.SELU: _SELU,
}
# Of transformers.activations, by class name: this layer does not import transformers.
_TRANSFORMERS: dict[str, tuple[float, float]] = {
    "GELUActivation": _GELU,
    "ClippedGELUActivation": _GELU,
    "GELUTanh": _TANH_GELU,
    "PytorchGELUTanh": _TANH_GELU,
    "NewGELUActivation": _TANH_GELU,
    "FastGELUActivation": _TANH_GELU,
    "AccurateGELUActivation": _TANH_GELU,
    # u sigmoid(1.702 u) has the slopes of u sigmoid(u).
    "QuickGELUActivation": _SILU,
    "SiLUActivation": _SILU,
    "MishActivation": _MISH,
    "LinearActivation": (1.0, 1.0),
    "LaplaceActivation": (0.0, 1.414212519),
    "SqrtSoftplusActivation": (0.0, 0.319086344),
}
_REASONS: dict[str, str] = {
    "ReLUSquaredActivation": "its slope grows without bound",
    "XIELUActivation": "its slope grows without bound",
    "PReLU": "its slopes are trained, so that no range holds",
    "RReLU": "its slopes are drawn at random in training",
    "Hardshrink": "it jumps",
    "Threshold": "it jumps unless its value is its threshold",
}


def slope_range(activation: nn.Module) -> tuple[float, float]:
    r"""The least and the largest slope (s(u) - s(v))/(u - v) of an elementwise activation.

    Extremes of the derivatives, rounded outward at the ninth decimal: GELU \([-0.128904146, 1.128904146]\), with tanh
    \([-0.128993069, 1.128993069]\), SiLU and quick GELU \([-0.099839321, 1.099839321]\), Mish
    \([-0.112526123, 1.088498162]\), Hardswish \([-1/2, 3/2]\), SELU \([0, 1.758099341]\).

    Args:
        activation (`torch.nn.Module`):
            One of torch or of `transformers.activations`, of exactly that class: a subclass may compute anything.

    Returns:
        `tuple[float, float]`: m and M, a **sound bound** of every slope of the function in exact arithmetic. The
        Lipschitz constant is max(|m|, |M|).

    Raises:
        ValueError: the activation is not elementwise, has no bounded slopes, or is not known.
    """
    if isinstance(activation, GroupSort):
        raise ValueError(
            f"{type(activation).__name__} is not elementwise: it has no slopes, and inside an SLL or CPL block it can "
            "make the block 3-Lipschitz; put it between layers instead"
        )
    if isinstance(activation, SlopeCorrected):
        return _UNIT if activation.is_corrected else slope_range(activation.activation)
    if isinstance(activation, Bounded):
        least, largest = slope_range(activation.activation)
        return least / activation.divisor, largest / activation.divisor
    kind = type(activation)
    if kind in _PARAMETRIC:
        return _PARAMETRIC[kind](activation)
    if kind in _TORCH:
        return _TORCH[kind]
    if kind.__module__ == "transformers.activations" and kind.__name__ in _TRANSFORMERS:
        return _TRANSFORMERS[kind.__name__]
    reason = _REASONS.get(kind.__name__, "its slopes are not known")
    raise ValueError(
        f"activation {kind.__name__}: {reason}; use one with bounded slopes, e.g. torch.nn.ReLU, GELU, SiLU, Tanh"
    )


class SlopeCorrected(nn.Module):
    r"""u ↦ (s(u) - m u)/(M - m), whose slopes lie in [0, 1]; s itself where its slopes already do.

    m and M are those of [`slope_range`], widened to hold 0 and 1. SLL and CPL blocks need such an s: with GELU itself
    they reach 1.26 (Araujo et al. 2023 assume slopes in [0, 1]).

    Args:
        activation (`torch.nn.Module`):
            s, elementwise.

    Raises:
        ValueError: as [`slope_range`].
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        least, largest = slope_range(activation)
        self.activation = activation
        self.is_corrected = least < 0 or largest > 1
        self.least, self.largest = min(least, 0.0), max(largest, 1.0)

    def forward(self, u: Tensor) -> Tensor:
        if not self.is_corrected:
            return self.activation(u)
        # Before s, which may work in place.
        line = self.least * u
        return (self.activation(u) - line) / (self.largest - self.least)

    def extra_repr(self) -> str:
        return f"slopes of [{self.least:g}, {self.largest:g}] to [0, 1]" if self.is_corrected else "slopes in [0, 1]"


class Bounded(nn.Module):
    r"""u ↦ s(u)/max(1, L), which is 1-Lipschitz; s itself where its constant L is at most 1.

    Args:
        activation (`torch.nn.Module`):
            s, elementwise.

    Raises:
        ValueError: as [`slope_range`].
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.divisor = max(1.0, *(abs(slope) for slope in slope_range(activation)))

    def forward(self, u: Tensor) -> Tensor:
        value = self.activation(u)
        return value if self.divisor == 1 else value / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor:g}"


class GroupSort(nn.Module):
    """Sorts each group of `group_size` neighbours along `dim`, ascending: 1-Lipschitz, and it keeps every norm
    (Anil, Lucas & Grosse 2019).

    Sorting is not elementwise, so it goes between layers, never inside an SLL or CPL block.

    Args:
        group_size (`int`):
            At least 1; divides the size of the axis.
        dim (`int`, *optional*, defaults to -1):
            Axis of the features; 1 after a convolution.

    Raises:
        ValueError: `group_size < 1`, or in `forward` a size that it does not divide.
    """

    def __init__(self, group_size: int, dim: int = -1) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size, self.dim = group_size, dim

    def forward(self, x: Tensor) -> Tensor:
        return self.groups(x).sort(-1).values.flatten(-2).movedim(-1, self.dim)

    def groups(self, x: Tensor) -> Tensor:
        """The groups, as the last of one more axis."""
        size = x.shape[self.dim]
        if size % self.group_size:
            raise ValueError(
                f"{type(self).__name__}: group_size={self.group_size} does not divide the {size} features of axis "
                f"{self.dim}; choose a size that does, or another dim"
            )
        return x.movedim(self.dim, -1).unflatten(-1, (-1, self.group_size))

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class MaxMin(GroupSort):
    """(a, b) ↦ (max(a, b), min(a, b)) on pairs of neighbours along `dim`: 1-Lipschitz, and it keeps every norm.

    Not elementwise, as [`GroupSort`].

    Args:
        dim (`int`, *optional*, defaults to -1):
            Axis of the features, of even size; 1 after a convolution.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__(2, dim)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.groups(x).unbind(-1)
        pairs = torch.stack([torch.maximum(first, second), torch.minimum(first, second)], dim=-1)
        return pairs.flatten(-2).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _gelu(activation: nn.GELU) -> tuple[float, float]:
    return _GELU if activation.approximate == "none" else _TANH_GELU


def _leaky_relu(activation: nn.LeakyReLU) -> tuple[float, float]:
    slope = float(activation.negative_slope)
    return min(1.0, slope), max(1.0, slope)


def _elu(activation: nn.ELU) -> tuple[float, float]:
    return min(0.0, float(activation.alpha)), max(1.0, float(activation.alpha))


def _celu(activation: nn.CELU) -> tuple[float, float]:
    if activation.alpha <= 0:
        raise ValueError(f"activation CELU: with alpha={activation.alpha} its slope grows without bound; alpha > 0")
    return _UNIT


def _softplus(activation: nn.Softplus) -> tuple[float, float]:
    # Where torch changes to the identity, at beta * u = threshold, the function jumps by exp(-threshold)/beta.
    if activation.threshold < 20:
        raise ValueError(
            f"activation Softplus: threshold={activation.threshold} makes it jump; leave it at 20 or more"
        )
    return _UNIT


_PARAMETRIC: dict[type[nn.Module], Callable[..., tuple[float, float]]] = {
    nn.GELU: _gelu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.Softplus: _softplus,
}
