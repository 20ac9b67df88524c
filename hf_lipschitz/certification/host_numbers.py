"""Random numbers on the host: many threads, and the same bits for any number of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


CHUNK = 1 << 17

Fill = Callable[[np.random.Generator, NDArray[np.float32]], object]


class HostNumbers:
    """
    Every `CHUNK` numbers come from a stream of numpy's SFC64 that is their own, a child of the key's sequence. Chunks
    are drawn by `torch.get_num_threads()` threads, which are idle while the base classifier waits for noise.

    Args:
        entropy (`int`):
            Of the key's `numpy.random.SeedSequence`.
    """

    def __init__(self, entropy: int) -> None:
        self.entropy = entropy
        self.num_chunks = 0

    def draw(self, size: tuple[int, ...], fill: Fill) -> Tensor:
        """
        The next numbers, float32.

        Args:
            size (`tuple[int, ...]`):
                Shape of the result.
            fill (`Callable`):
                `fill(generator, out)` writes independent numbers to the vector `out`.
        """
        numbers = np.empty(math.prod(size), np.float32)
        parts = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        streams = [self._stream(self.num_chunks + i) for i in range(len(parts))]
        self.num_chunks += len(parts)
        threads = min(torch.get_num_threads(), len(parts))
        if threads > 1:
            with ThreadPoolExecutor(threads, thread_name_prefix="noise") as pool:
                list(pool.map(fill, streams, parts))
        else:
            for stream, part in zip(streams, parts, strict=True):
                fill(stream, part)
        return torch.from_numpy(numbers).view(size)

    def _stream(self, chunk: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(self.entropy, spawn_key=(chunk,))))
