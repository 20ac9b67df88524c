"""Confidence bounds on the mean of variables in [0, 1] by betting. `alpha` is the one-sided error everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lipschitz.certification.statistics.checks import checked_alpha, checked_trials, float_if_scalar


DEFAULT_CAP = 0.99
STEPS = 60
STEP_TOLERANCE = 2.0**-44
LEAST_BOUND = 2.0**-60
BLOCK_SIZE = 2**17
EPS = float(np.finfo(np.float64).eps)
# What the pilot samples are taken to have missed: so much squared deviation, and zeros at so low a frequency.
PRIOR_DEVIATION = 0.05
PRIOR_ZEROS = 0.1
LEAST_STAKE = 0.7

Array = NDArray[np.float64]


def betting_lower(
    values: ArrayLike, alpha: ArrayLike, bet: ArrayLike, *, counts: ArrayLike | None = None, cap: float = DEFAULT_CAP
) -> float | Array:
    r"""
    Lower confidence bound on the mean of independent variables in [0, 1] by betting (Waudby-Smith and Ramdas 2024,
    arXiv:2010.09686, Theorem 3, with one bet for all samples): the largest m whose capital reaches 1/α,

    $$\sup\{m : W(m) \ge 1/\alpha\}, \qquad W(m) = \prod_i (1 + \lambda(m) (X_i - m)), \qquad
    \lambda(m) = \min(\lambda_0, c/m),$$

    and 0 where there is none.

    Sound: the bound exceeds the true mean μ with probability at most `alpha`, provided λ₀ and c do not depend on the
    samples. At m = μ the factors are nonnegative (each is at least 1 - λ(m) m ≥ 1 - c) and of mean 1, so W(μ) is a
    nonnegative martingale, and by Ville's inequality it reaches 1/α at ANY number of samples with probability at most
    `alpha`. The bound may therefore be looked at after every sample, and its running maximum is a bound at the same
    `alpha`. It follows for the largest rejected m because W decreases: a factor is 1 - λ₀ m + λ₀ X_i where m ≤ c/λ₀,
    with derivative -λ₀, and 1 - c + c X_i / m beyond, with derivative -c X_i / m²; neither is positive, the two pieces
    agree at m = c/λ₀, and a product of positive non-increasing factors does not increase. Without the truncation c/m
    factors can be negative, and the bound wrong half of the time.

    The m that is returned has itself been rejected: ln W(m), computed in float64, exceeds ln(1/α) by an allowance of
    eps (V + 8 + 4/(1-c)) (Σ|terms| + ln(1/α)) for V values, which is more than the rounding of the terms and of their
    sum. It is below the supremum by no more than this allowance and 1e-13 of itself need.

    Args:
        values (array of shape `(V,)`):
            The samples, or the bins of a histogram of them; rounded down if they are rounded.
        alpha (`float` or array of `float`):
            One-sided error of each bound, in (0, 0.5].
        bet (`float` or array of `float`):
            λ₀, at least 0, fixed before the samples are drawn; see [`pilot_bet`].
        counts (array of shape `(..., V)`, *optional*, defaults to once each):
            How often each value occurred: integers, or an [`interpolated_histogram`] over `SCORE_WEIGHT`.
        cap (`float`, *optional*, defaults to 0.99):
            c, in (0, 1), fixed before the samples are drawn.

    Returns:
        `float`, or an array of the shape to which `counts.shape[:-1]`, `alpha` and `bet` broadcast, in [0, 1).

    Raises:
        `ValueError`: an argument is out of range, or a row of `counts` holds less than one sample.
    """
    values, counts = _checked_samples(values, counts)
    return float_if_scalar(_largest_rejected(values, counts, alpha, bet, cap))


def betting_upper(
    values: ArrayLike, alpha: ArrayLike, bet: ArrayLike, *, counts: ArrayLike | None = None, cap: float = DEFAULT_CAP
) -> float | Array:
    r"""
    Upper confidence bound on the mean by betting: one less [`betting_lower`] of \\(1 - X_i\\), with a bet of its own.
    Sound, at all numbers of samples together, and rounded up. `values` are to be rounded up if they are rounded;
    conditions, arguments and errors are those of [`betting_lower`].

    Returns:
        `float`, or an array of the shape to which `counts.shape[:-1]`, `alpha` and `bet` broadcast, in (0, 1].
    """
    values, counts = _checked_samples(values, counts)
    lower = _largest_rejected(_complement(values), counts, alpha, bet, cap)
    return float_if_scalar(np.minimum(np.nextafter(1 - lower, 2), 1.0))


def pilot_bet(values: ArrayLike, counts: ArrayLike | None, alpha: ArrayLike, n: ArrayLike) -> float | Array:
    r"""
    λ₀ for the [`betting_lower`] bound of `n` samples, tuned on n₀ pilot samples that are not among them. For
    [`betting_upper`] pass the pilot's `1 - values`. See [`bet_from_moments`] for the rule.

    Args:
        values (array of shape `(V,)`):
            The pilot samples, or the bins of a histogram of them.
        counts (array of shape `(..., V)`, *optional*):
            How often each value occurred; `None` is once each. There may be no samples at all.
        alpha (`float` or array of `float`):
            The error of the bound, in (0, 0.5].
        n (`int` or array of `int`):
            Samples the bound is to be computed from.

    Returns:
        `float`, or an array of the shape to which `counts.shape[:-1]`, `alpha` and `n` broadcast; finite and positive.

    Raises:
        `ValueError`: an argument is out of range.
    """
    values, counts = _checked_samples(values, counts, least=0)
    return bet_from_moments(counts @ values, counts @ np.square(values), counts.sum(axis=-1), alpha, n)


def bet_from_moments(
    sums: ArrayLike, sums_of_squares: ArrayLike, n0: ArrayLike, alpha: ArrayLike, n: ArrayLike
) -> float | Array:
    r"""
    λ₀ from the sum and the sum of squares of `n0` pilot samples. With their mean \\(\bar X\\),

    $$\lambda_0 = \min\left(\sqrt{\frac{2 \ln(1/\alpha)}{n \hat V}}, \frac{q}{\bar X}\right), \quad
    \hat V = \frac{1/20 + \sum (X_i - \bar X)^2}{n_0 + 1}, \quad q = \max(0.7, 1 - \alpha^{10 (n_0 + 1)/n}).$$

    The root maximises the expected log capital near the bound to second order; it is the bet of Waudby-Smith and
    Ramdas 2024 (arXiv:2010.09686, Section 4) for one n, with 1/20 where they have 1/4. The second term keeps samples
    near 0, which a short pilot can miss, from ruining the capital: one costs about ln(1 - q), and
    n / (10 (n₀ + 1)) of them no more than ln α, unless q is 0.7. Any λ₀ ≥ 0 is sound. On 23 beta, Bernoulli and mixed
    distributions with n₀ = 100, n from 100 to 100 000 and α = 0.001, the distance from the mean to the bound is 1.13
    times that of the best fixed bet on average and 2.1 times at worst; with 1/4 and without the second term it is
    1.20 and 4.2 times.

    Args:
        sums (`float` or array), sums_of_squares (`float` or array), n0 (`int` or array):
            Of the pilot; for an upper bound those of one less each sample.
        alpha (`float` or array of `float`):
            The error of the bound, in (0, 0.5].
        n (`int` or array of `int`):
            Samples the bound is to be computed from.

    Returns:
        `float`, or an array of the shape to which the arguments broadcast; finite and positive.

    Raises:
        `ValueError`: an argument is out of range, or no samples in [0, 1] have these sums.
    """
    alpha, n = checked_alpha(alpha), checked_trials(n)
    sums, squares, n0 = (np.asarray(moment, dtype=np.float64) for moment in (sums, sums_of_squares, n0))
    slack = 1e-6 * (1 + n0)
    possible = (n0 >= 0) & (sums >= 0) & (sums <= n0 + slack) & (squares >= 0) & (squares <= sums + slack)
    if not possible.all():
        raise ValueError(f"No {n0} samples in [0, 1] have the sums {sums} and the sums of squares {squares}.")
    mean = sums / np.maximum(n0, 1)
    variance = (PRIOR_DEVIATION + np.maximum(squares - sums * mean, 0.0)) / (n0 + 1)
    stake = np.maximum(LEAST_STAKE, -np.expm1(np.log(alpha) * (n0 + 1) / (PRIOR_ZEROS * n)))
    bet = np.sqrt(-2 * np.log(alpha) / (n * variance))
    return float_if_scalar(np.where(bet * mean > stake, stake / np.where(mean > 0, mean, 1.0), bet))


def _largest_rejected(values: Array, counts: Array, alpha: ArrayLike, bet: ArrayLike, cap: float) -> Array:
    alpha, bet = checked_alpha(alpha), np.asarray(bet, dtype=np.float64)
    if not np.all((bet >= 0) & (bet < np.inf)):
        raise ValueError(f"bet must be finite and at least 0, got {bet}.")
    if not (0 < cap < 1):
        raise ValueError(f"cap must be in (0, 1), got {cap}.")
    shape = np.broadcast_shapes(counts.shape[:-1], alpha.shape, bet.shape)
    goals, bets = (np.broadcast_to(part, shape).reshape(-1) for part in (-np.log(alpha), bet))
    counts = np.broadcast_to(counts, (*shape, len(values)))
    counts = counts.reshape(len(goals), len(values))
    bounds = np.empty(len(goals))
    rows_at_once = max(1, BLOCK_SIZE // len(values))
    for start in range(0, len(goals), rows_at_once):
        rows = slice(start, start + rows_at_once)
        bounds[rows] = _solve(values, counts[rows], goals[rows], bets[rows], cap)
    return bounds.reshape(shape)


def _solve(values: Array, counts: Array, goals: Array, bets: Array, cap: float) -> Array:
    """
    One row a bound, by Newton's method inside a bracket whose lower end is rejected, or 0. A step aims short of the
    root by a tolerance, so that the last point is rejected as well. It is a bisection instead where it would leave the
    bracket or is more than half of the step before: ln W is concave on one side of c/λ₀ and convex on the other.

    Sums go over all values in one order, so that a row's bound does not depend, bit by bit, on the other rows.
    """
    least = np.full(len(goals), LEAST_BOUND)
    rejects_least = _excess_and_slope(values, counts, goals, bets, least, cap)[0] >= 0
    rejected, accepted = np.where(rejects_least, LEAST_BOUND, 0.0), np.ones(len(goals))
    # No mean above that of the samples is rejected, for ln W(m) ≤ λ(m) Σ(X_i - m).
    points = np.minimum(np.einsum("rv,v->r", counts, values) / counts.sum(axis=-1), 1.0)
    last_steps = np.full(len(goals), np.inf)
    rows = np.flatnonzero(rejects_least)
    for _ in range(STEPS):
        if not len(rows):
            break
        m = points[rows]
        excess, slope = _excess_and_slope(values, counts[rows], goals[rows], bets[rows], m, cap)
        rejects = excess >= 0
        low = np.where(rejects, m, rejected[rows])
        high = np.where(rejects, accepted[rows], m)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = m - excess / slope - STEP_TOLERANCE * m
        steps, allowed = np.abs(newton - m), np.maximum(last_steps[rows] / 2, 8 * STEP_TOLERANCE * m)
        trusted = (newton > low) & (newton < high) & (steps <= allowed)
        points[rows] = np.where(trusted, newton, low + (high - low) / 2)
        last_steps[rows] = np.where(trusted, steps, high - low)
        rejected[rows], accepted[rows] = low, high
        rows = rows[~(rejects & (newton <= m * (1 + STEP_TOLERANCE)) | (high - low <= STEP_TOLERANCE * high))]
    return rejected


def _excess_and_slope(
    values: Array, counts: Array, goals: Array, bets: Array, m: Array, cap: float
) -> tuple[Array, Array]:
    """ln W(m) - ln(1/α) less the allowance for rounding, and the derivative of ln W."""
    fractions = np.minimum(bets, cap / m)
    gains = fractions[:, None] * (values - m[:, None])
    logs = np.log1p(gains)
    allowance = EPS * (len(values) + 8 + 4 / (1 - cap)) * (np.einsum("rv,rv->r", counts, np.abs(logs)) + goals)
    shares = counts / (1 + gains)
    truncated = bets * m > cap
    slope = -fractions * np.where(truncated, np.einsum("rv,v->r", shares, values) / m, shares.sum(axis=-1))
    return np.einsum("rv,rv->r", counts, logs) - goals - allowance, slope


def _complement(values: Array) -> Array:
    """1 - values, rounded down."""
    rest = 1 - values
    return np.where(1 - rest < values, np.nextafter(rest, 0), rest)


def _checked_samples(values: ArrayLike, counts: ArrayLike | None, least: int = 1) -> tuple[Array, Array]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"values must be one-dimensional and in [0, 1], got {values}.")
    counts = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=np.float64)
    if counts.shape[-1:] != values.shape:
        raise ValueError(f"counts must have a last axis of {len(values)} values, got shape {counts.shape}.")
    if not np.all((counts >= 0) & (counts < np.inf)):
        raise ValueError("counts must be finite and not negative.")
    if not np.all(counts.sum(axis=-1) >= least):
        raise ValueError("n, the sum of the counts, must be at least 1 in each row.")
    return values, counts
