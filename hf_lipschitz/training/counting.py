"""Which rows of logits count in a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss


IGNORED = -100

# What the gradient of a mean loss is multiplied by, so that it does not underflow in half precision.
SCALE = 2.0**14

# Of a scaled gradient: a row whose softmax is one class but for rounding sums to about 1e-7.
ROUNDING = 1e-5 * SCALE


def shifted(labels: Tensor) -> Tensor:
    """Labels `(B, T)` of the next token at each position, as the loss of a causal language model shifts them."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def counted_rows(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    """Which rows of logits the loss is about: those whose label is not -100.

    Args:
        labels (`Tensor`, *optional*):
            One class a row: `(B,)` or `(B, 1)` for `(B, K)` logits, `(B, T)` for `(B, T, K)` logits, already shifted
            if the loss shifts. Labels of the shape of the logits (several labels an example, one-hot frames), of a
            floating dtype, or of a single output (regression) leave no row out.
        logits (`Tensor` of shape `(..., K)`):
            The model's.

    Returns:
        `Tensor` of booleans of the shape of the logits without the last axis, or `None` if every row counts.

    Raises:
        RuntimeError: logits of tokens without labels, or labels that are not one a row.
    """
    if labels is None:
        if logits.ndim == 2:
            return None
        raise RuntimeError(
            f"activation_decay: the logits, of shape {tuple(logits.shape)}, are those of tokens, and the batch has no "
            "'labels' that say which of them count; give train_dataset a column 'labels', or set activation_decay=0"
        )
    if labels.is_floating_point() or labels.shape == logits.shape or logits.shape[-1] == 1:
        return None
    if labels.numel() != logits.shape[:-1].numel():
        raise RuntimeError(
            f"activation_decay: labels of shape {tuple(labels.shape)} are not one for each row of the logits, of "
            f"shape {tuple(logits.shape)}; set activation_decay=0"
        )
    return labels.reshape(logits.shape[:-1]) != IGNORED


def logits_gradient(loss: Tensor, outputs: Tensor, num_classes: int) -> Tensor:
    """`SCALE` times the gradient of a loss with respect to the outputs of the head.

    Args:
        loss (`Tensor`):
            0-dim; its graph stays.
        outputs (`Tensor`):
            Of `(B, K)`, `(B, T, K)`, or for a convolution `(B, K, 1, ...)`.
        num_classes (`int`):
            K.

    Returns:
        `Tensor` of shape `(rows, K)`; zero if the loss does not use them.
    """
    (gradient,) = torch.autograd.grad(
        loss, outputs, torch.full_like(loss, SCALE), retain_graph=True, materialize_grads=True
    )
    return gradient.reshape(-1, num_classes)


def loss_shifts_labels(model: nn.Module, gradient: Tensor, labels: Tensor) -> bool:
    """Whether the row of logits at t is about the label at t + 1.

    The loss itself tells: its gradient with respect to the logits is zero at rows that do not count. Names do not
    tell. Of transformers' causal language models a dozen families, BART, Whisper and XLM among them, do not shift,
    and GPT2LMHeadModel, which does, has no `loss_type`; `config.is_decoder` is about the attention mask; and a loss
    of one's own may do either. Where the gradient leaves it open (a loss that also uses other rows, or one whose
    gradient has underflowed), a model shifts if its loss function is transformers' causal one and it has no encoder.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        gradient (`Tensor` of shape `(B, T, K)`):
            Of the loss with respect to the logits, or to the outputs of the head.
        labels (`Tensor` of shape `(B, T)`):
            As they are given to the model.

    Returns:
        `bool`.
    """
    used = gradient.ne(0).any(-1)
    at_own, at_next = labels != IGNORED, shifted(labels) != IGNORED
    only_own = bool((used & at_own & ~at_next).any())
    only_next = bool((used & at_next & ~at_own).any())
    is_open = (only_own and only_next) or bool((used & ~at_own & ~at_next).any()) or not bool(used.any())
    if not is_open:
        return not only_own
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_function", None) is ForCausalLMLoss and not is_encoder_decoder


def is_cross_entropy(gradient: Tensor) -> bool:
    """Whether the rows of the gradient of a loss with respect to `(..., K)` logits sum to zero, all in all.

    Those of a cross-entropy over classes do, p - y, with smoothed labels too; those of a binary cross-entropy for
    each label and of a regression do not, but by chance.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    sums = gradient.sum(-1, dtype=wide).abs().sum()
    sizes = torch.linalg.vector_norm(gradient, 1, dtype=wide)
    return bool(sums <= 0.05 * sizes + ROUNDING)
