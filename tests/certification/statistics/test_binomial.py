from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_lipschitz.certification.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    randomized_clopper_pearson_upper,
)
from tests.certification.statistics.error_rates import HARD, LOOKS, RUNS, exact_pmf, is_refuted


ALPHAS = [1e-12, 1e-3, 0.05, 0.5]
alphas = st.floats(1e-30, 0.5)


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
@pytest.mark.parametrize("n", [1, 4, 11, 30])
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


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
def test_counts_trials_and_alphas_broadcast(bound: object) -> None:
    k, n, alpha = np.array([0, 3, 10, 10]), np.array([[10], [10_000]]), np.array([0.5, 0.01, 1e-9, 0.01])
    together = bound(k, n, alpha)
    assert together.shape == (2, 4)
    for i, j in np.ndindex(2, 4):
        assert together[i, j] == bound(int(k[j]), int(n[i, 0]), float(alpha[j]))
    assert type(bound(np.int64(3), 10, 0.01)) is float
    assert bound(np.array([], dtype=int), 10, 0.01).shape == (0,)


def test_randomized_bounds_broadcast() -> None:
    u = np.array([0.0, 0.2, 1.0])
    together = randomized_clopper_pearson_lower(np.array([[0], [9], [10]]), 10, 0.05, u)
    assert together[1].tolist() == [randomized_clopper_pearson_lower(9, 10, 0.05, float(draw)) for draw in u]
    assert type(randomized_clopper_pearson_upper(3, 10, 0.05, 0.5)) is float


def test_an_unreliable_quantile_is_refused() -> None:
    with pytest.warns(RuntimeWarning, match="iterations"), pytest.raises(RuntimeError, match="use a larger alpha"):
        clopper_pearson_lower(np.array([1, 2]), 10, np.array([0.01, 1e-300]))


@given(n=st.integers(1, 10**6), share=st.floats(0, 1), alpha=alphas)
def test_clopper_pearson_is_monotone_in_k_and_alpha(n: int, share: float, alpha: float) -> None:
    k = int(share * (n - 1))
    lower, upper = clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)
    assert 0 <= lower <= k / n <= upper <= 1 or alpha > 0.3
    assert lower <= clopper_pearson_lower(k + 1, n, alpha)
    assert upper <= clopper_pearson_upper(k + 1, n, alpha)
    assert clopper_pearson_lower(k, n, alpha / 10) <= lower
    assert clopper_pearson_upper(k, n, alpha / 10) >= upper


@given(n=st.integers(1, 10**5), share=st.floats(0, 1), alpha=alphas, factor=st.integers(2, 10))
def test_clopper_pearson_tightens_with_n_at_the_same_frequency(
    n: int, share: float, alpha: float, factor: int
) -> None:
    k = int(share * n)
    if alpha <= 0.05:
        assert clopper_pearson_lower(factor * k, factor * n, alpha) >= clopper_pearson_lower(k, n, alpha)
        assert clopper_pearson_upper(factor * k, factor * n, alpha) <= clopper_pearson_upper(k, n, alpha)


def largest_erring_u(errs: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Measure of the u that err, which are the small ones."""
    low, high = np.zeros(shape), np.ones(shape)
    for _ in range(32):
        u = (low + high) / 2
        errors = errs(u)
        low, high = np.where(errors, u, low), np.where(errors, high, u)
    return low


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("n", [1, 3, 12])
def test_the_error_of_randomized_bounds_is_alpha(n: int, alpha: float) -> None:
    k = np.arange(n + 1)
    hardest = np.concatenate([clopper_pearson_lower(k[1:], n, alpha), clopper_pearson_upper(k[:-1], n, alpha)])
    p = np.concatenate([hardest, hardest * (1 - 1e-8), np.linspace(0.001, 0.999, 12)])[:, None]
    pmf = np.array([[float(mass) for mass in exact_pmf(n, Fraction(place))] for place in p[:, 0]])
    too_high = largest_erring_u(lambda u: randomized_clopper_pearson_lower(k, n, alpha, u) > p, pmf.shape)
    too_low = largest_erring_u(lambda u: randomized_clopper_pearson_upper(k, n, alpha, u) < p, pmf.shape)
    np.testing.assert_allclose((pmf * too_high).sum(axis=1), alpha, rtol=2e-6)
    np.testing.assert_allclose((pmf * too_low).sum(axis=1), alpha, rtol=2e-6)


@pytest.mark.parametrize("u", [0.0, 0.04, 0.3, 0.9])
@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_randomized_tails_in_exact_arithmetic(u: float, alpha: float) -> None:
    n, share = 9, Fraction(u)
    for k in range(n + 1):
        lower, upper = (
            Fraction(bound(k, n, alpha, u))
            for bound in (randomized_clopper_pearson_lower, randomized_clopper_pearson_upper)
        )
        if lower > 0:
            pmf = exact_pmf(n, lower)
            assert sum(pmf[k + 1 :]) + share * pmf[k] <= Fraction(alpha)
        else:
            assert k == 0
            assert u >= alpha
        if upper < 1:
            pmf = exact_pmf(n, upper)
            assert sum(pmf[:k]) + share * pmf[k] <= Fraction(alpha)
        else:
            assert k == n
            assert u >= alpha


@pytest.mark.parametrize("n", [10, 1000, 10**5, 10**6])
def test_bounds_pass_their_own_check(n: int) -> None:
    generator = np.random.default_rng(0)
    k = np.concatenate([generator.integers(0, n + 1, 100), np.arange(10), n - np.arange(10)])
    alpha = 10.0 ** generator.uniform(-12, math.log10(0.5), k.shape)
    clopper_pearson_lower(k, n, alpha)
    clopper_pearson_upper(k, n, alpha)
    for u in (generator.random(k.shape), alpha, alpha * (1 - 10.0 ** generator.uniform(-16, -6, k.shape))):
        randomized_clopper_pearson_lower(k, n, alpha, u)
        randomized_clopper_pearson_upper(k, n, alpha, u)


def test_ends_of_randomized_bounds() -> None:
    n, alpha = 50, 0.01
    assert randomized_clopper_pearson_lower(0, n, alpha, alpha) == 0.0
    assert randomized_clopper_pearson_upper(n, n, alpha, alpha) == 1.0
    assert 0 < randomized_clopper_pearson_lower(0, n, alpha, 0.5 * alpha) < alpha / n
    assert randomized_clopper_pearson_lower(n, n, alpha, 0.5 * alpha) == pytest.approx(1 - 1e-10, abs=1e-12)
    assert randomized_clopper_pearson_upper(0, n, alpha, 0.5 * alpha) == 1e-10
    assert randomized_clopper_pearson_lower(n, n, alpha, 0.4) == pytest.approx((alpha / 0.4) ** (1 / n), rel=1e-9)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1), alpha=st.floats(1e-20, 0.5), u=st.floats(0, 1))
def test_randomized_bounds_are_monotone_and_inside_clopper_pearson(
    n: int, share: float, alpha: float, u: float
) -> None:
    k = int(share * (n - 1))
    lower, upper = (
        bound(np.array([k, k, k + 1, k]), n, np.array([alpha, alpha / 3, alpha, alpha]), np.array([u, u, u, u / 2]))
        for bound in (randomized_clopper_pearson_lower, randomized_clopper_pearson_upper)
    )
    assert lower[1] <= lower[0] <= min(lower[2], lower[3])
    assert upper[1] >= upper[0] >= upper[3]
    assert upper[0] <= upper[2] * (1 + 1e-12)
    assert lower[0] >= clopper_pearson_lower(k, n, alpha) * (1 - 2e-10)
    assert upper[0] <= max(clopper_pearson_upper(k, n, alpha) * (1 + 2e-10), 1e-10)


@pytest.mark.parametrize("p", [0.3, 0.98])
@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_what_is_no_bound_is_refuted(p: float, alpha: float) -> None:
    generator, n = np.random.default_rng(0), 20
    k, u = generator.binomial(n, p, RUNS), generator.random((3, RUNS))
    assert not is_refuted(clopper_pearson_lower(k, n, alpha) > p, alpha)
    assert not is_refuted(clopper_pearson_upper(k, n, alpha) < p, alpha)
    assert not is_refuted(randomized_clopper_pearson_lower(k, n, alpha, u[0]) > p, alpha)
    assert not is_refuted(randomized_clopper_pearson_upper(k, n, alpha, u[0]) < p, alpha)
    point_estimate = k / n
    assert is_refuted(point_estimate > p, alpha)


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_drawing_u_again_is_refuted(alpha: float) -> None:
    generator, p = np.random.default_rng(0), 0.98
    k, u = generator.binomial(20, p, RUNS), generator.random((3, RUNS))
    assert not is_refuted(randomized_clopper_pearson_lower(k, 20, alpha, u[0]) > p, alpha)
    best_of_three_draws = randomized_clopper_pearson_lower(k, 20, alpha, u.min(axis=0))
    assert is_refuted(best_of_three_draws > p, alpha)


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_peeking_at_clopper_pearson_is_refuted(alpha: float) -> None:
    looks = LOOKS[::3]
    k = HARD["bernoulli .5"].paths(looks, runs=6000)[..., 1]
    lower = clopper_pearson_lower(k, looks, alpha)
    assert not is_refuted(lower[:, -1] > 0.5, alpha)
    assert is_refuted(lower.max(axis=1) > 0.5, alpha)
    assert not is_refuted(clopper_pearson_lower(k, looks, alpha / len(looks)).max(axis=1) > 0.5, alpha)


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
def test_bad_arguments_are_refused(bound: object) -> None:
    for k, n, alpha in [(-1, 10, 0.1), (11, 10, 0.1), (1.5, 10, 0.1), (1, 0, 0.1), (1, 10, 0.0), (1, 10, 0.6)]:
        with pytest.raises(ValueError, match="must be"):
            bound(k, n, alpha)
        with pytest.raises(ValueError, match="must be"):
            bound(np.array([k, k]), np.array([n, n]), np.array([alpha, 0.1]))
    with pytest.raises(ValueError, match="alpha"):
        bound(1, 10, math.nan)
    with pytest.raises(ValueError, match="n must be"):
        bound(1, math.nan, 0.1)
    with pytest.raises(ValueError, match="n must be"):
        bound(1, 10.5, 0.1)
    with pytest.raises(ValueError, match="between 0 and n"):
        bound(np.array([3, 7]), np.array([3, 5]), 0.1)


@pytest.mark.parametrize("bound", [randomized_clopper_pearson_lower, randomized_clopper_pearson_upper])
@pytest.mark.parametrize("u", [-0.1, 1.1, math.nan])
def test_what_is_no_uniform_number_is_refused(bound: object, u: float) -> None:
    with pytest.raises(ValueError, match="u must be"):
        bound(1, 10, 0.1, u)
