from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, sparse, stats

from hf_lipschitz.certification.radius import laplace_radius, smoothing_radius, uniform_radius


PROBABILITIES = [1e-300, 1e-12, 1e-3, 0.3, 0.5, 0.5 + 2**-52, 0.51, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53]
probabilities = st.floats(1e-12, 1 - 1e-12)


def exact_quantile(p: float) -> mpmath.mpf:
    with mpmath.workdps(400):
        return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


RADII = [smoothing_radius, laplace_radius, uniform_radius]
QUANTILES = {p: exact_quantile(p) for p in PROBABILITIES}


@pytest.mark.parametrize("sigma", [1e-30, 0.12, 1.0, 1e30])
@pytest.mark.parametrize("p_lower", PROBABILITIES)
def test_one_class_is_just_below_the_formula(p_lower: float, sigma: float) -> None:
    exact = float(max(QUANTILES[p_lower], 0) * sigma)
    radius = smoothing_radius(p_lower, sigma=sigma)
    assert exact * (1 - 1e-13) <= radius <= exact
    assert type(radius) is float


def test_the_score_at_the_radius_is_enough() -> None:
    for p, radius in zip(scores := np.linspace(0.5001, 0.9999, 999), smoothing_radius(scores), strict=True):
        with mpmath.workdps(50):
            assert mpmath.ncdf(mpmath.mpf(float(radius))) < mpmath.mpf(float(p))
            assert mpmath.ncdf(mpmath.mpf(float(radius)) * (1 + mpmath.mpf(2) ** -46)) > mpmath.mpf(float(p))


@pytest.mark.parametrize("p_upper", PROBABILITIES)
@pytest.mark.parametrize("p_lower", PROBABILITIES)
def test_two_class_is_just_below_the_formula(p_lower: float, p_upper: float) -> None:
    exact = max(QUANTILES[p_lower] - QUANTILES[p_upper], 0) / 2 * 0.7
    radius = smoothing_radius(p_lower, p_upper, 0.7)
    assert radius <= exact
    assert radius >= exact - 1e-13 * (abs(QUANTILES[p_lower]) + abs(QUANTILES[p_upper]))


def test_two_class_certifies_without_a_majority() -> None:
    assert smoothing_radius(0.4, 0.1, 1.0) > 0.5
    assert smoothing_radius(0.4, None, 1.0) == 0.0


def test_two_class_equals_one_class_for_complementary_bounds() -> None:
    assert smoothing_radius(0.75, 0.25, 2.0) == pytest.approx(smoothing_radius(0.75, None, 2.0), rel=1e-13)


def test_ties_and_what_is_not_certified_have_radius_zero() -> None:
    assert smoothing_radius(0.5) == smoothing_radius(0.0) == smoothing_radius(0.49) == 0.0
    assert smoothing_radius(0.3, 0.3) == smoothing_radius(0.3, 0.6) == smoothing_radius(0.0, 1.0) == 0.0
    assert smoothing_radius(0.0, 1e-300) == 0.0


def test_an_infinite_radius_is_an_error() -> None:
    for radius in RADII:
        with pytest.raises(ValueError, match="p_lower is 1"):
            radius(1.0, 0.1)
        with pytest.raises(ValueError, match="p_lower is 1"):
            radius([0.5, 1.0])
        with pytest.raises(ValueError, match="p_upper is 0"):
            radius(0.9, [0.1, 0.0])
    with pytest.raises(ValueError, match="p_lower is 1"):
        smoothing_radius(1.0, None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("p_lower", "p_upper", "sigma"),
    [
        (-0.1, None, 1.0),
        (1.1, None, 1.0),
        (math.nan, None, 1.0),
        (0.9, math.nan, 1.0),
        (0.9, 1.2, 1.0),
        (0.9, None, 0.0),
        (0.9, None, -1.0),
        (0.9, None, math.inf),
        (0.9, None, math.nan),
    ],
)
def test_bad_arguments_are_refused(p_lower: float, p_upper: float | None, sigma: float) -> None:
    for radius in RADII:
        with pytest.raises(ValueError, match="must be"):
            radius(p_lower, p_upper, sigma)
        with pytest.raises(ValueError, match="must be"):
            radius([0.7, p_lower], None if p_upper is None else [0.2, p_upper], [1.0, sigma])


@given(p_lower=probabilities, p_upper=probabilities, step=st.floats(0, 0.1), sigma=st.floats(1e-6, 1e6))
def test_radius_is_monotone(p_lower: float, p_upper: float, step: float, sigma: float) -> None:
    radius = smoothing_radius(p_lower, p_upper, sigma)
    higher, lower = min(p_lower + step, 1 - 1e-13), max(p_upper - step, 1e-13)
    slack = 1e-12 * sigma
    assert smoothing_radius(higher, p_upper, sigma) >= radius - slack
    assert smoothing_radius(p_lower, lower, sigma) >= radius - slack
    assert 0 <= radius < math.inf


def lipschitz_radius(p_lower: float, p_upper: float | None = None, sigma: float = 1.0) -> float:
    return smoothing_radius(p_lower, p_upper, sigma, 0.4)


@pytest.mark.parametrize("radius", [*RADII, lipschitz_radius])
def test_arrays_are_scalars_bit_by_bit(radius: Callable) -> None:
    generator = np.random.default_rng(0)
    tails = np.concatenate([10 ** generator.uniform(-16, 0, 60), 10 ** generator.uniform(-300, 0, 33)])
    p_lower = np.concatenate([1 - tails[:60], tails[60:]])
    p_upper = generator.permutation(p_lower)[:, None]
    noise = 10 ** generator.uniform(-3, 3, len(p_lower))
    one, two = radius(p_lower, None, noise), radius(p_lower, p_upper, noise)
    assert one.shape == (93,)
    assert two.shape == (93, 93)
    assert (one > 0).any()
    for j in range(93):
        assert radius(p_lower[j], None, noise[j]) == one[j]
        for i in range(j % 9, 93, 9):
            assert radius(p_lower[j], p_upper[i, 0], noise[j]) == two[i, j]


@pytest.mark.parametrize("radius", RADII)
def test_shapes_and_types(radius: Callable) -> None:
    assert type(radius(np.float32(0.75))) is type(radius(np.array(0.75), 0.25, np.array(2))) is float
    assert radius([0.75]).shape == (1,)
    assert radius(np.zeros((0, 3)), 0.5).shape == (0, 3)
    assert radius(0.75, [[0.25], [0.1]], [1.0, 2.0, 3.0]).shape == (2, 3)
    scores = np.array([0.6, 0.7])
    radius(scores, scores, scores)
    np.testing.assert_array_equal(scores, [0.6, 0.7])
    with pytest.raises(ValueError, match="broadcast"):
        radius([0.6, 0.7], [0.1, 0.1, 0.1])


@pytest.mark.parametrize("radius", RADII)
def test_the_largest_and_smallest_noise_stay_sound(radius: Callable) -> None:
    assert 0 < radius(0.99, 0.01, 1.7e308) < math.inf
    assert radius(0.75, 0.5, 5e-324) == 0.0
    assert smoothing_radius(0.9, None, 0.0, 5e-324) < math.inf


def exact_laplace(p: float) -> mpmath.mpf:
    p = mpmath.mpf(p)
    return mpmath.log(2 * p) if p <= 0.5 else -mpmath.log(2 * (1 - p))


@pytest.mark.parametrize("scale", [1e-30, 0.12, 1.0, 1e30])
def test_laplace_is_just_below_the_formula(scale: float) -> None:
    for p_lower in PROBABILITIES:
        with mpmath.workdps(50):
            a = exact_laplace(p_lower)
            one = max(a, 0) * scale
            assert one * (1 - mpmath.mpf(1e-13)) <= laplace_radius(p_lower, None, scale) <= one
            for p_upper in PROBABILITIES:
                b = exact_laplace(p_upper)
                two = max(a - b, 0) * scale / 2
                slack = mpmath.mpf(1e-13) * (abs(a) + abs(b)) * scale
                assert two - slack <= laplace_radius(p_lower, p_upper, scale) <= two


@pytest.mark.parametrize("half_width", [1e-30, 0.12, 1.0, 1e30])
def test_uniform_is_just_below_the_formula(half_width: float) -> None:
    width, slack = Fraction(half_width), Fraction(half_width) / 10**15
    for p_lower in PROBABILITIES:
        one = max(2 * width * (Fraction(p_lower) - Fraction(1, 2)), 0)
        assert one - slack <= Fraction(uniform_radius(p_lower, None, half_width)) <= one
        for p_upper in PROBABILITIES:
            two = max(width * (Fraction(p_lower) - Fraction(p_upper)), 0)
            assert two - slack <= Fraction(uniform_radius(p_lower, p_upper, half_width)) <= two


@given(p_lower=probabilities, p_upper=probabilities)
def test_laplace_is_never_below_the_published_radius(p_lower: float, p_upper: float) -> None:
    published = max(0.5 * math.log(p_lower / p_upper), 0)
    if p_lower > p_upper:
        published = max(published, -math.log((1 - p_lower) + p_upper))
    if p_lower + p_upper <= 1:
        assert laplace_radius(p_lower, p_upper) >= published * (1 - 1e-12) - 1e-14
    if p_lower > 0.5:
        assert laplace_radius(p_lower) == pytest.approx(-math.log(2 * (1 - p_lower)), rel=1e-12)
    assert laplace_radius(0.7, 0.01) > 1.04 * max(0.5 * math.log(0.7 / 0.01), -math.log(1 - 0.7 + 0.01))


NOISES = [
    pytest.param(laplace_radius, stats.laplace(scale=0.7), 0.7, id="laplace"),
    pytest.param(uniform_radius, stats.uniform(-0.7, 1.4), 0.7, id="uniform"),
]
TWO_CLASS = [(0.4, 0.1), (0.5, 0.5 - 1e-3), (0.7, 0.01), (0.7, 0.3), (0.9, 0.05), (0.3, 0.29)]


@pytest.mark.parametrize("p_lower", [0.55, 0.8, 0.99])
@pytest.mark.parametrize(("radius", "noise", "parameter"), NOISES)
def test_no_score_loses_more_along_an_axis(
    radius: Callable, noise: stats.rv_frozen, parameter: float, p_lower: float
) -> None:
    certified = radius(p_lower, None, parameter)
    assert lowest_score(noise, [certified], p_lower) >= 0.5 - 1e-9
    assert lowest_score(noise, [1.01 * certified], p_lower) < 0.5 - 1e-5


@pytest.mark.parametrize(("p_lower", "p_upper"), TWO_CLASS)
@pytest.mark.parametrize(("radius", "noise", "parameter"), NOISES)
def test_no_two_scores_meet_before_along_an_axis(
    radius: Callable, noise: stats.rv_frozen, parameter: float, p_lower: float, p_upper: float
) -> None:
    certified = radius(p_lower, p_upper, parameter)
    assert smallest_gap(noise, [certified], p_lower, p_upper) >= -1e-9
    assert smallest_gap(noise, [1.02 * certified], p_lower, p_upper) < -1e-7


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("radius", "noise", "parameter"), NOISES)
def test_no_score_loses_more_in_the_plane(
    radius: Callable, noise: stats.rv_frozen, parameter: float, share: float
) -> None:
    for p_lower in (0.6, 0.9):
        certified = radius(p_lower, None, parameter)
        shift = [share * certified, (share - 1) * certified]
        lowest = lowest_score(noise, shift, p_lower)
        assert lowest >= 0.5 - 1e-9
        assert share > 0 or lowest < 0.5 + 1e-3
    for p_lower, p_upper in TWO_CLASS:
        certified = radius(p_lower, p_upper, parameter)
        shift = [share * certified, (share - 1) * certified]
        assert smallest_gap(noise, shift, p_lower, p_upper) >= -1e-9


def lowest_score(noise: stats.rv_frozen, shift: list[float], p_lower: float) -> float:
    here, there = cells(noise, shift)
    return optimize.linprog(there, A_eq=here[None], b_eq=[p_lower], bounds=(0, 1)).fun


def smallest_gap(noise: stats.rv_frozen, shift: list[float], p_lower: float, p_upper: float) -> float:
    here, there = cells(noise, shift)
    return optimize.linprog(
        np.concatenate([there, -there]),
        A_ub=sparse.hstack([sparse.eye_array(len(here))] * 2),
        b_ub=np.ones(len(here)),
        A_eq=sparse.block_diag([here[None], here[None]]),
        b_eq=[p_lower, p_upper],
        bounds=(0, 1),
    ).fun


def cells(noise: stats.rv_frozen, shift: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Masses of the noise, and of the noise shifted, in the cells of a grid that holds the kinks of both densities."""
    here, there = np.ones(1), np.ones(1)
    for distance in shift:
        kinks = [-0.7, 0.0, 0.7]
        inner = np.linspace(-4, 4, 400 if len(shift) == 1 else 24)
        edges = np.unique([-np.inf, *inner, *kinks, *(kink + distance for kink in kinks), np.inf])
        here = np.outer(here, np.diff(noise.cdf(edges))).ravel()
        there = np.outer(there, np.diff(noise.cdf(edges - distance))).ravel()
    return here, there
