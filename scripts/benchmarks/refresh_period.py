"""What a longer refresh period costs in accuracy: MiniLM fine-tuned on tweets with each layer held to its norm.

    python scripts/benchmarks/refresh_period.py

Between refreshes a layer is scaled by b/(b + d), with b the bound of its norm at the last refresh and d the distance
that its raw weight has moved since. "kept" is that factor: its mean over layers and steps, and the mean over steps of
the layer where it is least. The bound holds with every period.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import HfArgumentParser, TrainerCallback, logging, set_seed

from hf_lipschitz import lipschitzify
from hf_lipschitz.demo.acts import prepared, text_act, trainer_of
from hf_lipschitz.demo.data import tweets
from hf_lipschitz.demo.models import text_model
from hf_lipschitz.nn.attachment import constrained_layers


@dataclass
class Arguments:
    periods: list[int] = field(default_factory=lambda: [1, 5, 20])
    learning_rates: list[float] = field(default_factory=lambda: [2e-5, 2e-4])
    epochs: int = field(default=3)
    seeds: int = field(default=2)
    threads: int = field(default=2)
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


class KeptNorms(TrainerCallback):
    """Records after each step what factor the distance since the refresh leaves each layer."""

    def __init__(self) -> None:
        self.kept: dict[str, list[float]] = defaultdict(list)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for layer in constrained_layers(model):
            reference = layer.parametrization.reference
            moved = torch.linalg.vector_norm(layer.parametrization.original - reference.weight, dtype=torch.float64)
            self.kept[layer.name].append((reference.bound / (reference.bound + moved)).item())


def fine_tune(period: int, learning_rate: float, seed: int, args: Arguments) -> dict[str, float]:
    set_seed(seed)
    data = tweets()
    model, tokenizer = text_model(data, None)
    lipschitzify(model, layer_lipschitz=None, refresh_every=period)
    act = dataclasses.replace(
        text_act(data),
        training={"num_train_epochs": args.epochs, "per_device_train_batch_size": 16, "learning_rate": learning_rate},
    )
    train, test = (prepared(part, tokenizer, model) for part in (data.train, data.test))
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(act, model, tokenizer, train, test, Path(directory), seed)
        trainer.args.disable_tqdm = True
        record = KeptNorms()
        trainer.add_callback(record)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    means = [mean(values) for values in record.kept.values()]
    return {"accuracy": accuracy, "kept": mean(means), "kept_least": min(means)}


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    table = Table(title=f"MiniLM on tweets, {args.epochs} epochs, mean of {args.seeds} seeds")
    for column in ("learning rate", "refresh every", "accuracy", "kept", "kept, least layer"):
        table.add_column(column, justify="right")
    rows = []
    for learning_rate in args.learning_rates:
        for period in args.periods:
            runs = [fine_tune(period, learning_rate, seed, args) for seed in range(args.seeds)]
            row = {name: mean(run[name] for run in runs) for name in runs[0]}
            rows.append({"learning_rate": learning_rate, "refresh_every": period, **row, "runs": runs})
            table.add_row(
                f"{learning_rate:g}",
                str(period),
                f"{row['accuracy']:.1%}",
                f"{row['kept']:.4f}",
                f"{row['kept_least']:.4f}",
            )
    Console().print(table)
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
