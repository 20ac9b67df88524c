"""Accuracy on handwritten digits of networks 30 layers deep, for each kind of standalone layer and residual block.

    python scripts/deep_layers.py
    python scripts/deep_layers.py --activation relu --depth 30 --epochs 20

Every constrained network is 1-Lipschitz from the standardised input to the features before the head. The rows "torch's
start" hold the same layers with the initialisation of `torch.nn.Linear`, for which the signal dies with depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_lipschitz.nn import AOLLinear, CPLBlock, CPLLinear, MaxMin, SLLBlock, SLLLinear, SpectralLinear


@dataclass
class Arguments:
    depth: int = field(default=30, metadata={"help": "Layers or blocks of each network."})
    width: int = field(default=64, metadata={"help": "Features of each layer; even."})
    epochs: int = field(default=15, metadata={"help": "Passes over the 1437 training images."})
    batch_size: int = field(default=128, metadata={"help": "Images a step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of AdamW."})
    activation: str = field(default="maxmin", metadata={"help": "Between layers: 'maxmin' or 'relu'."})
    seed: int = field(default=0, metadata={"help": "Of the split, the weights and the batches."})


def main(args: Arguments) -> None:
    if args.activation not in ("maxmin", "relu"):
        raise ValueError(f"activation must be 'maxmin' or 'relu', got {args.activation!r}")
    activation = MaxMin if args.activation == "maxmin" else nn.ReLU
    data = digits(args.seed)
    table = Table(title=f"{args.depth} layers of width {args.width}, {args.activation}, {args.epochs} epochs")
    for column in ("layer", "start", "signal at the start", "test accuracy", "seconds"):
        table.add_column(column, justify="left" if column in ("layer", "start") else "right")
    for name, start, layer in kinds(args.width):
        torch.manual_seed(args.seed)
        is_block = isinstance(layer(), (SLLBlock, CPLBlock))
        body = [part for _ in range(args.depth) for part in ((layer(),) if is_block else (layer(), activation()))]
        features = nn.Sequential(SpectralLinear(64, args.width), *body)
        began = time.perf_counter()
        gain = signal(features, data[0])
        accuracy = trained_accuracy(features, args, data)
        table.add_row(name, start, f"{gain:.2g}", f"{accuracy:.1%}", f"{time.perf_counter() - began:.0f}")
    Console().print(table)


def kinds(width: int) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """Name, initialisation and builder of what a network is made of."""
    rows: list[tuple[str, str, Callable[[], nn.Module]]] = [("Linear", "torch's", lambda: nn.Linear(width, width))]
    for kind in (AOLLinear, SLLLinear, CPLLinear, SpectralLinear):
        rows.append((kind.__name__, "orthogonal", lambda kind=kind: kind(width, width)))
    rows.append(("AOLLinear", "torch's", lambda: with_default_start(AOLLinear(width, width))))
    rows.append(("SLLLinear", "torch's", lambda: with_default_start(SLLLinear(width, width))))
    rows.append(("SLLBlock", "Gaussian", lambda: SLLBlock(width, width)))
    rows.append(("CPLBlock", "Gaussian", lambda: CPLBlock(width, width)))
    return rows


def with_default_start(layer: nn.Linear) -> nn.Linear:
    """The layer with the raw weight and bias that `torch.nn.Linear` begins with."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(plain.weight)
        layer.bias.copy_(plain.bias)
    return layer


@torch.no_grad()
def signal(features: nn.Module, inputs: Tensor) -> float:
    """How much of the distance between images is left, on average, where 1 is the most a 1-Lipschitz network keeps."""
    others = inputs.roll(1, 0)
    return ((features(inputs) - features(others)).norm(dim=1) / (inputs - others).norm(dim=1)).mean().item()


def trained_accuracy(features: nn.Module, args: Arguments, data: tuple[Tensor, ...]) -> float:
    train_x, test_x, train_y, test_y = data
    model = nn.Sequential(features, nn.Linear(args.width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    steps = args.epochs * -(-len(train_x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(train_x), generator=generator).split(args.batch_size):
            loss = nn.functional.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def digits(seed: int) -> tuple[Tensor, ...]:
    """Training and test images with mean 0 and standard deviation 1, then their labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, deviation = train_x.mean(), train_x.std()
    return (train_x - mean) / deviation, (test_x - mean) / deviation, torch.tensor(parts[2]), torch.tensor(parts[3])


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
