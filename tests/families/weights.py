"""Values that tests can see, where those of a new model are trivial."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def with_visible_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every constant parameter: biases of 0, gains of 1, tokens of 0.

    A test then sees a bias that is lost or a gain that is skipped.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            value = parameter.flatten()[0].item()
            if parameter.numel() > 1 and (parameter == value).all():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if value else 0.02)
    return model


def with_statistics(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Gives the batch norms the statistics of random images; with those of a new model no signal gets through."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixel_values=torch.rand(8, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * norm.running_var.sqrt(), alpha=0.1)
    return model
