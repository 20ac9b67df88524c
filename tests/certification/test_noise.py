from __future__ import annotations

import random
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy import stats

from hf_lipschitz.certification.noise import NOISE_BLOCK, Stage, gaussian_noise_block


def draw(shape: tuple[int, ...] = (4,), sigma: float = 1.0, **key: object) -> torch.Tensor:
    return gaussian_noise_block(shape, sigma, **{"seed": 0, "index": 0, "stage": Stage.SELECTION, "block": 0, **key})


def test_noise_is_standard_normal_times_sigma() -> None:
    noise = draw((200, 20), sigma=0.25)
    assert noise.shape == (NOISE_BLOCK, 200, 20)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy() / 0.25, "norm").pvalue > 0.01


def test_first_samples_of_many_keys_are_standard_normal() -> None:
    firsts = [float(draw((1,), block=block, index=index)[0, 0]) for block, index in product(range(40), range(50))]
    assert stats.kstest(firsts, "norm").pvalue > 0.01
    by_block = np.array(firsts).reshape(40, 50)
    assert abs(np.corrcoef(by_block[:-1].ravel(), by_block[1:].ravel())[0, 1]) < 0.08


def test_the_key_decides_the_noise() -> None:
    assert torch.equal(draw(seed=5, block=3), draw(seed=5, block=3))
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 - 1, 2**64, 2**64 - 1, -(2**63), 10**40, 10**40 + 2**64]
    keys = [{"seed": seed} for seed in seeds]
    keys += [{"seed": 1, "index": 23}, {"seed": 12, "index": 3}, {"index": 1}, {"block": 1}, {"index": 2**32}]
    keys += [{"stage": Stage.ESTIMATION}, {"stage": Stage.PREDICTION}]
    for first, second in combinations([draw(**key) for key in keys], 2):
        assert not torch.isin(first, second).any()


def test_no_two_of_many_blocks_share_a_sample() -> None:
    samples = torch.cat([draw((2,), stage=stage, block=block) for stage in Stage for block in range(1000)])
    assert len(torch.unique(samples, dim=0)) == len(samples)


def test_global_generators_are_untouched() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    draw()
    assert torch.equal(torch.get_rng_state(), torch_state)
    numpy_state_after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state_after, numpy_state, strict=True))
    assert random.getstate() == python_state


@pytest.mark.parametrize("sigma", [2.0**-100, 2.0**120])
def test_extreme_sigmas_neither_vanish_nor_overflow(sigma: float) -> None:
    noise = draw((1000,), sigma=sigma)
    assert torch.isfinite(noise).all()
    assert float(noise.double().std()) == pytest.approx(sigma, rel=0.05)
