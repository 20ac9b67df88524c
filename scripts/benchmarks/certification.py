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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import certification_loops as loops
import datasets
import numpy as np
import torch
from certification_arguments import Arguments
from certification_control import control
from certification_loops import ART, COHEN, Art, BarePasses, Cohen, MemoryPeak, Outcome, Smoothing, Speed, outcome_of
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
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

from hf_lipschitz import CertifiedClassificationPipeline, lipschitzify
from hf_lipschitz.conversion import materialized
from hf_lipschitz.demo.acts import prepared, text_act, trainer_of, vision_act
from hf_lipschitz.demo.data import mnist, tweets
from hf_lipschitz.demo.models import image_model, text_model


ACTS = {"mnist": (mnist, vision_act, image_model), "tweets": (tweets, text_act, text_model)}
PAUSE_SHARE = 0.1
PACKAGES = ("hf-lipschitz", "torch", "transformers", "numpy", "scipy", "adversarial-robustness-toolbox")


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
