"""Confidence bounds on a mean. `alpha` is the one-sided error everywhere."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


QUANTILE_MARGIN = 1e-10
SUM_TOLERANCE = 1e-9


def clopper_pearson_lower(k: ArrayLike, n: int, alpha: float) -> float | NDArray[np.float64]:
    r"""
    Lower confidence bound on a probability from `k` successes in `n` independent trials (Clopper and Pearson 1934):
    the p with \\(P(\mathrm{Bin}(n, p) \ge k) = \alpha\\), which is the α-quantile of Beta(k, n - k + 1); 0 for k = 0.

    Sound: the bound exceeds the true probability with probability at most `alpha`, for every n. The quantile is
    rounded down by 1e-10 of itself, then its tail is computed again and compared with `alpha`.

    Args:
        k (`int` or array of `int`):
            Successes, `0 <= k <= n`; an array gives one bound an entry, each at `alpha`.
        n (`int`):
            Trials, at least 1.
        alpha (`float`):
            One-sided error in (0, 0.5].

    Returns:
        `float`, or an array of the shape of `k`, in [0, 1).

    Raises:
        `ValueError`: an argument is out of range.
        `RuntimeError`: the quantile fails its check; seen only for `alpha` below 1e-100 and n above 1e8.
    """
    k = _checked_counts(k, n, alpha)
    with np.errstate(invalid="ignore"):
        quantile = stats.beta.ppf(alpha, k, n - k + 1)
    bound = np.where(k == 0, 0.0, quantile * (1 - QUANTILE_MARGIN))
    _check_tail(stats.binom.sf(k - 1, n, bound), k > 0, alpha)
    return _float_if_scalar(bound)


def clopper_pearson_upper(k: ArrayLike, n: int, alpha: float) -> float | NDArray[np.float64]:
    r"""
    Upper confidence bound on a probability from `k` successes in `n` independent trials (Clopper and Pearson 1934):
    the p with \\(P(\mathrm{Bin}(n, p) \le k) = \alpha\\), which is the (1 - α)-quantile of Beta(k + 1, n - k); 1 for
    k = n.

    Sound: the bound is below the true probability with probability at most `alpha`, for every n. Rounded up and
    checked like [`clopper_pearson_lower`], whose arguments and errors it shares.

    Returns:
        `float`, or an array of the shape of `k`, in (0, 1].
    """
    k = _checked_counts(k, n, alpha)
    with np.errstate(invalid="ignore"):
        quantile = stats.beta.isf(alpha, k + 1, n - k)
    bound = np.where(k == n, 1.0, np.minimum(quantile * (1 + QUANTILE_MARGIN), 1.0))
    _check_tail(stats.binom.cdf(k, n, bound), k < n, alpha)
    return _float_if_scalar(bound)


def empirical_bernstein_lower(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: int, alpha: float
) -> float | NDArray[np.float64]:
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
        n (`int`):
            Samples, at least 1.
        alpha (`float`):
            One-sided error in (0, 0.5].

    Returns:
        `float`, or an array of the shape of `sums`, in [0, 1].

    Raises:
        `ValueError`: an argument is out of range, or no n samples in [0, 1] have these sums.
    """
    mean, half_width = _empirical_bernstein(sums, sums_of_squares, n, alpha)
    return _float_if_scalar(np.clip(mean - half_width, 0.0, 1.0))


def empirical_bernstein_upper(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: int, alpha: float
) -> float | NDArray[np.float64]:
    r"""
    Upper confidence bound on the mean, \\(\bar X + \sqrt{2 V \ln(2/\alpha) / n} + 7 \ln(2/\alpha) / (3 (n - 1))\\).
    Sound, rounded up and clipped to [0, 1]; 1 for n = 1. Arguments and errors are those of
    [`empirical_bernstein_lower`].
    """
    mean, half_width = _empirical_bernstein(sums, sums_of_squares, n, alpha)
    return _float_if_scalar(np.clip(mean + half_width, 0.0, 1.0))


def _empirical_bernstein(
    sums: ArrayLike, sums_of_squares: ArrayLike, n: int, alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _check_trials_and_alpha(n, alpha)
    sums, squares = np.asarray(sums, dtype=np.float64), np.asarray(sums_of_squares, dtype=np.float64)
    slack = SUM_TOLERANCE * n
    possible = (squares >= -slack) & (squares <= sums + 2 * slack) & (sums <= n + slack)
    possible &= sums * (sums / n) <= squares + 4 * slack
    if sums.shape != squares.shape or not possible.all():
        raise ValueError(f"No {n} samples in [0, 1] have the sums {sums} and the sums of squares {squares}.")
    mean = sums / n
    if n == 1:
        return mean, np.full_like(mean, np.inf)
    variance = (np.maximum(squares - sums * mean, 0.0) + 4 * slack) / (n - 1)
    log_term = math.log(2) - math.log(alpha)
    half_width = np.sqrt(2 * variance * log_term / n) + 7 * log_term / (3 * (n - 1))
    return mean, half_width * (1 + 1e-12) + 2 * SUM_TOLERANCE


def _checked_counts(k: ArrayLike, n: int, alpha: float) -> NDArray[np.int64]:
    _check_trials_and_alpha(n, alpha)
    k = np.asarray(k)
    if not np.issubdtype(k.dtype, np.integer):
        raise ValueError(f"Counts must be integers, got {k.dtype}.")
    if k.size and (k.min() < 0 or k.max() > n):
        raise ValueError(f"Counts must be between 0 and n = {n}, got {k}.")
    return k.astype(np.int64)


def _check_trials_and_alpha(n: int, alpha: float) -> None:
    if n < 1 or n != int(n):
        raise ValueError(f"n must be an integer of at least 1, got {n}.")
    if not (0 < alpha <= 0.5):
        raise ValueError(f"alpha must be in (0, 0.5], got {alpha}.")


def _check_tail(tail: NDArray[np.float64], informative: NDArray[np.bool_], alpha: float) -> None:
    if not np.all((tail <= alpha) | ~informative):
        raise RuntimeError(f"The beta quantile at alpha = {alpha} is not accurate enough; use a larger alpha.")


def _float_if_scalar(bound: NDArray[np.float64]) -> float | NDArray[np.float64]:
    return float(bound) if bound.ndim == 0 else bound
