"""What a curvature penalty is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CurvatureProblem:
    """A model, the weights in question, and the task on a micro-batch.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism, nor compiled.
        weights (`Sequence[Tensor]`):
            Trained ones, as the model uses them: for a constrained layer the effective weight, part of the graph of
            the raw one.
        task_loss (`Callable`):
            Takes the inputs, runs a forward of the model and returns its 0-dim mean loss and its outputs.
        inputs (`Mapping[str, Any]`):
            Keyword arguments of the forward, labels included.
        generator (`torch.Generator`):
            Where probes come from.
        radius (`float`, *optional*, defaults to 0.0):
            How far a penalty that looks at another point goes.
        input_scale (`Tensor` or `float`, *optional*, defaults to 1.0):
            How far pixel values move when the unit in which distances are measured moves by one.
        head_module (`str`, *optional*):
            Name of the last layer, where it is not found by itself.
    """

    model: nn.Module
    weights: Sequence[Tensor]
    task_loss: Callable[[Mapping[str, Any]], tuple[Tensor, Any]]
    inputs: Mapping[str, Any]
    generator: torch.Generator
    radius: float = 0.0
    input_scale: Tensor | float = 1.0
    head_module: str | None = None

    def loss(self) -> Tensor:
        """The task loss at the present weights and inputs, with its graph."""
        return self.task_loss(self.inputs)[0]
