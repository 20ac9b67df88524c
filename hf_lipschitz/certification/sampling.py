"""Noisy copies of many inputs in batches of one shape, and the counts of what the base classifier says to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lipschitz.certification.noise import NOISE_BLOCK, NOISES, NoiseKey, Stage
from hf_lipschitz.certification.statistics import NUM_SCORE_BINS, SCORE_WEIGHT, interpolation_weights


# Scores are summed as whole numbers of this unit: sums of integers are the same in every order.
SCORE_UNIT = 2.0**-30
SIMPLEX_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Item:
    """One block of noise on one input: `row` is its place among those certified together, `size` of it count."""

    row: int
    block: int
    size: int


@dataclass(frozen=True)
class Counted:
    """Which rows of a batch count, and for whom.

    Args:
        rows (`Tensor`, int64):
            For each of them, the place of its input among those certified together.
        places (`Tensor`, int64, *optional*):
            Where each is in the batch; `None` if they are the first ones.
    """

    rows: Tensor
    places: Tensor | None

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs' rows on the device of the logits, and the logits that count."""
        rows = self.rows.to(logits.device)
        return rows, logits[: len(rows)] if self.places is None else logits[self.places.to(logits.device)]


@dataclass(frozen=True)
class Batch:
    """What goes through the base classifier at once: the items' noisy copies in blocks, and which of them count."""

    items: tuple[Item, ...]
    noisy: Tensor
    counted: Counted


def items_of(rows: Iterable[int], start: int, stop: int) -> list[Item]:
    """The blocks with the samples `start` to `stop` of each input; `start` is a multiple of the block."""
    if start % NOISE_BLOCK:
        raise ValueError(f"start must be a multiple of {NOISE_BLOCK}, got {start}.")
    blocks = range(start // NOISE_BLOCK, math.ceil(stop / NOISE_BLOCK))
    return [Item(row, block, min(stop - block * NOISE_BLOCK, NOISE_BLOCK)) for row in rows for block in blocks]


def in_batches(items: Sequence[Item], shapes: Sequence[tuple[int, ...]], batch_size: int) -> list[tuple[Item, ...]]:
    """
    Items of inputs of one shape together, `batch_size` samples at a time rounded up to whole blocks. Which items share
    a batch, and where they are in it, is a function of the arguments alone: not of how many processes there are.
    """
    alike: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(shapes[item.row], []).append(item)
    size = blocks_of(batch_size)
    return [tuple(group[i : i + size]) for group in alike.values() for i in range(0, len(group), size)]


def blocks_of(batch_size: int) -> int:
    """Noise blocks in a batch."""
    return math.ceil(batch_size / NOISE_BLOCK)


def counted_in(parts: Sequence[tuple[Item, ...]], device: torch.device) -> list[Counted]:
    """What counts in each batch. It goes to the device at once: each transfer waits for what is computed there."""
    if not parts:
        return []
    rows = [np.repeat([item.row for item in part], [item.size for item in part]) for part in parts]
    starts = [np.arange(len(part)) * NOISE_BLOCK for part in parts]
    places = [
        np.concatenate([start + np.arange(item.size) for item, start in zip(part, begin, strict=True)])
        for part, begin in zip(parts, starts, strict=True)
    ]
    together = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(places)])).to(device)
    split = together.split([len(part) for part in rows], dim=1)
    are_first = [bool(part[-1] == len(part) - 1) for part in places]
    return [Counted(both[0], None if first else both[1]) for both, first in zip(split, are_first, strict=True)]


@dataclass(frozen=True)
class NoisyInputs:
    """Several inputs, and the key of the noise on each.

    Args:
        xs (`Sequence[Tensor]`):
            Without a batch axis, float32.
        indices (`Sequence[int]`):
            The example that each one is, part of the noise's key.
        noise (`str`), sigma (`float`), seed (`int`):
            The noise.
        batch_size (`int`):
            Rows of every batch: whole blocks. The last one is filled up with repeats, which do not count.
    """

    xs: Sequence[Tensor]
    indices: Sequence[int]
    noise: str
    sigma: float
    seed: int
    batch_size: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in self.xs]

    def batches(self, stage: Stage, parts: Sequence[tuple[Item, ...]]) -> Iterator[Batch]:
        """Each part as a batch."""
        for part, counted in zip(parts, counted_in(parts, self.xs[0].device), strict=True):
            blocks = [self._noisy(stage, item) for item in part]
            blocks += [blocks[0]] * (blocks_of(self.batch_size) - len(blocks))
            yield Batch(part, blocks[0] if len(blocks) == 1 else torch.cat(blocks), counted)

    def _noisy(self, stage: Stage, item: Item) -> Tensor:
        x = self.xs[item.row]
        key = NoiseKey(seed=self.seed, index=self.indices[item.row], stage=stage, block=item.block)
        return NOISES[self.noise].perturb(x, self.sigma, key, x.device)


@torch.no_grad()
def logits_of(base_classifier: Callable[[Tensor], Any], noisy: Tensor, num_classes: int, splits: int = 1) -> Tensor:
    """
    Logits of shape `(len(noisy), num_classes)`; the batch goes through in `splits` equal parts.

    Raises:
        `TypeError`, `ValueError`: they are no tensor, or have another shape.
    """
    parts = [_logits(base_classifier, part, num_classes) for part in noisy.chunk(splits)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _logits(base_classifier: Callable[[Tensor], Any], noisy: Tensor, num_classes: int) -> Tensor:
    output = base_classifier(noisy)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"The base classifier must return a tensor or an object with .logits, got {type(output)}.")
    if logits.shape != (len(noisy), num_classes):
        raise ValueError(
            f"The base classifier returned logits of shape {tuple(logits.shape)}; expected "
            f"{(len(noisy), num_classes)}, which is (batch, num_classes)."
        )
    return logits


class Votes:
    """Counts of the top classes, shape `(inputs, num_classes)`, int64: they add exactly, in any order."""

    def __init__(self, num_inputs: int, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_inputs, num_classes, dtype=torch.int64, device=device)

    def add(self, counted: Counted, logits: Tensor) -> None:
        rows, logits = counted.of(logits)
        flat = rows * self.counts.shape[1] + logits.argmax(dim=-1)
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def check(self) -> None:
        """Nothing can be wrong with votes."""


class ScoreSums:
    """Sums of scores and of their squares, shape `(inputs, 2, num_classes)`, in whole units of 2⁻³⁰."""

    def __init__(self, num_inputs: int, num_classes: int, device: torch.device, to_scores: Callable) -> None:
        self.counts = torch.zeros(num_inputs, 2, num_classes, dtype=torch.int64, device=device)
        self.scores = Scores(to_scores, device)

    def add(self, counted: Counted, logits: Tensor) -> None:
        rows, logits = counted.of(logits)
        scores = self.scores.of(logits)
        units = torch.stack([scores, scores.square()], dim=1).div_(SCORE_UNIT).round_().to(self.counts)
        self.counts.index_add_(0, rows, units)

    def check(self) -> None:
        self.scores.check()


class ScoreHistograms:
    """Interpolated histograms of the scores of groups of classes, shape `(inputs, groups, NUM_SCORE_BINS)`, int64.

    Args:
        groups (`Tensor` of shape `(inputs, num_classes)`, int64):
            The group that each class of each input is in; the score of a group is the sum of its classes' scores.
        num_groups (`int`):
            How many groups there are.
    """

    def __init__(self, groups: Tensor, num_groups: int, to_scores: Callable) -> None:
        self.counts = torch.zeros(len(groups), num_groups, NUM_SCORE_BINS, dtype=torch.int64, device=groups.device)
        self.groups = groups
        self.scores = Scores(to_scores, groups.device)

    def add(self, counted: Counted, logits: Tensor) -> None:
        rows, logits = counted.of(logits)
        scores = self.scores.of(logits)
        rows, groups = rows.to(scores.device), self.groups.to(scores.device)
        num_groups = self.counts.shape[1]
        grouped = scores.new_zeros(len(scores), num_groups).scatter_add_(1, groups[rows], scores)
        below, weights = interpolation_weights(grouped.clamp_(0, 1), are_checked=True)
        first = rows[:, None] * num_groups + torch.arange(num_groups, device=rows.device)
        places = (first * NUM_SCORE_BINS + below).flatten().to(self.counts.device)
        weights = weights.flatten().to(self.counts.device)
        self.counts.view(-1).index_add_(0, places, SCORE_WEIGHT - weights)
        self.counts.view(-1).index_add_(0, places + 1, weights)

    def check(self) -> None:
        self.scores.check()


class Scores:
    """Scores of logits in float64, in [0, 1]. Whether they were on the simplex is seen at the end alone, since asking
    the device waits for it."""

    def __init__(self, to_scores: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.to_scores = to_scores
        self.are_inside = torch.ones((), dtype=torch.bool, device=device)

    def of(self, logits: Tensor) -> Tensor:
        device = "cpu" if logits.device.type == "mps" else logits.device  # MPS has no float64
        scores = self.to_scores(logits.to(device, torch.float64))
        inside = (scores >= -SIMPLEX_TOLERANCE).all() & (scores.sum(dim=-1) <= 1 + SIMPLEX_TOLERANCE).all()
        self.are_inside &= inside.to(self.are_inside.device)
        return scores.clamp(0, 1)

    def check(self) -> None:
        """
        Raises:
            `ValueError`: the simplex map left the simplex.
        """
        if not self.are_inside:
            raise ValueError("The simplex map returned scores that are negative or sum to more than 1.")
