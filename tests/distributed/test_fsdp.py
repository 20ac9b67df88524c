from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.fsdp_step import build, steps
from tests.processes import on_two_processes


SCRIPT = Path(__file__).with_name("fsdp_step.py")


def test_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    """Each process holds half of every raw weight; norms are those of the whole."""
    alone = steps(build())
    for found in on_two_processes(SCRIPT, tmp_path):
        assert found["sharded"]
        assert found["worst"] <= 0.5 * (1 + 1e-7)
        assert torch.equal(found["saved"], found["after saving"])
        assert torch.linalg.matrix_norm(found["saved"].double(), 2) > torch.linalg.matrix_norm(
            found["effective.2"].double(), 2
        )
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert alone["worst"] > 0.49
