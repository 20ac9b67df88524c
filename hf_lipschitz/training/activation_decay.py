"""The penalty on the activations that enter the last layer of a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lipschitz.holders import CONVOLUTIONS


# Two tokens whose rows of logits are equal are the same token but for rounding, unless the head maps them together.
SAME_TOKEN_RTOL = 1e-3


class HeadCall(NamedTuple):
    """What went into the head and came out of it in one forward."""

    head: nn.Module
    activations: Tensor
    outputs: Tensor


@contextmanager
def captured(head: nn.Module) -> Iterator[list[HeadCall]]:
    """Records the calls of `head` inside the block, with their autograd graph."""
    calls: list[HeadCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append(HeadCall(module, args[0], output))

    handle = head.register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def activation_decay(activations: Tensor) -> Tensor:
    r"""
    \\(\frac1B \sum_i \|h_i\|^2\\), accumulated in at least float32.

    For a linear head W with noise \\(\varsigma\,\varepsilon\\) on its weights, ε standard normal, and the
    cross-entropy CE over K classes, \\(CE \le E[CE] \le CE + \frac{\varsigma^2}{2}(1-\frac1K)\|h\|^2\\): λ = ς²/2
    times this is an **upper bound** of what the noise adds to the loss. The largest eigenvalue of the Hessian of CE
    with respect to W is at most \\(\frac12\|h\|^2\\).

    Args:
        activations (`Tensor` of shape `(B, d)`):
            What enters the head, one row an example.

    Returns:
        `Tensor`: 0-dim.
    """
    wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
    return wide.pow(2).sum(-1).mean()


def example_activations(call: HeadCall, logits: Tensor) -> Tensor:
    """The rows of activations that the model's logits come from.

    A head that is applied to the pooled example gives its input as it is. One that is applied to every token, before
    the model picks the logits of one token, gives for each example the activations of the token whose logits were
    picked: the one whose row of outputs equals them.

    Args:
        call (`HeadCall`):
            Activations of shape `(B, d)`, `(B, T, d)`, or `(B, d, *kernel_size)` for a convolution.
        logits (`Tensor` of shape `(B, K)`):
            Of the same forward.

    Returns:
        `Tensor` of shape `(B, d)`, part of the autograd graph.

    Raises:
        RuntimeError: the outputs of the head are not the logits, or several different tokens have the same outputs.
    """
    head, activations, outputs = call
    if isinstance(head, CONVOLUTIONS) and tuple(activations.shape[2:]) != tuple(head.kernel_size):
        raise RuntimeError(
            "activation_decay: the head is a convolution applied at several places, which has no single activation an "
            "example; set head_module to a layer after the pooling, or activation_decay=0"
        )
    rows = outputs.detach()
    asked = logits.detach().to(rows.dtype)
    if rows[0].numel() == asked[0].numel() and torch.equal(rows.flatten(1), asked.flatten(1)):
        return activations.flatten(1)
    if rows.ndim != 3 or asked.shape != (rows.shape[0], rows.shape[2]):
        raise RuntimeError(_not_the_head(rows, asked))
    return _picked_tokens(activations, (rows == asked.unsqueeze(1)).all(-1))


def _picked_tokens(activations: Tensor, matches: Tensor) -> Tensor:
    counts = matches.sum(1)
    if not bool((counts > 0).all()):
        raise RuntimeError(
            "activation_decay: the logits of an example are those of no token; name the classifier's last layer by "
            "head_module, or set activation_decay=0"
        )
    picked = activations[torch.arange(len(matches), device=matches.device), matches.int().argmax(1)]
    if bool((counts > 1).any()):
        distance = torch.linalg.vector_norm((activations - picked.unsqueeze(1)).detach(), dim=-1) * matches
        if bool((distance.amax(1) > SAME_TOKEN_RTOL * torch.linalg.vector_norm(picked.detach(), dim=-1)).any()):
            raise RuntimeError(
                "activation_decay: several tokens have the logits of their example, so that its token is not known; "
                "initialise the head with non-zero weights, or set activation_decay=0"
            )
    return picked


def _not_the_head(rows: Tensor, logits: Tensor) -> str:
    return (
        f"activation_decay: the outputs of the head, of shape {tuple(rows.shape)}, are not the model's logits, of "
        f"shape {tuple(logits.shape)}; name the classifier's last layer by head_module, or set activation_decay=0"
    )
