"""One rule an operator: from what is known of its arguments to what is known of its value."""

# Each registers its rules.
from hf_lipschitz.bounds.rules import (
    arithmetic,
    attention,
    elementwise,
    linear,
    modules,
    norms,
    ordering,
    pooling,
    resizing,
    selections,
)


__all__ = [
    "arithmetic",
    "attention",
    "elementwise",
    "linear",
    "modules",
    "norms",
    "ordering",
    "pooling",
    "resizing",
    "selections",
]
