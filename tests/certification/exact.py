"""Base classifiers on one direction of the plane, whose smoothed scores and radii are known without sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor


DIRECTION = torch.tensor([0.6, 0.8])
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(200)


def place(u: float) -> Tensor:
    """A point whose coordinate along the direction is u."""
    return u * DIRECTION + 3.0 * torch.tensor([-0.8, 0.6])


def coordinate(batch: Tensor) -> Tensor:
    return batch @ DIRECTION


@dataclass(frozen=True)
class Slabs:
    """Class k on thresholds[k-1] < u <= thresholds[k]; a class given by name may own several slabs."""

    thresholds: tuple[float, ...]
    classes: tuple[int, ...]
    num_classes: int

    def __call__(self, batch: Tensor) -> Tensor:
        slab = torch.bucketize(coordinate(batch), torch.tensor(self.thresholds))
        return torch.nn.functional.one_hot(torch.tensor(self.classes)[slab], self.num_classes).float()

    def smoothed(self, u: float, sigma: float) -> np.ndarray:
        edges = np.concatenate([[-np.inf], self.thresholds, [np.inf]])
        mass = np.diff(stats.norm.cdf((edges - u) / sigma))
        return np.bincount(self.classes, weights=mass, minlength=self.num_classes)


@dataclass(frozen=True)
class Lines:
    """Logits that are affine in u; smoothed scores by Gauss-Hermite quadrature."""

    slopes: tuple[float, ...]
    offsets: tuple[float, ...]
    temperature: float = 1.0

    @property
    def num_classes(self) -> int:
        return len(self.slopes)

    def __call__(self, batch: Tensor) -> Tensor:
        return coordinate(batch)[:, None] * torch.tensor(self.slopes) + torch.tensor(self.offsets)

    def smoothed(self, u: float, sigma: float) -> np.ndarray:
        logits = (u + sigma * NODES)[:, None] * np.array(self.slopes) + np.array(self.offsets)
        powers = np.exp((logits - logits.max(1, keepdims=True)) / self.temperature)
        return (WEIGHTS / WEIGHTS.sum()) @ (powers / powers.sum(1, keepdims=True))


def exact_radius(smoothed: Callable[[float, float], np.ndarray], u: float, sigma: float, best: int) -> float:
    """Distance from u to where `best` is no longer the smoothed classifier's only top class; 0 if it is not at u."""

    def margin(v: float) -> float:
        scores = smoothed(v, sigma)
        return scores[best] - np.delete(scores, best).max()

    if margin(u) <= 0:
        return 0.0
    distances = []
    for sign in (-1, 1):
        steps = np.arange(0, 12 * sigma, 0.01 * sigma)
        crossing = next((i for i, s in enumerate(steps) if margin(u + sign * s) <= 0), None)
        if crossing is not None:
            # The very points at which the sign was seen, for margins beside a root are rounding.
            before, after = (u + sign * steps[i] for i in (crossing - 1, crossing))
            distances.append(sign * (brentq(margin, before, after) - u))
    return min(distances)
