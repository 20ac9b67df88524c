from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from hf_lipschitz.certification.statistics import (
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
    subgaussian_lower,
    subgaussian_upper,
)
from tests.certification.statistics.error_rates import HARD, MANY_LOOKS, RUNS, Discrete, is_refuted


alphas = st.floats(1e-30, 0.5)
both_alphas = pytest.mark.parametrize("alpha", [1e-3, 0.05])


def reference_half_width(samples: np.ndarray, alpha: float) -> float:
    n, log_term = len(samples), math.log(2 / alpha)
    return math.sqrt(2 * samples.var(ddof=1) * log_term / n) + 7 * log_term / (3 * (n - 1))


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.5])
@pytest.mark.parametrize("n", [2, 3, 100, 20_000])
def test_empirical_bernstein_against_the_samples(n: int, alpha: float) -> None:
    generator = np.random.default_rng(0)
    for samples in (generator.random(n), generator.integers(0, 2, n) * 1.0, np.full(n, 0.3), np.ones(n), np.zeros(n)):
        half = reference_half_width(samples, alpha)
        lower, upper = max(samples.mean() - half, 0.0), min(samples.mean() + half, 1.0)
        sums = samples.sum(), np.square(samples).sum()
        assert lower - 0.005 * half <= empirical_bernstein_lower(*sums, n, alpha) <= lower
        assert upper <= empirical_bernstein_upper(*sums, n, alpha) <= upper + 0.005 * half


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-9])
def test_empirical_bernstein_is_not_narrowed_by_cancellation(spread: float) -> None:
    samples = 1 - spread * np.random.default_rng(1).random(10_000)
    exact = [Fraction(float(value)) for value in samples]
    total = sum(exact)
    variance = float((sum(value * value for value in exact) - total * total / len(exact)) / (len(exact) - 1))
    log_term = math.log(2 / 1e-3)
    half = math.sqrt(2 * variance * log_term / len(exact)) + 7 * log_term / (3 * (len(exact) - 1))
    lower = empirical_bernstein_lower(samples.sum(), np.square(samples).sum(), len(exact), 1e-3)
    assert lower <= float(total / len(exact)) - half
    assert lower >= float(total / len(exact)) - 1.02 * half


@given(n=st.integers(2, 10**6), mean=st.floats(0, 1), spread=st.floats(0, 1), alpha=alphas)
def test_empirical_bernstein_is_monotone_in_alpha_and_variance(
    n: int, mean: float, spread: float, alpha: float
) -> None:
    total = mean * n
    low, high = n * mean * mean, total
    squares = low + spread * (high - low)
    lower, upper = (
        bound(total, squares, n, alpha) for bound in (empirical_bernstein_lower, empirical_bernstein_upper)
    )
    assert 0 <= lower <= mean <= upper <= 1
    assert empirical_bernstein_lower(total, squares, n, alpha / 10) <= lower
    assert empirical_bernstein_upper(total, squares, n, alpha / 10) >= upper
    assert empirical_bernstein_lower(total, high, n, alpha) <= lower <= empirical_bernstein_lower(total, low, n, alpha)


def test_empirical_bernstein_covers_the_rounding_of_sums() -> None:
    n, mean, variance, alpha = 10**8, 0.5, 2e-9, 1e-3
    log_term = math.log(2 / alpha)
    half = math.sqrt(2 * variance * log_term / n) + 7 * log_term / (3 * n)
    rounded = n * mean, n * (mean**2 + variance - 1e-9)
    assert empirical_bernstein_lower(*rounded, n, alpha) <= mean - half
    assert empirical_bernstein_upper(*rounded, n, alpha) >= mean + half


def test_one_sample_says_nothing_about_a_mean() -> None:
    assert empirical_bernstein_lower(1.0, 1.0, 1, 0.5) == 0.0
    assert empirical_bernstein_upper(0.0, 0.0, 1, 0.5) == 1.0
    assert empirical_bernstein_lower([1.0, 1e5], [1.0, 1e5], [1, 10**5], 0.01).tolist()[0] == 0.0
    assert empirical_bernstein_lower([1.0, 1e5], [1.0, 1e5], [1, 10**5], 0.01)[1] > 0.99


@pytest.mark.parametrize("sums", [(11.0, 11.0), (5.0, 6.0), (5.0, 2.0), (-1.0, 1.0), (math.nan, 1.0), (5.0, math.nan)])
def test_impossible_sums_are_refused(sums: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"samples in \[0, 1\]"):
        empirical_bernstein_lower(*sums, 10, 0.05)


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.5])
@pytest.mark.parametrize("n", [1, 100, 10**6])
def test_half_widths_have_the_stated_tails(n: int, alpha: float) -> None:
    mean, lipschitz, sigma = 0.5, 0.04, 0.5
    for low, high, tail in [
        (hoeffding_lower, hoeffding_upper, lambda t: math.exp(-2 * n * t * t)),
        (
            lambda *args: subgaussian_lower(*args, lipschitz=lipschitz, sigma=sigma),
            lambda *args: subgaussian_upper(*args, lipschitz=lipschitz, sigma=sigma),
            lambda t: math.exp(-n * t * t / (2 * (lipschitz * sigma) ** 2)),
        ),
    ]:
        lower, upper = low(mean * n, n, alpha), high(mean * n, n, alpha)
        if lower > 0:
            assert tail(mean - lower) <= alpha * (1 + 1e-9)
            assert tail(mean - lower - 1e-8) > alpha
            assert upper - mean == pytest.approx(mean - lower, abs=1e-15)
        else:
            assert tail(mean) >= alpha
            assert upper == 1.0


@both_alphas
@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("name", HARD)
def test_errors_are_no_more_than_alpha(name: str, n: int, alpha: float) -> None:
    distribution: Discrete = HARD[name]
    sums, squares = distribution.sums(n)
    assert not is_refuted(hoeffding_lower(sums, n, alpha) > distribution.mean, alpha)
    assert not is_refuted(hoeffding_upper(sums, n, alpha) < distribution.mean, alpha)
    assert not is_refuted(empirical_bernstein_lower(sums, squares, n, alpha) > distribution.mean, alpha)
    assert not is_refuted(empirical_bernstein_upper(sums, squares, n, alpha) < distribution.mean, alpha)


@both_alphas
def test_a_normal_approximation_is_refuted(alpha: float) -> None:
    distribution, n = HARD["bernoulli .98"], 300
    sums, squares = distribution.sums(n)
    deviation = np.sqrt(squares / n - (sums / n) ** 2)
    lower = sums / n - special.ndtri(1 - alpha) * deviation / math.sqrt(n)
    upper = sums / n + special.ndtri(1 - alpha) * deviation / math.sqrt(n)
    assert is_refuted(lower > distribution.mean, alpha) or is_refuted(upper < distribution.mean, alpha)


@both_alphas
def test_peeking_at_hoeffding_is_refuted(alpha: float) -> None:
    lower = hoeffding_lower(HARD["bernoulli .5"].paths(MANY_LOOKS)[..., 1], MANY_LOOKS, alpha)
    assert not is_refuted(lower[:, -1] > 0.5, alpha)
    assert is_refuted(lower.max(axis=1) > 0.5, alpha)


def clipped_line(lipschitz: float, sigma: float, n: int) -> tuple[np.ndarray, float]:
    noise = sigma * np.random.default_rng(0).standard_normal((RUNS, n))
    return np.clip(0.5 + lipschitz * noise, 0, 1).sum(axis=1), 0.5


def distance(lipschitz: float, sigma: float, n: int, dimensions: int = 30) -> tuple[np.ndarray, float]:
    lengths = sigma * np.sqrt(np.random.default_rng(0).chisquare(dimensions, (RUNS, n)))
    mean = sigma * math.sqrt(2) * math.exp(special.gammaln((dimensions + 1) / 2) - special.gammaln(dimensions / 2))
    return np.minimum(lipschitz * lengths, 1).sum(axis=1), lipschitz * mean


@both_alphas
@pytest.mark.parametrize("scores", [clipped_line, distance])
def test_subgaussian_errors_are_no_more_than_alpha(scores: Callable, alpha: float) -> None:
    lipschitz, sigma, n = 0.1, 0.5, 5
    sums, mean = scores(lipschitz, sigma, n)
    for claimed, is_wrong in [(lipschitz, False), (0.3 * lipschitz, True)]:
        constants = {"lipschitz": claimed, "sigma": sigma}
        assert is_refuted(subgaussian_lower(sums, n, alpha, **constants) > mean, alpha) == is_wrong
        assert is_refuted(subgaussian_upper(sums, n, alpha, **constants) < mean, alpha) == is_wrong


def test_subgaussian_needs_a_constant() -> None:
    assert subgaussian_lower(90.0, 100, 0.01, lipschitz=math.inf, sigma=0.5) == 0.0
    assert subgaussian_upper(10.0, 100, 0.01, lipschitz=math.inf, sigma=0.5) == 1.0
    assert subgaussian_lower(90.0, 100, 0.01, lipschitz=0.0, sigma=0.5) == pytest.approx(0.9, abs=1e-8)
    assert subgaussian_lower(90.0, 100, 0.01, lipschitz=[0.1, 1.0], sigma=0.5).shape == (2,)


@given(
    n=st.integers(1, 10**6),
    mean=st.floats(0, 1),
    alpha=alphas,
    lipschitz=st.floats(0, 10),
    sigma=st.floats(0.01, 10),
)
def test_bounds_are_monotone(n: int, mean: float, alpha: float, lipschitz: float, sigma: float) -> None:
    total = np.array([mean, mean, (1 + mean) / 2]) * n
    errors = np.array([alpha, alpha / 7, alpha])
    for lower, upper in [
        (hoeffding_lower(total, n, errors), hoeffding_upper(total, n, errors)),
        (
            subgaussian_lower(total, n, errors, lipschitz=lipschitz, sigma=sigma),
            subgaussian_upper(total, n, errors, lipschitz=lipschitz, sigma=sigma),
        ),
    ]:
        assert 0 <= lower[1] <= lower[0] <= mean <= upper[0] <= upper[1] <= 1
        assert lower[0] <= lower[2]
        assert upper[0] <= upper[2]
    assert hoeffding_lower(2 * total, 2 * n, errors)[0] >= hoeffding_lower(total, n, errors)[0]
    wide = subgaussian_upper(total, n, errors, lipschitz=2 * lipschitz, sigma=sigma)
    assert (wide >= subgaussian_upper(total, n, errors, lipschitz=lipschitz, sigma=sigma)).all()
    assert (wide == subgaussian_upper(total, n, errors, lipschitz=lipschitz, sigma=2 * sigma)).all()


@pytest.mark.parametrize("bound", [hoeffding_lower, hoeffding_upper])
def test_bad_arguments_are_refused(bound: Callable) -> None:
    for sums, n, alpha in [(5.0, 0, 0.1), (5.0, 10, 0.0), (5.0, 10, 0.6), (5.0, 10, math.nan), (5.0, math.nan, 0.1)]:
        with pytest.raises(ValueError, match="must be"):
            bound(sums, n, alpha)
    for sums in (-1.0, 11.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"samples in \[0, 1\]"):
            bound(sums, 10, 0.1)
        with pytest.raises(ValueError, match=r"samples in \[0, 1\]"):
            subgaussian_upper([5.0, sums], 10, 0.1, lipschitz=1.0, sigma=1.0)


@pytest.mark.parametrize("constants", [(-1.0, 0.5), (math.nan, 0.5), (1.0, 0.0), (1.0, math.inf), (1.0, math.nan)])
def test_bad_constants_are_refused(constants: tuple[float, float]) -> None:
    for bound in (subgaussian_lower, subgaussian_upper):
        with pytest.raises(ValueError, match="must be"):
            bound(5.0, 10, 0.1, lipschitz=constants[0], sigma=constants[1])
