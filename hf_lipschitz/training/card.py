"""A model card in each checkpoint: what was evaluated, constrained and asked for."""

from __future__ import annotations

import logging
import os
import platform
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lipschitz.integrations.base_classifiers import EMBEDDING_UNIT, PIXEL_UNIT
from hf_lipschitz.training.augmentation import PIXELS
from hf_lipschitz.training.card_tables import (
    changed_arguments,
    constraint_facts,
    evaluations,
    history_columns,
    history_rows,
)


logger = logging.getLogger(__name__)

MARKER = (
    "<!-- Written by ModelCardCallback of hf_lipschitz, which replaces this file at the next save. To keep changes of "
    "your own, remove this comment. -->"
)
PACKAGES = ("hf_lipschitz", "torch", "transformers", "accelerate", "huggingface_hub")
CERTIFIED = "certified_accuracy@"


class ModelCardCallback(TrainerCallback):
    """Writes `README.md` into each checkpoint folder and, when training ends, into `output_dir`.

    The metadata hold the metrics of the evaluation of these very weights, and none where they were saved without one;
    with `load_best_model_at_end` the card in `output_dir` is that of the best checkpoint. Only the main process
    writes, and a `README.md` that does not come from here is left alone, with a warning.

    Args:
        model_name (`str`, *optional*):
            Defaults to the name of `hub_model_id`, or of `output_dir`.
        dataset_name (`str`, *optional*, defaults to `"the evaluation dataset"`):
            What the metrics are of.
        license (`str`, *optional*), language (`str`, *optional*):
            For the metadata.

    Example::

        LipschitzTrainer(model, args, ..., callbacks=[ModelCardCallback(dataset_name="rotten_tomatoes")]).train()
    """

    def __init__(
        self,
        model_name: str | None = None,
        dataset_name: str = "the evaluation dataset",
        license: str | None = None,
        language: str | None = None,
    ) -> None:
        self.model_name = model_name
        self.dataset_name = dataset_name
        self.license = license
        self.language = language
        self._has_warned = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._write(folder, args, state, model, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self._write(
                Path(args.output_dir), args, state, model, state.best_global_step if is_best else state.global_step
            )

    def _write(self, folder: Path, args: TrainingArguments, state: TrainerState, model: nn.Module, step: int) -> None:
        obstacle = obstacle_to_a_card(folder)
        if obstacle is None:
            self.card(args, state, model, step).save(folder / "README.md")
        elif not self._has_warned:
            logger.warning("no model card is written: %s", obstacle)
            self._has_warned = True

    def card(self, args: TrainingArguments, state: TrainerState, model: nn.Module, step: int) -> ModelCard:
        """The card of the weights that there were after `step` optimizer steps.

        Args:
            args (`TrainingArguments`), state (`TrainerState`):
                Of the trainer.
            model (`torch.nn.Module`):
                With these weights, not wrapped for data parallelism.
            step (`int`):
                At most `state.global_step`.
        """
        found = evaluations(state.log_history)
        metrics = found[step].metrics if step in found else {}
        unit = PIXEL_UNIT if getattr(model, "main_input_name", None) == PIXELS else EMBEDDING_UNIT
        base_model, task = hub_id_of(model), task_of(model)
        epoch = state.epoch if step == state.global_step else None
        name = self.model_name or (args.hub_model_id or Path(args.output_dir).resolve().name).rpartition("/")[2]
        certified = any(CERTIFIED in metric for metric in metrics)
        data = ModelCardData(
            language=self.language,
            license=self.license,
            library_name="transformers",
            pipeline_tag=task,
            base_model=base_model,
            tags=["hf_lipschitz", "generated_from_trainer", *(["certified-robustness"] if certified else [])],
            model_name=name,
            eval_results=self._eval_results(metrics, task, unit) or None,
        )
        template = resources.files("hf_lipschitz") / "templates" / "training_card.md"
        columns = history_columns(found)
        return ModelCard.from_template(
            data,
            template_str=template.read_text(encoding="utf-8"),
            marker=MARKER,
            model_name=name,
            model_class=type(_base_of(model)).__name__,
            base_model=base_model,
            step=step,
            epoch=found[step].epoch if step in found else epoch,
            dataset_name=self.dataset_name,
            metrics=metrics,
            certified=certified,
            unit=unit,
            columns=columns,
            history=history_rows(found, columns),
            constraint=constraint_facts(model),
            arguments=changed_arguments(args),
            arguments_class=type(args).__name__,
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        )

    def _eval_results(self, metrics: dict[str, float], task: str | None, unit: str) -> list[EvalResult]:
        if task is None:
            return []
        return [
            EvalResult(
                task_type=task,
                dataset_type="custom",
                dataset_name=self.dataset_name,
                metric_type=metric.partition("@")[0],
                metric_name=f"{metric} ({unit})" if CERTIFIED in metric else metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]


def obstacle_to_a_card(folder: str | os.PathLike[str]) -> str | None:
    """Why no card may be written into a folder: it is not there, or has a `README.md` of somebody else."""
    path = Path(folder) / "README.md"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if path.exists() and MARKER not in path.read_text(encoding="utf-8"):
        return f"{path} was not written by ModelCardCallback; move it away to get a card"
    return None


def hub_id_of(model: nn.Module) -> str | None:
    """The model on the hub that `model` was loaded from; `None` for a folder, or where none is known."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name or Path(name).exists() or Path(name).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def task_of(model: nn.Module) -> str | None:
    """The task of a model of transformers, by the hub's name; `None` for others."""
    name = type(_base_of(model)).__name__
    for task, classes in TASK_MAPPING.items():
        if any(name == known or (isinstance(known, (tuple, list)) and name in known) for known in classes.values()):
            return task
    return None


def _base_of(model: nn.Module) -> nn.Module:
    """Without the wrapper of adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
