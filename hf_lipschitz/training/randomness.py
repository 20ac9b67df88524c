"""Random draws of training that are functions of a key, so that a resumed run repeats them."""

from __future__ import annotations

import numpy as np
import torch


class Draws:
    """Generators keyed by (seed, process, optimizer step, micro-batch of the step, purpose).

    No global generator is read or advanced: dropout and data order are the same with and without the draws.

    Args:
        seed (`int`):
            Any integer.
        process (`int`):
            Rank; processes draw independently.
    """

    def __init__(self, seed: int, process: int) -> None:
        self.seed = seed
        self.process = process
        self._step = -1
        self._micro_batch = 0

    def advance(self, step: int) -> None:
        """Goes to the next micro-batch, the first one if `step` is another optimizer step than before."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """A new generator on `device`; the same numbers each time it is asked for within a micro-batch."""
        key = f"{self.seed}/{self.process}/{self._step}/{self._micro_batch}/{purpose}"
        sequence = np.random.SeedSequence(int.from_bytes(key.encode(), "little"))
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
