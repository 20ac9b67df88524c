"""What the engine needs of other processes and of the disk; both are optional."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Processes(Protocol):
    """The processes among which batches are dealt out. `add`, `share` and `raise_together` are meetings of all."""

    rank: int
    size: int

    def add(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum over the processes, entry by entry."""

    def share(self, value: Any) -> Any:
        """The value that process 0 has."""

    def raise_together(self, failure: Exception | None) -> None:
        """Raises in each process if any of them failed."""


class OneProcess:
    """No others."""

    rank, size = 0, 1

    def add(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values

    def share(self, value: Any) -> Any:
        return value

    def raise_together(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure


ONE_PROCESS = OneProcess()


class Checkpoints(Protocol):
    """Where the counts of the inputs under way are kept."""

    def load(self) -> dict[str, NDArray[Any]] | None:
        """What was saved last for these inputs, the same in every process, or `None`."""

    def save(self, state: dict[str, NDArray[Any]]) -> None:
        """Takes the place of what was saved before; called in every process."""
