from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_lipschitz.certification.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
)


ALPHAS = [1e-12, 1e-3, 0.05, 0.5]
alphas = st.floats(1e-30, 0.5)


def exact_pmf(n: int, p: Fraction) -> list[Fraction]:
    return [math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(n + 1)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_clopper_pearson_tails_in_exact_arithmetic(n: int, alpha: float) -> None:
    tighter = Fraction(1, 10**9)
    for k in range(n + 1):
        if k > 0:
            bound = Fraction(clopper_pearson_lower(k, n, alpha))
            assert sum(exact_pmf(n, bound)[k:]) <= Fraction(alpha) < sum(exact_pmf(n, bound * (1 + tighter))[k:])
        if k < n:
            bound, alike = Fraction(clopper_pearson_upper(k, n, alpha)), slice(k + 1)
            assert sum(exact_pmf(n, bound)[alike]) <= Fraction(alpha) < sum(exact_pmf(n, bound * (1 - tighter))[alike])


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 4, 11])
def test_clopper_pearson_error_in_exact_arithmetic(n: int, alpha: float) -> None:
    lower = [Fraction(clopper_pearson_lower(k, n, alpha)) for k in range(n + 1)]
    upper = [Fraction(clopper_pearson_upper(k, n, alpha)) for k in range(n + 1)]
    worst_places = [bound - Fraction(1, 10**15) for bound in lower[1:]]
    worst_places += [bound + Fraction(1, 10**15) for bound in upper[:-1]]
    for p in worst_places + [Fraction(i, 20) for i in range(21)]:
        pmf = exact_pmf(n, p)
        assert sum(mass for mass, bound in zip(pmf, lower, strict=True) if bound > p) <= Fraction(alpha)
        assert sum(mass for mass, bound in zip(pmf, upper, strict=True) if bound < p) <= Fraction(alpha)


@pytest.mark.parametrize("alpha", [1e-12, 1e-3, 0.05])
@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
def test_clopper_pearson_against_scipy(n: int, alpha: float) -> None:
    for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        above = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
        below = stats.binomtest(k, n, alternative="less").proportion_ci(1 - alpha, method="exact")
        assert clopper_pearson_lower(k, n, alpha) == pytest.approx(above.low, rel=2e-5 if alpha < 1e-6 else 1e-9)
        assert clopper_pearson_upper(k, n, alpha) == pytest.approx(below.high, rel=2e-5 if alpha < 1e-6 else 1e-9)


def test_clopper_pearson_closed_forms_and_ends() -> None:
    for n in (1, 7, 10_000, 10**7):
        for alpha in (1e-50, 1e-3, 0.5):
            all_won = clopper_pearson_lower(n, n, alpha)
            assert all_won == pytest.approx(alpha ** (1 / n), rel=1e-9)
            assert all_won < 1
            assert clopper_pearson_upper(0, n, alpha) == pytest.approx(-math.expm1(math.log(alpha) / n), rel=1e-9)
            assert clopper_pearson_lower(0, n, alpha) == 0.0
            assert clopper_pearson_upper(n, n, alpha) == 1.0


def test_clopper_pearson_is_vectorised_and_returns_python_floats() -> None:
    counts = np.array([0, 3, 10, 10_000])
    lower, upper = clopper_pearson_lower(counts, 10_000, 0.01), clopper_pearson_upper(counts, 10_000, 0.01)
    assert lower.tolist() == [clopper_pearson_lower(int(k), 10_000, 0.01) for k in counts]
    assert upper.tolist() == [clopper_pearson_upper(int(k), 10_000, 0.01) for k in counts]
    assert type(clopper_pearson_lower(np.int64(3), 10, 0.01)) is float
    assert type(empirical_bernstein_upper(np.float64(3), 2.0, 10, 0.01)) is float


def test_an_unreliable_quantile_is_refused() -> None:
    with pytest.warns(RuntimeWarning, match="iterations"), pytest.raises(RuntimeError, match="use a larger alpha"):
        clopper_pearson_lower(2, 10, 1e-300)


@settings(deadline=None)
@given(n=st.integers(1, 10**6), share=st.floats(0, 1), alpha=alphas)
def test_clopper_pearson_is_monotone_in_k_and_alpha(n: int, share: float, alpha: float) -> None:
    k = int(share * (n - 1))
    lower, upper = clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)
    assert 0 <= lower <= k / n <= upper <= 1 or alpha > 0.3
    assert lower <= clopper_pearson_lower(k + 1, n, alpha)
    assert upper <= clopper_pearson_upper(k + 1, n, alpha)
    assert clopper_pearson_lower(k, n, alpha / 10) <= lower
    assert clopper_pearson_upper(k, n, alpha / 10) >= upper


@settings(deadline=None)
@given(n=st.integers(1, 10**5), share=st.floats(0, 1), alpha=alphas, factor=st.integers(2, 10))
def test_clopper_pearson_tightens_with_n_at_the_same_frequency(
    n: int, share: float, alpha: float, factor: int
) -> None:
    k = int(share * n)
    if alpha <= 0.05:
        assert clopper_pearson_lower(factor * k, factor * n, alpha) >= clopper_pearson_lower(k, n, alpha)
        assert clopper_pearson_upper(factor * k, factor * n, alpha) <= clopper_pearson_upper(k, n, alpha)


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


@pytest.mark.parametrize("shape", [(0.05, 0.05), (0.5, 0.02), (2.0, 5.0)])
@pytest.mark.parametrize("n", [30, 300])
def test_empirical_bernstein_error_by_simulation(shape: tuple[float, float], n: int) -> None:
    alpha, runs = 0.05, 4000
    samples = np.random.default_rng(2).beta(*shape, size=(n, runs))
    sums, squares, mean = samples.sum(0), np.square(samples).sum(0), shape[0] / sum(shape)
    too_high = int((empirical_bernstein_lower(sums, squares, n, alpha) > mean).sum())
    too_low = int((empirical_bernstein_upper(sums, squares, n, alpha) < mean).sum())
    for errors in (too_high, too_low):
        assert stats.binomtest(errors, runs, alpha, alternative="greater").pvalue > 0.01


@settings(deadline=None)
@given(
    n=st.integers(2, 10**6),
    mean=st.floats(0, 1),
    spread=st.floats(0, 1),
    alpha=alphas,
)
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


def test_one_sample_says_nothing_about_a_mean() -> None:
    assert empirical_bernstein_lower(1.0, 1.0, 1, 0.5) == 0.0
    assert empirical_bernstein_upper(0.0, 0.0, 1, 0.5) == 1.0


@pytest.mark.parametrize("sums", [(11.0, 11.0), (5.0, 6.0), (5.0, 2.0), (-1.0, 1.0), (math.nan, 1.0), (5.0, math.nan)])
def test_impossible_sums_are_refused(sums: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"samples in \[0, 1\]"):
        empirical_bernstein_lower(*sums, 10, 0.05)


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
def test_bad_arguments_are_refused(bound: object) -> None:
    for k, n, alpha in [(-1, 10, 0.1), (11, 10, 0.1), (1.5, 10, 0.1), (1, 0, 0.1), (1, 10, 0.0), (1, 10, 0.6)]:
        with pytest.raises(ValueError, match="must be"):
            bound(k, n, alpha)
    with pytest.raises(ValueError, match="alpha"):
        bound(1, 10, math.nan)
