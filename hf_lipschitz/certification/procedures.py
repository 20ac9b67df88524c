"""Fixed-n certification procedures: how samples are spent and which bounds they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_lipschitz.certification.certificate import ABSTAIN
from hf_lipschitz.certification.noise import Stage
from hf_lipschitz.certification.radius import smoothing_radius
from hf_lipschitz.certification.sampling import NoisySampler
from hf_lipschitz.certification.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
)
from hf_lipschitz.configuration import CERTIFICATES, SmoothingConfig


RUNNER_UP_SHARE = 0.1
FIXED_N = "fixed_n"


@dataclass(frozen=True)
class Decision:
    """
    Outcome of a procedure. `radius` is 0 exactly when `prediction` is `ABSTAIN`; `p_lower` and `p_upper` bound the
    scores of the candidate class and of every other one, also on abstention.
    """

    prediction: int
    radius: float
    p_lower: float
    p_upper: float | None
    n: int
    stop_reason: str


Procedure = Callable[[NoisySampler, SmoothingConfig], Decision]
Predictor = Callable[[NoisySampler, SmoothingConfig], int]

PROCEDURES: dict[str, Procedure] = {}
PREDICTORS: dict[str, Predictor] = {}


def register_certificate(name: str, predictor: Predictor | None = None) -> Callable[[Procedure], Procedure]:
    """
    Decorator that makes `SmoothingConfig(certificate=name)` use the decorated procedure.

    Args:
        name (`str`):
            A name that is not taken yet.
        predictor (`Callable[[NoisySampler, SmoothingConfig], int]`, *optional*):
            Used by `SmoothedClassifier.predict`. Without it, `predict` returns the procedure's own prediction.

    Raises:
        `ValueError`: the name is taken.
    """
    if name in PROCEDURES:
        raise ValueError(f"The certificate {name!r} is already registered; choose another name.")

    def register(procedure: Procedure) -> Procedure:
        PROCEDURES[name] = procedure
        PREDICTORS[name] = predictor or (lambda sampler, config: procedure(sampler, config).prediction)
        if name not in CERTIFICATES:
            CERTIFICATES.append(name)
        return procedure

    return register


def predict_by_votes(sampler: NoisySampler, config: SmoothingConfig) -> int:
    r"""
    PREDICT of Cohen et al. 2019 (arXiv:1902.02918): the class with most votes among `n` samples, or `ABSTAIN` unless
    a two-sided binomial test tells it from the second at `alpha` (Hung and Fithian 2019). The class returned is not
    the smoothed classifier's with probability at most `alpha`.
    """
    counts = sampler.votes(Stage.PREDICTION, config.n).counts
    second, first = np.argsort(counts, kind="stable")[-2:]
    top, runner_up = int(counts[first]), int(counts[second])
    test = stats.binomtest(top, top + runner_up, 0.5, alternative="two-sided")
    return int(first) if test.pvalue <= config.alpha else ABSTAIN


@register_certificate("one_class", predict_by_votes)
def one_class(sampler: NoisySampler, config: SmoothingConfig) -> Decision:
    r"""
    CERTIFY of Cohen et al. 2019 (arXiv:1902.02918): the class is chosen on `n0` votes, \\(\underline{p_A}\\) is the
    Clopper-Pearson lower bound at `alpha` on `n` others, the radius \\(\sigma \Phi^{-1}(\underline{p_A})\\). Sound
    with probability at least 1 - `alpha`.
    """
    candidate = int(sampler.votes(Stage.SELECTION, config.n0).counts.argmax())
    votes = sampler.votes(Stage.ESTIMATION, config.n)
    p_lower = clopper_pearson_lower(int(votes.counts[candidate]), votes.n, config.alpha)
    return _decide(candidate, p_lower, None, votes.n, config.sigma)


@register_certificate("two_class", predict_by_votes)
def two_class(sampler: NoisySampler, config: SmoothingConfig) -> Decision:
    r"""
    Two-class certificate on votes: the class is chosen on `n0` votes; on `n` others, \\(\underline{p_A}\\) is its
    Clopper-Pearson lower bound at 0.9 `alpha`, and \\(\overline{p_B} = \min(\max_{j \ne A} \overline{p_j}, 1 -
    \underline{p_A})\\) with each upper bound at 0.1 `alpha` / (K - 1). For K = 2 all of `alpha` goes to
    \\(\underline{p_A}\\). The radius is \\(\frac{\sigma}{2} (\Phi^{-1}(\underline{p_A}) -
    \Phi^{-1}(\overline{p_B}))\\) (Cohen et al. 2019, Theorem 1). Sound with probability at least 1 - `alpha`, by the
    union bound over the K bounds.
    """
    candidate = int(sampler.votes(Stage.SELECTION, config.n0).counts.argmax())
    votes = sampler.votes(Stage.ESTIMATION, config.n)
    p_lower, p_upper = _split_bounds(
        lambda alpha: clopper_pearson_lower(int(votes.counts[candidate]), votes.n, alpha),
        lambda alpha: clopper_pearson_upper(np.delete(votes.counts, candidate), votes.n, alpha),
        len(votes.counts),
        config.alpha,
    )
    return _decide(candidate, p_lower, p_upper, votes.n, config.sigma)


@register_certificate("lvm")
def lvm(sampler: NoisySampler, config: SmoothingConfig) -> Decision:
    r"""
    Certificate on scores (Delattre et al. 2024, LVM-RS, arXiv:2309.16883), with its simplex map and temperature fixed
    in the configuration: choosing them per input, as its authors' code does, is not sound. The class is chosen on the
    mean scores of `n0` samples; on `n` others the means are bounded by empirical Bernstein (Maurer and Pontil 2009),
    with `alpha` split as in [`two_class`]. Sound with probability at least 1 - `alpha`. `predict` returns the same
    class, and abstains where the lower bound is not above every other class's upper bound.
    """
    candidate = int(sampler.scores(Stage.SELECTION, config.n0).sums.argmax())
    scores = sampler.scores(Stage.ESTIMATION, config.n)
    others = np.delete(scores.sums, candidate), np.delete(scores.sums_of_squares, candidate)
    p_lower, p_upper = _split_bounds(
        lambda alpha: empirical_bernstein_lower(
            scores.sums[candidate], scores.sums_of_squares[candidate], scores.n, alpha
        ),
        lambda alpha: empirical_bernstein_upper(*others, scores.n, alpha),
        len(scores.sums),
        config.alpha,
    )
    return _decide(candidate, p_lower, p_upper, scores.n, config.sigma)


def _split_bounds(
    lower: Callable[[float], float],
    uppers: Callable[[float], NDArray[np.float64]],
    num_classes: int,
    alpha: float,
) -> tuple[float, float]:
    if num_classes == 2:
        p_lower = lower(alpha)
        return p_lower, _one_minus(p_lower)
    p_lower = lower((1 - RUNNER_UP_SHARE) * alpha)
    runner_up = float(uppers(RUNNER_UP_SHARE * alpha / (num_classes - 1)).max())
    return p_lower, min(runner_up, _one_minus(p_lower))


def _one_minus(p_lower: float) -> float:
    return min(float(np.nextafter(1 - p_lower, 2)), 1.0)


def _decide(candidate: int, p_lower: float, p_upper: float | None, n: int, sigma: float) -> Decision:
    radius = smoothing_radius(p_lower, p_upper, sigma)
    return Decision(candidate if radius > 0 else ABSTAIN, radius, p_lower, p_upper, n, FIXED_N)
