"""Whether a configuration can certify anything at all."""

from __future__ import annotations

import dataclasses

import numpy as np

from hf_lipschitz.certification.engine import looks_of
from hf_lipschitz.certification.methods import METHODS, Integers, Setting, radii_of
from hf_lipschitz.certification.sampling import SCORE_UNIT
from hf_lipschitz.certification.statistics import NUM_SCORE_BINS, SCORE_WEIGHT


_MOST_SAMPLES = 2**40


def check_reach(setting: Setting) -> None:
    """
    Raises:
        `ValueError`: not even samples that all agree would certify a radius above 0; the message has the n that would.
    """
    n = setting.config.n
    if _is_in_reach(setting, n):
        return
    enough = 2 * n
    while enough < _MOST_SAMPLES and not _is_in_reach(setting, enough):
        enough *= 2
    raise ValueError(
        f"n = {n} samples certify nothing at alpha = {setting.config.alpha} with {setting.num_classes} classes, even "
        f"if they all agree: raise n to {enough} or more, or alpha."
    )


def _is_in_reach(setting: Setting, n: int) -> bool:
    config = dataclasses.replace(setting.config, n=n, looks=None)
    setting = dataclasses.replace(setting, config=config)
    method, look = METHODS[config.certificate], looks_of(setting)[-1]
    if method.statistic == "votes":
        selection, estimation = (_one_for_all(setting.num_classes, count) for count in (config.n0, n))
    else:
        sums = _one_for_all(setting.num_classes, round(config.n0 / SCORE_UNIT))
        selection = np.stack([sums, sums], axis=1)
        estimation = None
    choice = method.choose(selection, setting)
    if estimation is None:
        estimation = np.zeros((1, choice.num_groups, NUM_SCORE_BINS), dtype=np.int64)
        estimation[0, 0, -1] = estimation[0, 1:, 0] = n * SCORE_WEIGHT
    bounds = method.bounds(estimation, n, choice, look.alpha, setting)
    return bool(radii_of(bounds, setting, 1)[0] > 0)


def _one_for_all(num_classes: int, count: int) -> Integers:
    counts = np.zeros((1, num_classes), dtype=np.int64)
    counts[0, 0] = count
    return counts
