"""Arguments of `certification.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import certification_loops as loops
from certification_loops import Smoothing, Speed
from torch import Tensor, nn


FIXED_N = {"mnist": 100_000, "tweets": 2000, "control": 1000}


@dataclass
class Arguments:
    task: str = field(default="mnist", metadata={"choices": ["mnist", "tweets", "overhead", "control"]})
    inputs: int = field(default=100, metadata={"help": "held-out inputs of mnist and tweets"})
    sigma: float | None = field(default=None, metadata={"help": "default: 0.5, for tweets 0.1"})
    alpha: float | None = field(default=None, metadata={"help": "default: 0.001, for control 0.05"})
    n0: int = field(default=100)
    fixed: bool = field(default=True, metadata={"help": "of mnist and tweets: rows with fixed n, and their speeds"})
    fixed_n: int | None = field(default=None, metadata={"help": f"samples, at most or fixed; default: {FIXED_N}"})
    radii: list[float] | None = field(default=None, metadata={"help": "of the curve; default: the demo's"})
    radius: float | None = field(default=None, metadata={"help": "of the row at one radius; default: radii[1]"})
    sequential: list[str] = field(default_factory=lambda: ["two_class"], metadata={"help": "certificates"})
    temperature: float = field(default=1.0, metadata={"help": "of the simplex maps, for lvm"})
    batch_size: int = field(default=100, metadata={"help": "rows of a forward pass, a multiple of 100"})
    checkpoint: str | None = field(default=None, metadata={"help": "folder: trained model, written if there is none"})
    train_steps: int = field(default=-1, metadata={"help": "-1: the demo's epochs"})
    models: list[str] = field(default_factory=lambda: ["minilm", "resnet18", "tiny"], metadata={"help": "of overhead"})
    batch_sizes: list[int] = field(default_factory=lambda: [100], metadata={"help": "of overhead"})
    dtype: str = field(default="float32", metadata={"help": "of the weights of overhead"})
    rounds: int = field(default=5, metadata={"help": "of interleaved measurements"})
    batches: int = field(default=10, metadata={"help": "of a measurement, at least"})
    least_seconds: float = field(default=3.0, metadata={"help": "of bare passes in a measurement"})
    art_gigabytes: float = field(default=8.0, metadata={"help": "that ART's noisy copies may take"})
    runs: int = field(default=1000, metadata={"help": "of control, at each distance"})
    distances: list[float] = field(default_factory=lambda: [0.1, 0.5, 1.5], metadata={"help": "of control, in sigma"})
    dimension: int = field(default=16, metadata={"help": "of control"})
    seed: int = field(default=0)
    threads: int = field(default=2)
    device: str = field(default="cpu")
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})

    def __post_init__(self) -> None:
        if self.sigma is None:
            self.sigma = 0.1 if self.task == "tweets" else 0.5
        if self.alpha is None:
            self.alpha = 0.05 if self.task == "control" else 1e-3
        if self.fixed_n is None:
            self.fixed_n = FIXED_N.get(self.task)

    def smoothing(self, classifier: nn.Module, num_classes: int, batch_size: int | None = None) -> Smoothing:
        batch_size = self.batch_size if batch_size is None else batch_size
        return Smoothing(classifier, num_classes, self.sigma, self.alpha, self.n0, batch_size, self.seed)

    def scores(self, simplex_map: str) -> dict[str, Any]:
        return {"certificate": "lvm", "simplex_map": simplex_map, "temperature": self.temperature}

    def ours_fixed(self) -> dict[str, dict[str, Any]]:
        """Our rows with fixed n; the first one draws the votes."""
        found = {name: {"certificate": name} for name in ("one_class", "two_class", "class_partition")}
        return found | {f"lvm, {name}": self.scores(name) for name in ("softmax", "sparsemax")}

    def speeds(self, smoothing: Smoothing, x: Tensor, ours: dict[str, dict[str, Any]]) -> list[Speed]:
        return loops.speeds_of(
            smoothing,
            x,
            ours,
            batches=self.batches,
            least_seconds=self.least_seconds,
            rounds=self.rounds,
            art_bytes=2**30 * self.art_gigabytes,
        )
