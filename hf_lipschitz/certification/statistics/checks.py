"""Checks that the bounds share. Arguments broadcast against each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def checked_alpha(alpha: ArrayLike) -> NDArray[np.float64]:
    alpha = np.asarray(alpha, dtype=np.float64)
    if not np.all((alpha > 0) & (alpha <= 0.5)):
        raise ValueError(f"alpha must be in (0, 0.5], got {alpha}.")
    return alpha


def checked_trials(n: ArrayLike) -> NDArray[np.int64]:
    n = np.asarray(n)
    if not np.all((n >= 1) & (n < 2**63) & (n == np.floor(n))):
        raise ValueError(f"n must be an integer of at least 1, got {n}.")
    return n.astype(np.int64)


def float_if_scalar(bound: NDArray[np.float64]) -> float | NDArray[np.float64]:
    return float(bound) if np.ndim(bound) == 0 else bound
