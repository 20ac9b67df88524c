"""A net of eight weights, batches in float64, and the penalty as the trainer asks for it."""

import torch
from tiny_models import Examples
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lipschitz.training.curvature import task_curvature
from hf_lipschitz.training.selection import curvature_layers


PIXELS = torch.randn(5, 1, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 1])
BATCH = {"pixel_values": PIXELS, "labels": LABELS}


def small_net(hidden=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()
    model.main_input_name = "pixel_values"
    return model


def task_of(model):
    def task_loss(inputs):
        logits = model(inputs["pixel_values"])
        return cross_entropy(logits, inputs["labels"]), {"logits": logits}

    return task_loss


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def double_batch(model, count=4):
    batch = Examples(model, count).batch()
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    return batch


def run(model, batch, curvature="hutchinson", seed=5, layers="default", **values):
    """The penalty as the trainer asks for it."""
    if layers == "default":
        layers = list(curvature_layers(model).values())

    def task_loss(inputs):
        outputs = model(**inputs)
        return outputs.loss, outputs

    return task_curvature(model, layers, task_loss, batch, draws(seed), curvature, **values)
