"""Denoised smoothing: a denoiser in front of a classifier that was never trained on noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.fields import check_name, real
from hf_lipschitz.fingerprints import fingerprint
from hf_lipschitz.integrations.base_classifiers import PIXEL_UNIT


# By how much the noise of the chosen timestep may be below that of the input, as a share of it.
LARGEST_GAP = 0.1

# The clean image from the model's input z = a x0 + b eps, its output, a = sqrt(abar) and b = sqrt(1 - abar).
CLEAN_IMAGES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda z, output, a, b: (z - b * output) / a,
    "sample": lambda z, output, a, b: output,
    "v_prediction": lambda z, output, a, b: a * z - b * output,
}


class DenoisedClassifier(nn.Module):
    r"""Logits \\(f(D(x + \delta))\\) of noisy images: a denoiser D, then a classifier f of clean images (denoised
    smoothing, Salman et al. 2020, arXiv:2003.01908).

    It is a base classifier for [`SmoothedClassifier`] like any other. Certificates are about the two together,
    smoothed by noise of exactly the configured sigma, and as sound as without a denoiser: how good or how well matched
    to sigma it is decides how large they are, never whether they hold. It must be a function of each row by itself:
    GroupNorm and LayerNorm are, BatchNorm is in eval mode.

    Args:
        denoiser (`Callable[[Tensor], Tensor]`):
            From float32 images with noise to images of the same shape; [`OneStepDiffusionDenoiser`], or a network
            trained at this sigma. It does its own casts.
        classifier (`Callable[[Tensor], Any]`):
            From images in [0, 1] to logits `(B, K)`, or to an object that has them as `.logits`: [`PixelClassifier`]
            for a transformers model.

    Raises:
        TypeError: one of them is not callable.
        RuntimeError: one of them is a module in train mode.

    Example::

        base = DenoisedClassifier(denoiser, PixelClassifier(model, image_processor))
        smoothed = SmoothedClassifier(base, model.config.num_labels, SmoothingConfig(sigma=0.5), unit=base.unit)
    """

    def __init__(self, denoiser: Callable[[Tensor], Tensor], classifier: Callable[[Tensor], Any]) -> None:
        super().__init__()
        _check_part("denoiser", denoiser)
        _check_part("classifier", classifier)
        self.eval()
        self.denoiser = denoiser
        self.classifier = classifier
        self.unit = getattr(classifier, "unit", PIXEL_UNIT)

    def encode(self, image: Any) -> Tensor:
        """One image to the tensor that noise is added to, as the classifier does it."""
        return self.classifier.encode(image)

    def denoise(self, noisy: Tensor) -> Tensor:
        """What the classifier sees of images `(B, channels, height, width)` in [0, 1] plus noise; the same shape.

        Raises:
            TypeError: the denoiser returns no tensor.
            ValueError: it changes the shape.
            RuntimeError: it returns NaN or infinity.
        """
        denoised = self.denoiser(noisy)
        if not isinstance(denoised, Tensor):
            raise TypeError(
                f"the denoiser must return a tensor of images, got {type(denoised).__name__}; wrap it in a function "
                "that picks them"
            )
        if denoised.shape != noisy.shape:
            raise ValueError(
                f"the denoiser turned images of shape {tuple(noisy.shape)} into {tuple(denoised.shape)}; it must keep "
                "the shape, so resize in the classifier instead"
            )
        _check_finite("denoiser", denoised)
        return denoised.to(noisy.dtype)

    def forward(self, noisy: Tensor) -> Tensor:
        """`(B, channels, height, width)` in [0, 1], noise included, to logits `(B, K)`."""
        output = self.classifier(self.denoise(noisy))
        return getattr(output, "logits", output)


def denoised(denoiser: Callable[[Tensor], Tensor], classifier: nn.Module) -> DenoisedClassifier:
    """A denoiser in front of the base classifier of a pipeline, where its parameters are.

    Raises:
        ValueError: the classifier does not take images.
        TypeError, RuntimeError: as [`DenoisedClassifier`].
    """
    if classifier.unit != PIXEL_UNIT:
        raise ValueError(f"a denoiser is for images, and this model takes {classifier.unit}: leave denoiser out")
    return DenoisedClassifier(denoiser, classifier).to(next(classifier.parameters()).device)


def denoiser_identity(base_classifier: nn.Module) -> str | None:
    """What tells two denoisers apart, by weights and printed form; `None` where there is none.

    A plain function prints with its address, so that results with it are never taken up by another process.
    """
    if not isinstance(base_classifier, DenoisedClassifier):
        return None
    denoiser = base_classifier.denoiser
    weights = fingerprint(denoiser) if isinstance(denoiser, nn.Module) else ""
    return f"{denoiser!r} {weights}".strip()


class OneStepDiffusionDenoiser(nn.Module):
    r"""One step of a diffusion model as a denoiser (Carlini et al. 2023, arXiv:2206.10550).

    The model lives on \\(u = 2x - 1 \in [-1, 1]\\), where the noise is \\(2\sigma\\), and was trained on
    \\(z_t = \sqrt{\bar\alpha_t}\,u + \sqrt{1 - \bar\alpha_t}\,\epsilon\\), whose noise relative to the image is
    \\(s_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}\\). It is asked once, at \\(z = \sqrt{\bar\alpha_t}\,(2(x +
    \delta) - 1)\\) and the largest timestep t with \\(s_t \le 2\sigma\\). The image is

        (z - √(1-ᾱ) out) / √ᾱ   for "epsilon",     out   for "sample",     √ᾱ z - √(1-ᾱ) out   for "v_prediction",

    clipped to [-1, 1] and mapped back to [0, 1].

    **Why soundness does not depend on t.** The input has noise sigma, whatever the schedule offers: t is a constant of
    the base classifier, and a wrong one costs accuracy alone. Downwards, the model takes out no more noise than there
    is, and the classifier sees what little is left. For a Gaussian image of any variance, \\(s_t = (1 - g)\,2\sigma\\)
    adds at most \\((1 - q)^2 / (4q)\\), \\(q = (1 - g)^2\\), of the least mean squared error: 1.1 % at the largest gap
    g = 0.1 that is accepted. Anything further off is refused rather than warned of: most often it is sigma in another
    unit, or the wrong schedule. In the usual 1000 steps, linear or cosine, the gap is below 4 % for sigma from 0.05 to
    5.

    Args:
        unet (`Callable[[Tensor, Tensor], Any]`):
            `unet(sample, timestep)` with images `(B, channels, height, width)` and `B` equal timesteps, int64, as
            diffusers' `UNet2DModel`. It returns a tensor or an object with `.sample`, of as many channels, or of twice
            as many where it has learned its variance: the second half, which is not used. It works on pixels, not
            latents, at the classifier's resolution. A module gets its input in the dtype of its weights.
        scheduler (`Any`):
            With `alphas_cumprod`, ᾱ by timestep, decreasing, and `config.prediction_type`, as diffusers'
            `DDPMScheduler`. It is read once.
        sigma (`float`):
            That of the smoothing, in pixels in [0, 1]. It is kept as `sigma`, and the timestep as `timestep`.

    Raises:
        TypeError: the unet is not callable, `sigma` no number, or the scheduler lacks one of the two.
        ValueError: the schedule does not decrease within [0, 1], `sigma` is out of its range or falls into a gap of
            it, or the prediction type is unknown.
        RuntimeError: the unet is in train mode.

    Example::

        unet, scheduler = UNet2DModel.from_pretrained(name).eval(), DDPMScheduler.from_pretrained(name)
        base = DenoisedClassifier(OneStepDiffusionDenoiser(unet, scheduler, sigma=0.5), classifier)
    """

    def __init__(self, unet: Callable[[Tensor, Tensor], Any], scheduler: Any, sigma: float) -> None:
        super().__init__()
        _check_part("unet", unet)
        alphas = _schedule(scheduler)
        self.eval()
        self.unet = unet
        self.sigma = real("sigma", sigma)
        self.timestep = matching_timestep(alphas, self.sigma)
        self.prediction_type = _prediction_type(scheduler)
        self.signal = math.sqrt(alphas[self.timestep])
        self.noise = math.sqrt(1 - alphas[self.timestep])

    def forward(self, noisy: Tensor) -> Tensor:
        """Images in [0, 1] plus noise, `(B, channels, height, width)`, to images in [0, 1] of the same shape.

        Raises:
            TypeError, ValueError: they are no batch of images, or the unet's output is none that fits them.
            RuntimeError: the unet's output is not finite.
        """
        if noisy.dim() != 4:
            raise ValueError(
                f"a diffusion model denoises images (batch, channels, height, width), got {tuple(noisy.shape)}; "
                "certify an image with its channel axis"
            )
        z = self.signal * (2 * noisy - 1)
        image = CLEAN_IMAGES[self.prediction_type](z, self._output(z), self.signal, self.noise)
        return (image.clamp(-1, 1) + 1) / 2

    def extra_repr(self) -> str:
        """All that it is besides the unet."""
        return (
            f"sigma={self.sigma}, timestep={self.timestep}, signal={self.signal}, "
            f"prediction_type={self.prediction_type!r}"
        )

    def _output(self, z: Tensor) -> Tensor:
        timesteps = torch.full((len(z),), self.timestep, dtype=torch.int64, device=z.device)
        output = self.unet(z.to(_dtype_of(self.unet, z.dtype)), timesteps)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the unet must return a tensor or an object with .sample, got {type(output).__name__}; wrap it in a "
                "function that does"
            )
        channels = z.shape[1]
        if output.shape not in (z.shape, (len(z), 2 * channels, *z.shape[2:])):
            raise ValueError(
                f"the unet turned {tuple(z.shape)} into {tuple(output.shape)}; it must keep the shape, up to twice "
                f"the channels for a learned variance: use a model of images of {channels} channels and this size"
            )
        _check_finite("unet", output)
        return output[:, :channels].to(z.dtype)


def matching_timestep(alphas_cumprod: Tensor, sigma: float) -> int:
    r"""The largest t with \\(\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t} \le 2\sigma\\), as
    [`OneStepDiffusionDenoiser`] needs it.

    Args:
        alphas_cumprod (`Tensor` of shape `(timesteps,)`, float64):
            ᾱ, decreasing within (0, 1].
        sigma (`float`):
            In pixels in [0, 1].

    Raises:
        ValueError: sigma is not positive and finite, or no such noise is within `LARGEST_GAP` of it.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    levels = ((1 - alphas_cumprod) / alphas_cumprod).sqrt() / 2
    step = int(torch.searchsorted(levels, sigma, right=True)) - 1
    if step < 0 or 1 - levels[step] / sigma > LARGEST_GAP:
        # Rounded up, so that what is printed fits.
        nearest = " and ".join(f"{1.001 * level:.4g}" for level in levels[max(step, 0) : step + 2].tolist())
        raise ValueError(
            f"no timestep fits sigma={sigma}: the noise of the nearest is {nearest}, in pixels in [0, 1], in a "
            f"schedule from {levels[0]:.4g} to {levels[-1]:.4g}, and it must be at most sigma and within "
            f"{LARGEST_GAP:.0%} of it. Give sigma in that unit, smooth with one of these, or use a model trained at "
            "this noise"
        )
    return step


def _schedule(scheduler: Any) -> Tensor:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise TypeError(
            f"{type(scheduler).__name__} has no alphas_cumprod; pass a scheduler that has, as diffusers' DDPMScheduler"
        )
    alphas = torch.as_tensor(alphas).detach().cpu().double()
    is_vector = alphas.dim() == 1 and alphas.numel() > 0
    if not is_vector or not (alphas.diff() < 0).all() or not (alphas[-1] >= 0 and 0 < alphas[0] <= 1):
        raise ValueError(
            f"alphas_cumprod, of shape {tuple(alphas.shape)}, must be a vector that decreases within [0, 1], one "
            "entry a timestep; pass the schedule the model was trained with, (1 - betas).cumprod(0)"
        )
    return alphas[alphas > 0]  # a last step of pure noise is no step to start from


def _prediction_type(scheduler: Any) -> str:
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if kind is None:
        raise TypeError(
            f"{type(scheduler).__name__} has no config.prediction_type; set it to one of {', '.join(CLEAN_IMAGES)}, "
            "as the model was trained"
        )
    check_name("prediction_type", kind, CLEAN_IMAGES)
    return kind


def _check_part(name: str, part: Any) -> None:
    if not callable(part):
        raise TypeError(f"the {name} must be callable, got {type(part).__name__}; pass a module or a function")
    if isinstance(part, nn.Module) and any(module.training for module in part.modules()):
        raise RuntimeError(f"the {name} is in train mode; call {name}.eval() first")


def _check_finite(name: str, images: Tensor) -> None:
    """Clipping would hide an infinity. Not while the graph is exported for a bound, which has no values."""
    if not torch.compiler.is_exporting() and not torch.isfinite(images).all():
        raise RuntimeError(
            f"the {name} returned NaN or infinity; check its weights, and run it in float32 or bfloat16 if it is in "
            "float16"
        )


def _dtype_of(part: Any, default: torch.dtype) -> torch.dtype:
    parameters = part.parameters() if isinstance(part, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), default)
