"""Confidence bounds on a probability, from the number of successes. `alpha` is the one-sided error everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hf_lipschitz.certification.statistics.checks import checked_alpha, checked_trials, float_if_scalar


QUANTILE_MARGIN = 1e-10
BISECTIONS = 60

Array = NDArray[np.float64]


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> float | Array:
    r"""
    Lower confidence bound on a probability from `k` successes in `n` independent trials (Clopper and Pearson 1934):
    the p with \\(P(\mathrm{Bin}(n, p) \ge k) = \alpha\\), which is the α-quantile of Beta(k, n - k + 1); 0 for k = 0.

    Sound: the bound exceeds the true probability with probability at most `alpha`, for every n. The quantile is
    rounded down by 1e-10 of itself, then its tail is computed again and compared with `alpha`.

    Args:
        k (`int` or array of `int`):
            Successes, `0 <= k <= n`.
        n (`int` or array of `int`):
            Trials, at least 1.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].

    Returns:
        `float`, or an array of the shape to which `k`, `n` and `alpha` broadcast, in [0, 1).

    Raises:
        `ValueError`: an argument is out of range.
        `RuntimeError`: the quantile fails its check; seen only for `alpha` below 1e-100 and n of 1e7 or more.
    """
    return float_if_scalar(_lower(*_checked(k, n, alpha)))


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> float | Array:
    r"""
    Upper confidence bound on a probability from `k` successes in `n` independent trials (Clopper and Pearson 1934):
    the p with \\(P(\mathrm{Bin}(n, p) \le k) = \alpha\\), which is the (1 - α)-quantile of Beta(k + 1, n - k); 1 for
    k = n.

    Sound: the bound is below the true probability with probability at most `alpha`, for every n. Rounded up and
    checked like [`clopper_pearson_lower`], whose arguments and errors it shares.

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in (0, 1].
    """
    return float_if_scalar(_upper(*_checked(k, n, alpha)))


def randomized_clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, u: ArrayLike) -> float | Array:
    r"""
    Lower confidence bound on a probability whose error is exactly `alpha` (Stevens 1950, "Fiducial limits of the
    parameter of a discontinuous distribution"): the p with

    $$P(\mathrm{Bin}(n, p) > k) + u\, P(\mathrm{Bin}(n, p) = k) = \alpha$$

    and 0 where no p solves it, which is k = 0 with u ≥ α. With u uniform on [0, 1) and independent of the trials, the
    left side at the true p is uniform as well, whence the exact level; `clopper_pearson_lower(k, n, alpha)` is the
    bound at u = 1 and never larger.

    Sound with probability 1 - `alpha` over the trials and u together, PROVIDED u is drawn once, independently of the
    trials, and kept: to draw it again after a look at the bound, or to report the best of several, is no bound at
    any level. Derive u from the seed and the input's index alone. A larger u is always safe, for the bound falls as u
    grows. The tail is solved for `alpha` less 1e-10 of it, the root is rounded down by 1e-10 of itself, and the tail
    is computed again and compared with `alpha`.

    Args:
        k (`int` or array of `int`):
            Successes, `0 <= k <= n`.
        n (`int` or array of `int`):
            Trials, at least 1.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].
        u (`float` or array of `float`):
            The uniform number of each bound, in [0, 1].

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in [0, 1 - 1e-10]. The upper end is
        reached where all trials succeeded and u ≤ α.

    Raises:
        `ValueError`: an argument is out of range.
        `RuntimeError`: a root or a quantile fails its check; seen only for n of 1e7 or more.
    """
    k, n, alpha, u = _checked(k, n, alpha, u)
    above = np.where(k == n, 1.0, _lower(np.minimum(k + 1, n), n, alpha))

    def tail(p: Array) -> Array:
        return (1 - u) * stats.binom.sf(k, n, p) + u * stats.binom.sf(k - 1, n, p)

    bound = _bisect(tail, _lower(k, n, alpha), above, alpha) * (1 - QUANTILE_MARGIN)
    _check_tail(stats.binom.sf(k, n, bound) + u * stats.binom.pmf(k, n, bound), bound > 0, alpha)
    return float_if_scalar(bound)


def randomized_clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, u: ArrayLike) -> float | Array:
    r"""
    Upper confidence bound on a probability whose error is exactly `alpha` (Stevens 1950): the p with
    \\(P(\mathrm{Bin}(n, p) < k) + u\, P(\mathrm{Bin}(n, p) = k) = \alpha\\), and 1 where no p solves it, which is
    k = n with u ≥ α.

    Sound under the condition on `u` that [`randomized_clopper_pearson_lower`] states; arguments and errors are those
    of that function. The bound rises with u. Error `alpha` is exact for probabilities above 1e-10, the least value
    returned, and below `alpha` under it.

    Returns:
        `float`, or an array of the shape to which the arguments broadcast, in [1e-10, 1].
    """
    k, n, alpha, u = _checked(k, n, alpha, u)
    below = np.where(k == 0, 0.0, _upper(np.maximum(k - 1, 0), n, alpha))

    def tail(p: Array) -> Array:
        return (1 - u) * stats.binom.cdf(k - 1, n, p) + u * stats.binom.cdf(k, n, p)

    root = _bisect(tail, _upper(k, n, alpha), below, alpha)
    bound = np.clip(root * (1 + QUANTILE_MARGIN), QUANTILE_MARGIN, 1.0)
    _check_tail(stats.binom.cdf(k - 1, n, bound) + u * stats.binom.pmf(k, n, bound), bound < 1, alpha)
    return float_if_scalar(bound)


def _lower(k: NDArray[np.int64], n: NDArray[np.int64], alpha: Array) -> Array:
    with np.errstate(invalid="ignore"):
        quantile = stats.beta.ppf(alpha, k, n - k + 1)
    bound = np.where(k == 0, 0.0, quantile * (1 - QUANTILE_MARGIN))
    _check_tail(stats.binom.sf(k - 1, n, bound), k > 0, alpha)
    return bound


def _upper(k: NDArray[np.int64], n: NDArray[np.int64], alpha: Array) -> Array:
    with np.errstate(invalid="ignore"):
        quantile = stats.beta.isf(alpha, k + 1, n - k)
    bound = np.where(k == n, 1.0, np.minimum(quantile * (1 + QUANTILE_MARGIN), 1.0))
    _check_tail(stats.binom.cdf(k, n, bound), k < n, alpha)
    return bound


def _bisect(tail: Callable[[Array], Array], safe: Array, unsafe: Array, alpha: Array) -> Array:
    """Moves `safe` towards `unsafe` as far as the tail stays at most α; both broadcast to the shape of the result."""
    for _ in range(BISECTIONS):
        middle = safe + (unsafe - safe) / 2
        small = tail(middle) <= alpha * (1 - QUANTILE_MARGIN)
        safe, unsafe = np.where(small, middle, safe), np.where(small, unsafe, middle)
    return safe


def _checked(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, *u: ArrayLike) -> list[NDArray]:
    k, n, alpha = np.asarray(k), checked_trials(n), checked_alpha(alpha)
    if not np.issubdtype(k.dtype, np.integer):
        raise ValueError(f"Counts must be integers, got {k.dtype}.")
    if not np.all((k >= 0) & (k <= n)):
        raise ValueError(f"Counts must be between 0 and n = {n}, got {k}.")
    uniform = [np.asarray(number, dtype=np.float64) for number in u]
    if not all(np.all((number >= 0) & (number <= 1)) for number in uniform):
        raise ValueError(f"u must be in [0, 1], got {uniform[0]}.")
    return list(np.broadcast_arrays(k.astype(np.int64), n, alpha, *uniform))


def _check_tail(tail: Array, informative: NDArray[np.bool_], alpha: Array) -> None:
    if not np.all((tail <= alpha) | ~informative):
        raise RuntimeError(f"A quantile at alpha = {alpha} is not accurate enough; use a larger alpha.")
