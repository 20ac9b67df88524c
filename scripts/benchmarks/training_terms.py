"""Time and memory of a fine-tuning step with each term of LipschitzTrainer, against the plain Trainer's step.

    python scripts/benchmarks/training_terms.py --model minilm
    python scripts/benchmarks/training_terms.py --model resnet --variants "activation decay" "hutchinson"

One process holds all trainers and runs a block of steps of each in turn, round after round; the ratio to the plain
Trainer is taken within a round, and the median over rounds is reported, with the least and the most. A step is
`training_step` (forward, terms, backward), the optimizer's step and the step of its schedule. Blocks are of ten steps,
so that what comes every ten steps comes once.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    logging,
)

from hf_lipschitz.demo.models import minilm_path
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments


PLAIN = "plain Trainer"
VARIANTS: dict[str, dict[str, Any]] = {
    "all terms off": {},
    "activation decay": {"activation_decay": 1e-3},
    "activation decay, Hessian trace": {"activation_decay": 1e-3, "activation_decay_kind": "hessian_trace"},
    "hutchinson": {"curvature_weight": 1e-3},
    "hutchinson, every 10 steps": {"curvature_weight": 1e-3, "curvature_every": 10},
    "trace": {"curvature_weight": 1e-3, "curvature": "trace"},
    "gauss_newton": {"curvature_weight": 1e-3, "curvature": "gauss_newton"},
    "cure": {"curvature_weight": 1e-3, "curvature": "cure"},
    "sam": {"curvature_weight": 1.0, "curvature": "sam"},
    "noise": {"noise_sigma": 0.1},
    "consistency, 2 copies": {"noise_sigma": 0.1, "noise_copies": 2, "smoothing": "consistency"},
    "macer, 2 copies": {"noise_sigma": 0.1, "noise_copies": 2, "smoothing": "macer"},
    "SmoothAdv, 2 steps": {"noise_sigma": 0.1, "attack_radius": 0.1, "attack_steps": 2},
    "norm penalty": {"norm_penalty": 1e-3},
    "norm penalty, every 10 steps": {"norm_penalty": 1e-3, "norm_penalty_every": 10},
}


@dataclass
class Arguments:
    model: str = field(default="minilm", metadata={"choices": ["minilm", "bert-base", "resnet"]})
    batch_size: int = field(default=16)
    tokens: int = field(default=64, metadata={"help": "tokens an input, of texts"})
    image_size: int = field(default=64, metadata={"help": "pixels a side, for resnet"})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    rounds: int = field(default=5)
    steps: int = field(default=10, metadata={"help": "of a block"})
    bf16: bool = field(default=False)
    threads: int = field(default=2)
    device: str = field(default="cpu", metadata={"choices": ["cpu", "cuda"]})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"unknown variants {', '.join(unknown)}; known: {', '.join(VARIANTS)}")


def base_model(args: Arguments) -> tuple[PreTrainedModel, dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (args.batch_size,))
    if args.model != "resnet":
        if args.model == "minilm":
            model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=3)
        else:
            model = BertForSequenceClassification(BertConfig(num_labels=3))
        ids = torch.randint(1000, 20_000, (args.batch_size, args.tokens))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, None
    shape = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    model = ResNetForImageClassification(ResNetConfig(num_labels=3, **shape))
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    return model, {"pixel_values": pixels, "labels": labels}, ViTImageProcessor()


def stepper(
    args: Arguments, model: PreTrainedModel, batch: dict[str, torch.Tensor], processor: Any, terms: dict | None
) -> Callable[[], None]:
    """A block of steps of a trainer of its own, on a copy of the model."""
    model = copy.deepcopy(model)
    common = {"report_to": [], "learning_rate": 2e-5, "bf16": args.bf16, "use_cpu": args.device == "cpu"}
    if terms is None:
        trainer = Trainer(model, TrainingArguments("unused", **common))
    else:
        settings = LipschitzTrainingArguments("unused", **common, **terms)
        trainer = LipschitzTrainer(model, settings, processing_class=processor)
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1

    def block() -> None:
        for _ in range(args.steps):
            trainer.training_step(model, dict(batch))
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()
            trainer.state.global_step += 1

    return block


def seconds_of(block: Callable[[], None], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    block()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    console = Console()
    model, batch, processor = base_model(args)
    terms = {PLAIN: None} | {name: VARIANTS[name] for name in args.variants}
    blocks = {name: stepper(args, model, batch, processor, own) for name, own in terms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    with console.status("warming up") as status:
        for block in blocks.values():
            block()
        for turn in range(args.rounds):
            names = list(blocks)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                status.update(f"round {turn + 1} of {args.rounds}: {name}")
                seconds[name].append(seconds_of(blocks[name], args.device))
    plain = seconds[PLAIN]
    ratios = {name: [s / p for s, p in zip(own, plain, strict=True)] for name, own in seconds.items()}
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    title = f"{args.model}, batch {args.batch_size}, {'bf16' if args.bf16 else 'float32'}, {device}"
    table = Table("", "milliseconds a step", "of the plain step", "least to most", title=title)
    for name, own in ratios.items():
        milliseconds = 1000 * statistics.median(seconds[name]) / args.steps
        table.add_row(
            name, f"{milliseconds:.1f}", f"{statistics.median(own):.3f}", f"{min(own):.3f} to {max(own):.3f}"
        )
    console.print(table)
    if args.output is not None:
        figures = {"arguments": vars(args), "device": device, "seconds": seconds, "torch": torch.__version__}
        Path(args.output).write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
