"""The counts of the inputs under way, in one file that is always whole."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lipschitz.certification.processes import Processes


_KEY = "key"


class CheckpointFile:
    """
    Counts in a file beside the results, written by process 0 under another name and then renamed, so that a kill or a
    full disk leaves the last one whole.

    Args:
        path (`str` or `os.PathLike`):
            The file; its directory must exist.
        key (`Any`):
            JSON data for which the counts hold: a file with another key is of other inputs, and counts as none.
        processes (`Processes`):
            All of which get what process 0 reads.
    """

    def __init__(self, path: str | os.PathLike[str], key: Any, processes: Processes) -> None:
        self.path, self.key, self.processes = Path(path), json.dumps(key, sort_keys=True), processes

    def load(self) -> dict[str, NDArray[Any]] | None:
        """
        Raises:
            `ValueError`: the file is damaged.
        """
        return self.processes.share(self._read() if self.processes.rank == 0 else None)

    def save(self, state: dict[str, NDArray[Any]]) -> None:
        """
        Raises:
            `RuntimeError`: the disk refuses the write; what was saved before is intact.
        """
        failure = None
        if self.processes.rank == 0:
            try:
                self._write(state)
            except OSError as error:
                failure = RuntimeError(f"Could not write to {self.path} ({error}); what it held before is intact.")
        if failure is not None or self.processes.size > 1:
            self.processes.raise_together(failure)

    def delete(self) -> None:
        if self.processes.rank == 0:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, NDArray[Any]] | None:
        if not self.path.exists():
            return None
        try:
            with np.load(self.path) as found:
                arrays = {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove it to begin these inputs anew.") from error
        return arrays if str(arrays.pop(_KEY)) == self.key else None

    def _write(self, state: dict[str, NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **state, **{_KEY: np.array(self.key)})
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with open(beside, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)
