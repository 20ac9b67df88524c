from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from hf_lipschitz.certification.statistics import (
    NUM_SCORE_BINS,
    SCORE_WEIGHT,
    betting_lower,
    betting_upper,
    bin_ends,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    interpolated_histogram,
    interpolation_weights,
    score_bins,
)
from tests.certification.statistics.error_rates import is_refuted


BINS = score_bins()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def below_weighted_bins(place: int, weight: int) -> float:
    """The largest number that is at most what two bins weigh out to: its weight is easily rounded up."""
    left, right = (Fraction(end) for end in BINS[place : place + 2])
    exact = left + (right - left) * Fraction(weight, SCORE_WEIGHT)
    nearest = float(exact)
    return nearest if Fraction(nearest) <= exact else float(np.nextafter(nearest, 0))


@cache
def all_kinds_of_scores() -> np.ndarray:
    generator = np.random.default_rng(0)
    tiny = np.exp2(-60 * generator.random(500))
    places, weights = generator.integers(0, NUM_SCORE_BINS - 1, 4000), generator.integers(1, SCORE_WEIGHT, 4000)
    weighted = [below_weighted_bins(int(place), int(weight)) for place, weight in zip(places, weights, strict=True)]
    return np.concatenate(
        [
            generator.random(500),
            weighted,
            tiny,
            1 - tiny,
            generator.random(300).astype(np.float32),
            BINS,
            np.nextafter(BINS[1:], 0),
            np.nextafter(BINS[:-1], 1),
            (BINS[1:] + BINS[:-1]) / 2,
        ]
    )


def test_bins_are_fine_and_symmetric() -> None:
    assert BINS.dtype == np.float64
    assert BINS.shape == (NUM_SCORE_BINS,)
    assert (np.diff(BINS) > 0).all()
    assert [BINS[0], BINS[1], BINS[-1]] == [0.0, 2.0**-24, 1.0]
    assert 0.5 in BINS
    assert (BINS[::-1] == 1 - BINS).all()
    assert all((Fraction(place) * 2**53).denominator == 1 for place in BINS)
    left, right = BINS[1:-2], BINS[2:-1]
    assert ((right - left) <= 0.02 * np.minimum(left, 1 - right)).all()


def test_bins_cannot_be_changed_from_outside() -> None:
    score_bins()[:] = 0.5
    assert (score_bins() == BINS).all()


@pytest.mark.parametrize("device", DEVICES)
def test_histograms_add(device: str) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).beta(0.3, 0.5, (400, 7))).to(device)
    scores[:20], scores[20:50] = 0.0, 1.0
    whole = interpolated_histogram(scores)
    assert whole.device == scores.device
    parts = [interpolated_histogram(scores[a:b]) for a, b in ((0, 130), (130, 131), (131, 400))]
    assert torch.equal(whole, sum(parts))
    assert torch.equal(whole, interpolated_histogram(scores.flip(0)))
    assert interpolated_histogram(scores[:0]).sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_interpolated_histograms_hold_the_weights(device: str) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).beta(0.3, 0.5, (300, 3))).to(device)
    scores[:20], scores[20:50] = 0.0, 1.0
    histogram = interpolated_histogram(scores)
    assert histogram.shape == (3, NUM_SCORE_BINS)
    assert histogram.sum(dim=1).tolist() == [300 * SCORE_WEIGHT] * 3
    expected = np.zeros((3, NUM_SCORE_BINS), dtype=np.int64)
    below, weights = (part.cpu().numpy() for part in interpolation_weights(scores))
    for sample, column in np.ndindex(300, 3):
        expected[column, below[sample, column]] += SCORE_WEIGHT - weights[sample, column]
        expected[column, below[sample, column] + 1] += weights[sample, column]
    assert histogram.cpu().numpy().tolist() == expected.tolist()
    assert (histogram[:, -1] >= 30 * SCORE_WEIGHT).all()


def test_weighted_bins_are_on_the_safe_side_in_exact_arithmetic() -> None:
    scores, (low, high) = all_kinds_of_scores(), bin_ends()
    below, weights = (part.numpy() for part in interpolation_weights(torch.from_numpy(scores)))
    assert ((weights >= 0) & (weights <= SCORE_WEIGHT)).all()
    assert (low[0], high[-1]) == (0.0, 1.0)
    assert ((low >= 0) & (high <= 1)).all()
    for score, place, weight in zip(scores, below, weights, strict=True):
        share = Fraction(int(weight), SCORE_WEIGHT)
        lower, upper = (
            (1 - share) * Fraction(ends[place]) + share * Fraction(ends[place + 1]) for ends in (low, high)
        )
        assert lower <= Fraction(score) <= upper
        assert upper - lower <= Fraction(1, 2**35)


def drawn(shape: tuple[float, float], n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).beta(*shape, n)


SHAPES = [(0.3, 0.2), (18.0, 2.0), (180.0, 20.0), (2.0, 0.02), (0.02, 5.0), (120.0, 80.0)]


def from_weights(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return *bin_ends(), interpolated_histogram(torch.from_numpy(scores)[:, None])[0].numpy() / SCORE_WEIGHT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bet", [0.05, 0.6, 4.0])
def test_betting_from_a_histogram_is_on_the_safe_side(shape: tuple[float, float], bet: float) -> None:
    scores, alpha = drawn(shape, 5000), 1e-3
    lower, upper = betting_lower(scores, alpha, bet), betting_upper(scores, alpha, bet)
    low, high, counts = from_weights(scores)
    assert betting_lower(low, alpha, bet, counts=counts) <= lower
    assert betting_upper(high, alpha, bet, counts=counts) >= upper


@pytest.mark.parametrize("shape", SHAPES)
def test_an_interpolated_histogram_loses_little(shape: tuple[float, float]) -> None:
    scores, alpha, n = drawn(shape, 10_000), 1e-3, 10_000
    mean = scores.mean()
    bet = min(math.sqrt(2 * math.log(1 / alpha) / (n * scores.var())), 0.9 / mean)
    low, high, counts = from_weights(scores)
    lower, upper = betting_lower(scores, alpha, bet), betting_upper(scores, alpha, bet)
    assert mean - betting_lower(low, alpha, bet, counts=counts) <= 1.02 * (mean - lower) + 1e-9
    assert betting_upper(high, alpha, bet, counts=counts) - mean <= 1.02 * (upper - mean) + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_other_bounds_from_an_interpolated_histogram_are_on_the_safe_side(shape: tuple[float, float]) -> None:
    scores, alpha, n = drawn(shape, 2000), 1e-3, 2000
    sums = scores.sum(), np.square(scores).sum()
    low, high, counts = from_weights(scores)
    lower = empirical_bernstein_lower(counts @ low, counts @ low**2, n, alpha)
    upper = empirical_bernstein_upper(counts @ high, counts @ high**2, n, alpha)
    assert lower <= empirical_bernstein_lower(*sums, n, alpha) <= lower + 5e-5
    assert upper - 5e-5 <= empirical_bernstein_upper(*sums, n, alpha) <= upper


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_errors_from_histograms_are_no_more_than_alpha(alpha: float) -> None:
    mean, n, runs = 0.9, 20, 4000
    scores = torch.from_numpy(np.random.default_rng(3).beta(1.8, 0.2, (n, runs)))
    counts, (low, high) = interpolated_histogram(scores).numpy() / SCORE_WEIGHT, bin_ends()
    assert not is_refuted(betting_lower(low, alpha, 0.7, counts=counts) > mean, alpha)
    assert not is_refuted(betting_upper(high, alpha, 0.7, counts=counts) < mean, alpha)


@pytest.mark.parametrize("score", [-1e-9, 1 + 1e-9, math.nan, math.inf])
def test_what_is_no_score_is_refused(score: float) -> None:
    scores = torch.tensor([[0.5], [score]], dtype=torch.float64)
    for function in (interpolation_weights, interpolated_histogram):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            function(scores)
