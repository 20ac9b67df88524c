"""From bounds on the smoothed scores to a certified radius."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from hf_lipschitz.certification.lipschitz_smoothing import (
    RAMP_HALF_WIDTH,
    ROUNDING,
    STEP_HALF_WIDTH,
    Floats,
    broadcast,
    check_noise,
    float_if_scalar,
    ramp_half_width,
    ramp_quantile,
)


Quantile = Callable[[Floats], tuple[Floats, Floats]]


def smoothing_radius(
    p_lower: ArrayLike,
    p_upper: ArrayLike | None = None,
    sigma: ArrayLike = 1.0,
    lipschitz_constant: ArrayLike = math.inf,
) -> float | Floats:
    r"""
    Radius of the open ℓ2 ball on which the class of a Gaussian-smoothed classifier cannot change: one-class
    \\(G^{-1}(\underline{p_A})\\) without `p_upper`, two-class \\((G^{-1}(\underline{p_A}) -
    G^{-1}(\overline{p_B})) / 2\\) with it, which needs no \\(p_A > 1/2\\), where

    $$G(z) = L \sigma \left[\psi\left(\frac{z + 1/(2L)}{\sigma}\right) - \psi\left(\frac{z - 1/(2L)}{\sigma}\right)
    \right], \quad \psi(t) = t \Phi(t) + \varphi(t)$$

    is the Gaussian smoothing of the ramp of slope L and width 1/L. Along a line, and with the noise across it averaged
    out, an L-Lipschitz score in [0, 1] minus the ramp of equal mean changes sign once; the ratio of the shifted
    Gaussian's density to the Gaussian's is monotone; so the ramp loses most, \\(G^{-1} \circ \tilde f_k\\) is
    1-Lipschitz, and the one-class radius is the largest possible, the two-class one where p_A + p_B <= 1.

    For L = ∞ (votes, or scores of which nothing is known) \\(G^{-1}\\) is \\(\sigma \Phi^{-1}\\) (Cohen et al. 2019,
    arXiv:1902.02918, Theorem 1; Salman et al. 2019, arXiv:1906.04584, Lemma 2 for soft scores). For `sigma` = 0 it is
    \\((p - 1/2) / L\\), the margin of the base classifier. The result is never below either, and grows with `p_lower`
    and `sigma` (more noise is less noise on a score already smoothed), and as `p_upper` or L falls.

    Sound: never above the formula's exact value, hence a certified radius whenever `p_lower` and `p_upper` are bounds
    and L is one. It is below the exact value by less than 1e-12 of the two quantiles' size: of itself, unless p_A and
    p_B are on one side of 1/2 and close.

    Args:
        p_lower (`float` or array):
            Lower bound on the smoothed score of the predicted class, in [0, 1).
        p_upper (`float` or array, *optional*):
            Upper bound, in (0, 1], on the smoothed score of EVERY other class. Without it, other classes get what is
            left, 1 - `p_lower`.
        sigma (`float` or array, *optional*, defaults to `1.0`):
            Standard deviation of the noise; the radius has its unit. It may be 0 where L is finite.
        lipschitz_constant (`float` or array, *optional*, defaults to infinity):
            L, a certified ℓ2 Lipschitz constant of every score as a function of the noised input.

    Returns:
        `float`, or an array of the arguments' common shape: the radius, or 0.0 where nothing is certified. A tie is
        0.0.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1]; `sigma` is not positive and finite (or 0, for finite L); L is
            not positive; or a `p_lower` is 1 or a `p_upper` is 0: no finite sample proves such a bound, so it is an
            estimate or a rounded number, and no radius follows from it.
    """
    p_lower, p_upper, shape, sigma, slope = _prepared(p_lower, p_upper, sigma, lipschitz_constant)
    check_noise(sigma, slope)
    half_width = ramp_half_width(sigma, slope)
    between = (half_width > STEP_HALF_WIDTH) & (half_width < RAMP_HALF_WIDTH)
    with np.errstate(over="ignore"):
        radius = np.maximum(
            sigma * _half_distance(_gaussian_quantile, p_lower, p_upper), _margin(p_lower, p_upper) / slope
        )
        if between.any():
            of_ramps = _half_distance(lambda p: ramp_quantile(p[between], half_width[between]), p_lower, p_upper)
            radius[between] = np.maximum(radius[between], sigma[between] * of_ramps)
    return _rounded_down(radius, shape)


def laplace_radius(p_lower: ArrayLike, p_upper: ArrayLike | None = None, scale: ArrayLike = 1.0) -> float | Floats:
    r"""
    Radius of the open ℓ1 ball on which the class of a classifier smoothed by independent Laplace noise of scale b on
    every coordinate cannot change: \\(F^{-1}(\underline{p_A})\\), or \\((F^{-1}(\underline{p_A}) -
    F^{-1}(\overline{p_B})) / 2\\) with `p_upper`, where F is the noise's distribution function. In full,

    $$R_{one} = b \ln \frac{1}{2 (1 - p_A)}, \quad R_{two} = \frac b2 \ln \frac{1}{4 (1 - p_A) p_B} \ (p_B \le 1/2 \le
    p_A), \quad R_{two} = \frac b2 \ln \frac{p_A}{p_B} \ (p_A, p_B \le 1/2)$$

    Proof: let one coordinate move by r. With the noise on the others averaged out, the score is one of a real variable
    with values in [0, 1], and the ratio of the shifted density to the density is monotone, so by Neyman and Pearson
    the indicator of a half-line loses most: \\(F^{-1} \circ \tilde f_k\\) falls by at most r. Coordinate after
    coordinate, it is 1-Lipschitz for ℓ1. The one-class radius is the largest possible, the two-class one where
    p_A + p_B <= 1; it is never below the two-class radius max(b/2 ln(p_A / p_B), -b ln(1 - p_A + p_B)) of Teng et al.
    2020 (OpenReview H1lQIgrFDS), whose one-class value is the same.

    Sound: rounded down, by less than 1e-13 of the quantiles' size.

    Args:
        p_lower (`float` or array):
            Lower bound on the smoothed score of the predicted class, in [0, 1).
        p_upper (`float` or array, *optional*):
            Upper bound, in (0, 1], on the smoothed score of EVERY other class; 1 - `p_lower` without it.
        scale (`float` or array, *optional*, defaults to `1.0`):
            b; the noise has standard deviation √2 b on every coordinate. The radius has its unit.

    Returns:
        `float`, or an array of the arguments' common shape: the radius, or 0.0 where nothing is certified.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1], a `p_lower` is 1 or a `p_upper` is 0; `scale` is not positive
            and finite.
    """
    p_lower, p_upper, shape, scale = _prepared(p_lower, p_upper, scale)
    _check_positive("scale", scale)
    with np.errstate(over="ignore"):
        radius = scale * _half_distance(_laplace_quantile, p_lower, p_upper)
    return _rounded_down(radius, shape)


def uniform_radius(
    p_lower: ArrayLike, p_upper: ArrayLike | None = None, half_width: ArrayLike = 1.0
) -> float | Floats:
    r"""
    Radius of the open ℓ1 ball on which the class of a classifier smoothed by independent uniform noise on [-λ, λ] on
    every coordinate cannot change: \\(2 \lambda (\underline{p_A} - 1/2)\\), or \\(\lambda (\underline{p_A} -
    \overline{p_B})\\) with `p_upper` (Lee et al. 2019, arXiv:1906.04948; Yang et al. 2020, arXiv:2002.08118).

    Proof: when one coordinate moves by r, the noise leaves a part r / (2λ) of its cube and enters as much elsewhere,
    so a smoothed score in [0, 1] changes by at most r / (2λ). Coordinate after coordinate it is 1/(2λ)-Lipschitz for
    ℓ1, and p_A falls to 1/2, or meets a rising p_B, at the radius. Along an axis a score can lose that much, so the
    one-class radius is the largest possible, and the two-class one where p_A + p_B <= 1.

    Sound: rounded down, by less than 1e-15 of λ.

    Args:
        p_lower (`float` or array):
            Lower bound on the smoothed score of the predicted class, in [0, 1).
        p_upper (`float` or array, *optional*):
            Upper bound, in (0, 1], on the smoothed score of EVERY other class; 1 - `p_lower` without it.
        half_width (`float` or array, *optional*, defaults to `1.0`):
            λ; the noise has standard deviation λ / √3 on every coordinate. The radius has its unit.

    Returns:
        `float`, or an array of the arguments' common shape: the radius, or 0.0 where nothing is certified.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1], a `p_lower` is 1 or a `p_upper` is 0; `half_width` is not
            positive and finite.
    """
    p_lower, p_upper, shape, half_width = _prepared(p_lower, p_upper, half_width)
    _check_positive("half_width", half_width)
    return _rounded_down(2 * _margin(p_lower, p_upper) * half_width, shape)


def _prepared(
    p_lower: ArrayLike, p_upper: ArrayLike | None, *parameters: ArrayLike
) -> tuple[Floats, Floats | None, tuple[int, ...], *tuple[Floats, ...]]:
    """Checked scores and the parameters, broadcast and flattened, with their shape."""
    scores = (p_lower,) if p_upper is None else (p_lower, p_upper)
    arrays = broadcast(*scores, *parameters)
    flat = [array.ravel() for array in arrays]
    _check_scores("p_lower", flat[0], unprovable=1)
    if p_upper is not None:
        _check_scores("p_upper", flat[1], unprovable=0)
    return flat[0], None if p_upper is None else flat[1], arrays[0].shape, *flat[len(scores) :]


def _gaussian_quantile(p: Floats) -> tuple[Floats, Floats]:
    return _widened(special.ndtri(p))


def _laplace_quantile(p: Floats) -> tuple[Floats, Floats]:
    with np.errstate(divide="ignore"):
        magnitude = -np.log(2 * np.minimum(p, 1 - p))
    return _widened(np.where(p < 0.5, -magnitude, magnitude))


def _widened(quantile: Floats) -> tuple[Floats, Floats]:
    change = ROUNDING * np.sign(quantile)
    return quantile * (1 - change), quantile * (1 + change)


def _half_distance(quantile: Quantile, p_lower: Floats, p_upper: Floats | None) -> Floats:
    """From 1/2 to p_A, or half that from p_B to p_A, on the scale of a quantile function."""
    low = quantile(p_lower)[0]
    distance = low if p_upper is None else (low - quantile(p_upper)[1]) / 2
    return np.maximum(distance, 0.0)


def _margin(p_lower: Floats, p_upper: Floats | None) -> Floats:
    """p_A - 1/2, which is exact where it is positive, or (p_A - p_B) / 2 rounded down."""
    if p_upper is None:
        return np.maximum(p_lower - 0.5, 0.0)
    return np.maximum(np.nextafter(p_lower - p_upper, -1) / 2, 0.0)


def _rounded_down(radius: Floats, shape: tuple[int, ...]) -> float | Floats:
    """One unit in the last place below, for the last product or quotient; what overflowed is finite again."""
    return float_if_scalar(np.nextafter(radius, 0.0).reshape(shape))


def _check_scores(name: str, scores: Floats, unprovable: int) -> None:
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        raise ValueError(f"{name} must be in [0, 1], got {scores[wrong][0]}.")
    if (scores == unprovable).any():
        raise ValueError(f"{name} is {unprovable}, which no finite sample proves; pass a confidence bound.")


def _check_positive(name: str, values: Floats) -> None:
    if not ((values > 0) & np.isfinite(values)).all():
        raise ValueError(f"{name} must be positive and finite.")
