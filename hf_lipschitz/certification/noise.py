"""Noise distributions, and noise that is a function of (seed, example index, stage, block), and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from hf_lipschitz.certification.discrete_gaussian import LEVELS, rounded_gaussian, total_variation
from hf_lipschitz.certification.host_numbers import HostNumbers


NOISE_BLOCK = 100
GRID_TOLERANCE = 1e-3

Source = HostNumbers | torch.Generator


class Stage(Enum):
    """What the samples are for. Samples of different stages are independent."""

    SELECTION = "selection"
    ESTIMATION = "estimation"
    PREDICTION = "prediction"


@dataclass(frozen=True)
class NoiseKey:
    """
    Names one block of samples.

    The key is written out as text, whose bytes are the entropy of a `numpy.random.SeedSequence`: every integer seed
    (negative, larger than 64 bits) is its own key. No global generator is read or advanced. On an accelerator the
    sequence seeds a `torch.Generator` (64 bits); on CPU its children seed numpy's SFC64 instead, because torch's CPU
    generator keeps only 32 bits of a seed, too few for the blocks of one data set to be different. The stream
    therefore depends on the kind of device, not on batch size, threads, processes or order of the draws. Distributions
    share the bits of a key: samples of two distributions under one key are not independent of each other.

    Args:
        seed (`int`), index (`int`), stage (`Stage`), block (`int`):
            The configuration's seed, the example, what the samples are for, and which block of them.
    """

    seed: int
    index: int
    stage: Stage
    block: int

    def sequence(self) -> np.random.SeedSequence:
        key = f"{int(self.seed)}/{int(self.index)}/{self.stage.value}/{int(self.block)}"
        return np.random.SeedSequence(int.from_bytes(key.encode(), "little"))

    def source(self, device: torch.device | str) -> Source:
        """A new generator at the start of this key's stream for the kind of `device`."""
        if torch.device(device).type == "cpu":
            return HostNumbers(self.sequence().entropy)
        return torch.Generator(device).manual_seed(int(self.sequence().generate_state(1, np.uint64)[0]))


Perturb = Callable[[Tensor, float, NoiseKey, "torch.device | str"], Tensor]


@dataclass(frozen=True)
class Noise:
    r"""
    A noise distribution, as certificates see it.

    Args:
        name (`str`):
            Its name in the configuration.
        perturb (`Callable`):
            `perturb(x, sigma, key, device)` returns the noisy INPUTS, x plus noise, float32 of shape `(NOISE_BLOCK,
            *x.shape)` on `device`. For `"exact"` it is the sum that is exact, so noise is never handed on alone.
        norm (`str`):
            The norm of the ball its radii are about: `"l2"` or `"l1"`.
        scale (`Callable[[float], float]`):
            The distribution's own parameter for a standard deviation sigma. It is the number that is drawn with, and
            the one a radius must be computed from.
        slack (`Callable[[int, float], float]`):
            `slack(x_size, sigma)` bounds the total variation distance between one drawn noisy input and the ideal one.
            A certificate takes it off the lower bound of a score and adds it to an upper one. It is sound where
            `is_exact`. Elsewhere it is 0 and leaves float32 rounding out.
        is_exact (`bool`):
            Whether the certificate covers the arithmetic of the draw and of the sum.
        is_lipschitz_compatible (`bool`):
            Whether the function that is smoothed is the base classifier f itself, so that a Lipschitz constant of f is
            one of it. `"exact"` smooths \\(f \circ \mathrm{round}\\), which has none.
    """

    name: str
    perturb: Perturb
    norm: str
    scale: Callable[[float], float]
    slack: Callable[[int, float], float]
    is_exact: bool
    is_lipschitz_compatible: bool


NOISES: dict[str, Noise] = {}


def register_noise(
    name: str,
    *,
    norm: str = "l2",
    scale: Callable[[float], float] = float,
    slack: Callable[[int, float], float] = lambda x_size, sigma: 0.0,
    is_exact: bool = False,
    is_lipschitz_compatible: bool = True,
) -> Callable[[Perturb], Perturb]:
    """
    Decorator that makes the decorated `perturb` function the noise called `name`. Arguments are those of [`Noise`].

    Raises:
        `ValueError`: the name is taken, or the norm is unknown.
    """
    if name in NOISES:
        raise ValueError(f"The noise {name!r} is already registered; choose another name.")
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', got {norm!r}.")

    def register(perturb: Perturb) -> Perturb:
        NOISES[name] = Noise(name, perturb, norm, scale, slack, is_exact, is_lipschitz_compatible)
        return perturb

    return register


def laplace_scale(sigma: float) -> float:
    r"""
    Scale b of the Laplace distribution with standard deviation `sigma`: \\(\sigma / \sqrt 2\\), rounded down to a
    float32. The noise is drawn with this very number, so a radius computed from it is not larger than the noise
    supports.
    """
    return _float32_below(sigma / math.sqrt(2))


def uniform_scale(sigma: float) -> float:
    r"""
    Half width λ of the uniform distribution on [-λ, λ] with standard deviation `sigma`: \\(\sqrt 3 \sigma\\), rounded
    as [`laplace_scale`] is.
    """
    return _float32_below(math.sqrt(3) * sigma)


def exact_slack(x_size: int, sigma: float) -> float:
    r"""
    Upper bound on the total variation distance between a noisy input drawn by [`exact`] and the ideal one: at most
    `x_size` times the distance of one entry, by coupling the independent entries one after another.

    Sound, with the generators taken for sources of independent uniform bits, as everywhere in the library.

    Args:
        x_size (`int`):
            Entries of one input.
        sigma (`float`):
            Standard deviation of the noise. At `sigma` = 0.25 the bound is 1e-11 for an input of 3·224·224 entries.
    """
    return x_size * total_variation(sigma)


@register_noise("gaussian")
def gaussian(x: Tensor, sigma: float, key: NoiseKey, device: torch.device | str) -> Tensor:
    r"""
    x + N(0, sigma² I), rounded to float32. The certificate holds for exact arithmetic: the rounded sum is not covered,
    and its low bits tell x from its neighbours (Jin et al. 2022, arXiv:2205.10159).
    """
    return _gaussian_block(tuple(x.shape), sigma, key, device).add_(_on(x, device))


@register_noise("laplace", norm="l1", scale=laplace_scale)
def laplace(x: Tensor, sigma: float, key: NoiseKey, device: torch.device | str) -> Tensor:
    r"""
    x plus independent Laplace noise of standard deviation `sigma`, the difference of two exponentials. Its ℓ1 radius
    is \\(-b \log(2 (1 - p_A))\\), b = `laplace_scale(sigma)` (Teng et al. 2020; Yang et al. 2020, arXiv:2002.08118,
    who compare noises at equal standard deviation). Float32 rounding is not covered.
    """
    source, size = key.source(device), (NOISE_BLOCK, *x.shape)
    noise = _exponential(size, source).sub_(_exponential(size, source))
    return noise.mul_(laplace_scale(sigma)).add_(_on(x, device))


@register_noise("uniform", norm="l1", scale=uniform_scale)
def uniform(x: Tensor, sigma: float, key: NoiseKey, device: torch.device | str) -> Tensor:
    r"""
    x plus independent uniform noise of standard deviation `sigma`. Its ℓ1 radius is \\(2 \lambda (p_A - 1/2)\\), λ =
    `uniform_scale(sigma)` (Lee et al. 2019; Yang et al. 2020, arXiv:2002.08118). Float32 rounding is not covered.
    """
    noise = _unit_uniform((NOISE_BLOCK, *x.shape), key.source(device))
    return noise.mul_(2).sub_(1).mul_(uniform_scale(sigma)).add_(_on(x, device))


@register_noise("exact", slack=exact_slack, is_exact=True, is_lipschitz_compatible=False)
def exact(x: Tensor, sigma: float, key: NoiseKey, device: torch.device | str) -> Tensor:
    r"""
    Gaussian noise without rounding errors, for inputs whose entries are pixels j / 255.

    An integer \\(\delta = \mathrm{round}(255 \sigma Z)\\), Z standard normal, is drawn for each entry
    ([`rounded_gaussian`]), added to the pixel j in integers, and \\((j + \delta) / 255\\) is handed on: one float32
    operation on an integer.

    Sound, for radii of the kind \\(\Phi^{-1}\\). Let f be the base classifier and \\(h(y) = f(\mathrm{round}(255 y) /
    255)\\), with the division in float32; it is one fixed function on all of R^d, so smoothing it with the continuous
    \\(N(0, \sigma^2 I)\\) gives a classifier g to which Cohen et al. 2019 (arXiv:1902.02918), Theorem 1 applies. At x
    on the grid, 255x is an integer and \\(\mathrm{round}(255 x + 255 \sigma Z) = 255 x + \mathrm{round}(255 \sigma
    Z)\\): what is handed on is what h hands to f, and the votes are votes of h. What remains is that \\(\delta\\) is
    drawn up to [`exact_slack`]. The radius is about g, at every real point of the ball; g can be sampled at those on
    the grid, which are all the images of 8 bits. Rounding is not continuous, so a Lipschitz constant of f says nothing
    of h, and no radius may use one.

    Noisy pixels are not clipped. Resizing and normalisation belong to f.

    On CPU and CUDA the bits are drawn there; other devices get the CPU's samples, because their generators do not
    promise 63 uniform bits.

    Args:
        x (`torch.Tensor`):
            One input, each entry within 1e-3 / 255 of a j / 255, 0 <= j <= 255. It stands for the point of the grid,
            and the certificate is centred there.
        sigma (`float`):
            Standard deviation before rounding, at most 16.
        key (`NoiseKey`):
            Which samples.
        device (`torch.device`):
            Where the result is.

    Raises:
        `ValueError`: an entry is not on the grid, or `sigma` is out of range.
    """
    pixels = _pixels(_on(x, device))
    table = rounded_gaussian(float(sigma))
    size = (NOISE_BLOCK, *x.shape)
    source = key.source(device if torch.device(device).type == "cuda" else "cpu")
    if isinstance(source, torch.Generator):
        return _levels(table.draw_torch(source, size).add_(pixels))
    integers = source.draw(size, lambda stream, out: table.draw(stream.bit_generator, out))
    return _levels(integers.add_(pixels.cpu())).to(device)


def gaussian_noise_block(
    shape: tuple[int, ...],
    sigma: float,
    *,
    seed: int,
    index: int,
    stage: Stage,
    block: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """
    One block of `NOISE_BLOCK` independent float32 samples of N(0, sigma² I).

    Args:
        shape (`tuple[int, ...]`):
            Shape of one input.
        sigma (`float`):
            Standard deviation, in the unit of the input.
        seed (`int`), index (`int`), stage (`Stage`), block (`int`):
            The key, see [`NoiseKey`].
        device (`torch.device`, *optional*, defaults to `"cpu"`):
            Where the noise is drawn.

    Returns:
        `torch.Tensor` of shape `(NOISE_BLOCK, *shape)`, float32, on `device`.
    """
    return _gaussian_block(shape, sigma, NoiseKey(seed, index, stage, block), device)


def _gaussian_block(shape: tuple[int, ...], sigma: float, key: NoiseKey, device: torch.device | str) -> Tensor:
    return _normal((NOISE_BLOCK, *shape), key.source(device)).mul_(sigma)


def _normal(size: tuple[int, ...], source: Source) -> Tensor:
    if isinstance(source, torch.Generator):
        return torch.randn(size, generator=source, device=source.device, dtype=torch.float32)
    return source.draw(size, lambda stream, out: stream.standard_normal(dtype=np.float32, out=out))


def _exponential(size: tuple[int, ...], source: Source) -> Tensor:
    if isinstance(source, torch.Generator):
        return torch.empty(size, device=source.device, dtype=torch.float32).exponential_(generator=source)
    return source.draw(size, lambda stream, out: stream.standard_exponential(dtype=np.float32, out=out))


def _unit_uniform(size: tuple[int, ...], source: Source) -> Tensor:
    if isinstance(source, torch.Generator):
        return torch.rand(size, generator=source, device=source.device, dtype=torch.float32)
    return source.draw(size, lambda stream, out: stream.random(dtype=np.float32, out=out))


def _pixels(x: Tensor) -> Tensor:
    scaled = x * LEVELS
    pixels = scaled.round()
    on_grid = ((scaled - pixels).abs() <= GRID_TOLERANCE) & (pixels >= 0) & (pixels <= LEVELS)
    if not on_grid.all():
        raise ValueError(
            "noise='exact' needs inputs in [0, 1] whose entries are j / 255, j an integer: certify the uint8 image "
            "before resizing, or round to the grid."
        )
    return pixels


def _levels(integers: Tensor) -> Tensor:
    # By a tensor there: CUDA multiplies by the reciprocal of a number, which gives 126 of 256 levels another last bit.
    return integers.div_(integers.new_tensor(LEVELS))


def _on(x: Tensor, device: torch.device | str) -> Tensor:
    return x.to(device, torch.float32)


def _float32_below(value: float) -> float:
    below = np.float32(value)
    if float(below) >= value:
        below = np.nextafter(below, np.float32(-np.inf))
    return float(below)
