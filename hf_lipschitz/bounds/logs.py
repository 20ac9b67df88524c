"""Arithmetic of Lipschitz constants by their logarithms, so that 10^300 times 10^300 is a number."""

from __future__ import annotations

import math
from collections.abc import Iterable


def scaled(log_lipschitz: float, gain: float) -> float:
    """log(gain · L). Zero times inf stays inf, for nothing is known of such a value; a gain of NaN is inf."""
    if log_lipschitz == math.inf or not math.isfinite(gain):
        return math.inf
    return log_lipschitz + math.log(gain) if gain > 0 else -math.inf


def log_sum(logs: Iterable[float]) -> float:
    """log Σ exp; the interpreter rounds up."""
    logs = list(logs)
    top = max(logs, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(log - top) for log in logs))


def log_root_sum_squares(logs: Iterable[float]) -> float:
    """log √Σ exp², of values side by side in one tensor."""
    return log_sum([2 * log for log in logs]) / 2


def exponential(log: float) -> float:
    """exp, inf where it is above the largest float64."""
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf
