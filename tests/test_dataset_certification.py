from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizer, ViTImageProcessor

from hf_lipschitz import DenoisedClassifier, SmoothedClassifier
from hf_lipschitz.certification import read_results
from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.dataset_certification import certify_dataset, fingerprint
from hf_lipschitz.pipelines import CertifiedClassificationPipeline
from tests.families import bert, resnet


IMAGES = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(5)]
LABELS = [0, 1, 2, 3, 0]


def certifier(model: object = None, **options: object) -> CertifiedClassificationPipeline:
    options = {"sigma": 0.25, "n": 100, "n0": 50, **options}
    return CertifiedClassificationPipeline(
        model=model or resnet().eval(),
        task="certified-classification",
        image_processor=ViTImageProcessor(size={"height": 16, "width": 16}),
        device="cpu",
        **options,
    )


def test_a_run_cut_off_anywhere_ends_up_with_the_same_bytes(tmp_path: Path) -> None:
    pipe = certifier(certificate="lvm")
    whole = tmp_path / "whole.jsonl"
    certificates = certify_dataset(pipe, IMAGES, LABELS, whole, progress_bar=False)
    assert read_results(whole).certificates == certificates
    assert read_results(whole).config["labels"] == LABELS
    content = whole.read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 3, len(content)):
        partial = tmp_path / f"{cut}.jsonl"
        partial.write_bytes(content[:cut])
        assert certify_dataset(pipe, IMAGES, LABELS, partial, progress_bar=False) == certificates
        assert partial.read_bytes() == content


def test_nothing_is_mixed(tmp_path: Path) -> None:
    model, path = resnet().eval(), tmp_path / "results.jsonl"
    certify_dataset(certifier(model), IMAGES[:2], LABELS[:2], path, progress_bar=False)
    for other in (certifier(), certifier(model, n=50), certifier(model, sigma=0.3)):
        with pytest.raises(ValueError, match="another config"):
            certify_dataset(other, IMAGES[:2], LABELS[:2], path, progress_bar=False)
    with pytest.raises(ValueError, match="another config"):
        certify_dataset(certifier(model), IMAGES[:2], [3, 3], path, progress_bar=False)
    with pytest.raises(ValueError, match="2 inputs and 5 labels"):
        certify_dataset(certifier(model), IMAGES[:2], LABELS, path, progress_bar=False)


def test_lines_in_another_order_are_the_same_results(tmp_path: Path) -> None:
    pipe, path = certifier(), tmp_path / "results.jsonl"
    certificates = certify_dataset(pipe, IMAGES[:3], LABELS[:3], path, progress_bar=False)
    header, first, second, third = path.read_text().splitlines()
    path.write_text("\n".join([header, second, first, third]) + "\n")
    assert json.loads(second)["index"] == 1
    assert certify_dataset(pipe, IMAGES[:3], LABELS[:3], path, progress_bar=False) == certificates


@pytest.mark.parametrize("lines", [(1, 1, 2), (1, 2, 3)])
def test_an_input_twice_or_one_too_many_is_refused(tmp_path: Path, lines: tuple[int, ...]) -> None:
    pipe, path = certifier(), tmp_path / "results.jsonl"
    certify_dataset(pipe, IMAGES[:3], LABELS[:3], path, progress_bar=False)
    whole = path.read_text().splitlines()
    kept = json.loads(whole[0])
    kept["config"]["labels"] = LABELS[:2]
    path.write_text("\n".join([json.dumps(kept), *(whole[line] for line in lines)]) + "\n")
    with pytest.raises(ValueError, match="twice, or one that is not there"):
        certify_dataset(pipe, IMAGES[:2], LABELS[:2], path, progress_bar=False)


def test_the_fingerprint_is_of_the_function() -> None:
    model = resnet().eval()
    before = fingerprint(model)
    assert fingerprint(lipschitzify(model, layer_lipschitz=None)) == before
    model.classifier[1].bias.data[0] += 1e-6
    assert fingerprint(model) != before


class Blur(nn.Module):
    """Averages neighbours: a denoiser of a kind."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return (1 - self.weight) * images + self.weight * nn.functional.avg_pool2d(images, 3, 1, 1)


def test_a_denoiser_is_part_of_the_base_classifier(tmp_path: Path) -> None:
    model, path = resnet().eval(), tmp_path / "results.jsonl"
    plain, blurred = certifier(model, certificate="lvm"), certifier(model, certificate="lvm", denoiser=Blur(0.5))
    by_hand = SmoothedClassifier(
        DenoisedClassifier(Blur(0.5), plain.base_classifier),
        4,
        plain.smoothing_config(),
        unit=plain.base_classifier.unit,
    )
    (found, *_) = certify_dataset(blurred, IMAGES[:2], LABELS[:2], path, progress_bar=False)
    expected = by_hand.certify(plain.base_classifier.encode(IMAGES[0]))
    assert replace(found, label=None) == expected
    assert found.p_lower != plain(IMAGES[0]).p_lower
    assert certify_dataset(blurred, IMAGES[:2], LABELS[:2], path, progress_bar=False)[0] == found
    for other in (plain, certifier(model, certificate="lvm", denoiser=Blur(0.4))):
        with pytest.raises(ValueError, match="another config"):
            certify_dataset(other, IMAGES[:2], LABELS[:2], path, progress_bar=False)


def test_a_denoiser_of_another_sigma_is_refused() -> None:
    denoiser = Blur(0.5)
    denoiser.sigma = 0.5
    with pytest.raises(ValueError, match=r"sigma=0\.5, and the noise has 0\.25"):
        certifier(denoiser=denoiser)(IMAGES[0])
    certifier(denoiser=denoiser, sigma=0.5)(IMAGES[0])


def test_a_denoiser_is_for_images() -> None:
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    )
    with pytest.raises(ValueError, match="for images"):
        CertifiedClassificationPipeline(
            model=bert().eval(), task="certified-classification", tokenizer=tokenizer, device="cpu", denoiser=Blur(0.5)
        )
