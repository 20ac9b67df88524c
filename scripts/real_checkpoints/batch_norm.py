"""What a BatchNorm does to the norm of the convolution before it, and to a convolution that was just rescaled."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import hf_lipschitz
from hf_lipschitz import lipschitzify, materialized


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is any."""
    return next(_batch_norms(model), None) is not None


def largest_norm(model: nn.Module) -> float:
    """The largest norm of a Linear or convolution, each with the BatchNorm behind it: a sound bound, in evaluation."""
    with materialized(model) as plain:
        plain = copy.deepcopy(plain)
    if has_batch_norm(plain):
        lipschitzify(plain.eval(), layer_lipschitz=None, replace=("weights", "norms"), strict=True)
    return max(layer.norm_before for layer in hf_lipschitz.inspect(plain).layers)


@torch.no_grad()
def take_statistics_anew(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the running mean and variance of each BatchNorm to the mean of those of the batches.

    The model is in evaluation mode afterwards.
    """
    momenta = {norm: norm.momentum for norm in _batch_norms(model)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for pixel_values in batches:
        model(pixel_values=pixel_values)
    model.eval()
    for norm, momentum in momenta.items():
        norm.momentum = momentum


def _batch_norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
