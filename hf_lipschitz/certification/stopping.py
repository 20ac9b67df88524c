"""When a sequential certification has seen enough of an input. Stopping is free: it is never a source of error."""

from __future__ import annotations

import math

import numpy as np

from hf_lipschitz.certification.looks import Look
from hf_lipschitz.certification.methods import Bounds, Choice, Floats, Integers, Method, Setting, radii_of


OPEN = 0
STOP_REASONS = ("open", "fixed_n", "radius reached", "next radius out of reach", "gain out of reach", "n reached")
FIXED_N, REACHED, UNREACHABLE, SMALL_GAIN, N_REACHED = range(1, 6)
# Standard deviations by which the counts to come may be better than those so far.
LUCK = 2.5


def stop_codes(radius: Floats, hoped_for: Floats, look: Look, looks: tuple[Look, ...], setting: Setting) -> Integers:
    """
    A place in `STOP_REASONS` for each input, `OPEN` if it goes on.

    Args:
        radius (array):
            What is certified.
        hoped_for (array):
            What might be at the last look.
    """
    config = setting.config
    if len(looks) == 1:
        return np.full(len(radius), FIXED_N)
    codes = np.full(len(radius), N_REACHED if look is looks[-1] else OPEN)
    if config.gain is not None:
        codes = np.where(hoped_for < radius + config.gain, SMALL_GAIN, codes)
    if config.radii is not None:
        goals = np.array([*config.radii, math.inf])
        # Balls are open: a radius is reached when the certified one is above it.
        following = goals[np.searchsorted(goals[:-1], radius, side="left")]
        codes = np.where(hoped_for <= following, UNREACHABLE, codes)
        codes = np.where(np.isinf(following), REACHED, codes)
    return codes


def hoped_for(
    counts: Integers, n: int, choice: Choice, looks: tuple[Look, ...], method: Method, setting: Setting, entries: int
) -> Floats:
    r"""
    About the largest radii within reach at the last look: those of the counts so far, multiplied, with means that turn
    out `LUCK` standard deviations better. Nothing rests on it but the number of samples.
    """
    last = looks[-1]
    factor = math.ceil(last.n / n)
    bounds = method.bounds(counts * factor, n * factor, choice, last.alpha, setting)
    best = 1 - math.log(1 / last.alpha) / (2 * last.n)
    spread = math.sqrt(max(1 / n - 1 / last.n, 0.0)) * LUCK
    p_lower = np.clip(bounds.p_lower + spread * _deviation(bounds.p_lower, n), 0, best)
    p_upper = bounds.p_upper
    if p_upper is not None:
        p_upper = np.clip(p_upper - spread * _deviation(p_upper, n), 1 - best, 1)
    return radii_of(Bounds(np.maximum(p_lower, 0), p_upper), setting, entries)


def _deviation(p: Floats, n: int) -> Floats:
    p = (p * n + 1) / (n + 2)
    return np.sqrt(p * (1 - p))
