"""Checks on weights that every bound makes before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor


def check_weight(w: Tensor, what: str = "weight") -> None:
    """Raises unless `w` is a non-empty, finite, floating-point or complex tensor.

    Raises:
        TypeError: `w` is not a tensor, or holds integers or booleans.
        ValueError: `w` is empty or holds NaN or inf.
    """
    check_kind(w, what)
    check_entries(w, what)


def check_kind(w: Tensor, what: str = "weight") -> None:
    """The part of [`check_weight`] that needs no look at the entries."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(w).__name__}")
    if not (w.is_floating_point() or w.is_complex()):
        raise TypeError(f"{what} has dtype {w.dtype}; convert it to a floating-point dtype first, e.g. w.float()")
    if w.numel() == 0:
        raise ValueError(f"{what} of shape {tuple(w.shape)} is empty and has no norm")


def check_entries(w: Tensor, what: str = "weight") -> None:
    """The part of [`check_weight`] that reads the tensor."""
    # NaN and inf reach the extremes, in one pass and without a mask.
    least, largest = torch.aminmax(torch.view_as_real(w.resolve_conj()) if w.is_complex() else w)
    if not bool(torch.isfinite(least) & torch.isfinite(largest)):
        raise ValueError(f"{what} holds NaN or inf; repair or reload it before asking for its norm")


def check_matrix(w: Tensor, what: str = "w") -> None:
    """[`check_weight`], and at least two axes."""
    check_matrix_kind(w, what)
    check_entries(w, what)


def check_matrix_kind(w: Tensor, what: str = "w") -> None:
    """The part of [`check_matrix`] that needs no look at the entries."""
    check_kind(w, what)
    if w.dim() < 2:
        raise ValueError(f"{what} must have shape (..., m, n), got {tuple(w.shape)}; reshape a vector to (1, n)")


def check_named_weight(name: str, w: Tensor) -> None:
    """[`check_weight`] with the layer's name in the message; a weight on the meta device has nothing to check."""
    if not w.is_meta:
        check_weight(w.detach(), f"layer {name}: weight")


def check_rtol(rtol: float) -> None:
    """Raises a ValueError unless 0 < rtol <= 1."""
    if not 0 < rtol <= 1:
        raise ValueError(f"rtol must be in (0, 1], got {rtol}; 1e-3 is the usual choice")
