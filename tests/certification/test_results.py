from __future__ import annotations

import json
import logging
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from hf_lipschitz.certification import SmoothingConfig
from hf_lipschitz.certification.certificate import Certificate
from hf_lipschitz.certification.results import ResultsWriter, read_results


CONFIG = SmoothingConfig(sigma=0.1, alpha=1 / 3).to_dict()
FIRST = Certificate(
    prediction=1, radius=0.1 + 0.2, norm="l2", unit="input", p_lower=2 / 3, p_upper=None, alpha=1e-3, n=10,
    method="one_class", stop_reason="fixed_n", sigma=0.25, seed=2**70, index=0, label="Möwe\nor \u2028 gull",
)  # fmt: skip
CERTIFICATES = [replace(FIRST, index=index, radius=1 / (3 + index)) for index in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path, CONFIG) as writer:
        for certificate in CERTIFICATES:
            writer.append(certificate)
    return path


def test_what_was_written_is_read_back_exactly(path: Path) -> None:
    results = read_results(path)
    assert results.certificates == CERTIFICATES
    assert results.config == CONFIG
    assert SmoothingConfig.from_dict(results.config) == SmoothingConfig(sigma=0.1, alpha=1 / 3)


def test_each_line_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    writer = ResultsWriter(tmp_path / "r.jsonl", CONFIG)
    for count, certificate in enumerate(CERTIFICATES, start=1):
        writer.append(certificate)
        assert len(read_results(writer.path).certificates) == count
        assert synced[-1] == writer.path.stat().st_size
        assert len(synced) == count + 1
    writer.close()


def test_a_file_is_continued(path: Path) -> None:
    more = replace(FIRST, index=99)
    with ResultsWriter(path, CONFIG) as writer:
        writer.append(more)
    assert read_results(path).certificates == [*CERTIFICATES, more]


def test_a_file_with_another_config_is_not_continued(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another config"):
        ResultsWriter(path, {**CONFIG, "sigma": 0.2})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"something else", b'{"a": 1}\n', b"\n", b"[]\n"])
def test_a_foreign_file_is_neither_read_nor_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="foreign"):
        ResultsWriter(path, CONFIG)
    with pytest.raises(ValueError, match="foreign"):
        read_results(path)
    assert path.read_bytes() == content


def test_a_last_line_cut_anywhere_is_left_out_and_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = path.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    for end in range(last + 1, len(content)):
        path.write_bytes(content[:end])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_results(path).certificates == CERTIFICATES[:-1]
        assert "truncated" in caplog.text
        assert str(path) in caplog.text


@pytest.mark.parametrize("cut", [1, 40])
def test_writing_goes_on_after_a_truncated_line(path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING), ResultsWriter(path, CONFIG) as writer:
        writer.append(CERTIFICATES[-1])
    assert "truncated" in caplog.text
    assert read_results(path).certificates == CERTIFICATES


def test_writing_starts_again_after_a_truncated_header(path: Path) -> None:
    header = path.read_bytes().split(b"\n")[0]
    for end in (0, 1, 20, len(header)):
        path.write_bytes(header[:end])
        with ResultsWriter(path, CONFIG) as writer:
            writer.append(FIRST)
        assert read_results(path).certificates == [FIRST]


@pytest.mark.parametrize("line", range(6))
@pytest.mark.parametrize(
    "damage", [lambda line: line[:-1], lambda line: b"", lambda line: b"\0" * len(line), lambda line: b"{}"]
)
def test_a_damaged_whole_line_is_refused_by_number(path: Path, line: int, damage: object) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[line] = damage(lines[line])
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"line {line + 1} "):
        read_results(path)
    with pytest.raises(ValueError, match=f"line {line + 1} "):
        ResultsWriter(path, CONFIG)


def test_a_contradictory_certificate_on_disk_is_refused(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[2] = json.dumps({**CERTIFICATES[1].to_dict(), "prediction": -1}).encode()
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="line 3 "):
        read_results(path)


@pytest.mark.parametrize("room", [0, 1, 60])
def test_a_full_disk_leaves_whole_lines(path: Path, room: int) -> None:
    size = path.stat().st_size
    writer = ResultsWriter(path, CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=str(path)):
            writer.append(FIRST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size
    assert read_results(path).certificates == CERTIFICATES
    with pytest.raises(ValueError, match="closed"):
        writer.append(FIRST)
    with ResultsWriter(path, CONFIG) as again:
        again.append(FIRST)
    assert read_results(path).certificates == [*CERTIFICATES, FIRST]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_sync_is_rolled_back(path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise error

    before = path.read_bytes()
    writer = ResultsWriter(path, CONFIG)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        writer.append(FIRST)
    assert path.read_bytes() == before


def test_numbers_that_json_does_not_have_are_refused(path: Path) -> None:
    before = path.read_bytes()
    with ResultsWriter(path, CONFIG) as writer, pytest.raises(ValueError, match="JSON"):
        writer.append(replace(FIRST, score_lipschitz=float("inf")))
    assert path.read_bytes() == before
