"""Clean, certified and attacked accuracy of a 1-Lipschitz convolutional network on 500 held-out MNIST digits.

    OMP_NUM_THREADS=1 python scripts/one_lipschitz_mnist.py --kind sll
    OMP_NUM_THREADS=1 python scripts/one_lipschitz_mnist.py --kind cpl

Pixels lie in [0, 1] and distances are l2 norms of 784 pixels. From the pixels to the features before the head the
network is 1-Lipschitz: space-to-depth keeps every norm, and residual blocks of `hf_lipschitz.nn` do the rest. The
4500 other images train it; the held-out ones are looked at once, after training. `--margin` trades clean accuracy for
certified accuracy at large radii, and so does a higher `--temperature`.

The certificate holds for every point of the ball in R^784, images or not. So the attack does not clip to [0, 1]
either: it is measured on the set that the certificate speaks of, and can never fall below it.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize
from transformers import HfArgumentParser

from hf_lipschitz import certify_deterministic
from hf_lipschitz.demo.data import mnist
from hf_lipschitz.nn import CPLBlock, CPLConvBlock2d, SLLBlock, SLLConvBlock2d


BLOCKS = {"sll": (SLLConvBlock2d, SLLBlock), "cpl": (CPLConvBlock2d, CPLBlock)}
SIDE = 28
FEATURES = SIDE * SIDE
CLASSES = 10
SHIFT = 1
RADII = {"36/255": 36 / 255, "1": 1.0}
ATTACK_STEPS = 100
RESTARTS = 5


@dataclass
class Arguments:
    kind: str = field(default="sll", metadata={"help": "Of the blocks: 'sll' or 'cpl'."})
    epochs: int = field(default=60, metadata={"help": "Passes over the 4500 training images."})
    width: int = field(
        default=128, metadata={"help": "Hidden features of a dense block; convolutions have 1/8 and 1/4 of them."}
    )
    depth: int = field(
        default=2, metadata={"help": "Blocks at 14 x 14 and at 7 x 7 pixels each; twice as many are dense."}
    )
    margin: float = field(default=1.0, metadata={"help": "Radius that the loss asks for, in l2 norm of the pixels."})
    temperature: float = field(default=0.25, metadata={"help": "Of the loss."})
    seed: int = field(default=0, metadata={"help": "Of the weights, the batches, the shifts and the attack."})
    batch_size: int = field(default=128, metadata={"help": "Images a step."})
    learning_rate: float = field(default=0.01, metadata={"help": "The highest of Adam's one-cycle schedule."})


class UnitRows(nn.Module):
    """A weight with rows of norm 1."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1)


def main(args: Arguments) -> None:
    if args.kind not in BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(BLOCKS)}, got {args.kind!r}")
    if args.width % 8:
        raise ValueError(f"width must be a multiple of 8, got {args.width}")
    torch.manual_seed(args.seed)
    data = mnist()
    model = network(args.kind, args.width, args.depth)
    began = time.perf_counter()
    train(model, *tensors(data.train), args)
    seconds = time.perf_counter() - began
    model.eval().requires_grad_(False)
    Console().print(evaluation(model, *tensors(data.test), f"{args.kind}, {args.epochs} epochs in {seconds:.0f} s"))


def network(kind: str, width: int, depth: int) -> nn.Sequential:
    """`features`, 784 of them and 1-Lipschitz, then `head`, a Linear with unit rows.

    1 x 28 x 28 becomes 4 x 14 x 14, then 16 x 7 x 7: nothing is pooled away, and each stage keeps all 784 numbers.
    """
    convolution, dense = BLOCKS[kind]
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    layers += [convolution(4, width // 8) for _ in range(depth)]
    layers += [nn.PixelUnshuffle(2)]
    layers += [convolution(16, width // 4) for _ in range(depth)]
    layers += [nn.Flatten()]
    layers += [dense(FEATURES, width) for _ in range(2 * depth)]
    head = nn.Linear(FEATURES, CLASSES)
    parametrize.register_parametrization(head, "weight", UnitRows())
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), head=head))


def tensors(split: Dataset) -> tuple[Tensor, Tensor]:
    """Images of shape (n, 1, 28, 28) in [0, 1] and their digits."""
    images = torch.from_numpy(np.stack(split["input"])).float() / 255
    return images.unsqueeze(1), torch.tensor(split["labels"])


def train(model: nn.Module, images: Tensor, labels: Tensor, args: Arguments) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    steps = args.epochs * -(-len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.15)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(images), generator=generator).split(args.batch_size):
            scores = model(shifted(images[batch], generator))
            loss = offset_cross_entropy(scores, labels[batch], args.margin, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def offset_cross_entropy(scores: Tensor, labels: Tensor, margin: float, temperature: float) -> Tensor:
    """Cross-entropy after √2 · margin is taken from the true score (Prach & Lampert 2022).

    √2 is the distance between orthogonal rows of the head: a lead of √2 · margin is then a radius of `margin`.
    """
    offset = math.sqrt(2) * margin * F.one_hot(labels, CLASSES)
    return F.cross_entropy((scores - offset) / temperature, labels) * temperature


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `SHIFT` pixels along both axes, with zeros moved in."""
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT)).squeeze(1)
    first, second = torch.randint(0, 2 * SHIFT + 1, (2, len(images), 1), generator=generator) + torch.arange(SIDE)
    return padded[torch.arange(len(images))[:, None, None], first[:, :, None], second[:, None, :]].unsqueeze(1)


@torch.no_grad()
def radii(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and certified l2 radii of the library; a tie has radius 0, and ABSTAIN for a prediction."""
    certificates = certify_deterministic(model, (images,))
    predictions = torch.tensor([certificate.prediction for certificate in certificates])
    return predictions, torch.tensor([certificate.radius for certificate in certificates])


def attacked(model: nn.Module, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Which images are wrong at first or after an l2 attack: projected normalised gradients, without clipping.

    The first run starts at the image and lowers its lead over the best other class; run k starts at a random point
    and lowers the lead over the k-th best other class of the image. A point counts at any step.
    """
    with torch.no_grad():
        scores = model(images)
    ranked = scores.scatter(1, labels[:, None], -math.inf).argsort(1, descending=True)
    fooled = scores.argmax(1) != labels
    for run in range(RESTARTS):
        left = (~fooled).nonzero().squeeze(1)
        rivals = None if run == 0 else ranked[left, run - 1]
        fooled[left] = descent(model, images[left], labels[left], rivals, radius)
    return fooled


def descent(model: nn.Module, images: Tensor, labels: Tensor, rivals: Tensor | None, radius: float) -> Tensor:
    """One run of the attack; where there are no `rivals`, each step takes the best other class."""
    size = 2.5 * radius / ATTACK_STEPS
    change = torch.zeros_like(images)
    if rivals is not None:
        change = direction(torch.randn_like(images)) * radius * torch.rand(len(images), 1, 1, 1)
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(ATTACK_STEPS):
        change.requires_grad_(True)
        scores = model(images + change)
        fooled |= scores.argmax(1) != labels
        others = scores.scatter(1, labels[:, None], -math.inf).amax(1)
        other = others if rivals is None else scores.gather(1, rivals[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad((scores.gather(1, labels[:, None]).squeeze(1) - other).sum(), change)
        change = inside(change.detach() - size * direction(gradient), radius)
    with torch.no_grad():
        return fooled | (model(images + change).argmax(1) != labels)


def direction(change: Tensor) -> Tensor:
    return change / norms(change).clamp_min(1e-12)


def inside(change: Tensor, radius: float) -> Tensor:
    """Projected to the ball, a hair smaller than asked for so that rounding does not leave it."""
    return change * (radius * (1 - 1e-6) / norms(change)).clamp(max=1)


def norms(change: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def evaluation(model: nn.Module, images: Tensor, labels: Tensor, setting: str) -> Table:
    table = Table(title=f"1-Lipschitz network on {len(images)} held-out digits: {setting}")
    for column in ("accuracy", "share", "95 % interval"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    predictions, certified_radii = radii(model, images)
    is_right = predictions == labels
    table.add_row("clean", *share(is_right))
    for name, radius in RADII.items():
        certified = is_right & (certified_radii > radius)
        fooled = attacked(model, images, labels, radius)
        check(certified & fooled, certified_radii, radius)
        table.add_row(f"certified at {name}", *share(certified))
        table.add_row(f"under attack at {name}", *share(~fooled))
    return table


def check(refuted: Tensor, certified_radii: Tensor, radius: float) -> None:
    """Raises a RuntimeError where an attack turned a certified image: the certificate is then wrong."""
    if refuted.any():
        index = int(refuted.nonzero()[0])
        raise RuntimeError(
            f"held-out image {index} has the certified radius {certified_radii[index]:.4g}, but the attack turned it "
            f"within {radius:.4g}: the network is not 1-Lipschitz"
        )


def share(counted: Tensor) -> tuple[str, str]:
    """Percentage and Clopper-Pearson interval."""
    count, total = int(counted.sum()), len(counted)
    interval = binomtest(count, total).proportion_ci(method="exact")
    return f"{count / total:.1%}", f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
