"""Activation decay against other regularisers: test accuracy, and the curvature of the loss in the last layer.

    python scripts/reproduce/activation_decay.py
    python scripts/reproduce/activation_decay.py --tasks mnist --label-noise 0.4 --output noisy.json
    python scripts/reproduce/activation_decay.py --table  # what activation_decay.json holds so far, in Markdown

MiniLM is fine-tuned on the demo's tweets, and the demo's small ResNet trained on MNIST of which a share of the
training labels is replaced by other ones; without constraint and without noise on the inputs.

- Each method but "plain" has one number, with three values to choose from. The value is chosen on the first seed by a
  part that is cut from the training data, with their wrong labels; the test data have no say. The runs of the table
  train on all the training data. Seeds share the test data, and differ in the new head or the whole start, in the
  order of the examples and in the wrong labels; all methods of one seed have them in common.
- "plain" has the dropout of the checkpoint, 0.1 in MiniLM. So have all methods but "dropout".
- "SAM" moves all trained weights. It and "curvature", which is about the last block and the head, are those of
  `LipschitzTrainer`: their forwards run in evaluation mode, with BatchNorm's running statistics.
- λ_max and trace are those of the Hessian of the mean cross-entropy on test examples with respect to the weight of the
  last layer, exact to rounding. A last layer with large logits lowers them as well as small activations do.

A run that is in the file of --output with the same settings is not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from regularized_runs import Figures, Record, Setting, Trainings, versions
from regularized_tasks import TASKS, Task
from regularizer_table import lines, markdown_of, table_of
from regularizers import PLAIN, TITLES, training_arguments
from rich.console import Console
from transformers import HfArgumentParser, logging


@dataclass
class Arguments:
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    methods: list[str] = field(default_factory=lambda: list(TITLES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "values are chosen on the first"})
    weight_decay: list[float] | None = field(default=None, metadata={"help": "grid; default: that of the task"})
    dropout: list[float] | None = field(default=None, metadata={"help": "grid; default: that of the task"})
    sam: list[float] | None = field(default=None, metadata={"help": "grid of radii; default: that of the task"})
    activation_decay: list[float] | None = field(default=None, metadata={"help": "grid; default: that of the task"})
    curvature: list[float] | None = field(default=None, metadata={"help": "grid; default: that of the task"})
    curvature_every: int = field(default=5, metadata={"help": "steps"})
    select_by: str = field(
        default="loss", metadata={"help": "on the validation part", "choices": ["loss", "accuracy"]}
    )
    validation: float = field(default=0.2, metadata={"help": "share of the training data that values are chosen on"})
    label_noise: float | None = field(
        default=None, metadata={"help": "share of wrong training labels; default: 0.2 for mnist, 0 for tweets"}
    )
    train_examples: int | None = field(default=None, metadata={"help": "default: that of the task"})
    epochs: float | None = field(default=None, metadata={"help": "default: that of the task"})
    max_steps: int = field(default=-1, metadata={"help": "of each training; -1: the epochs"})
    hessian_examples: int = field(default=500, metadata={"help": "test examples for the Hessian, at most"})
    threads: int = field(default=2)
    output: str = field(default="activation_decay.json", metadata={"help": "JSON file of the runs"})
    table: bool = field(default=False, metadata={"help": "train nothing, print what the file holds in Markdown"})

    def __post_init__(self) -> None:
        for given, known in ((self.tasks, TASKS), (self.methods, TITLES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")


class Comparison:
    """The runs of one task; with `trainings` the missing ones are made, and without they are left out."""

    def __init__(self, name: str, args: Arguments, record: Record, console: Console, trainings: Trainings | None):
        self.name, self.args, self.record, self.console, self.trainings = name, args, record, console, trainings
        self.task: Task = TASKS[name]

    def runs(self) -> dict[str, list[tuple[Setting, Figures]]]:
        """Of each method, over the seeds, with the value that was chosen for it."""
        found = {}
        for method in self.args.methods:
            value = self.chosen(method)
            if method == PLAIN or value is not None:
                runs = list(self.made(self.setting(method, value, seed, tuning=False) for seed in self.args.seeds))
                if runs:
                    found[method] = runs
        return found

    def chosen(self, method: str) -> float | None:
        """The value that is best on the validation part; `None` if there is nothing to choose, or not all is there."""
        if method == PLAIN:
            return None
        grid = getattr(self.args, method) or self.task.grids[method]
        tried = list(self.made(self.setting(method, value, self.args.seeds[0], tuning=True) for value in grid))
        return min(tried, key=self.badness)[0].value if len(tried) == len(grid) else None

    def badness(self, run: tuple[Setting, Figures]) -> tuple[float, float]:
        loss = math.inf if math.isnan(run[1].loss) else run[1].loss
        return (loss, 0.0) if self.args.select_by == "loss" else (-run[1].accuracy, loss)

    def made(self, settings: Iterator[Setting]) -> Iterator[tuple[Setting, Figures]]:
        for setting in settings:
            figures = self.record.find(setting)
            if figures is None and self.trainings is not None:
                figures = self.trainings.run(setting)
                self.record.add(setting, figures)
                self.console.print(progress(setting, figures), soft_wrap=True, highlight=False)
            if figures is not None:
                yield setting, figures

    def setting(self, method: str, value: float | None, seed: int, tuning: bool) -> Setting:
        args, task = self.args, self.task
        return Setting(
            task=self.name,
            method=method,
            value=value,
            seed=seed,
            validation=args.validation if tuning else None,
            train_examples=given(args.train_examples, task.train_examples),
            label_noise=self.label_noise,
            hessian_examples=args.hessian_examples,
            training={
                **task.training,
                "num_train_epochs": given(args.epochs, task.epochs),
                "max_steps": args.max_steps,
                **training_arguments(method, value, args.curvature_every),
            },
        )

    @property
    def label_noise(self) -> float:
        return given(self.args.label_noise, self.task.label_noise)

    @property
    def title(self) -> str:
        train_examples = given(self.args.train_examples, self.task.train_examples)
        epochs = given(self.args.epochs, self.task.epochs)
        length = f"{epochs:g} epochs" if self.args.max_steps < 0 else f"{self.args.max_steps} steps"
        noise = f", {self.label_noise:.0%} of their labels wrong" if self.label_noise else ""
        return f"{self.task.title}: {train_examples} to train on{noise}, {length}"


def given(value: Any, default: Any) -> Any:
    return default if value is None else value


def progress(setting: Setting, figures: Figures) -> str:
    value = "" if setting.value is None else f" {setting.value:g}"
    part = "test" if setting.validation is None else "validation"
    return (
        f"{setting.task}, seed {setting.seed}, {setting.method}{value}, {part}: accuracy {figures.accuracy:.1%}, loss "
        f"{figures.loss:.4g}, λ_max {figures.largest_eigenvalue:.4g}, trace {figures.trace:.4g}, "
        f"‖h‖² {figures.mean_square_norm:.4g}, {figures.seconds:.0f} s"
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(width=118)
    record = Record(Path(args.output))
    for name in args.tasks:
        comparison = Comparison(name, args, record, console, None if args.table else Trainings(TASKS[name]))
        found = lines(comparison.runs())
        if not found:
            raise ValueError(
                f"{args.output} has no runs on {name} with these settings: leave out --table to make them"
            )
        if args.table:
            console.print(
                f"{comparison.title}\n\n{markdown_of(found)}\n", soft_wrap=True, markup=False, highlight=False
            )
        else:
            console.print(table_of(found, comparison.title))
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
