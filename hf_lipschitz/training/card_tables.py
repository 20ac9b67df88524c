"""What a model card says of a training run, as numbers and short texts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_lipschitz.model_config import config_of
from hf_lipschitz.report import rounded_up
from hf_lipschitz.training.metrics import layer_metrics
from hf_lipschitz.training.unit_rows import layers_with_norms


PREFIX = "eval_"
# Of an evaluation: how long it took, not how it came out.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "compilation_time")
# Where the run was, how it was watched, and what is computed from other arguments; and secrets.
_NOT_ABOUT_TRAINING = {
    *("output_dir", "run_name", "report_to", "disable_tqdm", "debug", "resume_from_checkpoint", "accelerator_config"),
    *("dataloader_pin_memory", "hub_token", "hub_model_id", "do_train", "do_eval", "do_predict"),
}

# Of a LipschitzConfig: what is shown in any case, and what lipschitzify filled in.
_ALWAYS = ("method", "mode", "layer_lipschitz")
_OF_THE_MODEL = ("layers", "replaced", "version")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics after an optimizer step, and the training loss that was logged last."""

    epoch: float | None
    training_loss: float | None
    metrics: dict[str, float]


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> dict[int, Evaluation]:
    """The evaluations of a run by their step, with finite numbers alone; those of several datasets are put together.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            Of a [`~transformers.TrainerState`].
    """
    found: dict[int, Evaluation] = {}
    training_loss = None
    for entry in log_history:
        training_loss = entry.get("loss", training_loss)
        metrics = {
            name.removeprefix(PREFIX): float(value)
            for name, value in entry.items()
            if name.startswith(PREFIX) and not name.endswith(_TIMES) and _is_finite(value)
        }
        if metrics:
            step = entry["step"]
            before = found[step].metrics if step in found else {}
            found[step] = Evaluation(entry.get("epoch"), training_loss, {**before, **metrics})
    return found


def history_columns(found: Mapping[int, Evaluation]) -> list[str]:
    """Names of the columns of [`history_rows`]."""
    names = dict.fromkeys(name for evaluation in found.values() for name in evaluation.metrics)
    return ["step", "epoch", "training loss", *names]


def history_rows(found: Mapping[int, Evaluation], columns: Sequence[str]) -> list[list[str]]:
    """A row an evaluation, in the order of the steps; empty where a number is missing."""
    rows = []
    for step, evaluation in sorted(found.items()):
        numbers = {"epoch": evaluation.epoch, "training loss": evaluation.training_loss, **evaluation.metrics}
        rows.append([str(step), *(_shown(numbers.get(name)) for name in columns[1:])])
    return rows


def changed_arguments(args: TrainingArguments) -> dict[str, str]:
    """Training arguments that differ from their defaults, as JSON; without paths, tokens and what only shows the run.

    Args:
        args (`TrainingArguments`):
            Any kind of them.
    """
    shown = args.to_dict()
    found = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        is_unset = value == default or (not value and not default)
        if field.init and not is_unset and field.name not in _NOT_ABOUT_TRAINING:
            found[field.name] = json.dumps(shown[field.name], default=str).replace("|", "\\|")
    return found


def constraint_facts(model: nn.Module) -> dict[str, str]:
    """What the layers of a model are held to; nothing for a plain one."""
    present = layer_metrics(model)
    if not present:
        return {}
    facts = {
        "constrained layers": str(sum(1 for _ in layers_with_norms(model))),
        "largest constant of a layer": rounded_up(present["lipschitz_constant"]),
        "largest norm of a layer, at most": rounded_up(present["max_layer_norm"]),
    }
    config = config_of(model)
    if config is None:
        return facts
    values = config.to_dict()
    for field in dataclasses.fields(config):
        is_changed = field.name not in _OF_THE_MODEL and getattr(config, field.name) != field.default
        if is_changed or field.name in _ALWAYS:
            facts[f"`{field.name}`"] = f"`{json.dumps(values[field.name])}`"
    return facts


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
