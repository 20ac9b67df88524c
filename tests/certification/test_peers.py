"""
What certification goes wrong on elsewhere, row by row. Rows with a test of their own in another file:

- LVM-RS, map and temperature chosen per input: `test_procedures.py`, `faint_a_strong_b`;
- peeking at an interval for one fixed n: `test_sequential.py`, the exact error of looks and of the broken variant;
- float32 arithmetic: `test_exact_noise.py`, the float attack with and without `noise="exact"`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import ViTImageProcessor

from hf_lipschitz import CertifiedClassificationPipeline
from hf_lipschitz.certification import (
    ABSTAIN,
    Certificate,
    SmoothedClassifier,
    SmoothingConfig,
    certified_accuracy,
)
from hf_lipschitz.training.example_draws import ExampleDraws
from hf_lipschitz.training.noisy_inputs import noisy_inputs
from tests.certification.exact import Slabs, place
from tests.families import resnet


SIGMA = 0.25
HALF_PLANES = Slabs((0.0,), (0, 1), 2)


def test_art_adds_noise_of_another_sigma_in_training_and_ours_does_not() -> None:
    std = torch.tensor([0.5, 0.2, 0.1])
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=std.tolist())
    model, seen = resnet().eval(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", *args[:1])), with_kwargs=True
    )
    certifier = CertifiedClassificationPipeline(
        model=model, task="certified-classification", image_processor=processor, device="cpu", sigma=SIGMA, n=2000
    )
    image = np.full((16, 16, 3), 128, dtype=np.uint8)
    certifier(image)
    clean = processor(image, return_tensors="pt")["pixel_values"]
    certifying = torch.cat(seen) - clean
    draws = ExampleDraws(0)
    draws.advance(0, 2000)
    with noisy_inputs(model, {"pixel_values": clean.repeat(2000, 1, 1, 1)}, draws, processor, sigma=SIGMA) as inputs:
        training = inputs["pixel_values"] - clean
    for noise in (certifying, training):
        deviation = (noise * std.view(3, 1, 1)).std(dim=(0, 2, 3))
        torch.testing.assert_close(deviation, torch.full((3,), SIGMA), rtol=0.01, atol=0)


def test_art_leaves_abstentions_out_of_the_accuracy_and_ours_counts_them_as_wrong() -> None:
    right = SmoothedClassifier(HALF_PLANES, 2, SmoothingConfig(1.0, n=1000)).certify(place(2.0))
    at_a_tie = SmoothedClassifier(HALF_PLANES, 2, SmoothingConfig(1.0, n=1000)).certify(place(0.0), 3)
    assert right.radius > 0
    assert at_a_tie.prediction == ABSTAIN
    for label in (0, 1):
        assert certified_accuracy([right, at_a_tie], [right.prediction, label], [0.0]) == [0.5]


class Rank:
    """One of several processes, which hears nothing of the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def add(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def raise_together(self, failure: Exception | None) -> None:
        raise AssertionError(failure)


def test_one_seed_on_all_ranks_does_not_give_all_ranks_one_noise() -> None:
    """With one generator a rank, seeded alike, 8 ranks of n / 8 samples have n / 8 samples, 8 times each."""

    def noise_of(rank: int, size: int) -> Tensor:
        torch.manual_seed(0)
        seen = []

        def base(batch: Tensor) -> Tensor:
            seen.append(batch)
            return HALF_PLANES(batch)

        smoothed = SmoothedClassifier(base, 2, SmoothingConfig(SIGMA, n=1600, n0=800))
        dict(smoothed.certify_together([place(0.0)], processes=Rank(rank, size)))
        return torch.cat(
            [seen[0], *seen[2:]]
        )  # the second batch repeats rows of the first, to check their independence

    shares = [noise_of(rank, 8) for rank in range(8)]
    together = torch.cat(shares)
    assert len(torch.unique(together, dim=0)) == len(together) == 2400
    alone = noise_of(0, 1)
    assert torch.equal(torch.unique(together, dim=0), torch.unique(alone, dim=0))


@pytest.mark.parametrize("certificate", ["one_class", "two_class", "class_partition"])
def test_ranmask_certifies_by_an_estimate_and_ours_by_a_bound(certificate: str) -> None:
    distance, alpha, n, runs = 0.3, 0.05, 200, 400
    config = SmoothingConfig(1.0, n=n, alpha=alpha, certificate=certificate)
    smoothed, x = SmoothedClassifier(HALF_PLANES, 2, config), place(distance)
    certificates: list[Certificate] = [c for _, c in smoothed.certify_together([x] * runs)]
    wrong = sum(c.radius > distance for c in certificates)
    assert stats.binomtest(wrong, runs, alpha, alternative="greater").pvalue > 0.01
    exact = stats.norm.cdf(distance)
    estimates = np.random.default_rng(0).binomial(n, exact, runs) / n
    wrong = sum(stats.norm.ppf(estimate) > distance for estimate in estimates)
    assert stats.binomtest(wrong, runs, alpha, alternative="greater").pvalue < 1e-6
