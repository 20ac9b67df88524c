"""Logits among a model's outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(outputs: Any, *, has_loss: bool = True) -> Tensor:
    """The logits of a forward.

    Args:
        outputs (`ModelOutput` or `tuple`):
            Of the model.
        has_loss (`bool`, *optional*, defaults to `True`):
            Whether the loss comes first in a tuple, as it does where the model was given labels.

    Raises:
        RuntimeError: there are none.
    """
    if isinstance(outputs, dict):
        if "logits" not in outputs:
            raise RuntimeError(f"the model's outputs are {', '.join(outputs)}, with no 'logits': this term needs them")
        return outputs["logits"]
    return outputs[1 if has_loss else 0]
