"""Stopping early: its error, what it saves, and what it leaves as it is."""

from __future__ import annotations

from operator import itemgetter

import numpy as np
import pytest
from scipy import signal, stats

from hf_lipschitz.certification import ABSTAIN, Certificate, SmoothedClassifier, SmoothingConfig, engine
from hf_lipschitz.certification.looks import Look, default_looks, spend
from hf_lipschitz.certification.statistics import clopper_pearson_lower
from tests.certification.exact import Lines, Slabs, exact_radius, place


HALF_PLANES = Slabs((0.0,), (0, 1), 2)
THREE_SLABS = Slabs((-0.6, 0.8), (0, 1, 2), 3)
SOFT_THREE = Lines((2.0, 0.0, -2.0), (0.0, 1.0, 0.0))


def error_of(looks: tuple[Look, ...], p: float) -> float:
    """Probability that the bound of some look is above p, by sums over all paths of counts."""
    survives, before, wrong = np.ones(1), 0, 0.0
    for look in looks:
        step = stats.binom.pmf(np.arange(look.n - before + 1), look.n - before, p)
        reached = signal.fftconvolve(survives, step).clip(min=0)
        above = clopper_pearson_lower(np.arange(look.n + 1), look.n, look.alpha) > p
        wrong += reached[above].sum()
        survives, before = np.where(above, 0.0, reached), look.n
    return wrong


def hardest(looks: tuple[Look, ...]) -> np.ndarray:
    """Probabilities just below the bounds of single counts, where the error jumps up."""
    found = [0.5, 0.501, 0.6, 0.9, 0.99, 0.999]
    for look in looks[:: max(len(looks) // 4, 1)]:
        counts = np.unique(np.linspace(look.n // 2, look.n, 12).astype(int))
        found += list(clopper_pearson_lower(counts, look.n, look.alpha) * (1 - 1e-9))
    return np.unique(found)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("n", [400, 3000])
def test_the_exact_error_of_all_looks_is_at_most_alpha(n: int, alpha: float) -> None:
    looks = spend(default_looks(n), alpha, is_anytime=False)
    errors = [error_of(looks, p) for p in hardest(looks)]
    assert max(errors) <= alpha * (1 + 1e-9)
    assert max(errors) > 0.4 * alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_peeking_at_fixed_bounds_is_not(alpha: float) -> None:
    looks = tuple(Look(n, alpha) for n in default_looks(3000))
    assert max(error_of(looks, p) for p in hardest(looks)) > 1.5 * alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_one_look_has_the_error_of_clopper_and_pearson(alpha: float) -> None:
    looks = (Look(500, alpha),)
    errors = [error_of(looks, p) for p in hardest(looks)]
    assert 0.9 * alpha < max(errors) <= alpha * (1 + 1e-9)


RUNS = 20_000


def together(base: Slabs | Lines, u: float, runs: int, **config: object) -> list[Certificate]:
    smoothed = SmoothedClassifier(base, base.num_classes, SmoothingConfig(**{"sigma": 0.5, "n0": 30, **config}))
    return [c for _, c in sorted(smoothed.certify_together([place(u)] * runs), key=itemgetter(0))]


def not_above(errors: int, rate: float, runs: int) -> bool:
    return stats.binomtest(errors, runs, rate, alternative="greater").pvalue > 0.01


def errors_among(certificates: list[Certificate], base: Slabs | Lines, u: float) -> int:
    radii = [exact_radius(base.smoothed, u, 0.5, best) for best in range(base.num_classes)]
    return sum(c.prediction != ABSTAIN and c.radius > radii[c.prediction] + 1e-9 for c in certificates)


TIE = exact_radius(THREE_SLABS.smoothed, 0.1, 0.5, 1) + 0.1
SOFT_TIE = exact_radius(SOFT_THREE.smoothed, 0.0, 0.5, 1)
CASES = {
    "one_class": (HALF_PLANES, 0.0),
    "two_class": (THREE_SLABS, TIE),
    "class_partition": (THREE_SLABS, TIE),
    "lvm": (SOFT_THREE, SOFT_TIE),
}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("certificate", CASES)
def test_wrong_certificates_at_a_tie(certificate: str, alpha: float) -> None:
    base, u = CASES[certificate]
    certificates = together(base, u, RUNS, n=1600, alpha=alpha, certificate=certificate, radii=[0.0, 0.05, 0.1])
    assert not_above(errors_among(certificates, base, u), alpha, RUNS)


@pytest.mark.parametrize("certificate", CASES)
def test_fewer_wrong_certificates_at_a_tie(certificate: str) -> None:
    base, u = CASES[certificate]
    runs = 500 if certificate == "lvm" else 2000
    certificates = together(base, u, runs, n=800, alpha=0.05, certificate=certificate, radii=[0.0, 0.05, 0.1])
    assert not_above(errors_among(certificates, base, u), 0.05, runs)


def test_the_test_above_rejects_looks_with_the_whole_of_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "spend", lambda looks, alpha, is_anytime: tuple(Look(n, alpha) for n in looks))
    certificates = together(HALF_PLANES, 0.0, 2000, n=3000, alpha=0.05, certificate="one_class", gain=1e-6)
    assert not not_above(errors_among(certificates, HALF_PLANES, 0.0), 0.05, 2000)


@pytest.mark.parametrize("certificate", ["one_class", "two_class", "class_partition", "lvm"])
def test_an_asked_radius_is_decided_with_few_samples(certificate: str) -> None:
    base = SOFT_THREE if certificate == "lvm" else THREE_SLABS
    temperature = 0.05 if certificate == "lvm" else 1.0
    values = {"n": 100_000, "certificate": certificate, "temperature": temperature, "n0": 100}
    for u in (-1.5, 0.1, 1.6):
        (fixed,) = together(base, u, 1, **values)
        for radius in (0.5 * fixed.radius, 1.5 * fixed.radius):
            (found,) = together(base, u, 1, radii=[radius], **values)
            assert (found.radius > radius) == (fixed.radius > radius)
            assert found.n <= 10_000
            assert found.stop_reason == ("radius reached" if found.radius > radius else "next radius out of reach")


def test_several_radii_are_decided_one_after_another() -> None:
    radii = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    (found,) = together(THREE_SLABS, 0.1, 1, n=100_000, radii=radii, certificate="two_class")
    (fixed,) = together(THREE_SLABS, 0.1, 1, n=100_000, certificate="two_class")
    assert [found.radius > r for r in radii] == [fixed.radius > r for r in radii]
    assert found.n < 50_000


def test_gain_stops_where_little_is_left_to_gain() -> None:
    (fixed,) = together(HALF_PLANES, 0.3, 1, n=100_000)
    spent = []
    for gain in (0.2, 0.05, 0.02):
        (found,) = together(HALF_PLANES, 0.3, 1, n=100_000, gain=gain)
        assert fixed.radius - gain <= found.radius <= fixed.radius + gain
        assert found.stop_reason == "gain out of reach"
        spent.append(found.n)
    assert spent == sorted(set(spent))
    assert spent[-1] < 50_000


def test_a_look_at_the_end_gives_what_fixed_n_gives_at_half_the_error() -> None:
    (found,) = together(HALF_PLANES, 0.3, 1, n=3000, gain=1e-12, certificate="one_class", alpha=0.01)
    (fixed,) = together(HALF_PLANES, 0.3, 1, n=3000, certificate="one_class", alpha=0.005)
    assert found.n == 3000
    assert found.p_lower >= fixed.p_lower
    assert found.stop_reason in ("n reached", "gain out of reach")
