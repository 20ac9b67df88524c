import os
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from scipy import stats
from torch.utils.data import BatchSampler, DataLoader

from hf_lipschitz.training.example_draws import ExampleDraws
from tests.processes import leave, on_two_processes


EXAMPLES, BATCH = 38, 12
WAYS = {
    "batches": {},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "dispatched and split": {"dispatch_batches": True, "split_batches": True},
}


def steps_of(batches, accumulation):
    """(optimizer step, examples of the micro-batch), as the Trainer counts them."""
    return [(index // accumulation, [int(i) for i in batch]) for index, batch in enumerate(batches)]


def placed(micro_batches, process, num_processes):
    """(step, example, position, a number of the noise), in the order in which they come."""
    draws, rows = ExampleDraws(0, process, num_processes), []
    for step, examples in micro_batches:
        draws.advance(step, len(examples))
        noise = draws.standard_normal(torch.zeros(len(examples), 3))[0, :, 0]
        rows += zip([step] * len(examples), examples, draws.positions, noise.tolist(), strict=True)
    return rows


def assert_same(whole, parts):
    """Each example has in the parts the position and the noise that it has in the whole, and no other one has it."""
    together = [row for part in parts for row in part]
    assert set(whole) <= set(together)
    assert len({(step, position) for step, _, position, _ in together}) == len(together)
    assert len({number for *_, number in together}) == len(together)


def sampled(batch_size):
    order = np.random.default_rng(0).permutation(EXAMPLES).tolist()
    return BatchSampler(order, batch_size, drop_last=False)


def sharded(num_processes, per_process, accumulation, split):
    parts = []
    for process in range(num_processes):
        sampler = sampled(per_process * num_processes if split else per_process)
        shard = BatchSamplerShard(sampler, num_processes, process, split_batches=split)
        parts.append(placed(steps_of(shard, accumulation), process, num_processes))
    return parts


def whole():
    return placed(steps_of(sampled(BATCH), 1), 0, 1)


@pytest.mark.parametrize(("num_processes", "per_process", "accumulation"), [
    (1, 4, 3), (1, 3, 4), (2, 6, 1), (2, 3, 2), (2, 2, 3), (3, 4, 1), (3, 2, 2), (4, 1, 3), (12, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_shards_of_a_batch_have_its_positions(num_processes, per_process, accumulation, split):
    reference = whole()
    assert [position for *_, position, _ in reference] == [*range(12)] * 3 + [0, 1]
    parts = sharded(num_processes, per_process, accumulation, split)
    assert_same(reference, parts)


def test_another_rank_or_number_of_processes_is_noticed():
    micro_batches = [steps_of(BatchSamplerShard(sampled(6), 2, process), 1) for process in range(2)]
    with pytest.raises(AssertionError):
        assert_same(whole(), [placed(micro_batches[process], 1 - process, 2) for process in range(2)])
    with pytest.raises(AssertionError):
        assert_same(whole(), [placed(micro_batches[process], 0, 1) for process in range(2)])


def loaded(way, batch_size, accumulation):
    """What this process has when accelerate shares the examples in the way named."""
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5, **WAYS[way])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    rows = batch_size // accelerator.num_processes // accumulation
    size = rows * accelerator.num_processes if "split" in way else rows
    loader = accelerator.prepare(DataLoader(torch.arange(EXAMPLES), batch_size=size, shuffle=True))
    return placed(steps_of(loader, accumulation), accelerator.process_index, accelerator.num_processes)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(__file__, tmp_path_factory.mktemp("draws"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_noise_of_one(way, accumulation, two_processes):
    assert_same(loaded("batches", BATCH, 1), [results[way, accumulation] for results in two_processes])


def draws(seed=0, step=3, rows=(2,), **processes):
    found = ExampleDraws(seed, **processes)
    for count in rows:
        found.advance(step, count)
    return found


def test_numbers_are_functions_of_the_key():
    like = torch.zeros(2, 5)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draws().standard_normal(like)
    assert torch.equal(first, draws().standard_normal(like))
    others = [
        draws(seed=1).standard_normal(like),
        draws(step=4).standard_normal(like),
        draws(rows=(2, 2, 2)).standard_normal(like),
        draws(process=1, num_processes=2).standard_normal(like),
        draws().standard_normal(like, purpose="attack"),
        draws().standard_normal(like, copies=2)[1:],
    ]
    numbers = torch.cat([first, *others]).flatten().tolist()
    assert len(set(numbers)) == len(numbers)
    assert torch.equal(draws().standard_normal(like, copies=3)[:1], first)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert draws(seed=-(2**70)).standard_normal(like).isfinite().all()


def test_steps_and_new_runs_begin_with_the_first_micro_batch():
    found = ExampleDraws(0, 1, 2)
    for step, rows, first in ((0, 4, 4), (0, 4, 12), (0, 2, 18), (1, 4, 4), (1, 4, 12)):
        found.advance(step, rows)
        assert found.positions == range(first, first + rows)
    found.restart()
    found.advance(1, 4)
    assert found.positions == range(4, 8)


def test_numbers_are_standard_normal_and_independent():
    noise = draws(rows=(40,)).standard_normal(torch.zeros(40, 3, 16, 16), copies=2)
    assert noise.shape == (2, 40, 3, 16, 16)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    rows = noise.flatten(2).flatten(0, 1).double()
    correlations = torch.corrcoef(rows) - torch.eye(80, dtype=torch.float64)
    # Of 3160 correlations of 768 numbers the largest is 4.5 deviations of 1/√768 once in 47 trials.
    assert correlations.abs().max() < 4.5 / 768**0.5


def test_masked_tokens_get_no_noise_and_padding_does_not_matter():
    short = torch.tensor([[1, 1, 0], [1, 1, 1]])
    left = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 1, 0]])
    noise = draws().standard_normal(torch.zeros(2, 3, 4), copies=2, mask=short)
    padded = draws().standard_normal(torch.zeros(2, 5, 4), copies=2, mask=left)
    assert noise.shape == (2, 2, 3, 4)
    assert torch.equal(noise[:, short.bool()], padded[:, left.bool()])
    assert (noise[:, ~short.bool()] == 0).all()
    assert (noise[:, short.bool()] != 0).all()
    nothing = draws().standard_normal(torch.zeros(2, 3, 4), mask=torch.zeros(2, 3))
    assert (nothing == 0).all()
    everything = draws().standard_normal(torch.zeros(2, 3, 4), mask=torch.ones(2, 3))
    assert torch.equal(everything, draws().standard_normal(torch.zeros(2, 3, 4)))


def test_dtype_is_float32_whatever_the_model_is():
    like = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draws().standard_normal(like), draws().standard_normal(like.double()))
        assert draws().standard_normal(like, mask=torch.ones(2, 3)).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_processes_and_micro_batches_have_the_noise_of_one_batch():
    like = torch.zeros(8, 3, 5, device="cuda")
    whole_batch = draws(rows=(8,)).standard_normal(like, copies=2)
    second_half = draws(rows=(4,), process=1, num_processes=2).standard_normal(like[:4], copies=2)
    assert torch.equal(whole_batch[:, 4:], second_half)
    assert torch.equal(whole_batch[:, 6:], draws(rows=(2, 2, 2, 2)).standard_normal(like[:2], copies=2))
    masked = draws(rows=(8,)).standard_normal(like, mask=torch.ones(8, 3, device="cuda"))
    assert torch.equal(masked, whole_batch[:1])
    assert len(set(whole_batch.flatten().tolist())) == whole_batch.numel()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="process must be"):
        ExampleDraws(0, 2, 2)
    with pytest.raises(ValueError, match="at least one example"):
        ExampleDraws(0).advance(0, 0)
    with pytest.raises(ValueError, match="has 2 examples, and the tensor 3 rows"):
        draws().standard_normal(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="copies must be"):
        draws().standard_normal(torch.zeros(2, 4), copies=0)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\)"):
        draws().standard_normal(torch.zeros(2, 4, 3), mask=torch.ones(2, 5))


if __name__ == "__main__":
    results = {(way, accumulation): loaded(way, BATCH, accumulation) for way in WAYS for accumulation in (1, 3)}
    torch.save(results, os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
    leave()
