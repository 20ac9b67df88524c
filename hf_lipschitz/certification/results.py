"""Certificates on disk: a header line, then one JSON line each, durable line by line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_lipschitz.certification.certificate import Certificate


logger = logging.getLogger(__name__)

FORMAT = "hf_lipschitz.certificates"
VERSION = 1


@dataclass(frozen=True)
class Results:
    """What a results file holds: the `config` of its header and its certificates, in the order of the file."""

    config: dict[str, Any]
    certificates: list[Certificate]


def read_results(path: str | os.PathLike[str]) -> Results:
    """
    Reads a results file. A last line without its newline was being written when the writer died: it is left out, with
    a warning in the log.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        [`Results`]

    Raises:
        `ValueError`: the file has no header, or any whole line is not a certificate; the message names the line.
    """
    whole, truncated = _split_whole_lines(Path(path).read_bytes())
    if truncated:
        logger.warning("%s: the last line is truncated and was left out.", path)
    return _parse(path, whole)


class ResultsWriter:
    """
    Appends certificates to a file, each flushed and synced before `append` returns. Use it as a context manager.

    An existing file is continued: its header must carry the same config, and a truncated last line is removed, with a
    warning in the log.

    Args:
        path (`str` or `os.PathLike`):
            The file; its directory must exist.
        config (`dict[str, Any]`):
            Whatever produced the certificates (`SmoothingConfig.to_dict()`, the model, the data), as JSON data.

    Raises:
        `ValueError`: the file exists with another config, or is not a results file.
        `RuntimeError`: the disk refuses a write. What was appended before stays, whole and readable, and the writer is
            closed.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
        self.path = Path(path)
        header = _encode({"format": FORMAT, "version": VERSION, "config": config})
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            self._end = self._resume(header)
            if self._end == 0:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, certificate: Certificate) -> None:
        """Writes one line; raises as the class says."""
        self._write(_encode(certificate.to_dict()))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _resume(self, header: bytes) -> int:
        whole, truncated = _split_whole_lines(self.path.read_bytes())
        if not whole and not header.startswith(truncated):
            raise ValueError(f"{self.path} is not a results file; choose another path.")
        if whole:
            found = _parse(self.path, whole).config
            if found != json.loads(header)["config"]:
                raise ValueError(f"{self.path} has another config, {found}; choose another path.")
        if truncated:
            logger.warning("%s: the last line is truncated and was removed.", self.path)
            self._file.truncate(len(whole))
        return len(whole)

    def _write(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._drop_partial_line()
            raise RuntimeError(
                f"Could not write to {self.path} ({error}); what it held before is intact. Open it again to continue."
            ) from error
        except BaseException:
            self._drop_partial_line()
            raise
        self._end += len(line)

    def _drop_partial_line(self) -> None:
        with self._file, contextlib.suppress(OSError):
            self._file.truncate(self._end)


def _split_whole_lines(content: bytes) -> tuple[bytes, bytes]:
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _parse(path: str | os.PathLike[str], whole: bytes) -> Results:
    header, *lines = whole.split(b"\n")[:-1] or [b""]
    config = _parse_header(path, header)
    return Results(config, [_parse_certificate(path, number, line) for number, line in enumerate(lines, start=2)])


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _parse_header(path: str | os.PathLike[str], line: bytes) -> dict[str, Any]:
    header = _parse_object(path, 1, line)
    if header.get("format") != FORMAT or header.get("version") != VERSION or "config" not in header:
        raise ValueError(f"{path}: line 1 is not the header of a results file of version {VERSION}.")
    return header["config"]


def _parse_certificate(path: str | os.PathLike[str], number: int, line: bytes) -> Certificate:
    try:
        return Certificate.from_dict(_parse_object(path, number, line))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: line {number} is not a certificate ({error}).") from error


def _parse_object(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error}); repair or remove it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: line {number} is not a JSON object.")
    return value
