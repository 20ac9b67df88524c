"""The smoothed classifier: the shell around sampling, procedure and certificate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.certification.certificate import Certificate
from hf_lipschitz.certification.procedures import PREDICTORS, PROCEDURES
from hf_lipschitz.certification.sampling import NoisySampler
from hf_lipschitz.configuration import SmoothingConfig
from hf_lipschitz.functional.simplex import SIMPLEX_MAPS


SMALLEST_NOISE = 2.0**-20


class SmoothedClassifier:
    r"""
    \\(g(x) = \arg\max_k E[f_k(x + \delta)]\\), \\(\delta \sim N(0, \sigma^2 I)\\), with f the base classifier's votes
    or scores (Cohen et al. 2019, arXiv:1902.02918).

    The noise is added in float32 to the input as it is given; normalisation, casts and everything else belong to the
    base classifier. Certificates hold for g in exact arithmetic: float32 rounding of the noisy input is not covered,
    and a classifier built to exploit it can break them.

    Args:
        base_classifier (`Callable[[Tensor], Any]`):
            Maps a float32 batch of shape `(B, *x.shape)` to logits of shape `(B, num_classes)`, or to an object that
            has them as `.logits`. Each row's logits must depend on that row only. A module must be in eval mode.
        num_classes (`int`):
            Number of logits, at least 2.
        config (`SmoothingConfig`):
            The noise, the samples and the certificate.
        unit (`str`, *optional*, defaults to `"input"`):
            What the radius is measured in, written into each certificate.

    Raises:
        `ValueError`: `num_classes` is below 2, or the certificate is `"deterministic"`.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Any],
        num_classes: int,
        config: SmoothingConfig,
        unit: str = "input",
    ) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be an int of at least 2, got {num_classes!r}.")
        if config.certificate == "deterministic":
            raise ValueError(
                "certificate='deterministic' is about the classifier itself, not a smoothed one: use "
                "certify_deterministic, or the pipeline."
            )
        self.base_classifier = base_classifier
        self.num_classes = num_classes
        self.config = config
        self.unit = unit

    def certify(self, x: Tensor, index: int = 0) -> Certificate:
        """
        Certifies one input; sound with probability at least 1 - `config.alpha`.

        Args:
            x (`torch.Tensor`):
                One input without a batch axis: floating point and finite. It is taken as float32.
            index (`int`, *optional*, defaults to `0`):
                Which example this is. Different examples need different indices to get independent noise.

        Raises:
            `TypeError`, `ValueError`: `x` or the logits have a wrong type, shape or value.
            `RuntimeError`: the base classifier is in train mode or returns logits that are not finite.
        """
        config = self.config
        decision = PROCEDURES[config.certificate](self._sampler(x, index), config)
        return Certificate(
            prediction=int(decision.prediction),
            radius=float(decision.radius),
            norm="l2",
            unit=self.unit,
            p_lower=float(decision.p_lower),
            p_upper=None if decision.p_upper is None else float(decision.p_upper),
            alpha=config.alpha,
            n=int(decision.n),
            method=config.certificate,
            stop_reason=decision.stop_reason,
            sigma=config.sigma,
            seed=config.seed,
            index=index,
        )

    def predict(self, x: Tensor, index: int = 0) -> int:
        """
        The smoothed classifier's class or `ABSTAIN`; another class with probability at most `config.alpha`. Arguments
        and errors are those of `certify`.
        """
        return PREDICTORS[self.config.certificate](self._sampler(x, index), self.config)

    def _sampler(self, x: Tensor, index: int) -> NoisySampler:
        config = self.config
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"index must be an int, got {index!r}.")
        _check_eval_mode(self.base_classifier)
        return NoisySampler(
            base_classifier=self.base_classifier,
            x=_checked_input(x, config.sigma),
            num_classes=self.num_classes,
            sigma=config.sigma,
            seed=config.seed,
            index=index,
            batch_size=config.batch_size,
            simplex_map=partial(SIMPLEX_MAPS[config.simplex_map].function, temperature=config.temperature),
        )


def _check_eval_mode(base_classifier: Callable[[Tensor], Any]) -> None:
    if isinstance(base_classifier, nn.Module) and any(module.training for module in base_classifier.modules()):
        raise RuntimeError("The base classifier is in train mode; call model.eval() first.")


def _checked_input(x: Tensor, sigma: float) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x)
        raise TypeError(f"x must be a floating-point tensor in the unit of sigma, got {kind}.")
    x = x.detach().to(torch.float32)
    if x.numel() == 0:
        raise ValueError("x is empty.")
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite in float32; it holds NaN or infinity.")
    largest = float(x.abs().max())
    if sigma < SMALLEST_NOISE * largest:
        raise ValueError(f"sigma = {sigma} is lost in float32 next to entries of size {largest}; rescale the input.")
    return x
