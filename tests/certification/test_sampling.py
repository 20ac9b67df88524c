from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.certification.noise import NOISE_BLOCK, Stage, gaussian_noise_block
from hf_lipschitz.certification.sampling import NoisySampler, physical_batch_size
from hf_lipschitz.functional.simplex import softmax


X = torch.tensor([0.3, -0.2])


def three_classes(batch: Tensor) -> Tensor:
    return torch.stack([batch[:, 0], batch[:, 1], 0.2 - batch[:, 0]], dim=1)


def sampler(base_classifier: object = three_classes, batch_size: int = 500, **changes: object) -> NoisySampler:
    values = {"x": X, "num_classes": 3, "sigma": 0.5, "seed": 7, "index": 11, "simplex_map": softmax, **changes}
    return NoisySampler(base_classifier=base_classifier, batch_size=batch_size, **values)


def all_logits(num_samples: int, stage: Stage = Stage.ESTIMATION) -> Tensor:
    blocks = [
        gaussian_noise_block((2,), 0.5, seed=7, index=11, stage=stage, block=block)
        for block in range(-(-num_samples // NOISE_BLOCK))
    ]
    return three_classes(X + torch.cat(blocks)[:num_samples])


class Recorder:
    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.batches.append(batch.clone())
        return three_classes(batch)


@pytest.mark.parametrize("num_samples", [1, 30, 50, 130, 1130])
def test_statistics_match_the_samples_taken_one_by_one(num_samples: int) -> None:
    logits = all_logits(num_samples)
    votes = sampler().votes(Stage.ESTIMATION, num_samples)
    assert votes.counts.tolist() == [int((logits.argmax(1) == k).sum()) for k in range(3)]
    assert votes.counts.dtype == np.int64
    assert votes.n == num_samples
    scores = sampler().scores(Stage.ESTIMATION, num_samples)
    expected = torch.softmax(logits.double(), 1)
    assert scores.n == num_samples
    np.testing.assert_allclose(scores.sums, expected.sum(0), rtol=0, atol=1e-9 * num_samples)
    np.testing.assert_allclose(scores.sums_of_squares, expected.square().sum(0), rtol=0, atol=1e-9 * num_samples)


@pytest.mark.parametrize("num_samples", [30, 130, 1000, 1130])
def test_statistics_do_not_depend_on_the_batch_size(num_samples: int) -> None:
    reference_votes = sampler().votes(Stage.ESTIMATION, num_samples)
    reference_scores = sampler().scores(Stage.ESTIMATION, num_samples)
    for batch_size in (1, 50, 137, 500, 10**6):
        votes = sampler(batch_size=batch_size).votes(Stage.ESTIMATION, num_samples)
        scores = sampler(batch_size=batch_size).scores(Stage.ESTIMATION, num_samples)
        assert votes.counts.tolist() == reference_votes.counts.tolist()
        assert scores.sums.tolist() == reference_scores.sums.tolist()
        assert scores.sums_of_squares.tolist() == reference_scores.sums_of_squares.tolist()


@pytest.mark.parametrize("batch_size", [50, 100, 500])
def test_parts_add_up_to_the_whole_in_any_order(batch_size: int) -> None:
    one = sampler(batch_size=batch_size)
    parts = [range(9, 23), range(1), range(3, 9), range(1, 3), range(5, 5)]
    votes = sum(
        (one.votes(Stage.ESTIMATION, 1130, part) for part in parts[1:]), one.votes(Stage.ESTIMATION, 1130, parts[0])
    )
    scores = [one.scores(Stage.ESTIMATION, 1130, part) for part in parts]
    whole = one.scores(Stage.ESTIMATION, 1130)
    assert votes.counts.tolist() == one.votes(Stage.ESTIMATION, 1130).counts.tolist()
    assert votes.n == 1130
    for order in (scores, scores[::-1]):
        merged = sum(order[1:], order[0])
        assert merged.sums.tolist() == whole.sums.tolist()
        assert merged.sums_of_squares.tolist() == whole.sums_of_squares.tolist()
        assert merged.n == 1130


@pytest.mark.parametrize(
    ("asked", "num_samples", "physical"),
    [
        (1, 1130, 50),
        (50, 1130, 50),
        (137, 1130, 150),
        (500, 1130, 500),
        (500, 100, 100),
        (500, 30, 30),
        (1, 1, 1),
    ],
)
def test_a_stage_has_one_batch_shape(asked: int, num_samples: int, physical: int) -> None:
    assert physical_batch_size(asked, num_samples) == physical
    recorder = Recorder()
    sampler(recorder, batch_size=asked).votes(Stage.ESTIMATION, num_samples)
    assert {len(batch) for batch in recorder.batches} == {physical}
    assert len(recorder.batches) == -(-num_samples // physical)
    rows = torch.cat(recorder.batches)
    assert len(torch.unique(rows, dim=0)) == num_samples
    assert torch.equal(three_classes(rows[:num_samples]), all_logits(num_samples))


def test_stages_share_no_sample() -> None:
    recorder = Recorder()
    for stage in Stage:
        sampler(recorder).votes(stage, 2000)
    assert len(torch.unique(torch.cat(recorder.batches), dim=0)) == 6000


def test_an_object_with_logits_and_a_half_precision_output_are_accepted() -> None:
    expected = sampler().votes(Stage.ESTIMATION, 300).counts.tolist()
    wrapped = sampler(lambda batch: SimpleNamespace(logits=three_classes(batch)))
    assert wrapped.votes(Stage.ESTIMATION, 300).counts.tolist() == expected
    half = sampler(lambda batch: three_classes(batch).bfloat16())
    assert half.scores(Stage.ESTIMATION, 300).sums.sum() == pytest.approx(300)


def test_no_graph_is_built_and_the_input_is_not_changed() -> None:
    weight = torch.ones(3, requires_grad=True)
    before = X.clone()

    def in_place(batch: Tensor) -> Tensor:
        logits = three_classes(batch) * weight
        assert not logits.requires_grad
        batch.zero_()
        return logits

    sampler(in_place).votes(Stage.ESTIMATION, 120)
    assert torch.equal(X, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["votes", "scores"])
def test_logits_that_are_not_finite_name_the_input(bad: float, kind: str) -> None:
    def broken(batch: Tensor) -> Tensor:
        logits = three_classes(batch)
        logits[-1, 1] = bad
        return logits

    with pytest.raises(RuntimeError, match="on input 11"):
        getattr(sampler(broken), kind)(Stage.ESTIMATION, 100)


@pytest.mark.parametrize("shape", [(100,), (100, 2), (100, 4), (100, 3, 1), (3, 100), (1, 3)])
def test_logits_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is \\(batch, num_classes\\)"):
        sampler(lambda batch: torch.zeros(shape)).votes(Stage.ESTIMATION, 100)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="must return a tensor"):
        sampler(lambda batch: [0.0, 1.0, 2.0]).votes(Stage.ESTIMATION, 100)


@pytest.mark.parametrize("simplex_map", [lambda z: z, lambda z: torch.ones_like(z), lambda z: z * torch.nan])
def test_a_map_that_leaves_the_simplex_is_refused(simplex_map: object) -> None:
    with pytest.raises(ValueError, match="simplex map"):
        sampler(simplex_map=simplex_map).scores(Stage.ESTIMATION, 100)


@pytest.mark.parametrize("blocks", [range(4), range(-1, 2), range(0, 3, 2)])
def test_blocks_outside_the_stage_are_refused(blocks: range) -> None:
    with pytest.raises(ValueError, match="blocks must be"):
        sampler().votes(Stage.ESTIMATION, 130, blocks)
