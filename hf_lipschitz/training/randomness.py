"""Random draws of training that are functions of a key, so that a resumed run repeats them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from transformers import TrainerCallback


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
        self.restart()

    def restart(self) -> None:
        """Forgets the steps before: a run that begins anew, at whatever step, begins with the first micro-batch."""
        self._step = -1
        self._micro_batch = 0

    def advance(self, step: int) -> None:
        """Goes to the next micro-batch, the first one if `step` is another optimizer step than before."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step

    def generator(self, purpose: str, device: torch.device, *, is_shared: bool = False) -> torch.Generator:
        """A new generator on `device`; the same numbers each time it is asked for within a micro-batch, or, if it is
        shared, within an optimizer step and on every process."""
        owner = "all" if is_shared else f"{self.process}/{self._micro_batch}"
        key = f"{self.seed}/{owner}/{self._step}/{purpose}"
        sequence = np.random.SeedSequence(int.from_bytes(key.encode(), "little"))
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class Restartable(Protocol):
    def restart(self) -> None: ...


class RestartCallback(TrainerCallback):
    """Begins draws anew whenever training begins, so that a second run at the same step repeats the first."""

    def __init__(self, *draws: Restartable) -> None:
        self.draws = draws

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for draws in self.draws:
            draws.restart()
