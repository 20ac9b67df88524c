"""What a user can do about a node that costs much."""

from __future__ import annotations


_FLOOR = "replace=('weights', 'norms'), then calibrate: a floor under the deviation"
_ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("aten.layer_norm", "aten.rms_norm", "aten.group_norm"), _FLOOR),
    (("FloorStd",), "calibrate(model, data): the floor is the largest that leaves the data as they are"),
    (("aten.native_batch_norm", "aten._native_batch_norm", "aten.batch_norm"), "replace=('weights', 'norms')"),
    (("aten.scaled_dot_product_attention",), "replace=('weights', 'attention'), then calibrate: smaller balls"),
    (("aten.linear", "aten.addmm", "aten.mm", "aten.conv"), "layer_lipschitz=1.0, annealed while fine-tuning"),
    (("aten.gelu", "aten.silu", "aten.mish", "aten.hardswish"), "replace=('weights', 'activations')"),
    (("aten.add",), "replace=('weights', 'residuals'): a budget for the branches"),
)
_BY_REASON: tuple[tuple[str, str], ...] = (
    ("no bounded norm", "replace=('weights', 'attention'), then calibrate"),
    ("multiplies two values", "bound one of the two, as by a norm before it"),
    ("which entries it takes", "choosing by value jumps: no constant exists"),
    ("has no rule", "hf_lipschitz.bounds.rule registers one"),
)


def advice_for(operator: str, reason: str) -> str:
    """A few words; empty where there is nothing to do."""
    if reason:
        return next((text for part, text in _BY_REASON if part in reason), "")
    return next((text for kinds, text in _ADVICE if operator.startswith(kinds)), "")
