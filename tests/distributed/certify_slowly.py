"""Launched by a test that kills it: certifies images, with a pause in each forward pass, counts kept after each."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ViTImageProcessor

import hf_lipschitz
from hf_lipschitz.certification import engine
from hf_lipschitz.dataset_certification import certify_dataset
from tests.families import resnet


def main(output: Path, pause: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    engine.SLICE_SECONDS = 0.0
    model = resnet().eval()
    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(6)]
    certifier = hf_lipschitz.CertifiedClassificationPipeline(
        model=model,
        task="certified-classification",
        image_processor=ViTImageProcessor(size={"height": 16, "width": 16}),
        device="cpu",
        sigma=0.5,
        n=1600,
        certificate="lvm",
        gain=0.01,
    )
    forward = certifier.base_classifier.forward

    def slowly(x: Tensor) -> Tensor:
        time.sleep(pause)
        return forward(x)

    certifier.base_classifier.forward = slowly
    print("started", flush=True)  # noqa: T201  the test waits for it
    certify_dataset(certifier, images, [0] * 6, output, progress_bar=False)


main(Path(sys.argv[1]), float(sys.argv[2]))
