"""Gaussian smoothing of a score that is itself Lipschitz: its constant and its quantile function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


Floats = NDArray[np.float64]
Equation = Callable[[Floats], tuple[Floats, Floats]]

ROUNDING = 2.0**-48
# In units of sigma, half the ramp's width is 1 / (2 L sigma). Below the first width the ramp is a step and above the
# second the noise is nothing, each to 1e-16 of the quantile, which the outward rounding covers.
STEP_HALF_WIDTH = 2.0**-30
RAMP_HALF_WIDTH = 2.0**60
NARROW = 1 / 8
NEWTON_STEPS = 6
# What an equation's residual is trusted to at x is RESIDUAL_ERROR * (1 + min(x, 0)^2): the rounding of Gaussian tails.
RESIDUAL_ERROR = 2.0**-45
QUANTILE_STEP = 2.0**-44
NODES, WEIGHTS = (array.tolist() for array in np.polynomial.legendre.leggauss(16))
DENSITY_AT_ZERO = 1 / math.sqrt(2 * math.pi)


def smoothed_score_lipschitz(sigma: ArrayLike, lipschitz_constant: ArrayLike = math.inf) -> float | Floats:
    r"""
    ℓ2 Lipschitz constant of the Gaussian smoothing of every L-Lipschitz score with values in [0, 1]:

    $$L \, \mathrm{erf}\left(\frac{1}{2 \sqrt 2 L \sigma}\right)$$

    This is \\(G'(0)\\), for the smoothed ramp G of [`smoothing_radius`]: \\(\tilde f\\) is G of a 1-Lipschitz
    function. The ramp attains it at its middle. It tends to \\(1 / (\sigma \sqrt{2 \pi})\\) as L → ∞ and to L as
    σ → 0, and is never above either.

    Sound: an upper bound, rounded up by less than 1e-13 of itself.

    Args:
        sigma (`float` or array):
            Standard deviation of the noise, positive; 0 where `lipschitz_constant` is finite.
        lipschitz_constant (`float` or array, *optional*, defaults to infinity):
            L, a certified Lipschitz constant of the whole map from the noised input to the score.

    Returns:
        `float`, or an array of the arguments' common shape.

    Raises:
        `ValueError`: `sigma` is negative or not finite, `lipschitz_constant` is not positive, or one is NaN; `sigma`
            is 0 and `lipschitz_constant` infinite.
    """
    arrays = broadcast(sigma, lipschitz_constant)
    sigma, slope = (array.ravel() for array in arrays)
    check_noise(sigma, slope)
    half_width = ramp_half_width(sigma, slope)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        of_steps = np.nextafter(DENSITY_AT_ZERO / sigma * (1 + ROUNDING), math.inf)
        between = np.nextafter(slope * special.erf(half_width * math.sqrt(0.5)) * (1 + ROUNDING), math.inf)
    constant = np.fmin(slope, of_steps)
    constant = np.where(half_width > STEP_HALF_WIDTH, np.fmin(constant, between), constant)
    return float_if_scalar(constant.reshape(arrays[0].shape))


def ramp_quantile(p: Floats, half_width: Floats) -> tuple[Floats, Floats]:
    r"""
    Lower and upper bound on the p-quantile of U + Z, U uniform on [-h, h] and Z standard normal: on
    \\(G^{-1}(p) / \sigma\\), where G is the Gaussian smoothing of the ramp of slope L and \\(h = 1 / (2 L \sigma)\\).

    They differ by less than 1e-12 of the quantile, for all p in [0, 1] and all `half_width` from `STEP_HALF_WIDTH` to
    `RAMP_HALF_WIDTH`, and hold when `half_width` is itself wrong by some units in its last place, to which the
    quantile is no more sensitive than proportional.

    By symmetry only the quantile u >= 0 of t = 1 - p, p >= 1/2, is sought: as the root of a concave increasing
    function, the relative excess of the probability of [-u, u] near the middle and a log-probability in the tails, so
    Newton's method converges from anywhere. Two points beside the root are then certified by the sign there.

    Args:
        p (one-dimensional array): probabilities.
        half_width (array of the same shape): h.

    Raises:
        `RuntimeError`: a sign could not be certified; never seen.
    """
    tail = np.minimum(p, 1 - p)
    low, high = np.full_like(p, math.inf), np.full_like(p, math.inf)
    low[tail == 0.5] = high[tail == 0.5] = 0.0
    central = (tail >= 0.25) & (tail < 0.5)
    narrow = (tail > 0) & (tail < 0.25) & (half_width <= NARROW)
    wide = (tail > 0) & (tail < 0.25) & (half_width > NARROW)
    for chosen, solve in ((central, _solve_centre), (narrow, _solve_narrow_tail), (wide, _solve_wide_tail)):
        if chosen.any():
            low[chosen], high[chosen] = solve(tail[chosen], half_width[chosen])
    low, high = low * (1 - ROUNDING), high * (1 + ROUNDING)
    return np.where(p < 0.5, -high, low), np.where(p < 0.5, -low, high)


def ramp_half_width(sigma: Floats, slope: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return 0.5 / (slope * sigma)


def check_noise(sigma: Floats, slope: Floats) -> None:
    if not (slope > 0).all():
        raise ValueError("lipschitz_constant must be positive, or infinity for scores of which nothing is known.")
    if not (np.isfinite(sigma) & (sigma >= 0)).all() or ((sigma == 0) & np.isinf(slope)).any():
        raise ValueError("sigma must be positive and finite; it may be 0 where lipschitz_constant is finite.")


def broadcast(*arguments: ArrayLike) -> list[Floats]:
    return np.broadcast_arrays(*(np.asarray(argument, dtype=np.float64) for argument in arguments))


def float_if_scalar(value: Floats) -> float | Floats:
    return float(value) if value.ndim == 0 else value


def _solve_centre(tail: Floats, h: Floats) -> tuple[Floats, Floats]:
    excess = 0.5 - tail
    start = np.maximum(2 * h * excess, -special.ndtri(tail))
    u = _newton(lambda x: _centre(x, h, excess), start)
    return _certified(lambda x: _centre(x, h, excess), u, QUANTILE_STEP * u)


def _solve_narrow_tail(tail: Floats, h: Floats) -> tuple[Floats, Floats]:
    log_tail = np.log(tail)
    x = _newton(lambda x: _narrow_tail(x, h, log_tail), special.ndtri(tail))
    low, high = _certified(lambda x: _narrow_tail(x, h, log_tail), x, QUANTILE_STEP * (1 + np.abs(x)))
    return -high, -low


def _solve_wide_tail(tail: Floats, h: Floats) -> tuple[Floats, Floats]:
    area = np.maximum(2 * h * tail, 1e-300)
    log_area = np.log(2 * h) + np.log(tail)
    start = np.where(area < 0.4, special.ndtri(np.minimum(1.25 * area, 0.5)), area - 0.4)
    v = _newton(lambda x: _wide_tail(x, h, area, log_area), start)
    low, high = _certified(lambda x: _wide_tail(x, h, area, log_area), v, QUANTILE_STEP * (1 + np.abs(v)))
    return h - high, h - low


def _centre(u: Floats, h: Floats, excess: Floats) -> tuple[Floats, Floats]:
    """
    P(0 < U + Z < u) / excess - 1 and its derivative, for u < max(1, h). The probability is the integral of Φ - 1/2
    over [h - u, h + u], or over [u - h, u + h] as this is odd, divided by 2 h.
    """
    middle, radius = np.maximum(u, h), np.minimum(u, h)
    value = np.zeros_like(u)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        value += weight * special.erf((middle + radius * node) * math.sqrt(0.5))
    value *= radius / h / 4
    slope = (special.erf((u + h) * math.sqrt(0.5)) - special.erf((u - h) * math.sqrt(0.5))) / (4 * h)
    return value / excess - 1, slope / excess


def _narrow_tail(x: Floats, h: Floats, log_tail: Floats) -> tuple[Floats, Floats]:
    """log(P(U + Z < x) / tail) and its derivative for x < -h: the mean of Φ over [x - h, x + h]."""
    mass, density = np.zeros_like(x), np.zeros_like(x)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        point = h * node - x
        power = weight / 2 * np.exp(-point * point / 2 - log_tail)
        mass += power * _scaled_tail(point)
        density += power * DENSITY_AT_ZERO
    return np.log(mass), density / mass


def _wide_tail(v: Floats, h: Floats, area: Floats, log_area: Floats) -> tuple[Floats, Floats]:
    """
    log(P(U + Z < v - h) / tail) and its derivative, for v < 2 h. The probability is (ψ(v) - ψ(v - 2 h)) / (2 h), with
    ψ(t) = t Φ(t) + φ(t) the integral of Φ up to t.
    """
    near, far = np.abs(v), 2 * h - v
    near_power, far_power = (np.exp(-point * point / 2 - log_area) for point in (near, far))
    ratio = np.maximum(v, 0) / area + near_power * _scaled_psi(near) - far_power * _scaled_psi(far)
    near_mass = near_power * _scaled_tail(near)
    slope = np.where(v > 0, 1 / area - near_mass, near_mass) - far_power * _scaled_tail(far)
    return np.log(ratio), slope / ratio


def _scaled_psi(x: Floats) -> Floats:
    """ψ(-x) exp(x^2 / 2), for x >= 0."""
    return DENSITY_AT_ZERO - x * _scaled_tail(x)


def _scaled_tail(x: Floats) -> Floats:
    """Φ(-x) exp(x^2 / 2), for x >= 0."""
    return special.erfcx(x * math.sqrt(0.5)) / 2


def _newton(equation: Equation, x: Floats) -> Floats:
    for _ in range(NEWTON_STEPS):
        residual, slope = equation(x)
        x = x - residual / slope
    return x


def _certified(equation: Equation, x: Floats, step: Floats) -> tuple[Floats, Floats]:
    low, high = x - step, x + step
    error = RESIDUAL_ERROR * (1 + np.minimum(x, 0) ** 2)
    if not ((equation(low)[0] <= -error) & (equation(high)[0] >= error)).all():
        raise RuntimeError("the quantile of a smoothed ramp fails its check; report p_lower, p_upper, sigma and L.")
    return low, high
