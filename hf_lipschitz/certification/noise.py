"""Gaussian noise that is a function of (seed, example index, stage, block), and of nothing else."""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from torch import Tensor


NOISE_BLOCK = 50


class Stage(Enum):
    """What the samples are for. Samples of different stages are independent."""

    SELECTION = "selection"
    ESTIMATION = "estimation"
    PREDICTION = "prediction"


def gaussian_noise_block(
    shape: tuple[int, ...],
    sigma: float,
    *,
    seed: int,
    index: int,
    stage: Stage,
    block: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    One block of `NOISE_BLOCK` independent float32 samples of N(0, sigma² I).

    The key is written out as text, whose bytes are the entropy of a `numpy.random.SeedSequence`: every integer seed
    (negative, larger than 64 bits) is its own key. No global generator is read or advanced. On an accelerator the
    sequence seeds a `torch.Generator` (64 bits); on CPU it seeds numpy's SFC64 instead, because torch's CPU generator
    keeps only 32 bits of a seed, too few for the blocks of one data set to be different. The stream therefore depends
    on the kind of device, not on batch size, process count or order of the draws.

    Args:
        shape (`tuple[int, ...]`):
            Shape of one input.
        sigma (`float`):
            Standard deviation, in the unit of the input.
        seed (`int`), index (`int`), stage (`Stage`), block (`int`):
            The key: the configuration's seed, the example, what the samples are for, and which block of them.
        device (`torch.device`, *optional*, defaults to `"cpu"`):
            Where the noise is drawn.

    Returns:
        `torch.Tensor` of shape `(NOISE_BLOCK, *shape)`, float32, on `device`.
    """
    key = f"{int(seed)}/{int(index)}/{stage.value}/{int(block)}"
    sequence = np.random.SeedSequence(int.from_bytes(key.encode(), "little"))
    size = (NOISE_BLOCK, *shape)
    if torch.device(device).type == "cpu":
        noise = torch.from_numpy(np.random.Generator(np.random.SFC64(sequence)).standard_normal(size, np.float32))
    else:
        generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        noise = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
    return noise.mul_(sigma)
