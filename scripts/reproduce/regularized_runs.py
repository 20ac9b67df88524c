"""One training with one regulariser, its figures, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from label_noise import with_label_noise
from last_layer_hessian import hessian_trace, largest_eigenvalue, last_layer_rows, mean_square_norm
from regularized_tasks import Task
from regularizers import set_dropout
from transformers import PrinterCallback, set_seed

from hf_lipschitz.demo.acts import prepared, trainer_of
from hf_lipschitz.demo.data import SPLIT_SEED


@dataclass(frozen=True)
class Setting:
    """All that a run depends on. With a share for `validation` it is one of the tuning: that share of the training
    data is left out of it, and its figures are of that share and not of the test data."""

    task: str
    method: str
    value: float | None
    seed: int
    validation: float | None
    train_examples: int
    label_noise: float
    hessian_examples: int
    training: dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """Accuracy, mean cross-entropy, and the Hessian of the latter with respect to the last layer's weight."""

    accuracy: float
    loss: float
    count: int
    largest_eigenvalue: float
    trace: float
    mean_square_norm: float
    seconds: float


class Trainings:
    """Trains on the data of one task, which is prepared once a seed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.data = task.load()
        self._parts: dict[tuple[int, int, float], tuple[Dataset, Dataset]] = {}

    def run(self, setting: Setting) -> Figures:
        train, test = self._split(setting)
        set_seed(setting.seed)
        model, processor = self.task.make(self.data, None)
        if setting.method == "dropout":
            set_dropout(model, setting.value)
        act = dataclasses.replace(self.task.act(self.data), training={**setting.training, "disable_tqdm": True})
        with tempfile.TemporaryDirectory() as directory:
            trainer = trainer_of(act, model, processor, train, test, Path(directory), setting.seed)
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            evaluated = trainer.evaluate()
            some = test.select(range(min(setting.hessian_examples, len(test))))
            inputs, logits = last_layer_rows(model, trainer.get_eval_dataloader(some))
        return Figures(
            accuracy=evaluated["eval_accuracy"],
            loss=evaluated["eval_loss"],
            count=len(test),
            largest_eigenvalue=largest_eigenvalue(inputs, logits),
            trace=hessian_trace(inputs, logits),
            mean_square_norm=mean_square_norm(inputs),
            seconds=seconds,
        )

    def _split(self, setting: Setting) -> tuple[Dataset, Dataset]:
        train, test = self._prepared(setting)
        if setting.validation is None:
            return train, test
        parts = train.train_test_split(test_size=setting.validation, seed=SPLIT_SEED)
        return parts["train"], parts["test"]

    def _prepared(self, setting: Setting) -> tuple[Dataset, Dataset]:
        key = (setting.seed, setting.train_examples, setting.label_noise)
        if key not in self._parts:
            if setting.train_examples > len(self.data.train):
                raise ValueError(
                    f"train_examples={setting.train_examples}, but {self.data.name} have {len(self.data.train)} to "
                    "train on"
                )
            train = self.data.train.select(range(setting.train_examples))
            train = with_label_noise(train, setting.label_noise, setting.seed)
            model, processor = self.task.make(self.data, None)
            self._parts[key] = prepared(train, processor, model), prepared(self.data.test, processor, model)
        return self._parts[key]


class Record:
    """The runs in a JSON file, written after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        self.runs = [(Setting(**run["setting"]), Figures(**run["figures"])) for run in runs]

    def find(self, setting: Setting) -> Figures | None:
        return next((figures for other, figures in self.runs if other == setting), None)

    def add(self, setting: Setting, figures: Figures) -> None:
        self.runs.append((setting, figures))
        runs = [{"setting": asdict(setting), "figures": asdict(figures)} for setting, figures in self.runs]
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"versions": versions(), "runs": runs}, indent=2), encoding="utf-8")
        os.replace(unfinished, self.path)


def versions() -> dict[str, str]:
    packages = ("hf-lipschitz", "torch", "transformers", "scipy")
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
