from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_lipschitz.cli import app


ROOT = Path(__file__).parents[2]


def launch(
    processes: int, *arguments: object, program: Sequence[str] = ("-m", "tests.distributed.certify")
) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return subprocess.run(
        [sys.executable, *command, *program, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("many", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_return_and_write_what_one_does(tmp_path: Path, many: int) -> None:
    for processes in (1, many):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = launch(processes, folder)
        assert done.returncode == 0, done.stderr
    (single,) = (tmp_path / "1").glob("1-*.json")
    expected = json.loads(single.read_text())
    assert [certificate["index"] for certificate in expected["fixed"]] == list(range(7))
    assert len({certificate["p_lower"] for certificate in expected["fixed"]}) > 1
    assert all(100 < certificate["n"] < 3000 for certificate in expected["sequential"])
    for rank in range(many):
        assert json.loads((tmp_path / str(many) / f"{many}-{rank}.json").read_text()) == expected
    assert (tmp_path / "1" / "results.jsonl").read_bytes() == (tmp_path / str(many) / "results.jsonl").read_bytes()


def test_the_command_line_shares_its_work(tmp_path: Path, text_model: Path, text_data: Path) -> None:
    program = ("--no_python", "--", str(Path(sys.executable).with_name("hf-lipschitz")))
    asked = ("certify", text_model, text_data, "--sigma", 0.1, "--n", 1000, "--limit", 3, "--output")
    alone = CliRunner().invoke(app, [str(argument) for argument in (*asked, tmp_path / "1.jsonl")])
    assert alone.exit_code == 0, alone.output
    together = launch(2, *asked, tmp_path / "2.jsonl", program=program)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("written to") == 1
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_failure_in_one_process_stops_all_of_them(tmp_path: Path) -> None:
    done = launch(2, tmp_path, "fail")
    assert done.returncode != 0
    assert "process 1 failed to certify its share" in done.stderr
