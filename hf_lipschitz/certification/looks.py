"""When a sequential certification looks at its counts, and what each look may err."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lipschitz.certification.noise import NOISE_BLOCK


FIRST_LOOKS = (100, 200, 400, 800, 1600, 3000, 6000, 10_000, 20_000, 30_000, 40_000, 60_000, 80_000, 100_000)


@dataclass(frozen=True)
class Look:
    """A number of samples `n`, and the error `alpha` that the bounds there may make."""

    n: int
    alpha: float


def default_looks(n: int) -> tuple[int, ...]:
    """100, 200, 400, ... up to `n` samples, which is the last one; beyond 100 000 each is twice the one before."""
    looks = [look for look in FIRST_LOOKS if look < n]
    while looks and 2 * looks[-1] < n and looks[-1] >= FIRST_LOOKS[-1]:
        looks.append(2 * looks[-1])
    return (*looks, n)


def spend(looks: tuple[int, ...], alpha: float, *, is_anytime: bool) -> tuple[Look, ...]:
    r"""
    The looks with their errors: \\(\alpha/2\\) for the last one and \\(\alpha / (2 (m - 1))\\) for each of the m - 1
    before it, which add up to \\(\alpha\\), so that all bounds of all looks hold together with probability at least
    \\(1 - \alpha\\) (union bound). With `is_anytime` the bounds hold at all n together as they are, and each look has
    the whole of `alpha`. One look alone has it too.
    """
    if is_anytime or len(looks) == 1:
        return tuple(Look(n, alpha) for n in looks)
    early = alpha / (2 * (len(looks) - 1))
    return (*(Look(n, early) for n in looks[:-1]), Look(looks[-1], alpha / 2))


def check_looks(looks: tuple[int, ...], n: int) -> None:
    """
    Raises:
        `ValueError`: they do not increase, one but the last is no multiple of the noise block, or the last is not `n`.
    """
    if not looks or list(looks) != sorted(set(looks)) or looks[0] < 1:
        raise ValueError(f"looks must be increasing numbers of samples, got {looks}.")
    if looks[-1] != n:
        raise ValueError(f"looks must end with n = {n}, got {looks}.")
    if any(look % NOISE_BLOCK for look in looks[:-1]):
        raise ValueError(f"looks must be multiples of {NOISE_BLOCK}, but for the last one; got {looks}.")
