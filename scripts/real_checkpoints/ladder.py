"""The Lipschitz bound of a whole fine-tuned transformer, rung by rung of what is replaced in it, and its accuracy.

    python scripts/real_checkpoints/ladder.py --model minilm --output ladder_minilm.json
    python scripts/real_checkpoints/ladder.py --model vit --epochs 16 --output ladder_vit.json

The first rung is fine-tuned plainly. Norms and attention then get the constants that leave the training data as they
are (`calibrate`), without training. The rungs below start from the first one, are annealed to constant 1 a layer in a
share of the same number of steps, and are calibrated anew at the end. The last rung also caps the radii of the balls
and lifts the floors of the norms, which the model has to learn to live with. The bound is
`lipschitz_bound` with respect to the word embeddings of one held-out text, or to the normalised pixels of one image;
the attack is `verify_lipschitz`, and the radii are those of `certify_deterministic`. The settings were not chosen rung
by rung.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from anneal import interval, versions
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task
from transformers import HfArgumentParser, PreTrainedModel, PrinterCallback, logging, set_seed

from hf_lipschitz import calibrate, certify_deterministic, lipschitz_bound, lipschitzify, verify_lipschitz
from hf_lipschitz.demo.acts import trainer_of
from hf_lipschitz.demo.data import LabelledData
from hf_lipschitz.nn import BallRadii, FloorStdLayerNorm, FloorStdRMSNorm


@dataclass
class Arguments:
    model: str = field(default="minilm", metadata={"choices": ["minilm", "vit"]})
    seed: int = field(default=0)
    rungs: list[int] = field(
        default_factory=lambda: list(range(7)), metadata={"help": "by number; 0, from which the others start, always"}
    )
    epochs: float | None = field(default=None, metadata={"help": "default: those of the model's task"})
    constant: float = field(default=1.0, metadata={"help": "of each layer, from the fourth rung on"})
    schedule_ratio: float = field(default=0.4, metadata={"help": "share of the steps until the constant is reached"})
    ball: float = field(default=3.0, metadata={"help": "largest radius of the balls on the last rung"})
    floor: float = field(default=0.3, metadata={"help": "least floor of the norms on the last rung"})
    radii: int = field(default=16, metadata={"help": "held-out inputs that are certified"})
    starts: int = field(default=4, metadata={"help": "of the attack"})
    steps: int = field(default=10, metadata={"help": "of the attack"})
    threads: int = field(default=1)
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


@dataclass(frozen=True)
class Rung:
    """What is replaced, and whether the layers are annealed to the constant and balls and floors tightened."""

    name: str
    replace: str | tuple[str, ...] | None
    is_annealed: bool = False
    is_tight: bool = False


RUNGS = (
    Rung("as released, fine-tuned", None),
    Rung("+ norms", ("weights", "norms")),
    Rung("+ attention", ("weights", "norms", "attention")),
    Rung("+ weights", ("weights", "norms", "attention"), is_annealed=True),
    Rung("+ residuals", ("weights", "norms", "attention", "residuals"), is_annealed=True),
    Rung("+ activations: all", "all", is_annealed=True),
    Rung("all, small balls, high floors", "all", is_annealed=True, is_tight=True),
)


@dataclass(frozen=True)
class Row:
    """One rung, evaluated; logarithms are of base 10."""

    name: str
    accuracy: float
    count: int
    log_bound: float
    log_attack: float
    median_radius: float
    costliest: str
    seconds: float
    bound_seconds: float


class Ladder:
    """The rungs of one model."""

    def __init__(self, task: Task, data: LabelledData, args: Arguments, directory: Path) -> None:
        self.task, self.data, self.args, self.directory = task, data, args, directory

    def rows(self) -> Iterator[Row]:
        """Yields each rung as soon as it is there."""
        set_seed(self.args.seed)
        plain, processor = self.task.make(self.data)
        for rung in (RUNGS[number] for number in sorted({0, *self.args.rungs})):
            start = time.perf_counter()
            model = plain if rung.replace is None else copy.deepcopy(plain)
            if rung.replace is not None:
                lipschitzify(model, replace=rung.replace, layer_lipschitz=None, refresh_every=self.task.refresh_every)
                self.calibrate(model, processor, rung)
            schedule = {
                "lipschitz_schedule": "linear",
                "lipschitz_target": self.args.constant,
                "lipschitz_schedule_ratio": self.args.schedule_ratio,
            }
            trainer = self.trainer(model, processor, schedule if rung.is_annealed else {})
            if rung.replace is None or rung.is_annealed:
                trainer.train()
            if rung.is_annealed:
                self.calibrate(model, processor, rung)
            accuracy = trainer.evaluate()["eval_accuracy"]
            yield self.row(rung, model.eval(), processor, accuracy, time.perf_counter() - start)

    def row(self, rung: Rung, model: PreTrainedModel, processor: Any, accuracy: float, seconds: float) -> Row:
        start = time.perf_counter()
        example = self.example(model, processor, 0)
        bound = lipschitz_bound(model, example)
        taken = time.perf_counter() - start
        attack = verify_lipschitz(model, example, starts=self.args.starts, steps=self.args.steps, seed=self.args.seed)
        certificates = [
            certify_deterministic(model, self.example(model, processor, index))[0] for index in range(self.args.radii)
        ]
        return Row(
            name=rung.name,
            accuracy=accuracy,
            count=len(self.data.test),
            log_bound=bound.log_value / math.log(10),
            log_attack=math.log10(attack),
            median_radius=statistics.median(certificate.radius for certificate in certificates),
            costliest=str(bound.blame[0]),
            seconds=seconds,
            bound_seconds=taken,
        )

    def calibrate(self, model: PreTrainedModel, processor: Any, rung: Rung) -> None:
        """To the training data; tightened beyond them where the rung says so."""
        calibrate(model, self.batches(model, processor))
        for module in model.modules() if rung.is_tight else ():
            if isinstance(module, BallRadii):
                module.set_radii(*(min(radius, self.args.ball) for radius in module.radii.tolist()))
            elif isinstance(module, (FloorStdLayerNorm, FloorStdRMSNorm)):
                module.set_floor(max(module.s_min.item(), self.args.floor))

    def trainer(self, model: PreTrainedModel, processor: Any, schedule: dict[str, Any]) -> Any:
        arguments = {
            "num_train_epochs": self.args.epochs or self.task.epochs,
            "learning_rate": self.task.learning_rate,
            "per_device_train_batch_size": self.task.batch_size,
            "disable_tqdm": True,
            **self.task.training,
            **schedule,
        }
        act = self.task.act(self.data, arguments)
        parts = self.task.splits(self.data, model, processor)
        trainer = trainer_of(act, model, processor, *parts, self.directory, self.args.seed)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def batches(self, model: PreTrainedModel, processor: Any) -> Iterator[dict[str, Any]]:
        """The training inputs, without padding, which no constant should be wide enough for."""
        train, _ = self.task.splits(self.data, model, processor)
        for row in train:
            yield {name: torch.as_tensor(value)[None] for name, value in row.items() if name != "labels"}

    def example(self, model: PreTrainedModel, processor: Any, index: int) -> dict[str, Any]:
        _, test = self.task.splits(self.data, model, processor)
        return {name: torch.as_tensor(value)[None] for name, value in test[index].items() if name != "labels"}


def table_of(rows: list[Row], title: str) -> Table:
    """One line a rung."""
    table = Table(title=title)
    for column in ("model", "accuracy", "95 % interval", "bound", "attack", "median radius", "bound, s", "train, s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        low, high = interval([row.accuracy], row.count)
        table.add_row(
            row.name,
            f"{row.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"10^{row.log_bound:.1f}",
            f"10^{row.log_attack:.1f}",
            f"{row.median_radius:.2g}",
            f"{row.bound_seconds:.1f}",
            f"{row.seconds:.0f}",
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
        for row in Ladder(task, data, args, Path(directory)).rows():
            rows.append(row)
            console.print(f"{row.name}: {row.accuracy:.1%}, bound 10^{row.log_bound:.1f}; {row.costliest}")
            if args.output:
                figures = {"arguments": asdict(args), "versions": versions(), "rows": list(map(asdict, rows))}
                Path(args.output).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    epochs = args.epochs or task.epochs
    console.print(
        table_of(rows, f"{task.title}: {len(data.train)} to train on, {len(data.test)} held out, {epochs:g} epochs")
    )
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
