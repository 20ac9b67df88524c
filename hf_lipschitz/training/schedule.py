"""Moving the constants of constrained layers from their present norms to the asked one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_lipschitz.methods import lipschitz_share
from hf_lipschitz.model_config import config_of, set_config
from hf_lipschitz.nn.attachment import ConstrainedLayer
from hf_lipschitz.training.unit_rows import layers_with_norms


logger = logging.getLogger(__name__)

# From the share of the schedule's steps that is done, in [0, 1), to the share of the way.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    # Slow at both ends, as the learning rate of Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


def schedule_target(model: nn.Module, lipschitz_target: float | None) -> float:
    """The constant that the schedule ends at: the argument, or what the model's configuration asks for.

    Raises:
        ValueError: neither says, or no layer is constrained.
    """
    if next(layers_with_norms(model), None) is None:
        raise ValueError(
            "lipschitz_schedule needs constrained layers: call lipschitzify(model, layer_lipschitz=None) before the "
            "trainer is made, or set lipschitz_schedule='none'"
        )
    if lipschitz_target is not None:
        return lipschitz_target
    config = config_of(model)
    if config is None or config.layer_lipschitz is None:
        raise ValueError("lipschitz_schedule has no constant to go to: set lipschitz_target, for example to 1.0")
    return config.layer_lipschitz


class LipschitzScheduleCallback(TrainerCallback, ExportableState):
    r"""
    Sets the constant of each layer to \\(c_0 + (c - c_0)\,s(t/(rT))\\) after t of T optimizer steps, with s(x) = x
    (linear) or (1 - cos πx)/2 (cosine), and to the target c itself from step rT on, times the layer's share of the
    budget where a residual branch ends in it. A head of rows of norm one ([`UnitRows`]) stays as it is.

    c₀ is the bound of the norm of the layer's raw weight, so that training starts from the function of that weight. In
    cap mode it is at least c: a layer under the target stays as it is. The starts are part of the trainer's state, so
    a resumed run has the same constants at each step. While the constants are on their way the model's configuration
    says `layer_lipschitz=None`, and afterwards the target, so that every checkpoint describes itself.

    Args:
        target (`float`):
            The constant c of each layer at the end.
        ratio (`float`):
            Share r of the training steps, in (0, 1].
        schedule (`str`, *optional*, defaults to `"linear"`):
            A key of `SCHEDULES`.
    """

    def __init__(self, target: float, ratio: float, schedule: str = "linear") -> None:
        self.target = target
        self.ratio = ratio
        self.schedule = schedule
        self.starts: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        return {
            "args": {"target": self.target, "ratio": self.ratio, "schedule": self.schedule},
            "attributes": {"starts": dict(self.starts)},
        }

    def constant(self, start: float, target: float, step: int, max_steps: int) -> float:
        """The constant after `step` of `max_steps` steps."""
        if self._is_over(step, max_steps):
            return target
        return start + (target - start) * SCHEDULES[self.schedule](step / (self.ratio * max_steps))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._start(model)
        else:
            self._resume(state)
        self._set_constants(model, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._set_constants(model, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        layers = list(layers_with_norms(model))
        constants = {layer.parametrization.lipschitz.item() / lipschitz_share(layer.module) for layer in layers}
        is_at_target = all(math.isclose(constant, self.target, rel_tol=1e-12) for constant in constants)
        _describe(model, self.target if is_at_target else None)
        if not is_at_target:
            logger.warning(
                "the layers' constants are between %.4g and %.4g and not at lipschitz_target=%g: training ended, or "
                "the best checkpoint was saved, before the schedule: a lower lipschitz_schedule_ratio ends it sooner",
                min(constants),
                max(constants),
                self.target,
            )

    def _start(self, model: nn.Module) -> None:
        layers = list(layers_with_norms(model))
        self.starts = {_key(layer): _start_of(layer, self.target * lipschitz_share(layer.module)) for layer in layers}
        moved = [layer.name for layer in layers if layer.parametrization.scale() != 1]
        if moved:
            logger.warning(
                "lipschitz_schedule starts from the norms of the raw weights, which moves the constants of %d layers, "
                "such as %s: the function changes at the start. To start from the present function, "
                "lipschitzify(merge(model), layer_lipschitz=None) before the trainer is made.",
                len(moved),
                moved[0],
            )

    def _resume(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("starts")
        if not saved:
            raise ValueError(
                "the checkpoint was not trained with a lipschitz_schedule, so it cannot resume one: load it by "
                "from_pretrained and train without resume_from_checkpoint"
            )
        self.starts = dict(saved)

    def _set_constants(self, model: nn.Module, state: TrainerState) -> None:
        for layer in layers_with_norms(model):
            target = self.target * lipschitz_share(layer.module)
            constant = self.constant(self.starts[_key(layer)], target, state.global_step, state.max_steps)
            layer.parametrization.set_constant(constant)
        _describe(model, self.target if self._is_over(state.global_step, state.max_steps) else None)

    def _is_over(self, step: int, max_steps: int) -> bool:
        return step >= self.ratio * max_steps


def _key(layer: ConstrainedLayer) -> str:
    return layer.full_name


def _start_of(layer: ConstrainedLayer, target: float) -> float:
    bound = layer.parametrization.present_bound()
    return bound if layer.parametrization.exact else max(bound, target)


def _describe(model: nn.Module, layer_lipschitz: float | None) -> None:
    config = config_of(model)
    if config is not None and config.layer_lipschitz != layer_lipschitz:
        set_config(model, dataclasses.replace(config, layer_lipschitz=layer_lipschitz))
