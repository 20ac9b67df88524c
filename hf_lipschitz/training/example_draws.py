"""Noise of training that belongs to an example, however the batch is cut into processes and micro-batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_lipschitz.certification.host_numbers import HostNumbers


class ExampleDraws:
    r"""
    Standard normal numbers keyed by (seed, optimizer step, position of the example in the batch of that step, copy,
    purpose). A batch of 32 on one process, of 16 on each of two, and of 8 four times over get the same noise.

    The positions of a process that has seen s rows of the step before, and now has b, are \\(Ps + rb + i\\), i < b,
    with r its rank and P the number of processes. That is the place of the example in the order of the sampler for all
    the ways in which accelerate shares a map-style dataset: `BatchSamplerShard` gives process r the batches r, r + P,
    … of the sampler (`split_batches=False`), or the r-th part of each (`True`), and `dispatch_batches=True` cuts the
    same rows out of what process 0 has loaded.

    It holds where the processes have equally many rows in every micro-batch, as they do unless `even_batches=False`
    leaves the last batch of an epoch uneven, and where the order of the sampler does not depend on their number
    (`use_seedable_sampler=True`, the default of the Trainer). Examples that accelerate repeats to fill the last batch
    have positions of their own. It does not hold for an iterable dataset whose shards are dealt out to the processes,
    for there the batches themselves differ. The numbers are the same on one kind of device: CPU and CUDA differ.

    No global generator is read or advanced.

    Args:
        seed (`int`):
            Any integer.
        process (`int`, *optional*, defaults to 0), num_processes (`int`, *optional*, defaults to 1):
            r and P.

    Raises:
        ValueError: r is not in [0, P).
    """

    def __init__(self, seed: int, process: int = 0, num_processes: int = 1) -> None:
        if not 0 <= process < num_processes:
            raise ValueError(f"process must be in [0, num_processes), got {process} of {num_processes}")
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        self.restart()

    def restart(self) -> None:
        """Forgets the steps before: a run that begins anew, at whatever step, begins with the first micro-batch."""
        self._step = -1
        self._rows_before = 0
        self._rows = 0

    def advance(self, step: int, rows: int) -> None:
        """Goes to the next micro-batch, of `rows` examples; the first one if `step` is another one than before.

        Raises:
            ValueError: there are no rows.
        """
        if rows < 1:
            raise ValueError(f"a micro-batch has at least one example, got {rows}")
        self._rows_before = self._rows_before + self._rows if step == self._step else 0
        self._step, self._rows = step, rows

    @property
    def positions(self) -> range:
        """Of the examples of this micro-batch in the batch of the step."""
        first = self.num_processes * self._rows_before + self.process * self._rows
        return range(first, first + self._rows)

    def standard_normal(
        self, like: Tensor, copies: int = 1, *, purpose: str = "noise", mask: Tensor | None = None
    ) -> Tensor:
        """The numbers of this micro-batch; the same ones each time they are asked for.

        Args:
            like (`Tensor` of shape `(B, ...)`):
                Its shape and device are taken: one row for each example of the micro-batch.
            copies (`int`, *optional*, defaults to 1):
                m. The first ones do not depend on how many there are.
            purpose (`str`, *optional*, defaults to `"noise"`):
                Numbers for different purposes are independent.
            mask (`Tensor` of shape `(B, T)`, *optional*):
                For texts `like` of shape `(B, T, ...)`, the attention mask: only tokens that count get numbers, the
                others zeros, so that noise does not depend on how long the other texts of the batch are.

        Returns:
            `Tensor` of shape `(m, B, ...)`, float32.

        Raises:
            ValueError: B is not the number of rows of the micro-batch, there are no copies, or the mask does not fit.
        """
        if len(like) != self._rows:
            raise ValueError(f"the micro-batch has {self._rows} examples, and the tensor {len(like)} rows")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        if mask is None:
            return torch.stack([self._copy(like, copy, purpose) for copy in range(copies)])
        if mask.shape != like.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(like.shape[:2])}, got {tuple(mask.shape)}")
        counts = mask.to(like.device, torch.bool)
        lengths = counts.sum(1).tolist()
        noise = like.new_zeros((copies, *like.shape), dtype=torch.float32)
        for copy in range(copies):
            rows = [
                self._numbers((length, *like.shape[2:]), position, copy, purpose, like.device)
                for length, position in zip(lengths, self.positions, strict=True)
            ]
            noise[copy][counts] = torch.cat(rows)
        return noise

    def _copy(self, like: Tensor, copy: int, purpose: str) -> Tensor:
        shape = like.shape[1:]
        return torch.stack([self._numbers(shape, p, copy, purpose, like.device) for p in self.positions])

    def _numbers(self, shape: tuple[int, ...], position: int, copy: int, purpose: str, device: torch.device) -> Tensor:
        key = f"{self.seed}/{self._step}/{position}/{copy}/{purpose}"
        sequence = np.random.SeedSequence(int.from_bytes(key.encode(), "little"))
        if device.type == "cpu":
            # torch's generator on the CPU keeps 32 bits of a seed, fewer than there are keys.
            return HostNumbers(sequence.entropy).draw(
                tuple(shape), lambda stream, out: stream.standard_normal(dtype=np.float32, out=out)
            )
        generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
