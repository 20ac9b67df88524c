r"""
Integers distributed as \\(\mathrm{round}(N(0, s^2))\\), drawn by comparing random integers with integer thresholds.

\\(P(\delta \le k) = \Phi((k + 1/2) / s)\\), so \\(\delta\\) is the number of thresholds \\(T_k = 2^{63} \Phi((k + 1/2)
/ s)\\) that are at most a uniform 63-bit integer, counted from the middle one. The only approximation is that each
threshold is rounded to an integer: no logarithm, no square root and no rounded float takes part in the draw, and the
same bits give the same integer on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


LEVELS = 255
LARGEST_SIGMA = 16.0

BITS = 63
LEAD_BITS = 16
PIECE = 1 << 16
DIGITS = 40
REACH = 9
SQRT_TWO_PI = Decimal("2.506628274631000502415765284811045253006986740609938")


@dataclass(frozen=True, eq=False)
class RoundedGaussian:
    r"""
    The distribution of \\(\mathrm{round}(255 \sigma Z)\\), Z standard normal; see [`rounded_gaussian`].

    `guide` answers from the leading 16 of the 63 bits. It is the integer where these decide it, and NaN where a
    threshold lies among the numbers with these leading bits.

    Args:
        thresholds (`NDArray[np.int64]`):
            The 2m integers \\(T_{-m}, \dots, T_{m-1}\\), ascending, in \\((0, 2^{63})\\).
        guide (`NDArray[np.float32]`):
            2^16 entries.
    """

    thresholds: NDArray[np.int64]
    guide: NDArray[np.float32]

    def from_bits(self, bits: NDArray[np.int64]) -> NDArray[np.float32]:
        """
        The integers that 63-bit numbers stand for.

        Args:
            bits (`NDArray[np.int64]`):
                Uniform numbers in [0, 2^63).

        Returns:
            `NDArray[np.float32]` of the same shape; the integers are below 2^24, where float32 holds them exactly.
        """
        counts = self.thresholds.searchsorted(bits, side="right")
        return (counts - len(self.thresholds) // 2).astype(np.float32)

    def draw(self, source: np.random.BitGenerator, out: NDArray[np.float32]) -> None:
        """
        Fills the vector `out` with independent draws on CPU, in pieces that stay in cache. Only where 16 bits do not
        decide, 47 more are drawn; the result has the distribution of `from_bits` on 63 bits.
        """
        for start in range(0, len(out), PIECE):
            self._fill(out[start : start + PIECE], source)

    def _fill(self, out: NDArray[np.float32], source: np.random.BitGenerator) -> None:
        lead = source.random_raw(-(-len(out) // 4)).view(np.uint16)[: len(out)]
        self.guide.take(lead, out=out, mode="clip")
        undecided = np.flatnonzero(np.isnan(out))
        rest = source.random_raw(len(undecided)) >> np.uint64(64 - BITS + LEAD_BITS)
        bits = (lead[undecided].astype(np.int64) << (BITS - LEAD_BITS)) | rest.astype(np.int64)
        out[undecided] = self.from_bits(bits)

    def from_bits_torch(self, bits: Tensor) -> Tensor:
        """`from_bits` on the device of `bits` (int64)."""
        thresholds = torch.from_numpy(self.thresholds.copy()).to(bits.device)
        counts = torch.searchsorted(thresholds, bits, right=True, out_int32=True)
        return counts.sub_(len(thresholds) // 2).to(torch.float32)

    def draw_torch(self, generator: torch.Generator, size: tuple[int, ...]) -> Tensor:
        """
        Independent draws on the generator's device, float32. `random_` must give 63 uniform bits there: it does on
        CPU and on CUDA.
        """
        bits = torch.empty(size, dtype=torch.int64, device=generator.device).random_(generator=generator)
        return self.from_bits_torch(bits)


@lru_cache(maxsize=16)
def rounded_gaussian(sigma: float) -> RoundedGaussian:
    r"""
    The distribution of \\(\mathrm{round}(255 \sigma Z)\\). Takes 0.2 s at `sigma` = 1, in proportion to `sigma`, and
    is kept. Its distance from the ideal one is bounded by [`total_variation`].

    Args:
        sigma (`float`):
            Standard deviation before rounding, in units of 255 steps; its exact binary value counts.

    Raises:
        `ValueError`: `sigma` is not in (0, 16], beyond which the table of thresholds would get long.
    """
    thresholds = _thresholds(_standard_deviation(sigma))
    first = np.arange(1 << LEAD_BITS, dtype=np.int64) << (BITS - LEAD_BITS)
    last = first + ((1 << (BITS - LEAD_BITS)) - 1)
    table = RoundedGaussian(thresholds, np.empty(0, np.float32))
    guide = table.from_bits(first)
    guide[guide != table.from_bits(last)] = np.nan
    for array in (thresholds, guide):
        array.flags.writeable = False
    return RoundedGaussian(thresholds, guide)


def total_variation(sigma: float) -> float:
    r"""
    Sound upper bound on the total variation distance between one draw and \\(\mathrm{round}(255 \sigma Z)\\).

    With s = 255σ, exact distribution function \\(F_k\\) and drawn one \\(T_k / 2^{63}\\), the distance
    \\(\frac12 \sum_k |\Delta_k - \Delta_{k-1}|\\), \\(\Delta_k = F_k - T_k / 2^{63}\\), is at most
    \\(\sum_k |\Delta_k|\\). The at most 18s + 1 thresholds within 9 standard deviations are computed with 40 digits
    and rounded once: \\(2^{-64}\\) each. Those further out are 0 and \\(2^{63}\\); together they miss at most
    \\(2 \Phi(-9) (1 + s / 9) \le (4.2 + 0.5 s) 2^{-64}\\). The bound is \\((19 s + 6) 2^{-64}\\).

    Args:
        sigma (`float`):
            As in [`rounded_gaussian`], with the same errors.
    """
    return (19 * float(_standard_deviation(sigma)) + 6) * 2.0**-64


def _standard_deviation(sigma: float) -> Decimal:
    if not (0 < sigma <= LARGEST_SIGMA):
        raise ValueError(
            f"noise='exact' takes sigma in (0, {LARGEST_SIGMA}], got {sigma}: its inputs are in [0, 1], and its table "
            "grows with sigma."
        )
    with localcontext() as context:
        context.prec = DIGITS
        return LEVELS * Decimal(sigma)


def _thresholds(deviation: Decimal) -> NDArray[np.int64]:
    half, upper = 1 << (BITS - 1), []
    with localcontext() as context:
        context.prec = DIGITS
        z = Decimal("0.5") / deviation
        while z <= REACH:
            upper.append(half + int((_normal_mass(z) * 2**BITS).to_integral_value()))
            z = (len(upper) + Decimal("0.5")) / deviation
    return np.array([2 * half - threshold for threshold in reversed(upper)] + upper, dtype=np.int64)


def _normal_mass(z: Decimal) -> Decimal:
    r"""
    \\(\Phi(z) - 1/2 = \varphi(z) \sum_n z^{2n+1} / (2n+1)!!\\) for z > 0. All terms are positive, so the relative
    error stays within a few hundred roundings of the context's precision.
    """
    square = z * z
    total, term, odd = Decimal(0), z, 1
    while total + term != total:
        total += term
        odd += 2
        term *= square / odd
    return (-square / 2).exp() * total / SQRT_TWO_PI
