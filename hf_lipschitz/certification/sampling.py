"""Statistics of the base classifier's outputs on noisy copies of one input; they merge by addition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lipschitz.certification.noise import NOISE_BLOCK, Stage, gaussian_noise_block


SCORE_GRID = 2.0**-30
SIMPLEX_TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class VoteStatistics:
    """`counts` (int64, one entry a class) of the `n` samples' top classes. Adds exactly."""

    counts: NDArray[np.int64]
    n: int

    def __add__(self, other: VoteStatistics) -> VoteStatistics:
        return VoteStatistics(self.counts + other.counts, self.n + other.n)


@dataclass(frozen=True, eq=False)
class ScoreStatistics:
    """
    Sums and sums of squares (float64, one entry a class) of the scores of `n` samples.

    Each block's sum is rounded to a multiple of 2⁻³⁰, so that adding statistics is exact up to 2²³ samples and the
    result does not depend on how blocks were grouped. The rounding is at most 2⁻³¹ a block, which the empirical
    Bernstein bounds cover.
    """

    sums: NDArray[np.float64]
    sums_of_squares: NDArray[np.float64]
    n: int

    def __add__(self, other: ScoreStatistics) -> ScoreStatistics:
        return ScoreStatistics(self.sums + other.sums, self.sums_of_squares + other.sums_of_squares, self.n + other.n)


@dataclass(frozen=True)
class NoisySampler:
    r"""
    One input, the base classifier, and the key of the noise. Blocks are numbered from 0 in each stage, and any range
    of them can be drawn at any time, in any process: the statistics of a range are the sum of those of its parts.

    Args:
        base_classifier (`Callable`):
            Maps a float32 batch of shape `(B, *x.shape)` to logits of shape `(B, num_classes)`, or to an object
            that has them as `.logits`.
        x (`torch.Tensor`):
            One input without a batch axis, float32, in the unit of `sigma`.
        num_classes (`int`):
            Number of logits.
        sigma (`float`):
            Standard deviation of the noise.
        seed (`int`), index (`int`):
            Part of the noise's key.
        batch_size (`int`):
            Samples a forward pass, see [`physical_batch_size`].
        simplex_map (`Callable[[Tensor], Tensor]`):
            Maps float64 logits to scores in [0, 1] whose rows sum to at most 1; used by `scores` only.
    """

    base_classifier: Callable[[Tensor], Any]
    x: Tensor
    num_classes: int
    sigma: float
    seed: int
    index: int
    batch_size: int
    simplex_map: Callable[[Tensor], Tensor]

    def votes(self, stage: Stage, num_samples: int, blocks: range | None = None) -> VoteStatistics:
        """
        Counts the top classes.

        Args:
            stage (`Stage`):
                What the samples are for.
            num_samples (`int`):
                Samples of the WHOLE stage; its last block is cut there.
            blocks (`range`, *optional*, defaults to all blocks of the stage):
                Blocks to draw, with step 1.

        Raises:
            `RuntimeError`: the logits are not finite; the message names the input's index.
            `ValueError`, `TypeError`: the logits do not have shape `(B, num_classes)`, or are no tensor.
        """
        counts = np.zeros(self.num_classes, dtype=np.int64)
        for logits in self._batches(stage, num_samples, blocks):
            counts += np.bincount(logits.argmax(dim=-1).cpu().numpy(), minlength=self.num_classes)
        return VoteStatistics(counts, int(counts.sum()))

    def scores(self, stage: Stage, num_samples: int, blocks: range | None = None) -> ScoreStatistics:
        """
        Sums the scores and their squares, in float64. Arguments and errors are those of `votes`; a simplex map that
        leaves the simplex is a `ValueError`.
        """
        sums = np.zeros(self.num_classes)
        squares = np.zeros(self.num_classes)
        drawn = 0
        for logits in self._batches(stage, num_samples, blocks):
            scores = self._scores(logits)
            for block in scores.split(NOISE_BLOCK):
                sums += _on_grid(block.sum(dim=0))
                squares += _on_grid(block.square().sum(dim=0))
            drawn += len(scores)
        return ScoreStatistics(sums, squares, drawn)

    def _scores(self, logits: Tensor) -> Tensor:
        device = "cpu" if logits.device.type == "mps" else logits.device  # MPS has no float64
        scores = self.simplex_map(logits.to(device, torch.float64))
        inside = (scores >= -SIMPLEX_TOLERANCE).all() & (scores.sum(dim=-1) <= 1 + SIMPLEX_TOLERANCE).all()
        if not inside:
            raise ValueError("The simplex map returned scores that are negative or sum to more than 1.")
        return scores.clamp(0, 1)

    def _batches(self, stage: Stage, num_samples: int, blocks: range | None) -> Iterator[Tensor]:
        all_blocks = range(num_blocks(num_samples))
        blocks = all_blocks if blocks is None else blocks
        if blocks.step != 1 or (len(blocks) and (blocks.start < 0 or blocks.stop > len(all_blocks))):
            raise ValueError(f"blocks must be a range with step 1 inside {all_blocks}, got {blocks}.")
        physical = physical_batch_size(self.batch_size, num_samples)
        step = num_blocks(physical)
        for start in range(blocks.start, blocks.stop, step):
            batch_blocks = range(start, min(start + step, blocks.stop))
            size = min(batch_blocks.stop * NOISE_BLOCK, num_samples) - batch_blocks.start * NOISE_BLOCK
            batch = torch.cat([self._noise(stage, block) for block in batch_blocks])[:size].add_(self.x)
            if size < physical:
                batch = batch[torch.arange(physical, device=batch.device) % size]
            yield self._logits(batch)[:size]

    def _noise(self, stage: Stage, block: int) -> Tensor:
        return gaussian_noise_block(
            tuple(self.x.shape),
            self.sigma,
            seed=self.seed,
            index=self.index,
            stage=stage,
            block=block,
            device=self.x.device,
        )

    def _logits(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.base_classifier(batch)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"The base classifier must return a tensor or an object with .logits, got {type(output)}.")
        if logits.shape != (len(batch), self.num_classes):
            raise ValueError(
                f"The base classifier returned logits of shape {tuple(logits.shape)}; expected "
                f"{(len(batch), self.num_classes)}, which is (batch, num_classes)."
            )
        if not torch.isfinite(logits).all():
            raise RuntimeError(
                f"The base classifier returned NaN or infinite logits on input {self.index}; check that input."
            )
        return logits


def num_blocks(num_samples: int) -> int:
    """Noise blocks that hold `num_samples` samples."""
    return math.ceil(num_samples / NOISE_BLOCK)


def physical_batch_size(batch_size: int, num_samples: int) -> int:
    """
    Shape of every forward pass of a stage: `batch_size` rounded up to whole noise blocks, but no more than the
    stage's `num_samples`. One shape for all batches (the last is padded with repeats, which are not counted) keeps
    compiled models from recompiling and makes the numbers independent of how blocks are shared between processes.
    """
    return min(num_blocks(batch_size) * NOISE_BLOCK, num_samples)


def _on_grid(block_sum: Tensor) -> NDArray[np.float64]:
    return np.round(block_sum.cpu().numpy() / SCORE_GRID) * SCORE_GRID
