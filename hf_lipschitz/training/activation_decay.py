"""The penalty on the activations that enter the last layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.training.counting import (
    IGNORED,
    counted_rows,
    is_cross_entropy,
    logits_gradient,
    loss_shifts_labels,
    shifted,
)
from hf_lipschitz.training.head import find_head
from hf_lipschitz.training.head_calls import HeadCall, captured, example_activations
from hf_lipschitz.training.outputs import logits_of


# Entries of logits whose probabilities are in memory at once, in float32.
CHUNK = 2**24


def activation_decay(activations: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""
    \\(\frac1N \sum_i w_i \|h_i\|^2\\), accumulated in at least float32.

    For a linear head W with noise \\(\varsigma\,\varepsilon\\) on its weights, ε standard normal, and the
    cross-entropy CE over K classes, \\(CE \le E[CE] \le CE + \frac{\varsigma^2}{2}(1-\frac1K)\|h\|^2\\): λ = ς²/2
    times the unweighted mean is an **upper bound** of what the noise adds to the loss. The largest eigenvalue of the
    Hessian of CE with respect to W is at most \\(\frac12\|h\|^2\\).

    Args:
        activations (`Tensor` of shape `(..., d)`):
            What enters the head, one row an example or token.
        weights (`Tensor` of shape `(...)`, *optional*):
            Of each row, by default 1.

    Returns:
        `Tensor`: 0-dim; 0 if there are no rows.
    """
    wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
    squares = wide.pow(2).sum(-1)
    if weights is not None:
        squares = squares * weights
    return squares.sum() / max(squares.numel(), 1)


@torch.no_grad()
def unit_weights(logits: Tensor) -> Tensor:
    """1 for each row: the mean of ‖h‖², the **upper bound** of [`activation_decay`]."""
    return logits.new_ones(logits.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def hessian_trace_weights(logits: Tensor) -> Tensor:
    r"""
    \\(1 - \|p\|^2\\) for each row, p the softmax of the logits, in at least float32 and without a gradient.

    \\((1-\|p\|^2)\|h\|^2\\) is, exactly, the trace of the Hessian of the cross-entropy with respect to the weight of
    a linear head without its bias; ς²/2 times it is a second-order **estimate**, not a bound, of what noise N(0, ς²)
    on that weight adds to the loss. It is at most \\((1-\frac1K)\|h\|^2\\), the bound. As p is held fixed, training
    lowers ‖h‖ at examples that are not yet decided, and does not push p to be confident.

    Args:
        logits (`Tensor` of shape `(..., K)`):
            Of a softmax over K classes.

    Returns:
        `Tensor` of shape `(...)`, in [0, 1 - 1/K] but for rounding.
    """
    rows = logits.flatten(0, -2)
    weights = [_gini(chunk) for chunk in rows.split(max(CHUNK // logits.shape[-1], 1))]
    return torch.cat(weights).reshape(logits.shape[:-1])


def _gini(logits: Tensor) -> Tensor:
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return (p * (1 - p)).sum(-1)


# The weights of the rows of activations, from the logits.
ACTIVATION_DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_norm": unit_weights,
    "hessian_trace": hessian_trace_weights,
}


class HeadDecay:
    r"""
    Activation decay at the last layer of any model whose logits come out of it: \\(\frac1N \sum_i w_i \|h_i\|^2\\)
    over the rows of logits that count in the loss.

    For logits `(B, K)` (sequences, images, audio) the rows are the examples; for logits `(B, T, K)` (token
    classification, causal and masked language models) they are the tokens, with the labels shifted if the loss
    shifts them ([`loss_shifts_labels`], decided at the first batch). Rows whose label is -100 do not count.

    The mean is over the rows of one micro-batch, as the mean task loss of that micro-batch is. Over accumulated
    micro-batches and processes it is the mean of their means: for examples the mean over all of them, for tokens
    one in which the tokens of a micro-batch with few of them weigh more.

    Args:
        decay (`str`, *optional*, defaults to `"squared_norm"`):
            A key of `ACTIVATION_DECAYS`: `"squared_norm"`, w = 1, a **bound**, or `"hessian_trace"`,
            w = 1 - ‖p‖², an **estimate**. Both are about the cross-entropy over classes.
        head_module (`str`, *optional*):
            The name of the last layer, where it is not found by itself.

    Raises:
        ValueError: unknown `decay`.
    """

    def __init__(self, decay: str = "squared_norm", head_module: str | None = None) -> None:
        if decay not in ACTIVATION_DECAYS:
            raise ValueError(f"unknown activation decay {decay!r}; known: {', '.join(ACTIVATION_DECAYS)}")
        self.decay = decay
        self.head_module = head_module
        self._is_shifted: bool | None = None
        self._is_checked = False

    def check(self, model: nn.Module) -> None:
        """Before training.

        Args:
            model (`torch.nn.Module`):
                Not wrapped for data parallelism.

        Raises:
            ValueError: the model has no head, or nothing but its head is trained.
        """
        name, _ = find_head(model, self.head_module)
        others = (p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(f"{name}."))
        if not any(parameter.requires_grad for parameter in others):
            raise ValueError(
                f"activation_decay changes nothing: no parameter outside the head {name!r} is trained, so that the "
                "activations entering it are fixed; unfreeze a layer before it, or set activation_decay=0"
            )

    def captured(self, model: nn.Module) -> AbstractContextManager[list[HeadCall]]:
        """Around the forward: records what enters the head of `model`, which is not wrapped."""
        return captured(find_head(model, self.head_module)[1])

    def penalty(
        self, model: nn.Module, calls: list[HeadCall], loss: Tensor, outputs: Any, inputs: Mapping[str, Any]
    ) -> Tensor:
        """The penalty of one micro-batch.

        Args:
            model (`torch.nn.Module`):
                Not wrapped for data parallelism.
            calls (`list[HeadCall]`):
                From `captured`, around the one forward.
            loss (`Tensor`):
                0-dim, the task loss of that forward, with its graph: it is differentiated with respect to the logits
                at the first batch.
            outputs (`ModelOutput` or `tuple`):
                Of that forward: `logits`, or the second entry of a tuple.
            inputs (`Mapping[str, Any]`):
                Its batch. `labels` as the model gets them; `shift_labels` are taken as already shifted.

        Returns:
            `Tensor`: 0-dim, at least float32, part of the autograd graph; 0 if no row counts.

        Raises:
            RuntimeError: the head was not called once, its outputs are not the logits, its activations have no
                gradient, the labels are missing or do not fit, or `"hessian_trace"` meets another loss than a
                cross-entropy over classes.
        """
        if len(calls) != 1:
            raise RuntimeError(
                f"activation_decay: the head was called {len(calls)} times in a forward; name the model's last layer "
                "by head_module, or set activation_decay=0"
            )
        logits = logits_of(outputs)
        activations = example_activations(calls[0], logits)
        if not activations.requires_grad:
            raise RuntimeError(
                "activation_decay changes nothing: the activations entering the head have no gradient; train a layer "
                "before the head, or set activation_decay=0"
            )
        rows = counted_rows(self._aligned_labels(model, calls[0], loss, logits, inputs), logits)
        self._check_loss(calls[0], loss, logits)
        if rows is not None:
            activations, logits = activations[rows], logits.detach()[rows]
        return activation_decay(activations, ACTIVATION_DECAYS[self.decay](logits))

    def _aligned_labels(
        self, model: nn.Module, call: HeadCall, loss: Tensor, logits: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if labels is None or logits.ndim != 3 or labels.shape != logits.shape[:2]:
            return labels
        if self._is_shifted is None and bool((labels != IGNORED).any()):
            self._is_shifted = loss_shifts_labels(
                model, logits_gradient(loss, call.outputs, logits.shape[-1]).view_as(logits), labels
            )
        return shifted(labels) if self._is_shifted else labels

    def _check_loss(self, call: HeadCall, loss: Tensor, logits: Tensor) -> None:
        if self.decay != "hessian_trace" or self._is_checked:
            return
        if not is_cross_entropy(logits_gradient(loss, call.outputs, logits.shape[-1])):
            raise RuntimeError(
                "activation decay 'hessian_trace' is that of a cross-entropy over classes, and the loss is another "
                "one (several labels an example, or a regression); take 'squared_norm'"
            )
        self._is_checked = True
