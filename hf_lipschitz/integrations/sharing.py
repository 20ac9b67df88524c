"""Sharing the work of a certification over the processes of an `accelerate` launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from hf_lipschitz.certification import ONE_PROCESS, Certificate, Processes


class AcceleratorProcesses:
    """Those of an `accelerate.Accelerator`, on one machine or many."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def add(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        tensor = torch.from_numpy(values).to(self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").cpu().numpy()

    def share(self, value: Any) -> Any:
        (shared,) = broadcast_object_list([value])
        return shared

    def raise_together(self, failure: Exception | None) -> None:
        failures = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
        if failure is not None:
            raise failure
        for process, message in enumerate(failures):
            if message is not None:
                raise RuntimeError(f"process {process} failed to certify its share: {message}")


def processes_of(accelerator: Accelerator | None) -> Processes:
    """The processes to share with; this one alone without an accelerator, or where it has no others."""
    if accelerator is None or accelerator.num_processes == 1:
        return ONE_PROCESS
    return AcceleratorProcesses(accelerator)


def certify_in_shares(
    certify: Callable[[int], Certificate], count: int, accelerator: Accelerator
) -> list[Certificate]:
    """Certificates of positions 0 to `count` - 1, in order, on every process; each process does every w-th of them.

    An error in one process is raised in all of them, so that none waits for ever.

    Args:
        certify (`Callable[[int], Certificate]`):
            Must depend on the position alone.
        count (`int`):
            Number of inputs, the same on every process.
        accelerator (`accelerate.Accelerator`):
            Says how many processes there are, and which one this is.

    Raises:
        RuntimeError: a process failed; the message is that of the first failure.
    """
    mine: list[tuple[int, Certificate]] = []
    failure: Exception | None = None
    try:
        for position in range(accelerator.process_index, count, accelerator.num_processes):
            mine.append((position, certify(position)))
    except Exception as error:  # noqa: BLE001  every failure has to reach the other processes
        failure = error
    processes_of(accelerator).raise_together(failure)
    return [certificate for _, certificate in sorted(gather_object(mine), key=lambda pair: pair[0])]
