"""What a BatchNorm does to the norm of the convolution before it, and to a convolution that was just rescaled."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from efficientnet_lite0 import ConvNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import hf_lipschitz
from hf_lipschitz.conversion import materialized


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is any."""
    return next(_batch_norms(model), None) is not None


def fuse(model: nn.Module) -> nn.Module:
    r"""Puts each BatchNorm into its convolution, in place: weight \\(\mathrm{diag}(\gamma/\sqrt{v + \epsilon}) W\\).

    In evaluation the model computes what it did, and the norm of a convolution is then that of convolution and
    BatchNorm together. Training goes on without a BatchNorm.

    Raises:
        ValueError: the model is in training mode, where a BatchNorm depends on the batch.
    """
    if model.training:
        raise ValueError("a BatchNorm can be fused in evaluation mode only: call model.eval() first")
    for block in [module for module in model.modules() if isinstance(module, ConvNorm)]:
        if isinstance(block.norm, nn.BatchNorm2d):
            block.conv, block.norm = fuse_conv_bn_eval(block.conv, block.norm), nn.Identity()
    return model


def largest_norm(model: nn.Module) -> float:
    """The largest norm of a Linear or convolution, each with the BatchNorm behind it: a sound bound, in evaluation."""
    with materialized(model) as plain:
        plain = copy.deepcopy(plain)
    return max(layer.norm_after for layer in hf_lipschitz.inspect(fuse(plain.eval())).layers)


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
