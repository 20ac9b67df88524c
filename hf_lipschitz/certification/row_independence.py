"""A check that a row's logits are a function of that row alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


TOLERANCE = 1e-3


def check_row_independence(logits_of: Callable[[Tensor], Tensor], noisy: Tensor, logits: Tensor) -> None:
    """
    Compares the logits of the first row of a batch with those it has in a batch of its own copies. Votes of rows that
    see each other are not independent samples, and no bound holds for them.

    It finds what changes the logits by a thousandth of their largest; it is a check, not a proof.

    Args:
        logits_of (`Callable`):
            The base classifier.
        noisy (`Tensor`), logits (`Tensor`):
            A batch and what the base classifier said to it.

    Raises:
        `RuntimeError`: they differ.
    """
    alone = logits_of(noisy[:1].expand_as(noisy).contiguous())[0]
    together = logits[0].to(alone.device)
    if not torch.isfinite(together).all() or not torch.isfinite(alone).all():
        return  # reported with the input's name, by the counts
    change = (alone - together).abs().max()
    if change > TOLERANCE * together.abs().max().clamp_min(1e-6):
        raise RuntimeError(
            f"The logits of an input change by {change.item():.2g} with the other rows of its batch, so that samples "
            "are not independent. Call model.eval(); BatchNorm must use its running statistics, and nothing may be "
            "normalised, quantised or routed over the batch."
        )
