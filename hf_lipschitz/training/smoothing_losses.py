"""Losses of the smoothed classifier, from the logits of several noisy copies of each example."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.training.loss_checks import check_positive, checked_labels, checked_logits


# Scores are taken no nearer to 0 and 1 than this, where Φ⁻¹ is ∓7.03.
LEAST_SCORE = 1e-12
# Below ξ of scores at both ends.
LARGEST_GAMMA = 14.0


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""
    \\(-\log \frac1m \sum_i p_i(y)\\), p_i the softmax of the i-th copy: an **estimate** of the cross-entropy of the
    softmax smoothed by the noise, from above in the mean (Jensen). It is what SmoothAdv attacks (Salman et al. 2019,
    arXiv:1906.04584, section 2.2) and the classification loss of MACER (Zhai et al. 2020, arXiv:2001.02378).

    Args:
        logits (`Tensor` of shape `(m, B, K)`):
            Of m noisy copies of each example. The logarithm is taken of the sum in logarithms: it is finite, with
            finite gradients, where scores underflow.
        labels (`Tensor` of shape `(B,)`):
            y, in [0, K).

    Returns:
        `Tensor`: 0-dim, the mean over the batch, in at least float32.

    Raises:
        ValueError: a shape or a label is out of range, logits are NaN or inf.
        TypeError: logits are no floating-point tensor, or labels no integers.
    """
    wide = checked_logits(logits, are_copies=True)
    labels = checked_labels(labels, wide)
    return F.nll_loss(_log_mean(F.log_softmax(wide, -1)), labels)


def consistency(logits: Tensor, *, kl_weight: float = 10.0, entropy_weight: float = 0.5) -> Tensor:
    r"""
    \\(\lambda \frac1m \sum_i KL(\hat p \,\|\, p_i) + \eta H(\hat p)\\) with \\(\hat p = \frac1m \sum_i p_i\\), p_i the
    softmax of the i-th copy: the copies are to agree, and to be sure (Jeong & Shin 2020, arXiv:2006.04062, section
    3). It is added to the mean cross-entropy over the copies. Gradients go through p̂ as well.

    Args:
        logits (`Tensor` of shape `(m, B, K)`):
            Of m ≥ 2 noisy copies of each example.
        kl_weight (`float`, *optional*, defaults to 10.0):
            λ > 0.
        entropy_weight (`float`, *optional*, defaults to 0.5):
            η ≥ 0.

    Returns:
        `Tensor`: 0-dim, the mean over the batch, in at least float32.

    Raises:
        ValueError: there are less than two copies, a weight is out of range, logits are NaN or inf.
        TypeError: logits are no floating-point tensor.
    """
    check_positive("kl_weight", kl_weight)
    check_positive("entropy_weight", entropy_weight, or_zero=True)
    wide = checked_logits(logits, are_copies=True)
    if len(wide) < 2:
        raise ValueError("consistency compares noisy copies of an example: it needs at least two, got 1")
    logs = F.log_softmax(wide, -1)
    log_mean = _log_mean(logs)
    mean = log_mean.exp()
    divergence = (mean * (log_mean - logs.mean(0))).sum(-1)
    entropy = -(mean * log_mean).sum(-1)
    return (kl_weight * divergence + entropy_weight * entropy).mean()


def macer(logits: Tensor, labels: Tensor, *, sigma: float, gamma: float = 8.0, beta: float = 16.0) -> Tensor:
    r"""
    \\(\frac\sigma2 \max(0,\, \gamma - \xi)\\), \\(\xi = \Phi^{-1}(\hat p_y) - \Phi^{-1}(\max_{k \ne y} \hat p_k)\\),
    of the examples with ξ ≥ 0, and 0 of the others, with p̂ the mean over the copies of the softmax of β times the
    logits (Zhai et al. 2020, arXiv:2001.02378, algorithm 1). Where it is positive it falls as fast as the radius σξ/2
    of the smoothed β-softmax grows; that radius is an **estimate** here. It is added, times a weight (12 there), to
    [`smoothed_cross_entropy`].

    Scores are computed in float64 and kept between 1e-12 and 1 - 1e-12, so that values and gradients are finite. No
    gradient goes through a score beyond; where that is p̂_y, ξ is above every γ. (The published code leaves out the
    examples whose Φ⁻¹ is infinite.)

    Args:
        logits (`Tensor` of shape `(m, B, K)`):
            Of m noisy copies of each example.
        labels (`Tensor` of shape `(B,)`):
            y, in [0, K).
        sigma (`float`):
            σ > 0 of the noise; the loss has its unit.
        gamma (`float`, *optional*, defaults to 8.0):
            γ, in (0, 14): radii beyond σγ/2 are not asked for.
        beta (`float`, *optional*, defaults to 16.0):
            β > 0, the inverse temperature: the larger, the closer p̂ is to the shares of votes.

    Returns:
        `Tensor`: 0-dim, the mean over the whole batch, in at least float32.

    Raises:
        ValueError: a parameter, a shape or a label is out of range, logits are NaN or inf.
        TypeError: logits are no floating-point tensor, or labels no integers.
    """
    for name, value in (("sigma", sigma), ("gamma", gamma), ("beta", beta)):
        check_positive(name, value)
    if gamma >= LARGEST_GAMMA:
        raise ValueError(f"gamma must be below {LARGEST_GAMMA:g}, which no scores reach, got {gamma}; 8.0 is usual")
    wide = checked_logits(logits, are_copies=True)
    labels = checked_labels(labels, wide)
    scores = F.softmax(beta * wide.double(), -1).mean(0)
    truth = F.one_hot(labels, scores.shape[1]).bool()
    own = scores.gather(1, labels[:, None]).squeeze(1)
    other = scores.masked_fill(truth, -math.inf).amax(-1)
    gap = _quantile(own) - _quantile(other)
    loss = torch.where(own >= other, (gamma - gap).clamp_min(0), 0.0)
    return (sigma / 2 * loss.mean()).to(wide.dtype)


def _log_mean(logs: Tensor) -> Tensor:
    return torch.logsumexp(logs, 0) - math.log(len(logs))


def _quantile(scores: Tensor) -> Tensor:
    return torch.special.ndtri(scores.clamp(LEAST_SCORE, 1 - LEAST_SCORE))
