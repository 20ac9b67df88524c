from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import one_hot

from hf_lipschitz.certification import (
    SmoothedClassifier,
    SmoothingConfig,
    clopper_pearson_lower,
    clopper_pearson_upper,
)
from hf_lipschitz.certification.discrete_gaussian import PIECE, RoundedGaussian, rounded_gaussian, total_variation
from hf_lipschitz.certification.noise import NOISE_BLOCK, NOISES, NoiseKey, Stage, exact_slack


SIGMAS = [0.01 / 255, 0.5 / 9.01 / 255, 0.01, 0.05, 0.25, 1.0, 10.0]
TOP = 2**63


def noisy_inputs(name: str, x: Tensor, sigma: float = 0.25, blocks: int = 1, seed: int = 0) -> Tensor:
    keys = [NoiseKey(seed, 0, Stage.PREDICTION, block) for block in range(blocks)]
    return torch.cat([NOISES[name].perturb(x, sigma, key, "cpu") for key in keys])


def filled(source: np.random.BitGenerator, table: RoundedGaussian, size: int) -> np.ndarray:
    out = np.empty(size, np.float32)
    table.draw(source, out)
    return out


def draw(kind: str, sigma: float, size: int) -> np.ndarray:
    table = rounded_gaussian(sigma)
    if kind == "numpy":
        return filled(np.random.SFC64(3), table, size)
    return table.draw_torch(torch.Generator().manual_seed(3), (size,)).numpy()


def cumulative(k: int, sigma: float) -> mpmath.mpf:
    """P(round(255 sigma Z) <= k)."""
    return mpmath.ncdf((k + mpmath.mpf("0.5")) / (255 * mpmath.mpf(sigma)))


def grid_value(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


class Recorder:
    """A bit generator that remembers what it gave."""

    def __init__(self, seed: int) -> None:
        self.source = np.random.SFC64(seed)
        self.given: list[np.ndarray] = []

    def random_raw(self, size: int) -> np.ndarray:
        self.given.append(self.source.random_raw(size))
        return self.given[-1]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_thresholds_are_the_normal_distribution_function_to_half_a_unit(sigma: float) -> None:
    thresholds = rounded_gaussian(sigma).thresholds
    middle = len(thresholds) // 2
    chosen = np.random.default_rng(0).permutation(len(thresholds))[:1000]
    with mpmath.workdps(60):
        for i in chosen:
            error = abs(mpmath.mpf(int(thresholds[i])) - TOP * cumulative(int(i) - middle, sigma))
            assert error <= mpmath.mpf("0.5") + mpmath.mpf(10) ** -15


@pytest.mark.parametrize("sigma", SIGMAS)
def test_thresholds_ascend_are_symmetric_and_reach_nine_standard_deviations(sigma: float) -> None:
    thresholds = [int(threshold) for threshold in rounded_gaussian(sigma).thresholds]
    assert all(0 < threshold < TOP for threshold in thresholds)
    assert sorted(thresholds) == thresholds
    assert thresholds == [TOP - threshold for threshold in reversed(thresholds)]
    per_side = len(thresholds) // 2
    reach = 9 * 255 * Fraction(sigma)
    assert per_side - Fraction(1, 2) <= reach < per_side + Fraction(1, 2)


@pytest.mark.parametrize("sigma", SIGMAS[:-1])
def test_total_variation_covers_the_true_distance(sigma: float) -> None:
    thresholds = [0, *(int(threshold) for threshold in rounded_gaussian(sigma).thresholds), TOP]
    reach = len(thresholds) // 2 - 1
    with mpmath.workdps(60):
        below = [cumulative(k, sigma) for k in range(-reach - 1, reach + 1)]
        masses = [high - low for low, high in pairwise(below)]
        drawn = [mpmath.mpf(high - low) / TOP for low, high in pairwise(thresholds)]
        out_of_reach = 2 * below[0]
        distance = (sum(abs(p - q) for p, q in zip(masses, drawn, strict=True)) + out_of_reach) / 2
    assert distance <= total_variation(sigma)
    if sigma > 0.01 / 255:
        assert total_variation(sigma) < 10 * distance


def test_slack_adds_over_the_entries() -> None:
    assert exact_slack(150_528, 0.25) == 150_528 * total_variation(0.25)
    assert exact_slack(150_528, 0.25) < 1e-11
    assert NOISES["exact"].slack is exact_slack


@pytest.mark.parametrize("sigma", SIGMAS)
def test_an_integer_changes_exactly_at_its_threshold(sigma: float) -> None:
    table = rounded_gaussian(sigma)
    per_side = len(table.thresholds) // 2
    assert table.from_bits(np.array([0, TOP - 1])).tolist() == [-per_side, per_side]
    integers = np.arange(-per_side, per_side)
    apart = np.diff(table.thresholds, prepend=0, append=TOP - 1) > 0
    assert np.array_equal(table.from_bits(table.thresholds - 1)[apart[:-1]], integers[apart[:-1]])
    assert np.array_equal(table.from_bits(table.thresholds)[apart[1:]], integers[apart[1:]] + 1)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_bits_stand_for_the_same_integer_in_torch(sigma: float) -> None:
    table = rounded_gaussian(sigma)
    random = np.random.default_rng(0).integers(0, TOP - 1, 1000, endpoint=True)
    bits = np.concatenate([[0, TOP - 1], table.thresholds - 1, table.thresholds, random])
    assert np.array_equal(table.from_bits_torch(torch.from_numpy(bits)).numpy(), table.from_bits(bits))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_draw_reads_63_bits_of_which_16_often_decide(sigma: float) -> None:
    table, source, size = rounded_gaussian(sigma), Recorder(5), PIECE + 1003
    drawn = filled(source, table, size)
    first_piece, rest_first, second_piece, rest_second = source.given
    lead = np.concatenate([first_piece.view(np.uint16)[:PIECE], second_piece.view(np.uint16)[:1003]])
    lead = lead.astype(np.int64) << 47
    decided = table.from_bits(lead) == table.from_bits(lead + 2**47 - 1)
    assert np.array_equal(drawn[decided], table.from_bits(lead)[decided])
    rest = np.concatenate([rest_first, rest_second]) >> np.uint64(17)
    assert np.array_equal(drawn[~decided], table.from_bits(lead[~decided] + rest.astype(np.int64)))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("sigma", SIGMAS[1:])
def test_draws_have_the_law_of_the_rounded_gaussian(kind: str, sigma: float) -> None:
    drawn = draw(kind, sigma, 400_000)
    assert np.array_equal(drawn, np.round(drawn))
    deviation = 255 * sigma
    edges = np.unique(np.floor(deviation * np.linspace(-3, 3, 41))) + 0.5
    expected = np.diff(stats.norm.cdf(edges / deviation), prepend=0, append=1) * len(drawn)
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=len(edges) + 1)
    common = expected > 5
    assert counts[~common].sum() <= 40
    if common.sum() > 1:
        observed, wanted = (np.append(values[common], values[~common].sum() + 1e-9) for values in (counts, expected))
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.01


def test_63_bits_of_torch_are_uniform() -> None:
    bits = torch.empty(100_000, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    assert int(bits.min()) >= 0
    ones = (bits[:, None] >> torch.arange(63)).bitwise_and(1).double().mean(dim=0)
    assert float((ones - 0.5).abs().max()) < 4.5 * 0.5 / 100_000**0.5


@pytest.mark.parametrize("sigma", SIGMAS)
def test_noisy_inputs_never_leave_the_grid(sigma: float) -> None:
    pixels = np.arange(256)
    noisy = noisy_inputs("exact", torch.from_numpy(grid_value(pixels)), sigma).numpy()
    assert noisy.dtype == np.float32
    integers = np.round(noisy.astype(np.float64) * 255)
    assert np.array_equal(noisy, grid_value(integers))
    on_black = noisy_inputs("exact", torch.zeros(256), sigma).numpy()
    assert np.array_equal(integers - pixels, np.round(on_black.astype(np.float64) * 255))


@pytest.mark.parametrize("sigma", SIGMAS[2:])
def test_the_standard_deviation_is_sigma_plus_that_of_rounding(sigma: float) -> None:
    x = torch.full((1000,), 0.2)
    deviation = float((255 * (noisy_inputs("exact", x, sigma) - x)).double().square().mean().sqrt())
    assert deviation == pytest.approx(((255 * sigma) ** 2 + 1 / 12) ** 0.5, rel=0.01)


def test_the_smallest_noise_leaves_every_image_as_it_is() -> None:
    x = torch.from_numpy(grid_value(np.arange(256)))
    assert torch.equal(noisy_inputs("exact", x, 0.01 / 255), x.expand(NOISE_BLOCK, 256))


def test_votes_are_those_of_the_continuous_gaussian_rounded() -> None:
    sigma, votes = 0.02, 60_000
    noisy = noisy_inputs("exact", torch.full((votes // NOISE_BLOCK,), 10 / 255), sigma)
    for step in range(10):
        at_least = stats.norm.sf((10 + step - 0.5) / 255, loc=10 / 255, scale=sigma)
        count = int((noisy * 255 > 9.75 + step).sum())
        assert stats.binomtest(count, votes, at_least).pvalue > 0.001


def test_roundings_of_a_pixel_are_one_pixel() -> None:
    pixels = torch.arange(256)
    ways = [
        pixels.float() / 255,
        pixels.float() * np.float32(1 / 255),
        pixels.double() / 255,
        pixels * 0.00392156862745098,
    ]
    assert not torch.equal(ways[0], ways[1])
    first, *others = [noisy_inputs("exact", way) for way in ways]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("entry", [0.5, 1.2 / 255, 256 / 255, -1 / 255, 3.0, float("nan"), float("inf"), 7.01 / 255])
def test_inputs_off_the_grid_are_refused(entry: float) -> None:
    x = torch.full((2, 3), 7 / 255)
    noisy_inputs("exact", x)
    x[1, 2] = entry
    with pytest.raises(ValueError, match=r"in \[0, 1\] .* j / 255.*certify the uint8 image"):
        noisy_inputs("exact", x)


@pytest.mark.parametrize("sigma", [0.0, -0.25, 16.01, float("nan"), float("inf")])
def test_sigma_out_of_range_is_refused(sigma: float) -> None:
    for attempt in (lambda: noisy_inputs("exact", torch.zeros(1), sigma), lambda: exact_slack(1, sigma)):
        with pytest.raises(ValueError, match=r"sigma in \(0, 16"):
            attempt()


def low_bit_attack(batch: Tensor) -> Tensor:
    r"""
    Class 1 where an entry betrays that the noise was added to a number off the 2^-24 grid (after Jin et al. 2022,
    arXiv:2205.10159).

    An entry y in (-1/4, -1/64) came from an x near 1/2 by noise in (-1, -1/2), which float32 holds in steps of 2^-24.
    The sum is exact, since y has bits to spare, so y is a multiple of 2^-24 if and only if x is. Below 1/2 floats come
    in steps of 2^-25, and x need not be one.
    """
    read = (batch > -1 / 4) & (batch < -1 / 64)
    off_grid = (batch.double() * 2**24).frac() != 0
    return one_hot((read & off_grid).flatten(1).any(dim=1).long(), 2).float()


GREY = {"the next pixel value": (128 / 255, 127 / 255), "the next float": (0.5, 0.5 - 2**-25)}


@pytest.mark.parametrize("greys", GREY.values(), ids=GREY)
def test_float_attack_breaks_certificates_of_float_noise(greys: tuple[float, float]) -> None:
    here, there = (torch.full((784,), grey) for grey in greys)
    distance = float((here.double() - there.double()).norm())
    smoothed = SmoothedClassifier(low_bit_attack, 2, SmoothingConfig(sigma=0.25, n=10_000, certificate="one_class"))
    certificate, contradiction = smoothed.certify(here, 0), smoothed.certify(there, 1)
    assert certificate.prediction == 0
    assert certificate.radius > 0.79 > 7 * distance
    assert smoothed.predict(there, 2) == 1
    votes = low_bit_attack(noisy_inputs("gaussian", there, blocks=20))[:, 1]
    assert stats.binomtest(int(votes.sum()), len(votes), 0.5, alternative="greater").pvalue < 1e-100
    assert contradiction.prediction == 1
    assert contradiction.radius > 0.79


def certified_gap(name: str, x: Tensor, other: Tensor) -> float:
    """Lower confidence bound on how far apart the votes for class 1 are, as a distance in standard deviations."""
    counts = []
    for seed, image in enumerate((x, other)):
        votes = low_bit_attack(noisy_inputs(name, image, blocks=100, seed=seed))[:, 1]
        counts.append(int(votes.sum()))
    n = 100 * NOISE_BLOCK
    low, high = sorted(counts)
    bounds = clopper_pearson_lower(high, n, 1e-3), clopper_pearson_upper(np.array([low]), n, 1e-3)[0]
    return float(stats.norm.ppf(bounds[0]) - stats.norm.ppf(bounds[1]))


def test_float_attack_has_no_power_over_exact_noise() -> None:
    """With 784 entries to read its class is the same at both images; with 8, its votes move as little as they must."""
    greys = GREY["the next pixel value"]
    here, there = (torch.full((784,), grey) for grey in greys)
    classes = {
        name: [int(low_bit_attack(noisy_inputs(name, x)).sum(dim=0).argmax()) for x in (here, there)]
        for name in ("gaussian", "exact")
    }
    assert classes == {"gaussian": [0, 1], "exact": [1, 1]}
    allowed = float((here[:8] - there[:8]).norm()) / 0.25
    assert certified_gap("gaussian", here[:8], there[:8]) > 40 * allowed
    assert certified_gap("exact", here[:8], there[:8]) <= allowed
