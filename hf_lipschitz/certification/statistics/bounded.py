"""Fixed-n confidence bounds on the mean of variables in [0, 1]. `alpha` is the one-sided error everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lipschitz.certification.statistics.checks import checked_alpha, checked_trials, float_if_scalar


SUM_TOLERANCE = 1e-9

Array = NDArray[np.float64]


def hoeffding_lower(sums: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> float | Array:
    r"""
    Lower confidence bound on the mean of independent variables in [0, 1] (Hoeffding 1963, Theorem 1, eq. 2.3):
    \\(\bar X - \sqrt{\ln(1/\alpha) / (2n)}\\).

    Sound: the bound exceeds the true mean with probability at most `alpha`, for one n that was fixed beforehand. It
    is rounded down by 2e-9, which covers the rounding of the sums, and clipped to [0, 1].

    Args:
        sums (`float` or array):
            Sum of the n samples.
        n (`int` or array of `int`):
            Samples, at least 1.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in [0, 1].

    Raises:
        `ValueError`: an argument is out of range, or no n samples in [0, 1] have this sum.
    """
    mean, half_width = _hoeffding(sums, n, alpha)
    return float_if_scalar(np.clip(mean - half_width, 0.0, 1.0))


def hoeffding_upper(sums: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> float | Array:
    r"""
    Upper confidence bound on the mean, \\(\bar X + \sqrt{\ln(1/\alpha) / (2n)}\\). Sound, rounded up and clipped to
    [0, 1]. Arguments and errors are those of [`hoeffding_lower`].
    """
    mean, half_width = _hoeffding(sums, n, alpha)
    return float_if_scalar(np.clip(mean + half_width, 0.0, 1.0))


def subgaussian_lower(
    sums: ArrayLike, n: ArrayLike, alpha: ArrayLike, *, lipschitz: ArrayLike, sigma: float
) -> float | Array:
    r"""
    Lower confidence bound on \\(E f(x + \delta)\\), \\(\delta \sim N(0, \sigma^2 I)\\), for an L-Lipschitz f with
    values in [0, 1]: \\(\bar X - L \sigma \sqrt{2 \ln(1/\alpha) / n}\\).

    Sound, for one n that was fixed beforehand: the mean of the scores is an \\(L/\sqrt n\\)-Lipschitz function of all
    the noise, so Gaussian concentration (Tsirelson, Ibragimov and Sudakov 1976; in Boucheron, Lugosi and Massart
    2013, Theorem 5.6) holds for it, in any dimension. L belongs to the WHOLE map from the noised input to the score,
    preprocessing, temperature and simplex map included, and must hold everywhere. Noise that is rounded to a grid
    before the model makes f a step function, for which this is no bound. Rounded down by 2e-9 and clipped to [0, 1].

    Args:
        sums (`float` or array):
            Sum of the n scores.
        n (`int` or array of `int`):
            Samples, at least 1.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].
        lipschitz (`float` or array of `float`):
            L, at least 0, for distances in the unit of `sigma`. `inf` gives a bound of 0.
        sigma (`float`):
            Standard deviation of the noise, positive and finite.

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in [0, 1].

    Raises:
        `ValueError`: an argument is out of range, or no n samples in [0, 1] have this sum.
    """
    mean, half_width = _subgaussian(sums, n, alpha, lipschitz, sigma)
    return float_if_scalar(np.clip(mean - half_width, 0.0, 1.0))


def subgaussian_upper(
    sums: ArrayLike, n: ArrayLike, alpha: ArrayLike, *, lipschitz: ArrayLike, sigma: float
) -> float | Array:
    r"""
    Upper confidence bound on the mean, \\(\bar X + L \sigma \sqrt{2 \ln(1/\alpha) / n}\\). Sound, rounded up and
    clipped to [0, 1]. Conditions, arguments and errors are those of [`subgaussian_lower`].
    """
    mean, half_width = _subgaussian(sums, n, alpha, lipschitz, sigma)
    return float_if_scalar(np.clip(mean + half_width, 0.0, 1.0))


def empirical_bernstein_lower(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: ArrayLike, alpha: ArrayLike
) -> float | Array:
    r"""
    Lower confidence bound on the mean of independent variables in [0, 1] (Maurer and Pontil 2009, arXiv:0907.3740,
    Theorem 4), with V the unbiased sample variance:

    $$\bar X - \sqrt{2 V \ln(2/\alpha) / n} - \frac{7 \ln(2/\alpha)}{3 (n - 1)}$$

    Sound: the bound exceeds the true mean with probability at most `alpha`. V is computed from the sums, so it is
    raised by what their rounding can hide (1e-9 a sample, which also covers [`ScoreStatistics`]'s rounding), and the
    bound is rounded down and clipped to [0, 1]. For n = 1 it is 0.

    Args:
        sums (`float` or array):
            Sum of the n samples, one entry a class.
        sums_of_squares (`float` or array):
            Sum of their squares, same shape.
        n (`int` or array of `int`):
            Samples, at least 1.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in [0, 1].

    Raises:
        `ValueError`: an argument is out of range, or no n samples in [0, 1] have these sums.
    """
    mean, half_width = _empirical_bernstein(sums, sums_of_squares, n, alpha)
    return float_if_scalar(np.clip(mean - half_width, 0.0, 1.0))


def empirical_bernstein_upper(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: ArrayLike, alpha: ArrayLike
) -> float | Array:
    r"""
    Upper confidence bound on the mean, \\(\bar X + \sqrt{2 V \ln(2/\alpha) / n} + 7 \ln(2/\alpha) / (3 (n - 1))\\).
    Sound, rounded up and clipped to [0, 1]; 1 for n = 1. Arguments and errors are those of
    [`empirical_bernstein_lower`].
    """
    mean, half_width = _empirical_bernstein(sums, sums_of_squares, n, alpha)
    return float_if_scalar(np.clip(mean + half_width, 0.0, 1.0))


def _hoeffding(sums: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array]:
    n, alpha = checked_trials(n), checked_alpha(alpha)
    return _checked_mean(sums, n), _rounded_up(np.sqrt(-np.log(alpha) / (2 * n)))


def _subgaussian(
    sums: ArrayLike, n: ArrayLike, alpha: ArrayLike, lipschitz: ArrayLike, sigma: float
) -> tuple[Array, Array]:
    n, alpha, lipschitz = checked_trials(n), checked_alpha(alpha), np.asarray(lipschitz, dtype=np.float64)
    if not np.all(lipschitz >= 0):
        raise ValueError(f"lipschitz must be at least 0, got {lipschitz}.")
    if not (0 < sigma < np.inf):
        raise ValueError(f"sigma must be positive and finite, got {sigma}.")
    return _checked_mean(sums, n), _rounded_up(lipschitz * sigma * np.sqrt(-2 * np.log(alpha) / n))


def _empirical_bernstein(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: ArrayLike, alpha: ArrayLike
) -> tuple[Array, Array]:
    n, alpha = checked_trials(n), checked_alpha(alpha)
    sums, squares = np.asarray(sums, dtype=np.float64), np.asarray(sums_of_squares, dtype=np.float64)
    slack = SUM_TOLERANCE * n
    possible = (squares >= -slack) & (squares <= sums + 2 * slack) & (sums <= n + slack)
    possible &= sums * (sums / n) <= squares + 4 * slack
    if sums.shape != squares.shape or not possible.all():
        raise ValueError(f"No {n} samples in [0, 1] have the sums {sums} and the sums of squares {squares}.")
    mean, log_term = sums / n, np.log(2) - np.log(alpha)
    # For n = 1 this makes the half-width 7 ln(2/α) / 3, which is more than 1.
    others = np.maximum(n - 1, 1)
    variance = (np.maximum(squares - sums * mean, 0.0) + 4 * slack) / others
    return mean, _rounded_up(np.sqrt(2 * variance * log_term / n) + 7 * log_term / (3 * others))


def _checked_mean(sums: ArrayLike, n: NDArray[np.int64]) -> Array:
    sums = np.asarray(sums, dtype=np.float64)
    slack = SUM_TOLERANCE * n
    if not np.all((sums >= -slack) & (sums <= n + slack)):
        raise ValueError(f"No {n} samples in [0, 1] have the sums {sums}.")
    return sums / n


def _rounded_up(half_width: Array) -> Array:
    return half_width * (1 + 1e-12) + 2 * SUM_TOLERANCE
