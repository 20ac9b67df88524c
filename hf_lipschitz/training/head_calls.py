"""What went into a model's last layer, row by row of its logits."""

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


def example_activations(call: HeadCall, logits: Tensor) -> Tensor:
    """The activations that the model's logits come from, one row for each row of logits.

    A head that is applied to the pooled example, or to every token of a model that classifies tokens, gives its input
    as it is, times s if the model multiplies what comes out of the head by a constant s. One that is applied to every
    token, before the model picks the logits of one token, gives for each example the activations of the token whose
    logits were picked: the one whose row of outputs equals them.

    Args:
        call (`HeadCall`):
            Activations of shape `(B, d)`, `(B, T, d)`, or `(B, d, *kernel_size)` for a convolution.
        logits (`Tensor` of shape `(B, K)` or `(B, T, K)`):
            Of the same forward.

    Returns:
        `Tensor` of shape `(B, d)` or `(B, T, d)`, as the logits, part of the autograd graph.

    Raises:
        RuntimeError: the outputs of the head are not the logits, or several different tokens have the same outputs.
    """
    head, activations, outputs = call
    rows = outputs.detach()
    asked = logits.detach()
    if isinstance(head, CONVOLUTIONS):
        if tuple(activations.shape[2:]) != tuple(head.kernel_size):
            raise RuntimeError(
                "activation_decay: the head is a convolution applied at several places, which has no single "
                "activation an example; set head_module to a layer after the pooling, or activation_decay=0"
            )
        activations, rows = activations.flatten(1), rows.flatten(1)
        asked = asked.flatten(1)
    if rows.numel() == asked.numel() and rows.shape[-1] == asked.shape[-1]:
        scale = _scale(rows.reshape(asked.shape), asked)
        if scale is not None:
            activations = activations.reshape(*asked.shape[:-1], activations.shape[-1])
            return activations if scale == 1.0 else scale * activations
    if rows.ndim != 3 or asked.shape != (rows.shape[0], rows.shape[2]):
        raise RuntimeError(_not_the_head(rows, asked))
    return _picked_tokens(activations, (rows == asked.to(rows.dtype).unsqueeze(1)).all(-1))


def _scale(rows: Tensor, logits: Tensor) -> float | None:
    """s such that the logits are s times the rows but for rounding, or `None`."""
    # Logits over a vocabulary are large: in the common case they are the same memory.
    is_same_memory = rows.data_ptr() == logits.data_ptr() and rows.dtype == logits.dtype
    if (is_same_memory and rows.stride() == logits.stride()) or torch.equal(rows, logits.to(rows.dtype)):
        return 1.0
    largest = rows.abs().argmax()
    scale = (logits.flatten()[largest].double() / rows.flatten()[largest].double()).item()
    rtol = 8 * max(torch.finfo(rows.dtype).eps, torch.finfo(logits.dtype).eps)
    return scale if torch.allclose(logits.to(rows.dtype), scale * rows, rtol=rtol, atol=0.0) else None


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
        f"shape {tuple(logits.shape)}: it is not the last layer, or the model pools or caps what comes out of it; "
        "name the classifier's last layer by head_module, or set activation_decay=0"
    )
