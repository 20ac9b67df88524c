"""What every loss asks of its logits, labels and parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def checked_logits(logits: Tensor, *, are_copies: bool = False) -> Tensor:
    """The logits in at least float32.

    Args:
        logits (`Tensor` of shape `(B, K)`, or `(m, B, K)` with `are_copies`):
            K ≥ 2 classes.
        are_copies (`bool`, *optional*, defaults to `False`):
            Whether there is a leading axis of m noisy copies.

    Raises:
        TypeError: they are no floating-point tensor.
        ValueError: the shape is another one, or an entry is NaN or inf.
    """
    shape = "(m, B, K)" if are_copies else "(B, K)"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor of shape {shape}, got {_kind(logits)}")
    if logits.dim() != (3 if are_copies else 2) or logits.shape[-1] < 2 or 0 in logits.shape:
        raise ValueError(f"logits must have shape {shape} with K >= 2 classes, got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits.detach()).all()):
        raise ValueError("the logits hold NaN or inf: check the inputs, or lower the learning rate")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels `(B,)` for logits `(..., B, K)`, as int64.

    Raises:
        TypeError: they are no tensor of integers.
        ValueError: the shape is another one, or one is not in [0, K).
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of class indices (int64), got {_kind(labels)}")
    batch, classes = logits.shape[-2:]
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), one a row of logits, got {tuple(labels.shape)}")
    least, largest = torch.stack(labels.aminmax()).tolist()
    if least < 0 or largest >= classes:
        raise ValueError(
            f"labels must be in [0, {classes}) for logits of {classes} classes, got {least if least < 0 else largest}:"
            " set num_labels of the model, or drop examples without a label"
        )
    return labels.long()


def check_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    """Raises a ValueError unless `value` is finite and positive, or zero where that is allowed."""
    if not (0 <= value < math.inf if or_zero else 0 < value < math.inf):
        raise ValueError(f"{name} must be finite and {'>=' if or_zero else '>'} 0, got {value}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
