"""certify_dataset: certificates of a labelled set on disk, a durable line each, continued where a run was cut off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_lipschitz.certification import Certificate, ResultsWriter, read_results
from hf_lipschitz.fingerprints import fingerprint
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
    """Certifies each input and writes its certificate to a JSON lines file as soon as it is there.

    Run again after an interruption it does the inputs that are missing; the noise of each is keyed by its position, so
    the file ends up the same. The header holds what the certificates depend on: a fingerprint of the effective
    weights, the smoothing, the labels.

    Args:
        certifier (`CertifiedClassificationPipeline`):
            With its smoothing set. With an accelerator every process calls this function and the main one writes.
        inputs (`Sequence`):
            Texts or images.
        labels (`Sequence[int]`):
            True classes, in the same order.
        output (`str` or `os.PathLike`):
            The file; its directory must exist.
        details (`dict`, *optional*):
            More for the header, JSON-able: data set, split, names.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Shows one on the main process.

    Returns:
        `list[Certificate]`: one an input, in order.

    Raises:
        ValueError: as many labels as inputs are not given, or the file comes from another model, smoothing or labels.
        RuntimeError: the disk refuses a write; what was written before stays valid.
    """
    if len(inputs) != len(labels):
        raise ValueError(f"got {len(inputs)} inputs and {len(labels)} labels; give one label each")
    header = {
        "smoothing": certifier.smoothing_config().to_dict(),
        "model": fingerprint(certifier.model),
        "labels": [int(label) for label in labels],
        "version": __version__,
        **(details or {}),
    }
    accelerator = certifier.accelerator
    is_main = accelerator is None or accelerator.is_main_process
    stride = 1 if accelerator is None else accelerator.num_processes
    if is_main:
        ResultsWriter(output, header).close()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    done = read_results(output).certificates
    _check_order(done, output)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    writer = ResultsWriter(output, header) if is_main else None
    try:
        with tqdm(
            total=len(inputs), initial=len(done), desc="certifying", disable=not (progress_bar and is_main)
        ) as bar:
            for start in range(len(done), len(inputs), stride):
                stop = min(start + stride, len(inputs))
                batch = [inputs[position] for position in range(start, stop)]
                certificates = certifier(batch, index=start, progress_bar=False)
                for certificate in certificates:
                    if writer is not None:
                        writer.append(certificate)
                done.extend(certificates)
                bar.update(len(certificates))
    finally:
        if writer is not None:
            writer.close()
    return done


def _check_order(certificates: list[Certificate], output: str | os.PathLike[str]) -> None:
    for position, certificate in enumerate(certificates):
        if certificate.index != position:
            raise ValueError(f"{Path(output)} holds certificates out of order; move it away and start anew")
