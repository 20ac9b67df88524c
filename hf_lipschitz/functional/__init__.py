"""The mathematics: tensors in, tensors out."""

from hf_lipschitz.functional.conv import conv_spectral_norm_bound
from hf_lipschitz.functional.gram import spectral_norm_bound
from hf_lipschitz.functional.schatten import gram_norm


__all__ = ["conv_spectral_norm_bound", "gram_norm", "spectral_norm_bound"]
