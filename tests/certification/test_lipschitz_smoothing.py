from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, sparse, stats

from hf_lipschitz.certification import lipschitz_smoothing
from hf_lipschitz.certification.lipschitz_smoothing import ramp_quantile, smoothed_score_lipschitz
from hf_lipschitz.certification.radius import smoothing_radius


DIGITS = 80
PRODUCTS = [1e-8, 1e-6, 1e-4, 0.01, 0.065, 0.1, 0.25, 0.5, 1.0, 2.0, 3.99, 4.01, 10.0, 100.0, 1e3, 1e4, 1e6]
BELOW_HALF = [1e-300, 1e-100, 1e-16, 1e-9, 1e-3, 0.1, 0.2499, 0.25, 0.4, 0.4999999, 0.5 - 2**-54]
ABOVE_HALF = [0.5 + 2**-53, 0.500001, 0.6, 0.75, 0.7501, 0.9, 0.999, 1 - 1e-9, 1 - 1e-13, 1 - 2**-53]
probabilities = st.one_of(
    st.floats(1e-300, 1e-3), st.floats(1e-3, 1 - 1e-3), st.floats(1e-16, 1e-3).map(lambda t: 1 - t)
)
positives = st.floats(-8, 8).map(lambda exponent: 10.0**exponent)


def exact_cdf(t: mpmath.mpf) -> mpmath.mpf:
    return mpmath.erfc(-t / mpmath.sqrt(2)) / 2


def exact_integral_of_cdf(t: mpmath.mpf) -> mpmath.mpf:
    return t * exact_cdf(t) + mpmath.npdf(t)


@functools.cache
def exact_quantile(p: float, slope: float, sigma: float) -> mpmath.mpf:
    """G^-1(p) by Newton's method on the logarithm of the tail, in 80 digits."""
    with mpmath.workdps(DIGITS):
        if p == 0.5:
            return mpmath.mpf(0)
        tail = min(mpmath.mpf(p), 1 - mpmath.mpf(p))
        h = 1 / (2 * mpmath.mpf(slope) * mpmath.mpf(sigma))
        u = h - mpmath.mpf(float(stats.norm.ppf(float(tail))))
        for _ in range(300):
            value = (exact_integral_of_cdf(h - u) - exact_integral_of_cdf(-h - u)) / (2 * h)
            step = mpmath.log(value / tail) * value * 2 * h / (exact_cdf(h - u) - exact_cdf(-h - u))
            u += step
            if abs(step) < abs(u) * mpmath.mpf(10) ** -40:
                return mpmath.mpf(sigma) * (u if p > 0.5 else -u)
        raise AssertionError("no convergence")


@pytest.mark.parametrize("sigma", [1.0, 0.12])
@pytest.mark.parametrize("product", PRODUCTS)
def test_one_class_is_just_below_the_formula(product: float, sigma: float) -> None:
    slope = product / sigma
    for p in ABOVE_HALF:
        exact = exact_quantile(p, slope, sigma)
        assert exact * (1 - mpmath.mpf(1e-12)) <= smoothing_radius(p, None, sigma, slope) <= exact
    assert all(smoothing_radius(p, None, sigma, slope) == 0 for p in [0.0, *BELOW_HALF, 0.5])


@pytest.mark.parametrize("product", PRODUCTS)
def test_two_class_is_just_below_the_formula(product: float) -> None:
    sigma = 0.5
    slope = product / sigma
    scores = [*BELOW_HALF, 0.5, *ABOVE_HALF]
    radii = smoothing_radius(np.array(scores)[:, None], scores, sigma, slope)
    quantiles = [exact_quantile(p, slope, sigma) for p in scores]
    for i, j in np.ndindex(radii.shape):
        a, b, radius = quantiles[i], quantiles[j], radii[i, j]
        exact = max(a - b, 0) / 2
        assert radius <= exact
        assert radius >= exact - mpmath.mpf(5e-13) * (abs(a) + abs(b))
        if scores[j] <= 0.5 <= scores[i]:
            assert radius >= exact * (1 - mpmath.mpf(1e-12))


@pytest.mark.parametrize("product", [1e-40, 2.0**-61 * 0.99, 2.0**-61 * 1.01, 2.0**29 * 0.99, 2.0**29 * 1.01])
@pytest.mark.parametrize("p", [0.5 + 2**-53, 0.6, 0.9, 1 - 2**-53])
def test_products_beyond_those_that_are_solved(p: float, product: float) -> None:
    exact = exact_quantile(p, product, 1.0)
    assert exact * (1 - mpmath.mpf(1e-12)) <= smoothing_radius(p, None, 1.0, product) <= exact
    assert exact * (1 - mpmath.mpf(1e-12)) <= smoothing_radius(p, 1 - p, 1.0, product) <= exact


def test_quantiles_of_the_smallest_number() -> None:
    smallest = 5e-324
    for half_width in (1e-9, 0.1, 0.2, 3.0, 1e5):
        low, high = ramp_quantile(np.array([smallest]), np.array([half_width]))
        with mpmath.workdps(DIGITS):
            tails = [
                (exact_integral_of_cdf(z + half_width) - exact_integral_of_cdf(z - half_width)) / (2 * half_width)
                for z in (mpmath.mpf(float(low[0])), mpmath.mpf(float(high[0])))
            ]
            assert tails[0] < mpmath.mpf(smallest) < tails[1]
        assert 0 < high[0] - low[0] < 1e-12 * abs(low[0])


@pytest.mark.parametrize("half", [50, pytest.param(1500, marks=pytest.mark.slow)])
def test_quantiles_lie_amid_their_bounds_everywhere(half: int) -> None:
    generator = np.random.default_rng(0)
    half_width = 2.0 ** generator.uniform(-29.9, 59.9, 2 * half)
    half_width[::2] = 2.0 ** generator.uniform(-6, 6, half)
    p = np.concatenate([10 ** generator.uniform(-320, -0.31, half), 0.5 - 10 ** generator.uniform(-16, -0.31, half)])
    low, high = ramp_quantile(p, half_width)
    assert (high - low >= 1e-13 * np.minimum(np.abs(low), 1))[half_width < 64].all()
    for i in range(len(p)):
        exact = exact_quantile(float(p[i]), float(0.5 / half_width[i]), 1.0)
        # Near the middle of the bracket, hence far from its ends: their distance is no luck.
        assert abs(exact - (low[i] + high[i]) / 2) < 0.1 * (high[i] - low[i]) + 2e-16 * abs(low[i])


def test_smoothed_ramp_is_the_integral() -> None:
    for slope, sigma, z in [(0.3, 1.0, 1.2), (2.0, 0.5, 0.4), (20.0, 0.7, 1.5), (0.05, 2.0, 9.0)]:
        score, _ = integrate.quad(
            lambda t, slope=slope, sigma=sigma, z=z: np.clip(0.5 + slope * (z + sigma * t), 0, 1) * stats.norm.pdf(t),
            -12,
            12,
            points=[(-0.5 / slope - z) / sigma, (0.5 / slope - z) / sigma],
            epsabs=1e-13,
        )
        assert smoothing_radius(score, None, sigma, slope) == pytest.approx(z, rel=1e-8)
        assert smoothing_radius(1 - 0.3 * (1 - score), 1 - score, sigma, slope) > z


@pytest.mark.parametrize(("slope", "p"), [(0.1, 0.55), (0.1, 0.9), (0.5, 0.6), (0.5, 0.99), (2.0, 0.7), (10.0, 0.9)])
def test_no_lipschitz_score_loses_more_than_the_ramp(slope: float, p: float) -> None:
    radius = smoothing_radius(p, None, 1.0, slope)
    for distance, certified in [(radius, True), (1.01 * radius, False)]:
        places, here, there = discretised(slope, distance)
        score = optimize.linprog(
            there, **lipschitz_constraints(places, slope), A_eq=here[None], b_eq=[p], bounds=(0, 1)
        ).fun
        assert score >= 0.5 - 1e-8 if certified else score < 0.5 - 1e-4


@pytest.mark.parametrize(
    ("slope", "p_lower", "p_upper"),
    [(0.2, 0.5, 0.3), (0.2, 0.3, 0.2), (1.0, 0.8, 0.1), (1.0, 0.4, 0.05), (5.0, 0.6, 0.1)],
)
def test_no_two_lipschitz_scores_meet_before_the_two_ramps(slope: float, p_lower: float, p_upper: float) -> None:
    radius = smoothing_radius(p_lower, p_upper, 1.0, slope)
    for distance, certified in [(radius, True), (1.01 * radius, False)]:
        places, here, there = discretised(slope, distance)
        each = lipschitz_constraints(places, slope)
        both = sparse.hstack([sparse.eye_array(len(places)), sparse.eye_array(len(places))])
        gap = optimize.linprog(
            np.concatenate([there, -there]),
            A_ub=sparse.vstack([sparse.block_diag([each["A_ub"]] * 2), both]),
            b_ub=np.concatenate([each["b_ub"], each["b_ub"], np.ones(len(places))]),
            A_eq=sparse.block_diag([here[None], here[None]]),
            b_eq=[p_lower, p_upper],
            bounds=(0, 1),
        ).fun
        assert gap >= -1e-8 if certified else gap < -1e-4


def discretised(slope: float, distance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places and the weights that give the exact mean, at 0 and at `distance`, of the line through values there."""
    reach = 7 + 1 / slope
    places = np.linspace(-reach, reach + distance, 600)
    return places, hat_means(places), hat_means(places - distance)


def hat_means(places: np.ndarray) -> np.ndarray:
    ends = [places[0] - 1, *places, places[-1] + 1]
    integral = ends * stats.norm.cdf(ends) + stats.norm.pdf(ends)
    slopes = np.diff(integral) / np.diff(ends)
    weights = np.diff(slopes)
    weights[0], weights[-1] = slopes[1], 1 - slopes[-2]
    return weights


def lipschitz_constraints(places: np.ndarray, slope: float) -> dict:
    steps = len(places) - 1
    rises = sparse.diags_array([-np.ones(steps), np.ones(steps)], offsets=[0, 1], shape=(steps, steps + 1))
    return {"A_ub": sparse.vstack([rises, -rises]), "b_ub": np.tile(slope * np.diff(places), 2)}


@given(p_lower=probabilities, p_upper=st.none() | probabilities, sigma=positives, slope=positives)
@settings(max_examples=300, deadline=None)
def test_never_below_cohen_or_the_margin(p_lower: float, p_upper: float | None, sigma: float, slope: float) -> None:
    radius = smoothing_radius(p_lower, p_upper, sigma, slope)
    assert radius >= smoothing_radius(p_lower, p_upper, sigma)
    assert radius >= smoothing_radius(p_lower, p_upper, 0.0, slope)
    assert radius <= smoothing_radius(p_lower, p_upper, sigma) + 0.5 / slope


def test_gain_over_both() -> None:
    radius = smoothing_radius(0.9, None, 1.0, 0.5)
    assert radius > 1.05 * max(smoothing_radius(0.9), 0.4 / 0.5)


@given(
    p_lower=probabilities,
    p_upper=st.none() | probabilities,
    sigma=positives,
    slope=positives,
    step=st.floats(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_monotone(p_lower: float, p_upper: float | None, sigma: float, slope: float, step: float) -> None:
    scores = np.array([p_lower] if p_upper is None else [p_lower, p_upper])
    sizes = smoothing_radius(np.clip(np.maximum(scores, 1 - scores), 0.6, 1 - 2**-53), None, sigma, slope)
    slack = 1e-12 * sizes.sum()
    factor = 1 + step
    # As it is, then with each of p_lower, sigma, 1 / L and 1 / p_upper larger.
    radii = smoothing_radius(
        np.minimum([p_lower, p_lower * factor, p_lower, p_lower, p_lower], 1 - 2**-53),
        None if p_upper is None else [p_upper, p_upper, p_upper, p_upper, p_upper / factor],
        [sigma, sigma, sigma * factor, sigma, sigma],
        [slope, slope, slope, slope / factor, slope],
    )
    assert (radii >= radii[0] - slack).all()


def test_strictly_monotone() -> None:
    def rises(values: list[float]) -> bool:
        return all(a < b for a, b in itertools.pairwise(values))

    for p_upper in (None, 0.05, 0.55):
        assert rises([smoothing_radius(p, p_upper, 1.0, 0.7) for p in (0.6, 0.7, 0.8, 0.999)])
        assert rises([smoothing_radius(0.8, p_upper, sigma, 0.7) for sigma in (0.3, 0.5, 1.0, 2.0)])
        assert rises([smoothing_radius(0.8, p_upper, 1.0, slope) for slope in (10.0, 1.0, 0.5, 0.1)])
    assert rises([smoothing_radius(0.8, p, 1.0, 0.7) for p in (0.7, 0.6, 0.5, 0.1, 1e-9)])


@pytest.mark.parametrize("p_upper", [None, 1e-200, 0.1, 0.6])
@pytest.mark.parametrize("p_lower", [0.2, 0.5, 0.5 + 2**-53, 0.7, 1 - 2**-53])
@pytest.mark.parametrize("slope", [1e-290, 0.3, 7.0, 1e290])
def test_without_noise_it_is_the_margin(p_lower: float, p_upper: float | None, slope: float) -> None:
    a, b = Fraction(p_lower), Fraction(1, 2) if p_upper is None else Fraction(p_upper)
    exact = max((a - b) / Fraction(slope) / (1 if p_upper is None else 2), 0)
    radius = Fraction(smoothing_radius(p_lower, p_upper, 0.0, slope))
    assert exact * (1 - Fraction(1, 2**50)) <= radius <= exact
    assert smoothing_radius(p_lower, p_upper, 1e-40 / slope, slope) == float(radius)


def test_without_a_constant_it_is_cohens() -> None:
    for p_upper in (None, 0.1):
        cohen = smoothing_radius(0.7, p_upper, 0.5)
        assert smoothing_radius(0.7, p_upper, 0.5, math.inf) == smoothing_radius(0.7, p_upper, 0.5, 1e12) == cohen
        assert cohen < smoothing_radius(0.7, p_upper, 0.5, 1e3) < cohen * (1 + 1e-6)


def test_complements_and_units() -> None:
    for p in (0.5625, 0.75, 0.96875):
        one = smoothing_radius(p, None, 0.5, 3.0)
        assert smoothing_radius(p, 1 - p, 0.5, 3.0) == pytest.approx(one, rel=1e-12)
        assert smoothing_radius(p, None, 0.5 * 4, 3.0 / 4) == 4 * one
    assert smoothing_radius(0.875, 0.75, 1.0, 0.4) == pytest.approx(smoothing_radius(0.25, 0.125, 1.0, 0.4), rel=1e-11)
    assert smoothing_radius(0.0, 0.2, 1.0, 0.4) == smoothing_radius(0.3, 1.0, 1.0, 0.4) == 0.0
    assert smoothing_radius(0.3, 0.3, 1.0, 0.4) == smoothing_radius(0.3, 0.4, 1.0, 0.4) == 0.0


@pytest.mark.parametrize("slope", [1e-3, 0.1, 1.0, 5.0, 1e4])
def test_slope_of_the_radius(slope: float) -> None:
    sigma, step = 0.8, 1e-6
    at_the_middle = smoothing_radius(0.5 + step, None, sigma, slope) / step
    assert at_the_middle * smoothed_score_lipschitz(sigma, slope) == pytest.approx(1, rel=1e-9)
    radius = smoothing_radius(0.8, None, sigma, slope)
    rise = stats.norm.cdf((radius + 0.5 / slope) / sigma) - stats.norm.cdf((radius - 0.5 / slope) / sigma)
    derivative = np.diff(smoothing_radius([0.8 - step, 0.8 + step], None, sigma, slope))[0] / (2 * step)
    assert derivative * slope * rise == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sigma", [1e-200, 0.25, 1.0, 1e200])
@pytest.mark.parametrize("product", [1e-300, 1e-20, *PRODUCTS, 1e9, 1e20, 1e100])
def test_constant_of_the_smoothed_score(product: float, sigma: float) -> None:
    slope = product / sigma
    if not 0 < slope < math.inf:
        return
    with mpmath.workdps(500):
        exact = mpmath.mpf(slope) * mpmath.erf(1 / (2 * mpmath.sqrt(2) * mpmath.mpf(slope) * mpmath.mpf(sigma)))
        constant = smoothed_score_lipschitz(sigma, slope)
        # As an erf within 1e-16 of 1 rounds to 1, the constant may be L itself.
        assert exact <= constant <= exact * (1 + mpmath.mpf(1e-13))
    assert constant <= slope
    assert constant <= smoothed_score_lipschitz(sigma)
    assert type(constant) is float


def test_limits_of_the_constant() -> None:
    assert smoothed_score_lipschitz(0.0, 3.0) == 3.0
    assert smoothed_score_lipschitz(2.0) == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)), rel=1e-13)
    np.testing.assert_array_equal(
        smoothed_score_lipschitz([0.5, 2.0], [[1.0], [math.inf]]),
        [[smoothed_score_lipschitz(sigma, slope) for sigma in (0.5, 2.0)] for slope in (1.0, math.inf)],
    )


@pytest.mark.parametrize(
    ("sigma", "slope"),
    [(0.0, math.inf), (-1.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan)],
)
def test_bad_noise_and_constants_are_refused(sigma: float, slope: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        smoothed_score_lipschitz(sigma, slope)
    with pytest.raises(ValueError, match="must be positive"):
        smoothing_radius(0.9, None, sigma, slope)
    with pytest.raises(ValueError, match="must be positive"):
        smoothing_radius(0.9, None, [1.0, sigma], [1.0, slope])


@pytest.mark.parametrize("half_width", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("p", [0.01, 0.4])
def test_a_root_that_is_not_found_is_an_error(monkeypatch: pytest.MonkeyPatch, p: float, half_width: float) -> None:
    monkeypatch.setattr(lipschitz_smoothing, "NEWTON_STEPS", 0)
    with pytest.raises(RuntimeError, match="fails its check"):
        ramp_quantile(np.array([p]), np.array([half_width]))
