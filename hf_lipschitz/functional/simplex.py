"""Maps from logits to the probability simplex, each with the Lipschitz constant of one of its components."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


ROUND_UP = 1 + 2**-50


def softmax(z: Tensor, temperature: float = 1.0) -> Tensor:
    r"""
    Softmax of `z / temperature` over the last dimension.

    Args:
        z (`torch.Tensor` of shape `(..., num_classes)`):
            Logits.
        temperature (`float`, *optional*, defaults to `1.0`):
            Positive divisor of the logits.

    Returns:
        `torch.Tensor` of the shape of `z`: nonnegative, each row summing to 1 up to rounding.
    """
    return torch.softmax(_scaled(z, temperature), dim=-1)


def sparsemax(z: Tensor, temperature: float = 1.0) -> Tensor:
    r"""
    Euclidean projection of `z / temperature` onto the probability simplex, over the last dimension (Martins and
    Astudillo 2016, arXiv:1602.02068, Algorithm 1).

    With \\(z_{(1)} \ge \dots \ge z_{(K)}\\), \\(k = \max\{j : 1 + j z_{(j)} > \sum_{i \le j} z_{(i)}\}\\) and
    \\(\tau = (\sum_{i \le k} z_{(i)} - 1) / k\\), the result is \\(\max(z - \tau, 0)\\). Its gradient is
    \\(\mathrm{diag}(s) - s s^\top / k\\), s the indicator of the k positive entries.

    Args:
        z (`torch.Tensor` of shape `(..., num_classes)`):
            Logits.
        temperature (`float`, *optional*, defaults to `1.0`):
            Positive divisor of the logits.

    Returns:
        `torch.Tensor` of the shape of `z`: nonnegative, each row summing to 1 up to rounding.
    """
    z = _scaled(z, temperature)
    ordered = z.sort(dim=-1, descending=True).values
    partial_sums = ordered.cumsum(dim=-1)
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    support = (1 + ranks * ordered > partial_sums).sum(dim=-1, keepdim=True)
    threshold = (partial_sums.gather(-1, support - 1) - 1) / support
    return torch.relu(z - threshold)


def _scaled(z: Tensor, temperature: float) -> Tensor:
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    return (z - z.detach().amax(dim=-1, keepdim=True)) / temperature


@dataclass(frozen=True)
class SimplexMap:
    r"""
    A map from logits to the simplex.

    Args:
        function (`Callable[[Tensor, float], Tensor]`):
            Takes logits of shape `(..., num_classes)` and a temperature; returns scores in [0, 1] of the same shape
            whose rows sum to at most 1.
        lipschitz_constant (`Callable[[int, float], float]`):
            Takes the number of classes and the temperature; returns a sound upper bound on the ℓ2 Lipschitz constant
            of ONE component with respect to the logits.
    """

    function: Callable[[Tensor, float], Tensor]
    lipschitz_constant: Callable[[int, float], float]


SIMPLEX_MAPS: dict[str, SimplexMap] = {}


def register_simplex_map(
    name: str, lipschitz_constant: Callable[[int, float], float]
) -> Callable[[Callable[[Tensor, float], Tensor]], Callable[[Tensor, float], Tensor]]:
    """
    Decorator that makes `SmoothingConfig(simplex_map=name)` use the decorated function.

    Args:
        name (`str`):
            A name that is not taken yet.
        lipschitz_constant (`Callable[[int, float], float]`):
            See [`SimplexMap`].

    Raises:
        `ValueError`: the name is taken.
    """
    if name in SIMPLEX_MAPS:
        raise ValueError(f"The simplex map {name!r} is already registered; choose another name.")

    def register(function: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
        SIMPLEX_MAPS[name] = SimplexMap(function, lipschitz_constant)
        return function

    return register


def softmax_lipschitz_constant(num_classes: int, temperature: float = 1.0) -> float:
    r"""
    \\(\sqrt 2 / (4 t)\\), a sound upper bound (rounded up) on the ℓ2 Lipschitz constant of one component of
    `softmax(z / t)`: the gradient \\(p_i (e_i - p) / t\\) has norm at most \\(\sqrt 2\, p_i (1 - p_i) / t\\). Attained
    for two classes at a tie, approached for more.
    """
    return math.sqrt(2) / (4 * temperature) * ROUND_UP


def sparsemax_lipschitz_constant(num_classes: int, temperature: float = 1.0) -> float:
    r"""
    \\(\sqrt{1 - 1/K} / t\\), a sound upper bound (rounded up) on the ℓ2 Lipschitz constant of one component of
    `sparsemax(z / t)`: the gradient \\((e_i - s / |s|) / t\\) has norm \\(\sqrt{1 - 1/|s|} / t\\). Attained where all
    K entries are positive.
    """
    return math.sqrt(1 - 1 / num_classes) / temperature * ROUND_UP


register_simplex_map("softmax", softmax_lipschitz_constant)(softmax)
register_simplex_map("sparsemax", sparsemax_lipschitz_constant)(sparsemax)
