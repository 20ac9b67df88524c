"""What the trainer logs besides the loss."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_lipschitz.nn.attachment import ConstrainedLayer
from hf_lipschitz.training.unit_rows import layers_with_norms


class RunningMeans:
    """Means of the terms of the loss since they were last taken, each over the micro-batches that had it."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def take(self) -> dict[str, float]:
        """The means over all processes, which all have to call it; starts anew."""
        pairs = gather_object([(name, self._sums[name], self._counts[name]) for name in self._sums])
        self._sums.clear()
        self._counts.clear()
        names = dict.fromkeys(name for name, _, _ in pairs)
        totals = {name: [sum(p[i] for p in pairs if p[0] == name) for i in (1, 2)] for name in names}
        return {name: total / count for name, (total, count) in totals.items()}


def finite_values(terms: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The 0-dim terms as numbers.

    Raises:
        RuntimeError: one is NaN or inf; the message names it.
    """
    values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            fix = "check the data" if name == "task_loss" else "lower its weight"
            raise RuntimeError(f"{name} is {value} at step {step}: {fix}, or lower the learning rate")
    return values


def layer_metrics(model: nn.Module) -> dict[str, float]:
    """Of the constrained layers: the largest bound of a norm, the largest constant, and the logarithm to base ten of
    the product of the bounds; nothing for a plain model. A head of rows of norm one is left out."""
    layers = list(layers_with_norms(model))
    if not layers:
        return {}
    bounds = [_norm_bound(layer) for layer in layers]
    return {
        "max_layer_norm": max(bounds),
        "lipschitz_constant": max(layer.parametrization.lipschitz.item() for layer in layers),
        "log10_norm_product": sum(math.log10(bound) if bound > 0 else -math.inf for bound in bounds),
    }


def _norm_bound(layer: ConstrainedLayer) -> float:
    bound, constant = layer.parametrization.present_bound(), layer.parametrization.lipschitz.item()
    return constant if layer.parametrization.exact and bound > 0 else min(bound, constant)
