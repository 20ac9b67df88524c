"""The smoothed classifier: the shell around noise, samples and certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from hf_lipschitz.bounds.logs import exponential
from hf_lipschitz.bounds.result import LipschitzBound
from hf_lipschitz.certification.certificate import ABSTAIN, Certificate
from hf_lipschitz.certification.configuration import SmoothingConfig
from hf_lipschitz.certification.engine import Decision, Window
from hf_lipschitz.certification.methods import METHODS, Setting
from hf_lipschitz.certification.noise import NOISES, Stage
from hf_lipschitz.certification.processes import ONE_PROCESS, Checkpoints, Processes
from hf_lipschitz.certification.reach import check_reach
from hf_lipschitz.certification.sampling import NoisyInputs
from hf_lipschitz.functional.simplex import SIMPLEX_MAPS


SMALLEST_NOISE = 2.0**-20
# Covers the product of two constants in float64.
_ROUNDING = 1 + 1e-12


class SmoothedClassifier:
    r"""
    \\(g(x) = \arg\max_k E[f_k(x + \delta)]\\), \\(\delta \sim N(0, \sigma^2 I)\\) or another noise, with f the base
    classifier's votes or scores (Cohen et al. 2019, arXiv:1902.02918).

    The noise is added in float32 to the input as it is given; normalisation, casts and everything else belong to the
    base classifier. Certificates hold for g in exact arithmetic: unless `noise="exact"`, float32 rounding of the noisy
    input is not covered, and a classifier built to exploit it can break them.

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
        `ValueError`: `num_classes` is below 2; the certificate is `"deterministic"`, or `"lipschitz"` without a
            `score_lipschitz`; or n is too small to certify anything at this alpha.
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
        self.setting = Setting(config, num_classes, _score_lipschitz(config, num_classes))
        check_reach(self.setting)

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
            `RuntimeError`: the base classifier is in train mode, returns logits that are not finite, or logits that
                depend on the other rows of a batch.
        """
        ((_, certificate),) = self.certify_together([x], [index])
        return certificate

    def certify_together(
        self,
        inputs: Sequence[Tensor],
        indices: Sequence[int] | None = None,
        *,
        processes: Processes = ONE_PROCESS,
        checkpoints: Checkpoints | None = None,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, Certificate]]:
        """
        Certifies several inputs, whose noisy copies share batches, in rounds over those that are still undecided.

        Args:
            inputs (`Sequence[Tensor]`), indices (`Sequence[int]`, *optional*, defaults to 0, 1, ...):
                As in `certify`. Their number and order change no certificate by more than what the base classifier's
                rounding does.
            processes (`Processes`, *optional*):
                Deals the batches out; every process calls this with the same arguments and gets the same certificates.
            checkpoints (`Checkpoints`, *optional*):
                Keeps the counts, so that a run that was cut off goes on.
            on_samples (`Callable[[int], None]`, *optional*):
                Is told of the samples drawn.

        Yields:
            `tuple[int, Certificate]`: the place of an input and its certificate, as soon as it is decided.
        """
        indices = list(range(len(inputs))) if indices is None else list(indices)
        if not inputs:
            return
        window = Window(
            self.base_classifier, self._noisy(inputs, indices), self.setting, processes, checkpoints, on_samples
        )
        for finished in window.run():
            for place in sorted(finished):
                yield place, self._certificate(finished[place], indices[place])

    def predict(self, x: Tensor, index: int = 0) -> int:
        r"""
        The smoothed classifier's class or `ABSTAIN`; another class with probability at most `config.alpha`.

        On votes it is PREDICT of Cohen et al. 2019 (arXiv:1902.02918): the class with most of `n` votes, or `ABSTAIN`
        unless a two-sided binomial test tells it from the second at `alpha` (Hung and Fithian 2019). On scores it is
        the prediction of `certify`. Arguments and errors are those of `certify`.
        """
        if METHODS[self.config.certificate].statistic == "scores":
            return self.certify(x, index).prediction
        window = Window(self.base_classifier, self._noisy([x], [index]), self.setting)
        votes = window.counts_of(Stage.PREDICTION, self.config.n)[0]
        second, first = np.argsort(votes, kind="stable")[-2:]
        top, runner_up = int(votes[first]), int(votes[second])
        test = stats.binomtest(top, top + runner_up, 0.5, alternative="two-sided")
        return int(first) if test.pvalue <= self.config.alpha else ABSTAIN

    def _noisy(self, inputs: Sequence[Tensor], indices: Sequence[int]) -> NoisyInputs:
        config = self.config
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"index must be an int, got {index!r}.")
        if len(set(indices)) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs need as many different indices, got {indices}.")
        _check_eval_mode(self.base_classifier)
        xs = [_checked_input(x, config) for x in inputs]
        if config.score_lipschitz is not None:
            _check_shapes(xs, config.score_lipschitz)
        return NoisyInputs(xs, indices, config.noise, config.sigma, config.seed, config.rows)

    def _certificate(self, decision: Decision, index: int) -> Certificate:
        config = self.config
        known = self.setting.score_lipschitz
        return Certificate(
            prediction=decision.prediction,
            radius=decision.radius,
            norm=NOISES[config.noise].norm,
            unit=self.unit,
            p_lower=decision.p_lower,
            p_upper=decision.p_upper,
            alpha=config.alpha,
            n=decision.n,
            method=config.certificate,
            stop_reason=decision.stop_reason,
            sigma=config.sigma,
            seed=config.seed,
            index=index,
            score_lipschitz=None if known == math.inf else known,
            noise=config.noise,
            dtype=_dtype_of(self.base_classifier),
        )


def _score_lipschitz(config: SmoothingConfig, num_classes: int) -> float:
    if config.certificate != "lipschitz":
        return math.inf
    if config.score_lipschitz is None:
        raise ValueError(
            "certificate='lipschitz' needs score_lipschitz=lipschitz_bound(...), of the map from the noised input to "
            "the logits."
        )
    of_map = SIMPLEX_MAPS[config.simplex_map].lipschitz_constant(num_classes, config.temperature)
    return exponential(config.score_lipschitz.log_value) * of_map * _ROUNDING


def _check_shapes(xs: Iterable[Tensor], bound: LipschitzBound) -> None:
    for x in xs:
        if bound.shape is not None and bound.shape != (1, *x.shape):
            raise ValueError(
                f"score_lipschitz is for inputs of shape {bound.shape}, and this one is {(1, *x.shape)} with its "
                "batch axis: compute the bound for this shape."
            )


def _dtype_of(base_classifier: Callable[[Tensor], Any]) -> str | None:
    if not isinstance(base_classifier, nn.Module):
        return None
    kinds = {str(p.dtype).removeprefix("torch.") for p in base_classifier.parameters() if p.is_floating_point()}
    return ", ".join(sorted(kinds)) or None


def _check_eval_mode(base_classifier: Callable[[Tensor], Any]) -> None:
    if isinstance(base_classifier, nn.Module) and any(module.training for module in base_classifier.modules()):
        raise RuntimeError("The base classifier is in train mode; call model.eval() first.")


def _checked_input(x: Tensor, config: SmoothingConfig) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x)
        raise TypeError(f"x must be a floating-point tensor in the unit of sigma, got {kind}.")
    x = x.detach().to(torch.float32)
    if x.numel() == 0:
        raise ValueError("x is empty.")
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite in float32; it holds NaN or infinity.")
    largest = float(x.abs().max())
    if not NOISES[config.noise].is_exact and config.sigma < SMALLEST_NOISE * largest:
        raise ValueError(
            f"sigma = {config.sigma} is lost in float32 next to entries of size {largest}; rescale the input."
        )
    return x
