"""Real checkpoints held to one constant a layer: at once, or annealed from their own norms while they are fine-tuned.

    python scripts/real_checkpoints/anneal.py --model minilm --seeds 0 1 2 --output minilm.json
    python scripts/real_checkpoints/anneal.py --model efficientnet --output efficientnet.json

Every row that trains starts from the pretrained weights and a new head, and takes the same steps on the same batches;
the settings were not chosen row by row. "norm" is the largest spectral norm of a Linear or convolution, a sound bound
from `hf_lipschitz.inspect`. It bounds layers, not the model: norms and attention are as they were.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch
from batch_norm import has_batch_norm, largest_norm, take_statistics_anew
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tasks import TASKS, Task
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedModel, PrinterCallback, logging, set_seed

import hf_lipschitz
from hf_lipschitz import lipschitzify
from hf_lipschitz.demo.acts import trainer_of
from hf_lipschitz.demo.data import LabelledData


@dataclass
class Arguments:
    model: str = field(default="minilm", metadata={"choices": list(TASKS)})
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: float | None = field(default=None, metadata={"help": "default: those of the model's task"})
    learning_rate: float | None = field(default=None, metadata={"help": "default: that of the model's task"})
    constant: float = field(default=1.0, metadata={"help": "of each layer"})
    schedule_ratios: list[float] = field(
        default_factory=lambda: [0.4, 0.8], metadata={"help": "shares of the steps until the constant is reached"}
    )
    methods: list[str] = field(default_factory=lambda: ["gram"], metadata={"help": "of lipschitzify"})
    threads: int = field(default=1)
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


@dataclass(frozen=True)
class Row:
    """One model, evaluated; `norm_with_batch_norm` is of each convolution and the BatchNorm behind it as one layer."""

    name: str
    seed: int
    accuracy: float
    count: int
    norm: float
    norm_with_batch_norm: float
    seconds: float | None


class Run:
    """The rows of one seed."""

    def __init__(self, task: Task, data: LabelledData, seed: int, args: Arguments, directory: Path) -> None:
        self.task, self.data, self.seed, self.args, self.directory = task, data, seed, args, directory

    def rows(self) -> Iterator[Row]:
        """Yields each row as soon as it is there."""
        constant = self.args.constant
        plain, processor = self.fresh()
        yield self.row("fine-tuned, not constrained", plain, processor, train={})
        capped = lipschitzify(copy.deepcopy(plain), layer_lipschitz=constant)
        yield self.row(f"that model capped at {constant:g}", capped, processor, train=None)
        if has_batch_norm(capped):
            take_statistics_anew(capped, self.batches(capped, processor))
            yield self.row("... and BatchNorm statistics taken anew", capped, processor, train=None)
        for method in self.args.methods:
            name = "" if method == "gram" else f"{method}: "
            yield from self.constrained(name, {"method": method})
            if has_batch_norm(plain):
                options = {"method": method, "replace": ("weights", "norms")}
                yield from self.constrained(f"{name}BatchNorm fused, ", options)

    def constrained(self, prefix: str, options: dict[str, Any]) -> Iterator[Row]:
        """Capped before the training, and annealed during it."""
        constant = self.args.constant
        options = {"refresh_every": self.task.refresh_every, **options}
        model, processor = self.fresh()
        lipschitzify(model, layer_lipschitz=constant, **options)
        yield self.row(f"{prefix}capped at {constant:g}, then fine-tuned", model, processor, train={})
        for ratio in self.args.schedule_ratios:
            model, processor = self.fresh()
            lipschitzify(model, layer_lipschitz=None, **options)
            schedule = {
                "lipschitz_schedule": "linear",
                "lipschitz_target": constant,
                "lipschitz_schedule_ratio": ratio,
            }
            name = f"{prefix}fine-tuned, annealed to {constant:g} in {ratio:.0%} of the steps"
            yield self.row(name, model, processor, train=schedule)

    def fresh(self) -> tuple[PreTrainedModel, Any]:
        set_seed(self.seed)
        return self.task.make(self.data)

    def batches(self, model: PreTrainedModel, processor: Any) -> Iterator[Tensor]:
        train, _ = self.task.splits(self.data, model, processor)
        return (batch["pixel_values"] for batch in train.iter(self.task.batch_size))

    def row(self, name: str, model: PreTrainedModel, processor: Any, train: dict[str, Any] | None) -> Row:
        """Trains with the task's arguments and `train`, or not where that is `None`, and evaluates."""
        arguments = {
            "num_train_epochs": self.args.epochs or self.task.epochs,
            "learning_rate": self.args.learning_rate or self.task.learning_rate,
            "per_device_train_batch_size": self.task.batch_size,
            "disable_tqdm": True,
            **self.task.training,
            **(train or {}),
        }
        act = self.task.act(self.data, arguments)
        parts = self.task.splits(self.data, model, processor)
        trainer = trainer_of(act, model, processor, *parts, self.directory, self.seed)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        if train is not None:
            trainer.train()
        seconds = time.perf_counter() - start
        return Row(
            name=name,
            seed=self.seed,
            accuracy=trainer.evaluate()["eval_accuracy"],
            count=len(parts[1]),
            norm=max(layer.norm_after for layer in hf_lipschitz.inspect(model).layers),
            norm_with_batch_norm=largest_norm(model),
            seconds=None if train is None else seconds,
        )


def interval(accuracies: list[float], count: int) -> tuple[float, float]:
    """95 % Clopper-Pearson interval of the mean accuracy, as if it came from one model.

    The seeds share the held-out examples, so they do not count as more of them.
    """
    correct = round(mean(accuracies) * count, 6)
    low = binomtest(math.floor(correct), count).proportion_ci(0.95, method="exact").low
    high = binomtest(math.ceil(correct), count).proportion_ci(0.95, method="exact").high
    return float(low), float(high)


def table_of(rows: list[Row], title: str) -> Table:
    """One line a row name: means over the seeds, and the largest norm."""
    table = Table(title=title)
    for column in ("model", "accuracy", "95 % interval", "by seed", "norm", "with BatchNorm", "train, s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        accuracies = [row.accuracy for row in own]
        low, high = interval(accuracies, own[0].count)
        seconds = [row.seconds for row in own if row.seconds is not None]
        table.add_row(
            name,
            f"{mean(accuracies):.1%}",
            f"{low:.1%} to {high:.1%}",
            ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies),
            f"{max(row.norm for row in own):.4g}",
            f"{max(row.norm_with_batch_norm for row in own):.4g}",
            f"{mean(seconds):.0f}" if seconds else "",
        )
    return table


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(width=118)
    task = TASKS[args.model]
    data = task.load()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in args.seeds:
            for row in Run(task, data, seed, args, Path(directory)).rows():
                rows.append(row)
                console.print(f"seed {seed}: {row.name}: {row.accuracy:.1%}, norm {row.norm:.4g}")
                if args.output:
                    write(Path(args.output), args, task, rows)
    epochs = args.epochs or task.epochs
    title = f"{task.title}: {len(data.train)} to train on, {len(data.test)} held out, {epochs:g} epochs"
    console.print(table_of(rows, title))
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))


def write(path: Path, args: Arguments, task: Task, rows: list[Row]) -> None:
    settings = {"batch_size": task.batch_size, "refresh_every": task.refresh_every, **task.training}
    figures = {
        "arguments": asdict(args),
        "settings": settings,
        "versions": versions(),
        "rows": list(map(asdict, rows)),
    }
    path.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "transformers")}}


if __name__ == "__main__":
    main()
