"""Lipschitz constraints, training and certificates for Hugging Face models."""

from hf_lipschitz.bounds import LipschitzBound
from hf_lipschitz.calibration import calibrate
from hf_lipschitz.certification import (
    ABSTAIN,
    Certificate,
    SmoothedClassifier,
    SmoothingConfig,
    calibrate_simplex_map,
    certified_accuracy,
)
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import lipschitzify, materialized, merge
from hf_lipschitz.deterministic import certify_deterministic
from hf_lipschitz.integrations.denoisers import DenoisedClassifier, OneStepDiffusionDenoiser
from hf_lipschitz.integrations.lora import LipschitzLoraConfig, lipschitz_lora_config
from hf_lipschitz.integrations.registration import register
from hf_lipschitz.methods import register_method
from hf_lipschitz.model_bounds import lipschitz_bound, verify_lipschitz
from hf_lipschitz.pipelines import CertifiedClassificationPipeline
from hf_lipschitz.report import LipschitzReport, inspect  # noqa: F401  not in __all__: the name of a stdlib module
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments, ModelCardCallback
from hf_lipschitz.version import __version__


__all__ = [
    # constrain
    "LipschitzConfig",
    "LipschitzLoraConfig",
    "LipschitzReport",
    "calibrate",
    "lipschitz_lora_config",
    "lipschitzify",
    "materialized",
    "merge",
    "register_method",
    # bound
    "LipschitzBound",
    "lipschitz_bound",
    "verify_lipschitz",
    # train
    "LipschitzTrainer",
    "LipschitzTrainingArguments",
    "ModelCardCallback",
    # certify
    "ABSTAIN",
    "Certificate",
    "CertifiedClassificationPipeline",
    "DenoisedClassifier",
    "OneStepDiffusionDenoiser",
    "SmoothedClassifier",
    "SmoothingConfig",
    "calibrate_simplex_map",
    "certified_accuracy",
    "certify_deterministic",
    # package
    "__version__",
]

register()
