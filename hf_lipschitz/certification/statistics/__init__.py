"""Confidence bounds on a probability or a mean. `alpha` is the one-sided error everywhere."""

from hf_lipschitz.certification.statistics.betting import bet_from_moments, betting_lower, betting_upper, pilot_bet
from hf_lipschitz.certification.statistics.binomial import (
    QUANTILE_MARGIN,
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    randomized_clopper_pearson_upper,
)
from hf_lipschitz.certification.statistics.bounded import (
    SUM_TOLERANCE,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
    hoeffding_lower,
    hoeffding_upper,
    subgaussian_lower,
    subgaussian_upper,
)
from hf_lipschitz.certification.statistics.histogram import (
    NUM_SCORE_BINS,
    SCORE_WEIGHT,
    bin_ends,
    interpolated_histogram,
    interpolation_weights,
    score_bins,
)


__all__ = [
    # probabilities
    "QUANTILE_MARGIN",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "randomized_clopper_pearson_lower",
    "randomized_clopper_pearson_upper",
    # means of bounded variables, at one fixed n
    "SUM_TOLERANCE",
    "empirical_bernstein_lower",
    "empirical_bernstein_upper",
    "hoeffding_lower",
    "hoeffding_upper",
    "subgaussian_lower",
    "subgaussian_upper",
    # means of bounded variables, at all n together
    "bet_from_moments",
    "betting_lower",
    "betting_upper",
    "pilot_bet",
    # histograms of scores
    "NUM_SCORE_BINS",
    "SCORE_WEIGHT",
    "bin_ends",
    "interpolated_histogram",
    "interpolation_weights",
    "score_bins",
]
