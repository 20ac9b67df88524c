"""The choice of a simplex map and a temperature, once for all inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_lipschitz.certification.certificate import ABSTAIN
from hf_lipschitz.certification.configuration import SmoothingConfig
from hf_lipschitz.certification.smoothed import SmoothedClassifier


TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)


def calibrate_simplex_map(
    base_classifier: Callable[[Tensor], Any],
    inputs: Sequence[Tensor],
    num_classes: int,
    config: SmoothingConfig,
    *,
    labels: Sequence[int] | None = None,
    simplex_maps: Sequence[str] = ("softmax", "sparsemax"),
    temperatures: Sequence[float] = TEMPERATURES,
) -> SmoothingConfig:
    r"""
    The configuration with the map and the temperature that give the largest mean radius on a calibration split.

    Sound as long as no input of the split is certified with it afterwards: the choice is then fixed before any input
    is seen. LVM-RS (Delattre et al. 2024, arXiv:2309.16883) as published chooses them for each input by its own
    samples, which certifies two classes on overlapping balls.

    Args:
        base_classifier (`Callable[[Tensor], Any]`):
            As in [`SmoothedClassifier`].
        inputs (`Sequence[Tensor]`):
            The calibration split, without batch axes.
        num_classes (`int`):
            Number of logits.
        config (`SmoothingConfig`):
            For a certificate on scores, `"lvm"` or `"lipschitz"`. Its seed is moved by one for the calibration.
        labels (`Sequence[int]`, *optional*):
            True classes; radii of other predictions count as 0. Without them every radius counts.
        simplex_maps (`Sequence[str]`, *optional*), temperatures (`Sequence[float]`, *optional*):
            What is tried, each map at each temperature.

    Returns:
        [`SmoothingConfig`]: `config` with `simplex_map` and `temperature` set.

    Raises:
        `ValueError`: the certificate does not read scores, there are no inputs, or not as many labels.
    """
    if config.certificate not in ("lvm", "lipschitz"):
        raise ValueError(f"certificate={config.certificate!r} reads votes: a simplex map is for 'lvm' or 'lipschitz'.")
    if not inputs or (labels is not None and len(labels) != len(inputs)):
        raise ValueError("calibrate_simplex_map needs inputs, and as many labels if there are any.")

    def mean_radius(candidate: SmoothingConfig) -> float:
        calibrating = dataclasses.replace(candidate, seed=config.seed + 1)
        smoothed = SmoothedClassifier(base_classifier, num_classes, calibrating)
        radii = np.zeros(len(inputs))
        for place, certificate in smoothed.certify_together(inputs):
            is_right = labels is None or certificate.prediction in (ABSTAIN, int(labels[place]))
            radii[place] = certificate.radius if is_right else 0.0
        return float(radii.mean())

    candidates = [
        dataclasses.replace(config, simplex_map=name, temperature=temperature)
        for name in simplex_maps
        for temperature in temperatures
    ]
    return max(candidates, key=mean_radius)
