"""Distributions on which bounds err most often, and the test that tells a bound's error from its `alpha`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import stats


RUNS = 20_000
LOOKS = np.unique(np.geomspace(5, 20_000, 60).astype(int))
MANY_LOOKS = np.unique(np.geomspace(5, 10**6, 150).astype(int))


def is_refuted(errors: np.ndarray, alpha: float) -> bool:
    """Whether so many errors are too many for a probability of at most `alpha`."""
    return stats.binomtest(int(errors.sum()), errors.size, alpha, alternative="greater").pvalue < 1e-4


def exact_pmf(n: int, p: Fraction) -> list[Fraction]:
    return [math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(n + 1)]


@dataclass(frozen=True)
class Discrete:
    """Finitely many values in [0, 1]: histograms of samples are multinomial, and the mean is known."""

    values: np.ndarray
    probabilities: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values @ self.probabilities)

    def histograms(self, n: int, runs: int = RUNS, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).multinomial(n, self.probabilities, runs)

    def paths(self, looks: np.ndarray, runs: int = RUNS, seed: int = 0) -> np.ndarray:
        """Histograms of growing samples, shape `(runs, looks, values)`."""
        generator = np.random.default_rng(seed)
        steps = np.diff(looks, prepend=0)
        return np.stack([generator.multinomial(step, self.probabilities, runs) for step in steps], axis=1).cumsum(1)

    def sums(self, n: int, runs: int = RUNS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        histograms = self.histograms(n, runs, seed)
        return histograms @ self.values, histograms @ np.square(self.values)


def two_points(low: float, high: float, probability_of_high: float) -> Discrete:
    return Discrete(np.array([low, high]), np.array([1 - probability_of_high, probability_of_high]))


def beta(a: float, b: float, atoms: int = 40) -> Discrete:
    """The beta distribution on its quantiles."""
    quantiles = stats.beta.ppf((np.arange(atoms) + 0.5) / atoms, a, b)
    return Discrete(quantiles, np.full(atoms, 1 / atoms))


HARD = {
    "bernoulli .98": two_points(0, 1, 0.98),
    "bernoulli .5": two_points(0, 1, 0.5),
    "bernoulli .02": two_points(0, 1, 0.02),
    "rarely low": two_points(0.1, 0.95, 0.99),
    "rarely high": two_points(0.02, 0.6, 0.01),
    "softmax, confident": beta(8, 0.2),
    "softmax, spread": beta(2, 5),
    "near the ends": beta(0.1, 0.1),
}
