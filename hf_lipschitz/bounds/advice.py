"""What a user can do about a node that costs much."""

from __future__ import annotations


_ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("aten.layer_norm", "aten.rms_norm", "aten.group_norm"), "replace=('weights', 'norms'), calibrate"),
    (("FloorStd",), "calibrate on data: the largest floors that change nothing there"),
    (("aten._native_batch_norm", "aten.batch_norm"), "replace=('weights', 'norms')"),
    (("aten.scaled_dot_product_attention",), "replace=('weights', 'attention'), calibrate"),
    (("aten.linear", "aten.addmm", "aten.mm", "aten.conv"), "layer_lipschitz=1.0, annealed in training"),
    (("aten.gelu", "aten.silu", "aten.mish", "aten.hardswish"), "replace=('weights', 'activations')"),
    (("aten.add",), "replace=('weights', 'residuals')"),
)
_BY_REASON: tuple[tuple[str, str], ...] = (
    ("no bounded norm", "replace=('weights', 'attention'), calibrate"),
    ("multiplies two values", "bound one of the two, as by a norm before it"),
    ("which entries it takes", "choosing by value jumps: no constant exists"),
    ("its value jumps", "no constant exists"),
    ("has no rule", "hf_lipschitz.bounds.rule registers one"),
)


_SMALLER_BALLS = "smaller balls: BallRadii.set_radii, then training"


def advice_for(operator: str, reason: str, *, is_clipped: bool, log_factor: float) -> str:
    """A few words on a node; empty where there is nothing to do.

    Args:
        operator (`str`):
            Of the node.
        reason (`str`):
            Why it has no constant, or empty.
        is_clipped (`bool`):
            Whether the attention of the model is clipped to balls.
        log_factor (`float`):
            What it costs.
    """
    if reason:
        return next((text for part, text in _BY_REASON if part in reason), "")
    if log_factor <= 0:
        return ""
    if is_clipped and operator.startswith("aten.scaled_dot_product_attention"):
        return _SMALLER_BALLS
    return next((text for kinds, text in _ADVICE if operator.startswith(kinds)), "")
