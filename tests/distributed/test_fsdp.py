from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.distributed.fsdp_step import build, steps


SCRIPT = Path(__file__).with_name("fsdp_step.py")


def test_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    """Each process holds half of every raw weight; norms are those of the whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone = steps(build())
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["sharded"]
        assert found["worst"] <= 0.5 * (1 + 1e-7)
        assert torch.equal(found["saved"], found["after saving"])
        assert torch.linalg.matrix_norm(found["saved"].double(), 2) > torch.linalg.matrix_norm(
            found["effective.2"].double(), 2
        )
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert alone["worst"] > 0.49
