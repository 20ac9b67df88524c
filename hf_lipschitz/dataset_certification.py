"""certify_dataset: certificates of a labelled set on disk, a durable line each, continued where a run was cut off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from hf_lipschitz.certification import Certificate, CheckpointFile, ResultsWriter, WindowOfInputs, read_results
from hf_lipschitz.deterministic import DETERMINISTIC
from hf_lipschitz.fingerprints import fingerprint
from hf_lipschitz.integrations.denoisers import denoiser_identity
from hf_lipschitz.integrations.sharing import processes_of
from hf_lipschitz.pipelines import CertifiedClassificationPipeline
from hf_lipschitz.version import __version__


def certify_dataset(
    certifier: CertifiedClassificationPipeline,
    inputs: Sequence[Any],
    labels: Sequence[int],
    output: str | os.PathLike[str],
    *,
    details: dict[str, Any] | None = None,
    progress_bar: bool = True,
) -> list[Certificate]:
    """Certifies each input and writes its certificate to a JSON lines file as soon as it is decided.

    Run again after an interruption, at whatever moment, it goes on: inputs that are done are not certified again, and
    the counts of those under way are taken up from a second file, which is removed at the end. The noise of each input
    is keyed by its position, so the results are those of an uninterrupted run, byte by byte. The header holds what the
    certificates depend on: a fingerprint of the effective weights, the smoothing, the labels, the versions.

    Args:
        certifier (`CertifiedClassificationPipeline`):
            With its smoothing set. With an accelerator every process calls this function, the batches are dealt out
            over them, and the main one writes.
        inputs (`Sequence`):
            Texts or images.
        labels (`Sequence[int]`):
            True classes, in the same order.
        output (`str` or `os.PathLike`):
            The file; its directory must exist. Its lines are in the order in which inputs were decided.
        details (`dict`, *optional*):
            More for the header, JSON-able: data set, split, names.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Shows one on the main process.

    Returns:
        `list[Certificate]`: one an input, in order.

    Raises:
        ValueError: as many labels as inputs are not given, or the file comes from another model, smoothing, labels or
            versions.
        RuntimeError: the disk refuses a write; what was written before stays valid.
    """
    if len(inputs) != len(labels):
        raise ValueError(f"got {len(inputs)} inputs and {len(labels)} labels; give one label each")
    config = certifier.smoothing_config()
    header = {
        "smoothing": config.to_dict(),
        "model": fingerprint(certifier.model),
        "denoiser": denoiser_identity(certifier.base_classifier),
        "labels": [int(label) for label in labels],
        "versions": {
            "hf_lipschitz": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        **(details or {}),
    }
    processes = processes_of(certifier.accelerator)
    writer, failure = None, None
    try:
        if processes.rank == 0:
            writer = ResultsWriter(output, header)
            done = _by_position(read_results(output).certificates, len(inputs), output)
    except (OSError, ValueError) as error:
        failure = error
    processes.raise_together(failure)
    done = processes.share(done if processes.rank == 0 else None)
    beside = Path(output).with_name(Path(output).name + ".counts")

    def checkpoints(window: WindowOfInputs) -> CheckpointFile:
        key = {**header, "places": [window.places.start, window.places.stop], "inputs": window.digest()}
        return CheckpointFile(beside, key, processes)

    try:
        if config.certificate == DETERMINISTIC:
            found = _one_by_one(certifier, inputs, len(done), processes.size)
        else:
            found = certifier.certify_windows(inputs, config, done=set(done), checkpoints=checkpoints)
        show = progress_bar and processes.rank == 0
        with tqdm(total=len(inputs), initial=len(done), desc="certifying", disable=not show) as bar:
            for place, certificate in found:
                if place in done:
                    continue
                failure = None
                try:
                    if writer is not None:
                        writer.append(certificate)
                except RuntimeError as error:
                    failure = error
                if failure is not None or processes.size > 1:
                    processes.raise_together(failure)
                done[place] = certificate
                bar.update()
        if processes.rank == 0:
            beside.unlink(missing_ok=True)
    finally:
        if writer is not None:
            writer.close()
    return [done[place] for place in range(len(inputs))]


def _one_by_one(
    certifier: CertifiedClassificationPipeline, inputs: Sequence[Any], first: int, stride: int
) -> Iterator[tuple[int, Certificate]]:
    for start in range(first, len(inputs), stride):
        batch = [inputs[place] for place in range(start, min(start + stride, len(inputs)))]
        yield from enumerate(certifier(batch, index=start, progress_bar=False), start)


def _by_position(
    certificates: list[Certificate], count: int, output: str | os.PathLike[str]
) -> dict[int, Certificate]:
    found = {certificate.index: certificate for certificate in certificates}
    if len(found) != len(certificates) or not all(0 <= index < count for index in found):
        raise ValueError(f"{Path(output)} holds an input twice, or one that is not there; move it away and start anew")
    return found
