"""Certificates by randomised smoothing: pure torch, numpy and scipy."""

from hf_lipschitz.certification.certificate import ABSTAIN, Certificate, certified_accuracy
from hf_lipschitz.certification.noise import NOISE_BLOCK, Stage, gaussian_noise_block
from hf_lipschitz.certification.procedures import Decision, register_certificate
from hf_lipschitz.certification.radius import smoothing_radius
from hf_lipschitz.certification.results import Results, ResultsWriter, read_results
from hf_lipschitz.certification.sampling import NoisySampler, ScoreStatistics, VoteStatistics
from hf_lipschitz.certification.smoothed import SmoothedClassifier
from hf_lipschitz.certification.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
)


__all__ = [
    # certifying
    "ABSTAIN",
    "Certificate",
    "SmoothedClassifier",
    "certified_accuracy",
    # results on disk
    "Results",
    "ResultsWriter",
    "read_results",
    # procedures
    "Decision",
    "register_certificate",
    # samples
    "NOISE_BLOCK",
    "NoisySampler",
    "ScoreStatistics",
    "Stage",
    "VoteStatistics",
    "gaussian_noise_block",
    # statistics
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "empirical_bernstein_lower",
    "empirical_bernstein_upper",
    "smoothing_radius",
]
