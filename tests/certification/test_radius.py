from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.certification.radius import smoothing_radius


PROBABILITIES = [1e-300, 1e-12, 1e-3, 0.3, 0.5, 0.5 + 2**-52, 0.51, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53]
probabilities = st.floats(1e-12, 1 - 1e-12)


def exact_quantile(p: float) -> mpmath.mpf:
    with mpmath.workdps(400):
        return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


QUANTILES = {p: exact_quantile(p) for p in PROBABILITIES}


@pytest.mark.parametrize("sigma", [1e-30, 0.12, 1.0, 1e30])
@pytest.mark.parametrize("p_lower", PROBABILITIES)
def test_one_class_is_just_below_the_formula(p_lower: float, sigma: float) -> None:
    exact = float(max(QUANTILES[p_lower], 0) * sigma)
    radius = smoothing_radius(p_lower, sigma=sigma)
    assert exact * (1 - 1e-13) <= radius <= exact
    assert type(radius) is float


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
    with pytest.raises(ValueError, match="p_lower is 1"):
        smoothing_radius(1.0, 0.1)
    with pytest.raises(ValueError, match="p_upper is 0"):
        smoothing_radius(0.9, 0.0)


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
    with pytest.raises(ValueError, match="must be"):
        smoothing_radius(p_lower, p_upper, sigma)


@given(p_lower=probabilities, p_upper=probabilities, step=st.floats(0, 0.1), sigma=st.floats(1e-6, 1e6))
def test_radius_is_monotone(p_lower: float, p_upper: float, step: float, sigma: float) -> None:
    radius = smoothing_radius(p_lower, p_upper, sigma)
    higher, lower = min(p_lower + step, 1 - 1e-13), max(p_upper - step, 1e-13)
    slack = 1e-12 * sigma
    assert smoothing_radius(higher, p_upper, sigma) >= radius - slack
    assert smoothing_radius(p_lower, lower, sigma) >= radius - slack
    assert 0 <= radius < math.inf
