"""The certificates that come with the library: what each chooses on the selection samples, and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lipschitz.certification.methods import Bounds, Choice, Floats, Integers, Method, Setting, register_certificate
from hf_lipschitz.certification.sampling import SCORE_UNIT
from hf_lipschitz.certification.statistics import (
    SCORE_WEIGHT,
    bet_from_moments,
    betting_lower,
    betting_upper,
    bin_ends,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
    subgaussian_lower,
    subgaussian_upper,
)


RUNNER_UP_SHARE = 0.1
# Of a certificate on scores: classes that have a bound of their own. All the others have one together.
MOST_GROUPS = 16


def most_votes(counts: Integers, setting: Setting) -> Choice:
    """The class with most votes; the first of several."""
    return Choice(counts.argmax(axis=1))


def one_class_bounds(counts: Integers, n: int, choice: Choice, alpha: float, setting: Setting) -> Bounds:
    r"""
    CERTIFY of Cohen et al. 2019 (arXiv:1902.02918): the class is chosen on `n0` votes, \\(\underline{p_A}\\) is the
    Clopper-Pearson lower bound at `alpha` on `n` others, the radius \\(\sigma \Phi^{-1}(\underline{p_A})\\). Sound
    with probability at least 1 - `alpha`.
    """
    return Bounds(clopper_pearson_lower(_of_candidates(counts, choice), n, alpha), None)


def two_class_bounds(counts: Integers, n: int, choice: Choice, alpha: float, setting: Setting) -> Bounds:
    r"""
    Two-class certificate on votes: the class is chosen on `n0` votes; on `n` others, \\(\underline{p_A}\\) is its
    Clopper-Pearson lower bound at 0.9 `alpha`, and \\(\overline{p_B} = \min(\max_{j \ne A} \overline{p_j}, 1 -
    \underline{p_A})\\) with each upper bound at 0.1 `alpha` / (K - 1). For K = 2 all of `alpha` goes to
    \\(\underline{p_A}\\). The radius is \\(\frac{\sigma}{2} (\Phi^{-1}(\underline{p_A}) -
    \Phi^{-1}(\overline{p_B}))\\) (Cohen et al. 2019, Theorem 1). Sound with probability at least 1 - `alpha`, by the
    union bound over the K bounds.
    """
    votes = _of_candidates(counts, choice)
    others = counts.copy()
    others[np.arange(len(counts)), choice.candidates] = 0
    # The bound grows with the count, so the largest count has the largest bound.
    return _split(
        lambda alpha: clopper_pearson_lower(votes, n, alpha),
        lambda alpha: clopper_pearson_upper(others.max(axis=1), n, alpha),
        counts.shape[1] - 1,
        alpha,
    )


def partition(counts: Integers, setting: Setting) -> Choice:
    r"""
    The classes other than the candidate in as few groups as have no more votes than the runner-up each: the largest
    first, each into the fullest group that has room for it. Classes without votes join the emptiest one.
    """
    candidates = counts.argmax(axis=1)
    groups = np.stack([_partition(row, candidate) for row, candidate in zip(counts, candidates, strict=True)])
    return Choice(candidates, groups)


def class_partition_bounds(counts: Integers, n: int, choice: Choice, alpha: float, setting: Setting) -> Bounds:
    r"""
    Class-partitioning method (CPM; Delattre et al. 2025): as the two-class certificate, with the other classes in
    groups that were chosen on the selection samples. A group's votes bound those of each of its classes, and 0.1
    `alpha` is shared by the groups, which are fewer. Sound with probability at least 1 - `alpha`.
    """
    votes = _of_candidates(counts, choice)
    in_groups = _in_groups(counts, choice.groups, choice.num_groups)
    num_others = choice.groups.max(axis=1)
    return _split(
        lambda alpha: clopper_pearson_lower(votes, n, alpha),
        lambda alpha: clopper_pearson_upper(in_groups[:, 1:].max(axis=1), n, alpha),
        num_others,
        alpha,
    )


def largest_score(counts: Integers, setting: Setting) -> Choice:
    """The class with the largest mean score; the next ones in groups of their own, the rest in one; and their bets."""
    sums, squares = counts[:, 0], counts[:, 1]
    order = np.argsort(-sums, axis=1, kind="stable")
    num_classes = setting.num_classes
    num_groups = min(num_classes, MOST_GROUPS)
    groups = np.empty_like(sums)
    np.put_along_axis(groups, order, np.minimum(np.arange(num_classes), num_groups - 1)[None], axis=1)
    sums, squares = (_in_groups(part * SCORE_UNIT, groups, num_groups) for part in (sums, squares))
    if num_classes > num_groups:
        # The square of a sum of scores is not known; it is at most the sum, as scores and their sums are below 1.
        squares[:, -1] = sums[:, -1]
    return Choice(order[:, 0], groups, _bets(sums, squares, setting))


def score_bounds(counts: Integers, n: int, choice: Choice, alpha: float, setting: Setting) -> Bounds:
    r"""
    Certificate on scores (Delattre et al. 2024, LVM-RS, arXiv:2309.16883), with its simplex map and temperature fixed
    in the configuration: choosing them per input, as its authors' code does, is not sound. The class is chosen on the
    mean scores of `n0` samples; on `n` others the means are bounded by `mean_bound`, with `alpha` split as in the
    two-class certificate over the 14 classes that come next on the selection samples and the sum of the rest. Sound
    with probability at least 1 - `alpha`.
    """
    below, above = bin_ends()
    weights = counts / SCORE_WEIGHT
    lower, upper = MEAN_BOUNDS[setting.config.mean_bound]
    return _split(
        lambda alpha: lower(_Sample(below, weights[:, 0], n, choice.bets[:, 0]), alpha, setting),
        lambda alpha: upper(_Sample(above, weights[:, 1:], n, choice.bets[:, 1:]), alpha[..., None], setting).max(
            axis=1
        ),
        choice.num_groups - 1,
        alpha,
    )


class _Sample(NamedTuple):
    """Scores as values and how often each occurred, `(..., V)`; n of them, and the bets."""

    values: Floats
    counts: Floats
    n: int
    bets: Floats

    @property
    def sums(self) -> Floats:
        return np.einsum("...v,v->...", self.counts, self.values)

    @property
    def sums_of_squares(self) -> Floats:
        return np.einsum("...v,v->...", self.counts, np.square(self.values))


_MeanBound = Callable[[_Sample, Floats, Setting], Floats]

MEAN_BOUNDS: dict[str, tuple[_MeanBound, _MeanBound]] = {
    "betting": (
        lambda s, alpha, setting: betting_lower(s.values, alpha, s.bets, counts=s.counts),
        lambda s, alpha, setting: betting_upper(s.values, alpha, s.bets, counts=s.counts),
    ),
    "bernstein": (
        lambda s, alpha, setting: empirical_bernstein_lower(s.sums, s.sums_of_squares, s.n, alpha),
        lambda s, alpha, setting: empirical_bernstein_upper(s.sums, s.sums_of_squares, s.n, alpha),
    ),
    "hoeffding": (
        lambda s, alpha, setting: hoeffding_lower(s.sums, s.n, alpha),
        lambda s, alpha, setting: hoeffding_upper(s.sums, s.n, alpha),
    ),
    "subgaussian": (
        lambda s, alpha, setting: subgaussian_lower(s.sums, s.n, alpha, **_of_noise(setting)),
        lambda s, alpha, setting: subgaussian_upper(s.sums, s.n, alpha, **_of_noise(setting)),
    ),
}


def _of_noise(setting: Setting) -> dict[str, float]:
    return {"lipschitz": setting.score_lipschitz, "sigma": setting.config.sigma}


def _bets(sums: Floats, squares: Floats, setting: Setting) -> Floats:
    """For the lower bound of group 0 and the upper bounds of the others, at the errors that they will have."""
    n0, num_others = setting.config.n0, sums.shape[1] - 1
    alphas = np.full(1 + num_others, _share_of_others(num_others, setting.config.alpha))
    alphas[0] = _share_of_candidate(num_others, setting.config.alpha)
    sums_from_above, squares_from_above = n0 - sums, n0 - 2 * sums + squares
    sums = np.concatenate([sums[:, :1], sums_from_above[:, 1:]], axis=1).clip(0, n0)
    squares = np.concatenate([squares[:, :1], squares_from_above[:, 1:]], axis=1).clip(0, sums)
    return bet_from_moments(sums, squares, n0, alphas, setting.config.n)


def _in_groups(values: NDArray, groups: Integers, num_groups: int) -> NDArray:
    found = np.zeros((len(values), num_groups), dtype=values.dtype)
    np.add.at(found, (np.arange(len(values))[:, None], groups), values)
    return found


def _of_candidates(counts: Integers, choice: Choice) -> Integers:
    return counts[np.arange(len(counts)), choice.candidates]


def _split(
    lower: Callable[[Floats], Floats], upper: Callable[[Floats], Floats], num_others: ArrayLike, alpha: float
) -> Bounds:
    """
    All of `alpha` for the candidate where one group holds all the others, whose score is at most what it leaves;
    otherwise a tenth of it is shared by the groups.
    """
    num_others = np.asarray(num_others)
    p_lower = lower(_share_of_candidate(num_others, alpha))
    p_upper = np.minimum(np.nextafter(1 - p_lower, 2), 1.0)
    if (num_others > 1).any():
        runner_up = upper(_share_of_others(num_others, alpha))
        p_upper = np.where(num_others > 1, np.minimum(runner_up, p_upper), p_upper)
    return Bounds(p_lower, p_upper)


def _share_of_candidate(num_others: ArrayLike, alpha: float) -> Floats:
    return np.where(np.asarray(num_others) > 1, (1 - RUNNER_UP_SHARE) * alpha, alpha)


def _share_of_others(num_others: ArrayLike, alpha: float) -> Floats:
    return RUNNER_UP_SHARE * alpha / np.maximum(num_others, 1)


def _partition(counts: Integers, candidate: int) -> Integers:
    """Groups of one input's classes."""
    groups = np.zeros(len(counts), dtype=np.int64)
    others = [k for k in np.argsort(-counts, kind="stable") if k != candidate]
    room = int(counts[others[0]])
    held: list[int] = []
    for k in others:
        fitting = [g for g, votes in enumerate(held) if votes + counts[k] <= room]
        if not fitting:
            held.append(0)
            fitting = [len(held) - 1]
        best = max(fitting, key=lambda g: held[g]) if counts[k] else min(range(len(held)), key=lambda g: held[g])
        held[best] += int(counts[k])
        groups[k] = best + 1
    return groups


def _is_betting(setting: Setting) -> bool:
    return setting.config.mean_bound == "betting"


register_certificate("one_class", Method("votes", most_votes, one_class_bounds))
register_certificate("two_class", Method("votes", most_votes, two_class_bounds))
register_certificate("class_partition", Method("votes", partition, class_partition_bounds))
register_certificate("lvm", Method("scores", largest_score, score_bounds, _is_betting))
register_certificate("lipschitz", Method("scores", largest_score, score_bounds, _is_betting))
