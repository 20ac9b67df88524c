from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from hf_lipschitz.certification.checkpoint import CheckpointFile
from hf_lipschitz.certification.processes import ONE_PROCESS


STATE = {"counts": np.arange(6).reshape(2, 3), "p_upper": np.array([0.1, np.nan]), "round": np.array(3)}


def file_at(path: Path, key: object = "a") -> CheckpointFile:
    return CheckpointFile(path, key, ONE_PROCESS)


def test_what_was_saved_last_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "counts"
    assert file_at(path).load() is None
    file_at(path).save({"round": np.array(1)})
    file_at(path).save(STATE)
    found = file_at(path).load()
    assert set(found) == set(STATE)
    for name, value in STATE.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["counts"]
    file_at(path).delete()
    assert not path.exists()


def test_counts_of_other_inputs_count_as_none(tmp_path: Path) -> None:
    file_at(tmp_path / "counts", {"places": [0, 128]}).save(STATE)
    assert file_at(tmp_path / "counts", {"places": [128, 256]}).load() is None


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "counts"
    file_at(path).save(STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="counts is damaged.*remove it"):
        file_at(path).load()


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, room: int) -> None:
    path = tmp_path / "counts"
    file_at(path).save(STATE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="intact"):
            file_at(path).save({"round": np.array(9)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_a_kill_between_write_and_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counts"
    file_at(path).save(STATE)
    before = path.read_bytes()

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file_at(path).save({"round": np.array(9)})
    assert path.read_bytes() == before
