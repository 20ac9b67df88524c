"""kill -9 at any moment, and the same bytes in the end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lipschitz.certification import read_results


ROOT = Path(__file__).parents[1]


def start(output: Path, pause: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.certify_slowly", str(output), str(pause)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    return process


def finish(output: Path, pause: float) -> None:
    process = start(output, pause)
    assert process.wait(timeout=240) == 0
    process.stdout.close()


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_ends_up_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    finish(whole, 0.0)
    moments, killed = random.Random(kills), []
    for _ in range(kills):
        process = start(cut, 0.02)
        time.sleep(moments.uniform(0.2, 0.9))
        process.kill()
        process.wait()
        process.stdout.close()
        beside = cut.with_name(cut.name + ".counts")
        killed.append(beside.exists())
        before = read_results(cut).certificates if cut.exists() and cut.stat().st_size else []
    assert any(killed)
    finish(cut, 0.0)
    assert cut.read_bytes() == whole.read_bytes()
    after = read_results(cut).certificates
    assert after[: len(before)] == before
    assert sorted(certificate.index for certificate in after) == list(range(6))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cut.jsonl", "whole.jsonl"]
