"""Certificates by randomised smoothing: pure torch, numpy and scipy."""

from hf_lipschitz.certification import procedures as _procedures  # noqa: F401  registers the certificates
from hf_lipschitz.certification.certificate import ABSTAIN, Certificate, certified_accuracy
from hf_lipschitz.certification.checkpoint import CheckpointFile
from hf_lipschitz.certification.configuration import SmoothingConfig
from hf_lipschitz.certification.exports import columns_of, ecdf, write_csv
from hf_lipschitz.certification.methods import Bounds, Choice, Method, Setting, register_certificate
from hf_lipschitz.certification.noise import NOISE_BLOCK, Noise, NoiseKey, Stage, gaussian_noise_block, register_noise
from hf_lipschitz.certification.processes import ONE_PROCESS, Checkpoints, Processes
from hf_lipschitz.certification.radius import laplace_radius, smoothing_radius, uniform_radius
from hf_lipschitz.certification.results import Results, ResultsWriter, read_results
from hf_lipschitz.certification.simplex_choice import calibrate_simplex_map
from hf_lipschitz.certification.smoothed import SmoothedClassifier
from hf_lipschitz.certification.statistics import (
    betting_lower,
    betting_upper,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_lower,
    empirical_bernstein_upper,
)
from hf_lipschitz.certification.windows import WindowOfInputs, windows_of


__all__ = [
    # certifying
    "ABSTAIN",
    "Certificate",
    "SmoothedClassifier",
    "SmoothingConfig",
    "calibrate_simplex_map",
    "certified_accuracy",
    # results on disk
    "CheckpointFile",
    "Results",
    "ResultsWriter",
    "columns_of",
    "ecdf",
    "read_results",
    "write_csv",
    # many inputs, many processes
    "ONE_PROCESS",
    "Checkpoints",
    "Processes",
    "WindowOfInputs",
    "windows_of",
    # certificates of one's own
    "Bounds",
    "Choice",
    "Method",
    "Setting",
    "register_certificate",
    # noise
    "NOISE_BLOCK",
    "Noise",
    "NoiseKey",
    "Stage",
    "gaussian_noise_block",
    "register_noise",
    # statistics
    "betting_lower",
    "betting_upper",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "empirical_bernstein_lower",
    "empirical_bernstein_upper",
    "laplace_radius",
    "smoothing_radius",
    "uniform_radius",
]
