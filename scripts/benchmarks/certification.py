"""Certification by randomised smoothing against Cohen's CERTIFY and ART: certificates, time, memory, soundness.

    python scripts/benchmarks/certification.py --task mnist --checkpoint mnist-resnet
    python scripts/benchmarks/certification.py --task tweets --checkpoint tweets-minilm
    python scripts/benchmarks/certification.py --task overhead
    python scripts/benchmarks/certification.py --task overhead --device cuda --dtype bfloat16 --batch-sizes 100 400
    python scripts/benchmarks/certification.py --task control --runs 2000

ART is left out where it is not installed (`pip install adversarial-robustness-toolbox statsmodels`, for this alone).

"mnist" and "tweets" train the demo's models as the demo does, with noise, and certify held-out inputs.

- Rows with fixed n are *evaluated* on votes that are drawn once: our engine runs with "one_class" on each input, its
  base classifier's logits are kept, and every other row, Cohen's and ART's too, comes from the same logits by its own
  code. Their time is *measured* apart, on the first input with noise of their own, interleaved with bare passes;
  seconds with ≈ are that overhead times the bare passes of all samples of the row. Their memory is that of the
  measurement too, with the n given below the table: ART's grows with n, and its n is lowered where it would not fit.
- Sequential rows are runs of their own over all inputs, timed as a whole, with n at most that of the other rows.
  Between their slices, off the clock, bare passes are timed one by one.
- Overhead is time over that of bare forward passes of as many rows as there are samples, in the same batch shape.
  Rows that fill a batch up and do not count are overhead, and so is the batch that checks once a call that rows are
  independent. In measurements on one input it is taken off; "as timed" has it.
- Memory is the peak of the resident set, and on a GPU of torch's allocator, above the start, less that of bare passes.

"overhead" is that measurement alone, for random weights. "control" certifies points at known distances from the plane
between two classes, with noise of its own in each run: a certificate is false if its class is wrong or its radius
above the distance, a lower bound if it is above the exact mean of the true class's votes or scores. Limits are exact,
one-sided, at 95 %, of the larger of the two rates. Scores without a Lipschitz constant give radii far below the
distance, so that only their bounds tell something. The row that looks again and again at a bound for one fixed n is
there to be caught.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import certification_loops as loops
import datasets
import numpy as np
import torch
from certification_loops import ART, COHEN, Art, BarePasses, Cohen, MemoryPeak, Outcome, Smoothing, Speed
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import integrate, stats
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    logging,
    set_seed,
)

from hf_lipschitz import CertifiedClassificationPipeline, lipschitz_bound, lipschitzify
from hf_lipschitz.certification import Certificate, clopper_pearson_lower
from hf_lipschitz.certification.looks import default_looks
from hf_lipschitz.certification.windows import WINDOW
from hf_lipschitz.conversion import materialized
from hf_lipschitz.demo.acts import prepared, text_act, trainer_of, vision_act
from hf_lipschitz.demo.data import mnist, tweets
from hf_lipschitz.demo.models import image_model, text_model


FIXED_N = {"mnist": 100_000, "tweets": 2000, "control": 1000}
ACTS = {"mnist": (mnist, vision_act, image_model), "tweets": (tweets, text_act, text_model)}
PAUSE_SHARE = 0.1
PACKAGES = ("hf-lipschitz", "torch", "transformers", "numpy", "scipy", "adversarial-robustness-toolbox")


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


@dataclass(frozen=True)
class Row:
    """
    A method on all inputs. Accuracies are None at radii that it was not asked for; the mean radius counts inputs of
    another class as 0; samples are with those that choose the class.
    """

    method: str
    accuracies: list[float | None]
    mean_radius: float | None
    mean_n: float
    samples: int
    seconds: float
    is_timed_as_a_whole: bool
    overhead: float
    host_bytes: int
    device_bytes: int | None


class Task(NamedTuple):
    """Inputs with their labels, the loops' common settings, and the radii of the curve."""

    smoothing: Smoothing
    xs: list[Tensor]
    labels: list[int]
    radii: list[float]


def trained(args: Arguments) -> tuple[PreTrainedModel, Any, Any]:
    """The demo's model in evaluation mode, its processor and the act; from the checkpoint if there is one."""
    load, make_act, make_model = ACTS[args.task]
    data = load()
    act = make_act(data, noise_sigma=args.sigma, **({} if args.train_steps < 0 else {"max_steps": args.train_steps}))
    set_seed(args.seed)
    model, processor = make_model(data, None)
    if args.checkpoint and (Path(args.checkpoint) / "config.json").is_file():
        auto = AutoModelForImageClassification if args.task == "mnist" else AutoModelForSequenceClassification
        return auto.from_pretrained(args.checkpoint).to(args.device).eval(), processor, act
    lipschitzify(model, act.constraint)
    train = prepared(data.train, processor, model)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(act, model, processor, train, train, Path(directory), args.seed)
        trainer.args.disable_tqdm = True
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if args.checkpoint:
            trainer.save_model(args.checkpoint)
    return model.to(args.device).eval(), processor, act


class Tape:
    """A base classifier that keeps its logits, batch by batch."""

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier
        self.logits: list[Tensor] = []

    def __call__(self, noisy: Tensor) -> Tensor:
        self.logits.append(self.classifier(noisy))
        return self.logits[-1]

    def replay(self) -> Callable[[Tensor], Tensor]:
        """One that says the same again, whatever it is asked; batches come in the same order in every certificate."""
        calls = iter(self.logits)
        return lambda noisy: next(calls)

    def counts(self, n0: int, n: int, num_classes: int) -> tuple[NDArray, NDArray]:
        """The votes that choose the class, and the others. The second batch was the check of row independence."""
        batches = [logits.argmax(1).to(torch.uint8) for logits in (self.logits[0], *self.logits[2:])]
        first = -(-n0 // len(batches[0]))
        parts = torch.cat(batches[:first])[:n0], torch.cat(batches[first:])[:n]
        selection, estimation = (np.bincount(part.cpu().numpy(), minlength=num_classes) for part in parts)
        return selection, estimation


def fixed_outcomes(task: Task, args: Arguments, bare: BarePasses, console: Console) -> dict[str, list[Outcome]]:
    """All rows with fixed n on votes that are drawn once an input."""
    smoothing, ours = task.smoothing, args.ours_fixed()
    others = {COHEN: Cohen(smoothing)}
    if loops.PyTorchRandomizedSmoothing is not None:
        others[ART] = Art(smoothing, task.xs[0])
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*others, *ours)}
    drawing = 0.0
    for index, x in enumerate(task.xs):
        tape = Tape(smoothing.classifier)
        start = loops.synchronized_time(x.device)
        smoothing.smoothed(args.fixed_n, tape, **ours["one_class"]).certify(x, index)
        drawing += (spent := loops.synchronized_time(x.device) - start)
        bare.run_for(PAUSE_SHARE * spent)
        counts = tape.counts(args.n0, args.fixed_n, smoothing.num_classes)
        for name, method in others.items():
            outcomes[name].append(method.outcome(*counts))
        # The noise on the stand-in is drawn as well, and read by nobody.
        stand_in = x.new_zeros(1)
        for name, fields in ours.items():
            certifier = smoothing.smoothed(args.fixed_n, tape.replay(), **fields)
            outcomes[name].append(outcome_of(certifier.certify(stand_in, index)))
    samples = len(task.xs) * (args.n0 + args.fixed_n)
    console.print(f"votes drawn once: {samples:,} in {drawing:.1f} s, {samples / drawing:,.0f} a second")
    return outcomes


def outcome_of(certificate: Certificate) -> Outcome:
    return Outcome(certificate.prediction, certificate.radius, certificate.n)


def fixed_rows(task: Task, args: Arguments, console: Console) -> tuple[list[Row], list[Speed]]:
    bare = BarePasses(task.smoothing, task.xs)
    outcomes = fixed_outcomes(task, args, bare, console)
    speeds = args.speeds(task.smoothing, task.xs[0], args.ours_fixed())
    by_name = {speed.loop: speed for speed in speeds}
    seconds = bare.total((x, args.n0 + args.fixed_n) for x in task.xs)
    rows = []
    for name, found in outcomes.items():
        if name in by_name:
            speed = by_name[name]
            measured = (speed.ratio * seconds, False, speed.ratio, speed.host_bytes, speed.device_bytes)
            rows.append(row_of(f"{name}, fixed n", found, task, args.n0, task.radii, measured))
    return rows, speeds


def sequential_row(name: str, task: Task, args: Arguments, radii: Sequence[float], **fields: Any) -> Row:
    """One run over all inputs, with bare passes off the clock between its slices."""
    smoothing, xs = task.smoothing, task.xs
    bare, device = BarePasses(smoothing, xs), xs[0].device
    with MemoryPeak(device) as of_bare:
        loops.bare_passes(smoothing.classifier, loops.batch_of(max(xs, key=Tensor.numel), smoothing), 2)
    paused = resumed = 0.0

    def pause(count: int) -> None:
        nonlocal paused, resumed
        stopped = loops.synchronized_time(device)
        bare.run_for(PAUSE_SHARE * (stopped - resumed))
        resumed = loops.synchronized_time(device)
        paused += resumed - stopped

    certifier = smoothing.smoothed(args.fixed_n, radii=tuple(radii), **fields)
    with MemoryPeak(device, interval=0.02) as peak:
        start = resumed = loops.synchronized_time(device)
        found = dict(certifier.certify_together(xs, on_samples=pause))
        seconds = loops.synchronized_time(device) - start - paused
    outcomes = [outcome_of(found[place]) for place in range(len(xs))]
    overhead = seconds / bare.total((x, args.n0 + o.n) for x, o in zip(xs, outcomes, strict=True))
    memory = peak.host - of_bare.host, None if peak.device is None else peak.device - of_bare.device
    return row_of(name, outcomes, task, args.n0, radii, (seconds, True, overhead, *memory))


def row_of(
    method: str, outcomes: Sequence[Outcome], task: Task, n0: int, asked: Sequence[float], measured: tuple[Any, ...]
) -> Row:
    """`asked` are the radii that the method was to decide: of all, or the mean radius is left out."""
    radii = [o.radius if o.prediction == label else 0.0 for o, label in zip(outcomes, task.labels, strict=True)]
    accuracies = [mean(found > radius for found in radii) if radius in asked else None for radius in task.radii]
    mean_radius = None if None in accuracies else mean(radii)
    samples = sum(n0 + outcome.n for outcome in outcomes)
    return Row(method, accuracies, mean_radius, mean(o.n for o in outcomes), samples, *measured)


def compare(args: Arguments, console: Console) -> dict[str, Any]:
    """The tasks "mnist" and "tweets"."""
    model, processor, act = trained(args)
    radii = list(act.radii if args.radii is None else args.radii)
    radius = radii[min(1, len(radii) - 1)] if args.radius is None else args.radius
    radii = sorted({*radii, radius})
    kind = "image_processor" if args.task == "mnist" else "tokenizer"
    certifier = CertifiedClassificationPipeline(
        model=model, task="certified-classification", sigma=args.sigma, device=args.device, **{kind: processor}
    )
    chosen = act.data.test.select(range(min(args.inputs, len(act.data.test))))
    base = certifier.base_classifier
    with materialized(model):
        xs = [base.encode(item).to(args.device) for item in chosen["input"]]
        labels = [int(label) for label in chosen["labels"]]
        task = Task(args.smoothing(base, model.config.num_labels), xs, labels, radii)
        rows, speeds = fixed_rows(task, args, console) if args.fixed else ([], [])
        for name in args.sequential:
            fields = args.scores("softmax") if name == "lvm" else {"certificate": name}
            rows.append(sequential_row(f"{name}, until {radius:g} is decided", task, args, [radius], **fields))
            rows.append(sequential_row(f"{name}, until the curve is decided", task, args, radii, **fields))
    console.print(table_of_rows(rows, task, args, base.unit))
    if speeds:
        console.print(table_of_speeds({"the first input": speeds}))
    return {
        "radii": radii,
        "unit": base.unit,
        "rows": [asdict(r) for r in rows],
        "speeds": [asdict(s) for s in speeds],
    }


def table_of_rows(rows: list[Row], task: Task, args: Arguments, unit: str) -> Table:
    title = f"{len(task.xs)} inputs of {args.task}, sigma {args.sigma:g}, alpha {args.alpha:g}, radii in {unit}"
    table = Table(title=f"{title}, lvm at temperature {args.temperature:g}")
    table.add_column("method", overflow="fold")
    columns = [*(f"> {radius:g}" for radius in task.radii), "mean radius", "mean n", "samples", "seconds", "samples/s"]
    for column in (*columns, "overhead", "memory"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            *("-" if accuracy is None else f"{accuracy:.1%}" for accuracy in row.accuracies),
            "-" if row.mean_radius is None else f"{row.mean_radius:.3f}",
            f"{row.mean_n:,.0f}",
            f"{row.samples:,}",
            f"{'' if row.is_timed_as_a_whole else '≈ '}{row.seconds:,.1f}",
            f"{row.samples / row.seconds:,.0f}",
            f"{row.overhead:.3f}",
            memory_text(row.host_bytes, row.device_bytes),
        )
    return table


def table_of_speeds(speeds: dict[str, list[Speed]]) -> Table:
    table = Table(title="time over that of bare forward passes of as many rows, interleaved")
    for column in ("model", "loop"):
        table.add_column(column, overflow="fold")
    for column in ("batch", "samples", "samples/s", "overhead", "least to most", "as timed", "memory"):
        table.add_column(column, justify="right")
    for model, found in speeds.items():
        for s in found:
            table.add_row(
                model,
                s.loop,
                str(s.batch_size),
                f"{s.samples:,}",
                f"{s.samples_per_second:,.0f}",
                f"{s.ratio:.3f}",
                f"{s.ratio_least:.3f} to {s.ratio_most:.3f}",
                f"{s.ratio_as_timed:.3f}",
                memory_text(s.host_bytes, s.device_bytes),
            )
    return table


def memory_text(host_bytes: int, device_bytes: int | None) -> str:
    on_device = "" if device_bytes is None else f", GPU {device_bytes / 2**20:+,.0f} MiB"
    return f"{host_bytes / 2**20:+,.0f} MiB{on_device}"


class Logits(nn.Module):
    """From one input, by name, to logits."""

    def __init__(self, model: PreTrainedModel, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x.to(self.model.dtype)}).logits


def random_model(name: str) -> tuple[Logits, tuple[int, ...]]:
    """With the shape of its input."""
    if name == "minilm":
        config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
        return Logits(BertForSequenceClassification(config), "inputs_embeds"), (32, 384)
    shapes = {
        "resnet18": ((3, 224, 224), {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4}),
        "tiny": ((1, 28, 28), {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1] * 3}),
    }
    if name not in shapes:
        raise ValueError(f"unknown model {name!r}; known: minilm, {', '.join(shapes)}")
    shape, sizes = shapes[name]
    config = ResNetConfig(num_channels=shape[0], layer_type="basic", num_labels=10, **sizes)
    return Logits(ResNetForImageClassification(config), "pixel_values"), shape


def measure_overhead(args: Arguments, console: Console) -> dict[str, Any]:
    ours = {"two_class": {"certificate": "two_class"}, "lvm, softmax": args.scores("softmax")}
    found: dict[str, list[Speed]] = {}
    for name in args.models:
        set_seed(args.seed)
        base, shape = random_model(name)
        base.to(args.device, getattr(torch, args.dtype)).eval()
        x = torch.rand(shape, device=args.device)
        for batch_size in args.batch_sizes:
            smoothing = args.smoothing(base, base.model.config.num_labels, batch_size)
            found.setdefault(name, []).extend(args.speeds(smoothing, x, ours))
    console.print(table_of_speeds(found))
    return {"speeds": {name: [asdict(speed) for speed in speeds] for name, speeds in found.items()}}


@dataclass(frozen=True)
class Control:
    """
    What one method did at one distance: false certificates, and lower bounds above the exact mean, where the method
    tells its bound.
    """

    method: str
    distance: float
    runs: int
    false_certificates: int
    false_bounds: int | None
    mean_radius: float | None

    @property
    def false(self) -> int:
        return max(self.false_certificates, self.false_bounds or 0)


def control(args: Arguments, console: Console) -> dict[str, Any]:
    """The logits are ± x₀ / σ: the smoothed class changes at x₀ = 0, for votes and for scores, by symmetry."""
    plane = nn.Linear(args.dimension, 2, bias=False).requires_grad_(False).eval()
    plane.weight.zero_()[:, 0] = torch.tensor([1.0, -1.0]) / args.sigma
    smoothing = args.smoothing(plane.to(args.device), 2)
    found: list[Control] = []
    for multiple in args.distances:
        x = torch.zeros(args.dimension, device=args.device)
        x[0] = multiple * args.sigma
        distance = float(x[0])
        for name, fields in control_fields(args, plane, x).items():
            certificates = list(many_certificates(smoothing.smoothed(args.fixed_n, **fields), x, args.runs))
            exact = exact_mean(fields.get("simplex_map"), distance, args)
            bounds = sum(certificate.p_lower > exact for certificate in certificates)
            found.append(count_false(name, distance, [outcome_of(c) for c in certificates], bounds))
        others = {COHEN: Cohen(smoothing)}
        if loops.PyTorchRandomizedSmoothing is not None:
            others[ART] = Art(smoothing, x)
        for name, method in others.items():
            found.append(
                count_false(name, distance, [method.certify(x, args.fixed_n) for _ in range(args.runs)], None)
            )
        found.append(peeking(distance, args))
    console.print(table_of_controls(found, args))
    return {"rows": [asdict(c) | dict(zip(("low", "high"), limits(c.false, c.runs), strict=True)) for c in found]}


def control_fields(args: Arguments, plane: nn.Linear, x: Tensor) -> dict[str, dict[str, Any]]:
    """Our methods. The one radius is the distance, where a certificate that goes too far is a false one."""
    bound = lipschitz_bound(plane, (x[None],))
    radii = [0.25 * args.sigma * k for k in range(10)] if args.radii is None else args.radii
    votes, scores = {"certificate": "two_class"}, args.scores("softmax")
    lipschitz = {**args.scores("sparsemax"), "certificate": "lipschitz", "score_lipschitz": bound}
    return {
        **{f"{name}, fixed n": fields for name, fields in args.ours_fixed().items()},
        "lipschitz, sparsemax, fixed n": lipschitz,
        "two_class, until the distance is decided": {**votes, "radii": (float(x[0]),)},
        "two_class, until the curve is decided": {**votes, "radii": tuple(radii)},
        "two_class, until it gains little": {**votes, "gain": 0.02 * args.sigma},
        "lvm, softmax, until the curve is decided": {**scores, "radii": tuple(radii)},
        "lipschitz, sparsemax, until the curve is decided": {**lipschitz, "radii": tuple(radii)},
    }


def many_certificates(certifier: Any, x: Tensor, runs: int) -> Iterator[Certificate]:
    """Each run has an index of its own, and with it its own noise."""
    for first in range(0, runs, WINDOW):
        indices = list(range(first, min(first + WINDOW, runs)))
        yield from (certificate for _, certificate in certifier.certify_together([x] * len(indices), indices))


def exact_mean(simplex_map: str | None, distance: float, args: Arguments) -> float:
    """Of the votes, or of the scores by this map, for the true class under noise."""
    if simplex_map is None:
        return float(stats.norm.cdf(distance / args.sigma))
    score = {"softmax": lambda t: 1 / (1 + np.exp(-2 * t)), "sparsemax": lambda t: np.clip(t + 0.5, 0.0, 1.0)}[
        simplex_map
    ]
    center, spread = distance / args.sigma / args.temperature, 1 / args.temperature
    kinks = [z for z in ((-0.5 - center) / spread, (0.5 - center) / spread) if abs(z) < 10]
    density = stats.norm.pdf
    return integrate.quad(lambda z: score(center + spread * z) * density(z), -10, 10, points=kinks, limit=200)[0]


def count_false(method: str, distance: float, outcomes: Sequence[Outcome], bounds: int | None) -> Control:
    wrong = sum(o.radius > 0 and (o.prediction != 0 or o.radius > distance) for o in outcomes)
    return Control(method, distance, len(outcomes), wrong, bounds, mean(o.radius for o in outcomes))


def peeking(distance: float, args: Arguments) -> Control:
    """Not a method of anyone here: the bound for one fixed n, at all of alpha, at every look; the best counts."""
    looks = np.array(default_looks(args.fixed_n))
    p = float(stats.norm.cdf(distance / args.sigma))
    generator = np.random.default_rng(args.seed)
    votes = generator.binomial(np.diff(looks, prepend=0), p, size=(args.runs, len(looks))).cumsum(axis=1)
    wrong = int((clopper_pearson_lower(votes, looks, args.alpha) > p).any(axis=1).sum())
    return Control("[unsound] a fixed-n bound at every look", distance, args.runs, wrong, wrong, None)


def limits(false: int, runs: int) -> tuple[float, float]:
    """One-sided exact 95 % limits of a rate, each for itself."""
    low = float(stats.beta.ppf(0.05, false, runs - false + 1)) if false else 0.0
    high = float(stats.beta.ppf(0.95, false + 1, runs - false)) if false < runs else 1.0
    return low, high


def table_of_controls(found: list[Control], args: Arguments) -> Table:
    title = f"{args.runs} runs each, n at most {args.fixed_n:,}, alpha {args.alpha:g}, sigma {args.sigma:g}"
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for column in (
        "distance",
        "mean radius",
        "false certificates",
        "false bounds",
        "lower limit",
        "upper limit",
        "alpha",
    ):
        table.add_column(column, justify="right")
    table.add_column("")
    for c in found:
        low, high = limits(c.false, c.runs)
        table.add_row(
            c.method.replace("[", "\\["),
            f"{c.distance:g}",
            "-" if c.mean_radius is None else f"{c.mean_radius:.3f}",
            f"{c.false_certificates / c.runs:.2%}",
            "-" if c.false_bounds is None else f"{c.false_bounds / c.runs:.2%}",
            f"{low:.2%}",
            f"{high:.2%}",
            f"{args.alpha:.2%}",
            "above alpha" if low > args.alpha else "",
        )
    return table


def surroundings(args: Arguments) -> dict[str, Any]:
    """Versions, and what it runs on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    is_cuda = torch.device(args.device).type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{args.device}, {device}, {args.threads} threads",
    }


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    console, around = Console(), surroundings(args)
    console.print(", ".join(f"{name} {version}" for name, version in around.items()), highlight=False)
    if loops.PyTorchRandomizedSmoothing is None:
        console.print("ART is left out: pip install adversarial-robustness-toolbox statsmodels")
    tasks = {"mnist": compare, "tweets": compare, "overhead": measure_overhead, "control": control}
    report = tasks[args.task](args, console)
    if args.output:
        figures = {"arguments": vars(args), "surroundings": around, **report}
        Path(args.output).write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
