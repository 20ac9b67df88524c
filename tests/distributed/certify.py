"""Launched by a test, on one or more processes: certifies images, writes the certificates of each process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import ViTImageProcessor

import hf_lipschitz
from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.dataset_certification import certify_dataset
from tests.families import vit
from tests.processes import leave


def main(folder: Path, fail: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = lipschitzify(vit().eval(), layer_lipschitz=2.0)
    # What a process has drawn from the global generator must not matter.
    torch.manual_seed(accelerator.process_index)
    certifier = hf_lipschitz.CertifiedClassificationPipeline(
        model=model,
        task="certified-classification",
        image_processor=ViTImageProcessor(size={"height": 16, "width": 16}),
        accelerator=accelerator,
        sigma=0.5,
        n=500,
        certificate="lvm",
    )
    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(7)]
    if fail and accelerator.process_index == 1:
        certifier.base_classifier.forward = lambda x: torch.full((len(x), 4), torch.nan)
    certificates = {
        "fixed": certifier(images, progress_bar=False),
        "sequential": certifier(images, progress_bar=False, certificate="two_class", radii=[0.5, 1.0], n=3000),
        "batches of 7": certifier(images, progress_bar=False, batch_size=7),
    }
    assert certificates["batches of 7"] == certificates["fixed"]
    certify_dataset(certifier, images, [0] * 7, folder / "results.jsonl", progress_bar=False)
    name = f"{accelerator.num_processes}-{accelerator.process_index}.json"
    found = {kind: [certificate.to_dict() for certificate in some] for kind, some in certificates.items()}
    (folder / name).write_text(json.dumps(found))


main(Path(sys.argv[1]), fail="fail" in sys.argv)
leave()
