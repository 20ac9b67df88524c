from __future__ import annotations

import random
from itertools import combinations, product

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from hf_lipschitz.certification import noise as noise_module
from hf_lipschitz.certification.noise import (
    NOISE_BLOCK,
    NOISES,
    NoiseKey,
    Stage,
    gaussian_noise_block,
    laplace_scale,
    register_noise,
    uniform_scale,
)


KEY = {"seed": 0, "index": 0, "stage": Stage.SELECTION, "block": 0}
LAWS = {
    "gaussian": stats.norm(scale=0.25),
    "laplace": stats.laplace(scale=0.25 / np.sqrt(2)),
    "uniform": stats.uniform(-0.25 * np.sqrt(3), 2 * 0.25 * np.sqrt(3)),
}


def draw(shape: tuple[int, ...] = (4,), sigma: float = 1.0, **key: object) -> torch.Tensor:
    return gaussian_noise_block(shape, sigma, **{**KEY, **key})


def perturb(name: str, x: torch.Tensor, sigma: float = 0.25, **key: object) -> torch.Tensor:
    return NOISES[name].perturb(x, sigma, NoiseKey(**{**KEY, **key}), "cpu")


def torch_source(key: NoiseKey, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(key.sequence().generate_state(1, np.uint64)[0]))


@pytest.fixture(params=["cpu", "accelerator"])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of generator, the accelerator's on CPU."""
    if request.param == "accelerator":
        monkeypatch.setattr(NoiseKey, "source", torch_source)
    return request.param


def test_noise_is_standard_normal_times_sigma() -> None:
    noise = draw((200, 20), sigma=0.25)
    assert noise.shape == (NOISE_BLOCK, 200, 20)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy() / 0.25, "norm").pvalue > 0.01


@pytest.mark.parametrize("name", LAWS)
def test_the_standard_deviation_is_sigma(name: str) -> None:
    """A radius is proportional to it. Of a million draws it has an error of 0.1 %, 0.2 % for the Laplace law."""
    noise = perturb(name, torch.zeros(10_000)).double()
    assert float(noise.square().mean().sqrt()) == pytest.approx(0.25, rel=6e-3)
    assert abs(float(noise.mean())) < 5 * 0.25 / 1000


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
        assert not (first[:, None] == second).all(dim=-1).any()


def test_no_two_of_many_blocks_share_a_sample() -> None:
    samples = torch.cat([draw((2,), stage=stage, block=block) for stage in Stage for block in range(1000)])
    assert len(torch.unique(samples, dim=0)) == len(samples)


def test_the_gaussian_stream_of_a_key_stays_what_it_was() -> None:
    noise = draw((3,), sigma=0.25, seed=7, index=11, stage=Stage.ESTIMATION, block=2)
    first = ["-0x1.da82e80000000p-3", "0x1.e68e1a0000000p-4", "-0x1.0484bc0000000p-2"]
    fiftieth = ["-0x1.7748d60000000p-4", "-0x1.9f98d40000000p-5", "0x1.27c6ee0000000p-2"]
    assert [float(value).hex() for value in noise[0]] == first
    assert [float(value).hex() for value in noise[49]] == fiftieth


def test_gaussian_inputs_are_x_plus_the_block() -> None:
    x = torch.linspace(-3, 3, 12).reshape(3, 4)
    expected = x + draw((3, 4), sigma=0.5, seed=3, block=2)
    assert torch.equal(perturb("gaussian", x, 0.5, seed=3, block=2), expected)


@pytest.mark.parametrize("name", LAWS)
def test_noise_has_its_law_with_standard_deviation_sigma(name: str, stream: str) -> None:
    x = torch.linspace(-1, 1, 500)
    noise = perturb(name, x, seed=3).double() - x.double()
    assert stats.kstest(noise.flatten().numpy(), LAWS[name].cdf).pvalue > 0.01
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("name", LAWS)
def test_entries_and_samples_are_independent(name: str, stream: str) -> None:
    noise = perturb(name, torch.zeros(400)).numpy()
    for first, second in [(noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])]:
        for power in (1, 2):
            assert abs(np.corrcoef(first.ravel() ** power, second.ravel() ** power)[0, 1]) < 0.02


def test_uniform_noise_fills_its_interval_and_stays_in_it() -> None:
    largest = float(perturb("uniform", torch.zeros(10_000)).abs().max())
    assert uniform_scale(0.25) * (1 - 1e-4) < largest <= uniform_scale(0.25)


@pytest.mark.parametrize("sigma", [2.0**-100, 0.1, 0.25, 1 / 3, 1.0, np.sqrt(2), 100.0, 2.0**120])
def test_scales_are_the_floats_just_below(sigma: float) -> None:
    with mpmath.workdps(50):
        exact_values = mpmath.mpf(sigma) / mpmath.sqrt(2), mpmath.mpf(sigma) * mpmath.sqrt(3)
        for scale, exact in zip((laplace_scale(sigma), uniform_scale(sigma)), exact_values, strict=True):
            assert scale == float(np.float32(scale))
            assert scale <= exact
            assert float(np.nextafter(np.float32(scale), np.float32(np.inf))) > exact * (1 - mpmath.mpf(2) ** -50)


def test_what_certificates_read_of_each_noise() -> None:
    norms = {name: noise.norm for name, noise in NOISES.items()}
    assert norms == {"gaussian": "l2", "laplace": "l1", "uniform": "l1", "exact": "l2"}
    assert {name for name, noise in NOISES.items() if noise.is_exact} == {"exact"}
    assert {name for name, noise in NOISES.items() if not noise.is_lipschitz_compatible} == {"exact"}
    assert {name for name, noise in NOISES.items() if noise.slack(1000, 0.25) > 0} == {"exact"}
    assert all(noise.name == name for name, noise in NOISES.items())
    assert [NOISES[name].scale(0.5) for name in ("gaussian", "exact")] == [0.5, 0.5]
    assert [NOISES[name].scale(0.5) for name in ("laplace", "uniform")] == [laplace_scale(0.5), uniform_scale(0.5)]


def test_a_noise_is_registered_once_and_with_a_known_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "NOISES", dict(NOISES))

    @register_noise("none", norm="l1")
    def none(x: torch.Tensor, sigma: float, key: NoiseKey, device: torch.device | str) -> torch.Tensor:
        return x.expand(NOISE_BLOCK, *x.shape)

    assert noise_module.NOISES["none"].perturb is none
    with pytest.raises(ValueError, match="already registered"):
        register_noise("none")
    with pytest.raises(ValueError, match="norm"):
        register_noise("other", norm="l3")


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2)])
def test_shape_and_type(name: str, shape: tuple[int, ...], stream: str) -> None:
    noisy = perturb(name, torch.ones(shape, dtype=torch.float64))
    assert noisy.shape == (NOISE_BLOCK, *shape)
    assert noisy.dtype == torch.float32
    assert noisy.is_contiguous()
    assert len(torch.unique(noisy, dim=0)) > NOISE_BLOCK / 2


@pytest.mark.parametrize("name", NOISES)
def test_blocks_of_different_keys_are_unrelated(name: str, stream: str) -> None:
    x = torch.zeros(1000)
    assert torch.equal(perturb(name, x, seed=5, block=3), perturb(name, x, seed=5, block=3))
    keys = [{}, {"seed": -1}, {"index": 1}, {"block": 1}, {"stage": Stage.ESTIMATION}, {"seed": 2**64}]
    for first, second in combinations([perturb(name, x, **key).flatten().numpy() for key in keys], 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


@pytest.mark.parametrize("name", NOISES)
def test_global_generators_are_neither_read_nor_advanced(name: str, stream: str) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    first = perturb(name, torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    numpy_state_after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state_after, numpy_state, strict=True))
    assert random.getstate() == python_state
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        assert torch.equal(perturb(name, torch.zeros(5)), first)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sigma", [2.0**-100, 2.0**120])
def test_extreme_sigmas_neither_vanish_nor_overflow(name: str, sigma: float) -> None:
    noise = perturb(name, torch.zeros(1000), sigma)
    assert torch.isfinite(noise).all()
    assert float(noise.double().std()) == pytest.approx(sigma, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NOISES)
def test_on_cuda_noise_is_drawn_there_with_the_same_law(name: str) -> None:
    x = torch.full((3, 2000), 128 / 255)
    on_cuda, again = (NOISES[name].perturb(x.cuda(), 0.25, NoiseKey(**KEY), "cuda") for _ in range(2))
    assert on_cuda.device.type == "cuda"
    assert torch.equal(on_cuda, again)
    on_cpu = perturb(name, x).flatten().numpy()
    assert stats.ks_2samp(on_cuda.cpu().flatten().numpy(), on_cpu).pvalue > 0.01
