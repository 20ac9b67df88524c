"""From bounds on the smoothed scores to a certified radius."""

from __future__ import annotations

import math

from scipy import stats


ROUNDING = 2.0**-48


def smoothing_radius(p_lower: float, p_upper: float | None = None, sigma: float = 1.0) -> float:
    r"""
    Radius of the open ℓ2 ball on which the class of a Gaussian-smoothed classifier cannot change.

    One-class \\(\sigma \Phi^{-1}(p_A)\\) without `p_upper` (Cohen et al. 2019, arXiv:1902.02918, with
    \\(\overline{p_B} = 1 - \underline{p_A}\\)), two-class \\(\frac{\sigma}{2} (\Phi^{-1}(\underline{p_A}) -
    \Phi^{-1}(\overline{p_B}))\\) with it (Theorem 1), which needs no \\(p_A > 1/2\\). Both hold for soft scores in
    [0, 1] as well, because \\(\Phi^{-1} \circ \tilde f_k\\) is \\(1/\sigma\\)-Lipschitz (Salman et al. 2019,
    arXiv:1906.04584, Lemma 2).

    Sound: never above the formula's exact value (the quantiles are rounded towards a smaller radius), hence a
    certified radius whenever `p_lower` and `p_upper` are bounds.

    Args:
        p_lower (`float`):
            Lower bound on the smoothed score of the predicted class, in [0, 1).
        p_upper (`float`, *optional*):
            Upper bound, in (0, 1], on the smoothed score of EVERY other class. Without it, other classes get what is
            left, 1 - `p_lower`.
        sigma (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the noise; the radius has its unit.

    Returns:
        `float`: the radius, or 0.0 where nothing is certified. A tie is 0.0.

    Raises:
        `ValueError`: a score is NaN or outside [0, 1]; `sigma` is not positive and finite; or `p_lower` is 1 or
            `p_upper` is 0, where the formula is infinite: no finite sample proves such a bound, so it is an estimate
            or a rounded number, and no radius follows from it.
    """
    _check_score("p_lower", p_lower)
    if not (0 < sigma < math.inf):
        raise ValueError(f"sigma must be positive and finite, got {sigma}.")
    if p_lower == 1:
        raise ValueError("p_lower is 1, an infinite radius that no finite sample proves; pass a confidence bound.")
    z_a = float(stats.norm.ppf(p_lower))
    if p_upper is None:
        return sigma * max(z_a, 0.0) * (1 - ROUNDING)
    _check_score("p_upper", p_upper)
    if p_upper == 0:
        raise ValueError("p_upper is 0, an infinite radius that no finite sample proves; pass a confidence bound.")
    z_b = float(stats.norm.ppf(p_upper))
    return sigma / 2 * max(z_a - z_b - ROUNDING * (abs(z_a) + abs(z_b)), 0.0)


def _check_score(name: str, value: float) -> None:
    if not (0 <= value <= 1):
        raise ValueError(f"{name} must be in [0, 1], got {value}.")
