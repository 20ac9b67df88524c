"""The mathematics: tensors in, tensors out."""

from hf_lipschitz.functional.attention import attention_bound_on_ball, ball_attention_bound
from hf_lipschitz.functional.conv import conv_spectral_norm_bound
from hf_lipschitz.functional.rescaling import rescale_rows, spectral_rescaling
from hf_lipschitz.functional.rescaling_conv import conv_spectral_rescaling
from hf_lipschitz.functional.schatten import gram_norm
from hf_lipschitz.functional.spectral_norm import spectral_norm_bound


__all__ = [
    "attention_bound_on_ball",
    "ball_attention_bound",
    "conv_spectral_norm_bound",
    "conv_spectral_rescaling",
    "gram_norm",
    "rescale_rows",
    "spectral_norm_bound",
    "spectral_rescaling",
]
