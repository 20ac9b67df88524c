"""Real processes of a test, which share nothing but a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


SECONDS = 240


def on_two_processes(script: str | Path, directory: Path) -> list[Any]:
    """What each of two gloo processes on the CPU has left in `directory` as `rank0.pt` and `rank1.pt`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [*command, str(script), str(directory)], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


def leave() -> None:
    """Ends such a process once all have come here, without shutting the interpreter down: threads of gloo that are
    still there now and then abort a process that does, after all its work."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
