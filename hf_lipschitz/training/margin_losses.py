"""Losses that ask for a margin, which a Lipschitz constant turns into a radius."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.training.loss_checks import check_positive, checked_labels, checked_logits


# Of Araujo et al. 2023: a radius of 3/2 where differences of logits have constant √2.
OFFSET = 1.5 * math.sqrt(2)
TEMPERATURE = 0.25
MARGIN = 0.7

LossOfOutputs = Callable[..., Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits `(B, K)` and labels `(B,)`, in at least float32; 0-dim."""
    wide = checked_logits(logits)
    return F.cross_entropy(wide, checked_labels(labels, wide))


def offset_cross_entropy(
    logits: Tensor, labels: Tensor, *, offset: float = OFFSET, temperature: float = TEMPERATURE
) -> Tensor:
    r"""
    The cross-entropy with an offset u on the true class and a temperature t, \\(t \cdot CE((z - u\,e_y)/t,\, y) =
    t \log\big(1 + \sum_{j \ne y} e^{(u - (z_y - z_j))/t}\big)\\) (Prach & Lampert 2022, arXiv:2208.03160, with
    u = √2 and t = 1/4; Araujo et al. 2023, arXiv:2303.03169, with u = 3√2/2).

    The offset is subtracted, so that z_y has to exceed the others by more than u before the loss falls. The factor t
    in front keeps the gradient with respect to z_y between -1 and 0 whatever t is; for t → 0 the loss is the hinge
    \\(\max(0, u - \min_j (z_y - z_j))\\), above which it is by at most t log K. Where the differences of logits have
    Lipschitz constant √2, a margin u is a radius of u/√2: 3/2 for the default.

    Args:
        logits (`Tensor` of shape `(B, K)`):
            z, of a model of which a constant is known: a constant multiple of z is another loss.
        labels (`Tensor` of shape `(B,)`):
            y, in [0, K).
        offset (`float`, *optional*, defaults to 3√2/2):
            u ≥ 0, in the unit of the logits.
        temperature (`float`, *optional*, defaults to 0.25):
            t > 0.

    Returns:
        `Tensor`: 0-dim, the mean over the batch, in at least float32.

    Raises:
        ValueError: a parameter or a label is out of range, shapes do not fit, logits are NaN or inf.
        TypeError: logits are no floating-point tensor, or labels no integers.
    """
    check_positive("offset", offset, or_zero=True)
    check_positive("temperature", temperature)
    wide = checked_logits(logits)
    labels = checked_labels(labels, wide)
    truth = F.one_hot(labels, wide.shape[1]).to(wide)
    return temperature * F.cross_entropy((wide - offset * truth) / temperature, labels)


def multi_margin(logits: Tensor, labels: Tensor, *, margin: float = MARGIN) -> Tensor:
    r"""
    The mean over the batch of \\(\frac1K \sum_{j \ne y} \max(0,\, \mu - (z_y - z_j))\\), zero once every margin is μ
    (Weston & Watkins 1999, as `torch.nn.MultiMarginLoss`; the default μ is that of Meunier et al. 2022,
    arXiv:2110.12690).

    Args:
        logits (`Tensor` of shape `(B, K)`):
            z.
        labels (`Tensor` of shape `(B,)`):
            y, in [0, K).
        margin (`float`, *optional*, defaults to 0.7):
            μ > 0, in the unit of the logits.

    Returns:
        `Tensor`: 0-dim, in at least float32.

    Raises:
        ValueError, TypeError: as [`offset_cross_entropy`].
    """
    check_positive("margin", margin)
    wide = checked_logits(logits)
    return F.multi_margin_loss(wide, checked_labels(labels, wide), margin=margin)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "offset_cross_entropy": offset_cross_entropy,
    "multi_margin": multi_margin,
}


def loss_parameters(name: str) -> dict[str, float]:
    """The parameters of a loss with their defaults.

    Raises:
        ValueError: no loss has the name.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    found = inspect.signature(LOSSES[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in found if parameter.kind is parameter.KEYWORD_ONLY}


def loss_function(name: str, **parameters: float) -> LossOfOutputs:
    """A loss as the `compute_loss_func` of [`~transformers.Trainer`].

    Args:
        name (`str`):
            A key of `LOSSES`.
        parameters (`float`):
            Of that loss.

    Returns:
        `Callable`: `(outputs, labels, num_items_in_batch=None)` to the 0-dim mean loss of the micro-batch.

    Raises:
        ValueError: the loss is unknown, has no such parameter, or the parameter is out of range.

    Example::

        LipschitzTrainer(model, args, compute_loss_func=loss_function("offset_cross_entropy", temperature=0.5))
    """
    known = loss_parameters(name)
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"loss {name!r} has no {parameter}; it has {', '.join(known) or 'no parameter'}")
    loss = LOSSES[name]
    # What is out of range is to be known before there is a batch.
    loss(torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"), **parameters)

    def of_outputs(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return loss(outputs["logits"] if isinstance(outputs, dict) else outputs[0], labels, **parameters)

    return of_outputs
