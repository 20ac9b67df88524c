"""Time of the Lipschitz bound of a whole model of BERT-base's shape, with random weights.

python scripts/benchmarks/model_bound.py
python scripts/benchmarks/model_bound.py --layers 24 --width 1024 --tokens 384
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from hf_lipschitz import lipschitz_bound


@dataclass
class Arguments:
    layers: int = field(default=12)
    width: int = field(default=768, metadata={"help": "of the tokens; heads of 64, four times as much inside"})
    tokens: int = field(default=128)
    radius: float = field(default=1e-3, metadata={"help": "of the ball of the local bound"})
    rounds: int = field(default=3)
    threads: int = field(default=2)


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.width,
        num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
    )
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(1000, 2000, (1, args.tokens))}
    table = Table(title=f"BERT of {args.layers} layers of width {args.width}, {args.tokens} tokens")
    for column in ("bound", "seconds, median", "log10"):
        table.add_column(column, justify="left" if column == "bound" else "right")
    for name, options in (("global", {}), (f"on a ball of radius {args.radius:g}", {"radius": args.radius})):
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            bound = lipschitz_bound(model, inputs, **options)
            seconds.append(time.perf_counter() - start)
        table.add_row(name, f"{statistics.median(seconds):.1f}", f"{bound.log_value / math.log(10):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
