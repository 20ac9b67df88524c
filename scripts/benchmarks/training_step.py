"""Time and memory of a fine-tuning step: plain, lipschitzified, torch's spectral_norm, deel-torchlip's layers.

    python scripts/benchmarks/training_step.py --model minilm
    python scripts/benchmarks/training_step.py --model resnet50 --batch_size 4 --rounds 5

One process holds all variants and runs one step of each in turn, round after round; the ratio to plain is taken within
a round, and the median over rounds is reported, so that a slow moment of the machine touches all of them. Memory is
the peak of a process of its own for each variant. Peers are left out where they are not installed (`pip install -e
".[benchmark]"`).
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    logging,
)

from hf_lipschitz import lipschitzify
from hf_lipschitz.conversion import materialized
from hf_lipschitz.demo.models import minilm_path


try:
    from deel.torchlip.utils import bjorck_norm, lconv_norm
except ImportError:
    bjorck_norm = None


@dataclass
class Arguments:
    model: str = field(
        default="minilm", metadata={"help": "minilm (pretrained), bert-base or resnet50 (shapes, from a config)"}
    )
    batch_size: int = field(default=16)
    tokens: int = field(default=64, metadata={"help": "tokens an input, for minilm and bert-base"})
    image_size: int = field(default=96, metadata={"help": "pixels a side, for resnet50"})
    rounds: int = field(default=15)
    warm_up: int = field(default=2)
    refresh_every: int = field(default=20, metadata={"help": "the longer period to compare"})
    methods: list[str] = field(
        default_factory=lambda: ["rescaling", "aol", "sll"], metadata={"help": "others than gram, of lipschitzify"}
    )
    replaced: bool = field(default=False, metadata={"help": "also with norms and attention replaced"})
    threads: int = field(default=2)
    device: str = field(default="cpu")
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, in a process a variant"})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


def base_model(args: Arguments) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if args.model == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=3)
        ids = torch.randint(1000, 20_000, (args.batch_size, args.tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif args.model == "bert-base":
        model = BertForSequenceClassification(BertConfig(num_labels=3))
        ids = torch.randint(1000, 20_000, (args.batch_size, args.tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif args.model == "resnet50":
        model = ResNetForImageClassification(ResNetConfig(num_labels=3))
        batch = {"pixel_values": torch.randn(args.batch_size, 3, args.image_size, args.image_size)}
    else:
        raise ValueError(f"unknown model {args.model!r}; known: minilm, bert-base, resnet50")
    batch["labels"] = torch.randint(0, 3, (args.batch_size,))
    return model.to(args.device), {name: value.to(args.device) for name, value in batch.items()}


def layers(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def with_torch_spectral_norm(model: nn.Module) -> nn.Module:
    for module in list(layers(model)):
        torch.nn.utils.parametrizations.spectral_norm(module)
    return model


def with_torchlip(model: nn.Module) -> nn.Module:
    """What deel-torchlip's SpectralLinear and SpectralConv2d put on their weights."""
    for module in list(layers(model)):
        torch.nn.utils.parametrizations.spectral_norm(module, eps=1e-3)
        bjorck_norm(module, eps=1e-3)
        if isinstance(module, nn.Conv2d):
            lconv_norm(module)
    return model


def variants(args: Arguments) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Each layer is held to its present norm, so that the function trained is the same."""
    found = {
        "plain": lambda m: m,
        "lipschitzified, refresh every step": lambda m: lipschitzify(m, layer_lipschitz=None),
        f"lipschitzified, refresh every {args.refresh_every} steps": lambda m: lipschitzify(
            m, layer_lipschitz=None, refresh_every=args.refresh_every
        ),
        "torch spectral_norm (an estimate)": with_torch_spectral_norm,
    }
    for method in args.methods:
        found[f"lipschitzified, {method}"] = lambda m, method=method: lipschitzify(
            m, layer_lipschitz=None, method=method
        )
    if args.replaced:
        kinds = ("weights", "norms", "attention")
        found[f"{' + '.join(kinds)}, refresh every {args.refresh_every} steps"] = lambda m: lipschitzify(
            m, layer_lipschitz=None, refresh_every=args.refresh_every, replace=kinds
        )
    if bjorck_norm is not None:
        found["deel-torchlip (spectral + Björck)"] = with_torchlip
    return found


def stepper(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def evaluation(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    model.eval()

    @torch.no_grad()
    def forward() -> object:
        return model(**batch).logits

    return forward


def alternate(functions: dict[str, Callable[[], object]], args: Arguments, rounds: int) -> dict[str, list[float]]:
    for function in functions.values():
        for _ in range(args.warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(timed(functions[name], args.device))
    return seconds


def measure_steps(args: Arguments) -> list[dict[str, object]]:
    steps = {}
    for name, change in variants(args).items():
        model, batch = base_model(args)
        steps[name] = stepper(change(model), batch)
    # A whole number of periods, so that each refresh is counted as often as it comes.
    rounds = -(-args.rounds // args.refresh_every) * args.refresh_every
    seconds = alternate(steps, args, rounds)
    plain = seconds["plain"]
    means = {name: statistics.mean(times) for name, times in seconds.items()}
    return [
        {
            "variant": name,
            "seconds_median": statistics.median(times),
            # A refresh every k steps is an expensive step in k: only the mean sees it.
            "seconds_mean": means[name],
            "ratio_median": statistics.median(a / b for a, b in zip(times, plain, strict=True)),
            "ratio_of_means": means[name] / means["plain"],
        }
        for name, times in seconds.items()
    ]


def measure_evaluation(args: Arguments) -> float:
    """Evaluation and certification run on materialised weights: the ratio of their forward pass to the plain one."""
    plain, batch = base_model(args)
    constrained, _ = base_model(args)
    lipschitzify(constrained, layer_lipschitz=None)
    with materialized(constrained) as model:
        seconds = alternate(
            {"plain": evaluation(plain, batch), "materialized": evaluation(model, batch)}, args, 4 * args.rounds
        )
    return statistics.median(a / b for a, b in zip(seconds["materialized"], seconds["plain"], strict=True))


def peak_memory(args: Arguments, variant: str, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.threads)
    model, batch = base_model(args)
    step = stepper(variants(args)[variant](model), batch)
    for _ in range(3):
        step()
    queue.put(torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Of this process since it began; `getrusage` would give that of the parent before it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_memory(args: Arguments) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for variant in variants(args):
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(args, variant, queue))
        process.start()
        peaks[variant] = queue.get()
        process.join()
    return peaks


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    rows = measure_steps(args)
    evaluation_ratio = measure_evaluation(args)
    peaks = measure_memory(args) if args.memory else {}
    table = Table(title=f"{args.model}, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}")
    table.add_column("variant", overflow="fold")
    for column in ("step, median", "ratio, median", "ratio of means", "peak memory"):
        table.add_column(column, justify="right")
    for row in rows:
        row["peak_memory"] = peaks.get(row["variant"])
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f} MiB"
        table.add_row(
            row["variant"],
            f"{1e3 * row['seconds_median']:.0f} ms",
            f"{row['ratio_median']:.3f}",
            f"{row['ratio_of_means']:.3f}",
            memory,
        )
    console = Console()
    console.print(table)
    console.print(f"evaluation on materialised weights over plain: {evaluation_ratio:.3f}")
    if args.output:
        report = {"arguments": vars(args), "steps": rows, "evaluation_ratio": evaluation_ratio}
        Path(args.output).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
