"""What a certificate is made of: a choice on the selection samples, and bounds from the counts of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hf_lipschitz.certification.configuration import CERTIFICATES, SmoothingConfig
from hf_lipschitz.certification.noise import NOISES
from hf_lipschitz.certification.radius import laplace_radius, smoothing_radius, uniform_radius


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """
    What holds for all inputs that are certified together.

    Args:
        config (`SmoothingConfig`):
            The noise, the samples and the certificate.
        num_classes (`int`):
            Number of classes.
        score_lipschitz (`float`, *optional*, defaults to inf):
            A sound Lipschitz constant of each score with respect to the noisy input.
    """

    config: SmoothingConfig
    num_classes: int
    score_lipschitz: float = math.inf


@dataclass(frozen=True)
class Choice:
    """
    What was fixed on the selection samples of each of W inputs, before a sample of the others was drawn.

    Args:
        candidates (array of shape `(W,)`):
            The class that is certified.
        groups (array of shape `(W, num_classes)`, *optional*):
            The group each class belongs to: the candidate alone in group 0, the others in groups 1 to G - 1. The score
            of a group is the sum of its classes' scores, so what bounds it bounds each of them.
        bets (array of shape `(W, G)`, *optional*):
            For betting bounds: of the lower bound of group 0, and of the upper bounds of the others.
    """

    candidates: Integers
    groups: Integers | None = None
    bets: Floats | None = None

    def take(self, rows: Integers) -> Choice:
        """The choice of some of the inputs."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Choice(**{name: None if part is None else part[rows] for name, part in parts.items()})

    @property
    def num_groups(self) -> int:
        return int(self.groups.max()) + 1


@dataclass(frozen=True)
class Bounds:
    """Of W inputs: `p_lower` of the candidate's smoothed score; `p_upper` of every other class's, or `None`."""

    p_lower: Floats
    p_upper: Floats | None

    def take(self, rows: NDArray) -> Bounds:
        """Those of some of the inputs."""
        return Bounds(self.p_lower[rows], None if self.p_upper is None else self.p_upper[rows])


@dataclass(frozen=True)
class Method:
    r"""
    A certificate, vectorised over inputs.

    Args:
        statistic (`str`):
            `"votes"`: the counts are those of top classes, shape `(W, num_classes)`. `"scores"`: on the selection
            samples sums and sums of squares, in units of `SCORE_UNIT`, shape `(W, 2, num_classes)`; on the others
            interpolated histograms of the groups' scores, shape `(W, G, NUM_SCORE_BINS)`.
        choose (`Callable[[counts, Setting], Choice]`):
            From the selection counts.
        bounds (`Callable[[counts, n, Choice, alpha, Setting], Bounds]`):
            From the counts of `n` other samples, wrong with probability at most `alpha`.
        is_anytime (`Callable[[Setting], bool]`):
            Whether the bounds at `alpha` hold at all n together.
    """

    statistic: Literal["votes", "scores"]
    choose: Callable[[Integers, Setting], Choice]
    bounds: Callable[[Integers, int, Choice, float, Setting], Bounds]
    is_anytime: Callable[[Setting], bool] = lambda setting: False


METHODS: dict[str, Method] = {}


def register_certificate(name: str, method: Method) -> Method:
    """
    Makes `SmoothingConfig(certificate=name)` use `method`.

    Raises:
        `ValueError`: the name is taken.
    """
    if name in METHODS:
        raise ValueError(f"The certificate {name!r} is already registered; choose another name.")
    METHODS[name] = method
    if name not in CERTIFICATES:
        CERTIFICATES.append(name)
    return method


# By the name of the noise: from the bounds and the scale of the noise. A registered noise needs a proof of its own.
RADII: dict[str, Callable[[Floats, Floats | None, float], Floats]] = {
    "laplace": laplace_radius,
    "uniform": uniform_radius,
}
GAUSSIAN = ("gaussian", "exact")


def radii_of(bounds: Bounds, setting: Setting, num_entries: int) -> Floats:
    r"""
    Certified radii, 0 where nothing is certified, by what the noise was drawn from: \\(G^{-1}\\) of the bounds for
    Gaussian noise, which is \\(\sigma \Phi^{-1}\\) for scores without a Lipschitz constant, and the \\(\ell_1\\) radii
    of Laplace and uniform noise. `num_entries` of the input is for noise that is drawn up to a known distance in total
    variation, by which the bounds are moved.
    """
    noise = NOISES[setting.config.noise]
    scale, slack = noise.scale(setting.config.sigma), noise.slack(num_entries, setting.config.sigma)
    p_lower = np.maximum(bounds.p_lower - slack, 0.0)
    p_upper = None if bounds.p_upper is None else np.minimum(bounds.p_upper + slack, 1.0)
    if noise.name not in GAUSSIAN:
        if noise.name not in RADII:
            raise ValueError(f"no radius is known for noise={noise.name!r}: put a proved one into methods.RADII.")
        return RADII[noise.name](p_lower, p_upper, scale)
    return smoothing_radius(p_lower, p_upper, scale, setting.score_lipschitz)
