from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.certification.noise import NOISE_BLOCK, Stage, gaussian_noise_block
from hf_lipschitz.certification.sampling import (
    SCORE_UNIT,
    Item,
    NoisyInputs,
    ScoreHistograms,
    ScoreSums,
    Votes,
    counted_in,
    in_batches,
    items_of,
    logits_of,
)
from hf_lipschitz.certification.statistics import SCORE_WEIGHT, bin_ends
from hf_lipschitz.functional.simplex import softmax


XS = [torch.tensor([0.3, -0.2]), torch.tensor([-0.1, 0.4]), torch.tensor([0.0, 0.1])]
INDICES = [11, 5, 8]
CPU = torch.device("cpu")


def three_classes(batch: Tensor) -> Tensor:
    return torch.stack([batch[:, 0], batch[:, 1], 0.2 - batch[:, 0]], dim=1)


def noisy_inputs(batch_size: int = 300, **changes: object) -> NoisyInputs:
    return NoisyInputs(**{"xs": XS, "indices": INDICES, "noise": "gaussian", "sigma": 0.5, "seed": 7,
                          "batch_size": batch_size, **changes})  # fmt: skip


def samples_one_by_one(row: int, start: int, stop: int, stage: Stage = Stage.ESTIMATION) -> Tensor:
    blocks = [
        gaussian_noise_block((2,), 0.5, seed=7, index=INDICES[row], stage=stage, block=block)
        for block in range(-(-stop // NOISE_BLOCK))
    ]
    return (XS[row] + torch.cat(blocks))[start:stop]


def counted(counter: object, start: int, stop: int, batch_size: int = 300, rows: list[int] | None = None) -> object:
    inputs = noisy_inputs(batch_size)
    parts = in_batches(items_of([0, 1, 2] if rows is None else rows, start, stop), inputs.shapes, batch_size)
    for batch in inputs.batches(Stage.ESTIMATION, parts):
        assert len(batch.noisy) == batch_size
        counter.add(batch.counted, three_classes(batch.noisy))
    counter.check()
    return counter.counts.numpy()


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 30), (0, 100), (0, 250), (200, 700), (300, 1130)])
@pytest.mark.parametrize("batch_size", [100, 300, 1000])
def test_counts_are_those_of_the_samples_taken_one_by_one(start: int, stop: int, batch_size: int) -> None:
    votes = counted(Votes(3, 3, CPU), start, stop, batch_size)
    sums = counted(ScoreSums(3, 3, CPU, softmax), start, stop, batch_size) * SCORE_UNIT
    groups = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    histograms = counted(ScoreHistograms(groups, 3, softmax), start, stop, batch_size) / SCORE_WEIGHT
    for row in range(3):
        logits = three_classes(samples_one_by_one(row, start, stop))
        scores = torch.softmax(logits.double(), 1)
        assert votes[row].tolist() == [int((logits.argmax(1) == k).sum()) for k in range(3)]
        np.testing.assert_allclose(sums[row, 0], scores.sum(0), rtol=0, atol=1e-9 * (stop - start))
        np.testing.assert_allclose(sums[row, 1], scores.square().sum(0), rtol=0, atol=1e-9 * (stop - start))
        np.testing.assert_allclose(histograms[row].sum(-1), stop - start, rtol=1e-12)
        in_groups = scores[:, groups[row].argsort()]
        below, above = (histograms[row] @ ends for ends in bin_ends())
        assert (below <= in_groups.sum(0).numpy() + 1e-9).all()
        assert (above >= in_groups.sum(0).numpy() - 1e-9).all()
        np.testing.assert_allclose(below, above, rtol=1e-6)


def test_a_group_has_the_scores_of_its_classes_together() -> None:
    groups = torch.tensor([[0, 1, 1]] * 3)
    histograms = counted(ScoreHistograms(groups, 2, softmax), 0, 500) / SCORE_WEIGHT
    for row in range(3):
        scores = torch.softmax(three_classes(samples_one_by_one(row, 0, 500)).double(), 1)
        np.testing.assert_allclose(histograms[row, 1] @ bin_ends()[0], scores[:, 1:].sum(), rtol=1e-6)


def test_counts_do_not_depend_on_how_items_are_dealt_out() -> None:
    whole = counted(ScoreSums(3, 3, CPU, softmax), 0, 1130)
    parts = [counted(ScoreSums(3, 3, CPU, softmax), *ends) for ends in ((0, 300), (300, 700), (700, 1130))]
    assert (sum(parts) == whole).all()
    by_input = [counted(ScoreSums(3, 3, CPU, softmax), 0, 1130, rows=[row]) for row in (2, 0, 1)]
    assert (sum(by_input) == whole).all()


def test_a_batch_mixes_inputs_and_is_filled_up_with_repeats() -> None:
    inputs = noisy_inputs(batch_size=400)
    parts = in_batches(items_of([0, 1, 2], 0, 150), inputs.shapes, 400)
    assert [[(item.row, item.block, item.size) for item in part] for part in parts] == [
        [(0, 0, 100), (0, 1, 50), (1, 0, 100), (1, 1, 50)],
        [(2, 0, 100), (2, 1, 50)],
    ]
    first, second = inputs.batches(Stage.ESTIMATION, parts)
    assert len(first.noisy) == len(second.noisy) == 400
    assert torch.equal(first.noisy[200:300], samples_one_by_one(1, 0, 100))
    assert torch.equal(second.noisy[200:300], second.noisy[:100])


def test_inputs_of_different_shapes_do_not_share_a_batch() -> None:
    parts = in_batches([Item(row, 0, 100) for row in (0, 1, 2, 3)], [(2,), (3,), (2,), (3,)], 300)
    assert [[item.row for item in part] for part in parts] == [[0, 2], [1, 3]]


def test_samples_begin_with_a_block() -> None:
    with pytest.raises(ValueError, match="multiple of 100"):
        items_of([0], 50, 200)


def test_stages_share_no_sample() -> None:
    found = []
    for stage in Stage:
        inputs = noisy_inputs()
        parts = in_batches(items_of([0], 0, 2000), inputs.shapes, 300)
        found += [batch.noisy[: len(batch.items) * NOISE_BLOCK].clone() for batch in inputs.batches(stage, parts)]
    assert len(torch.unique(torch.cat(found), dim=0)) == 6000


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_an_object_with_logits_and_a_batch_in_parts(splits: int) -> None:
    seen = []

    def wrapped(batch: Tensor) -> SimpleNamespace:
        seen.append(len(batch))
        return SimpleNamespace(logits=three_classes(batch))

    noisy = torch.randn(100, 2)
    assert torch.equal(logits_of(wrapped, noisy, 3, splits), three_classes(noisy))
    assert seen == [100 // splits] * splits


def test_no_graph_is_built() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not logits_of(lambda batch: three_classes(batch) * weight, torch.randn(100, 2), 3).requires_grad


def test_a_base_classifier_may_change_its_batch() -> None:
    before = [x.clone() for x in XS]

    def in_place(batch: Tensor) -> Tensor:
        logits = three_classes(batch)
        batch.zero_()
        return logits

    inputs = noisy_inputs()
    for batch in inputs.batches(Stage.ESTIMATION, in_batches(items_of([0, 1], 0, 200), inputs.shapes, 300)):
        logits_of(in_place, batch.noisy, 3)
    assert all(torch.equal(x, y) for x, y in zip(XS, before, strict=True))


@pytest.mark.parametrize("shape", [(100,), (100, 2), (100, 4), (100, 3, 1), (3, 100), (1, 3)])
def test_logits_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is \\(batch, num_classes\\)"):
        logits_of(lambda batch: torch.zeros(shape), torch.zeros(100, 2), 3)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="must return a tensor"):
        logits_of(lambda batch: [0.0, 1.0, 2.0], torch.zeros(100, 2), 3)


@pytest.mark.parametrize("simplex_map", [lambda z: z, lambda z: torch.ones_like(z), lambda z: z * torch.nan])
def test_a_map_that_leaves_the_simplex_is_refused(simplex_map: object) -> None:
    with pytest.raises(ValueError, match="simplex map"):
        counted(ScoreSums(3, 3, CPU, simplex_map), 0, 100)


def test_scores_from_half_precision_logits() -> None:
    counter = ScoreSums(1, 3, CPU, softmax)
    (of_a_block,) = counted_in([(Item(0, 0, 100),)], CPU)
    counter.add(of_a_block, torch.randn(100, 3).bfloat16())
    assert counter.counts[0, 0].sum().item() * SCORE_UNIT == pytest.approx(100)
