from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from operator import itemgetter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hf_lipschitz.certification import (
    ABSTAIN,
    Certificate,
    SmoothedClassifier,
    engine,
    procedures,
    register_certificate,
)
from hf_lipschitz.certification.configuration import CERTIFICATES, SmoothingConfig
from hf_lipschitz.certification.methods import METHODS, Bounds, Choice, Method, Setting
from hf_lipschitz.certification.noise import Stage
from tests.certification.exact import Lines, Slabs, exact_radius, place


ALPHA, RUNS = 0.05, 2000
RUNS_OF_SCORES = 600
HALF_PLANES = Slabs((0.0,), (0, 1), 2)
THREE_SLABS = Slabs((-0.6, 0.8), (0, 1, 2), 3)
STRIPES = Slabs((-0.7, 0.1, 0.5, 1.6), (0, 1, 0, 2, 3), 4)
FAR_CLASSES = Slabs((-9.0, 0.0, 9.0), (2, 0, 1, 3), 10)
SOFT_TWO = Lines((1.0, -1.0), (0.0, 0.0))
SOFT_THREE = Lines((2.0, 0.0, -2.0), (0.0, 1.0, 0.0))


def tie(base: Slabs | Lines, sigma: float, best: int, start: float) -> float:
    """A place where two classes of the smoothed classifier tie: every radius above 0 is an error."""
    return start + exact_radius(base.smoothed, start, sigma, best)


def not_above(errors: int, rate: float, runs: int = RUNS) -> bool:
    return stats.binomtest(errors, runs, rate, alternative="greater").pvalue > 0.01


def certify_many(base: Slabs | Lines, u: float, **config: object) -> list[Certificate]:
    values = {"sigma": 0.5, "n0": 30, "n": 400, "alpha": ALPHA, **config}
    smoothed = SmoothedClassifier(base, base.num_classes, SmoothingConfig(**values))
    runs = RUNS_OF_SCORES if config["certificate"] == "lvm" else RUNS
    return [certificate for _, certificate in sorted(smoothed.certify_together([place(u)] * runs), key=itemgetter(0))]


CASES = {
    "class_partition, stripes": (STRIPES, -0.1, "class_partition"),
    "class_partition, ten classes, tie": (FAR_CLASSES, 0.0, "class_partition"),
    "one_class, tie": (HALF_PLANES, 0.0, "one_class"),
    "one_class, clear": (HALF_PLANES, -0.6, "one_class"),
    "one_class, ten classes, tie": (FAR_CLASSES, 0.0, "one_class"),
    "two_class, tie": (HALF_PLANES, 0.0, "two_class"),
    "two_class, three slabs": (THREE_SLABS, 0.1, "two_class"),
    "two_class, three slabs, tie": (THREE_SLABS, tie(THREE_SLABS, 0.5, 1, 0.1), "two_class"),
    "two_class, stripes": (STRIPES, -0.1, "two_class"),
    "two_class, ten classes, tie": (FAR_CLASSES, 0.0, "two_class"),
    "lvm, clear": (SOFT_TWO, 1.0, "lvm"),
    "lvm, three classes": (SOFT_THREE, 0.8, "lvm"),
    "lvm, three classes, tie": (SOFT_THREE, tie(SOFT_THREE, 0.5, 1, 0.0), "lvm"),
    "lvm, one-hot scores, tie": (HALF_PLANES, 0.0, "lvm"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_radii_and_wrong_bounds_are_no_more_frequent_than_alpha(case: str) -> None:
    base, u, certificate = CASES[case]
    temperature = 1e-3 if isinstance(base, Slabs) else 1.0
    scores = base.smoothed(u, 0.5)
    radii = [exact_radius(base.smoothed, u, 0.5, best) for best in range(base.num_classes)]
    certificates = certify_many(base, u, certificate=certificate, temperature=temperature)
    wrong = [c for c in certificates if c.prediction != ABSTAIN and c.radius > radii[c.prediction] + 1e-9]
    assert not_above(len(wrong), ALPHA, len(certificates))
    best = int(np.argmax(scores))
    runner_up = np.delete(scores, best).max()
    chosen = [c for c in certificates if c.prediction == best]
    wrong_bounds = [c for c in chosen if c.p_lower > scores[best] or (c.p_upper or 1) < runner_up - 1e-9]
    assert not_above(len(wrong_bounds), ALPHA, len(certificates))
    for c in certificates:
        assert (c.prediction == ABSTAIN) == (c.radius == 0)


@pytest.fixture
def registry() -> Iterator[None]:
    """Undoes the registrations of one test."""
    names, methods = list(CERTIFICATES), dict(METHODS)
    yield
    CERTIFICATES[:] = names
    METHODS.clear()
    METHODS.update(methods)


@pytest.mark.parametrize("base", [HALF_PLANES, FAR_CLASSES], ids=["two classes", "ten classes"])
def test_the_test_above_rejects_a_class_that_is_chosen_on_the_samples_of_its_bound(
    base: Slabs, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples_of = engine.Window._samples_of

    def shared(self: engine.Window, round_: int) -> tuple[Stage, int, int]:
        return Stage.ESTIMATION, *samples_of(self, round_)[1:]

    def counts(self: engine.Window, state: engine.State) -> None:
        draw(self, state)
        if state.round == 0:
            state.selection, state.estimation = state.estimation, None

    draw = engine.Window._draw
    monkeypatch.setattr(engine.Window, "_samples_of", shared)
    monkeypatch.setattr(engine.Window, "_draw", counts)
    certificates = certify_many(base, 0.0, certificate="one_class", n0=400)
    wrong = sum(c.radius > 0 for c in certificates)
    assert not not_above(wrong, ALPHA)
    assert wrong > 1.5 * ALPHA * RUNS


def test_the_test_above_rejects_bounds_that_share_no_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    base, u = FAR_CLASSES, 0.0
    monkeypatch.setattr(procedures, "_share_of_candidate", lambda num_others, alpha: np.asarray(alpha))
    monkeypatch.setattr(procedures, "_share_of_others", lambda num_others, alpha: np.asarray(alpha))
    scores = base.smoothed(u, 0.5)
    certificates = certify_many(base, u, certificate="two_class")
    wrong = [c for c in certificates if c.p_lower > scores[c.prediction] or c.p_upper < scores.max() - 1e-9]
    assert not not_above(len(wrong), ALPHA)


@pytest.mark.parametrize("certificate", ["one_class", "two_class"])
@pytest.mark.parametrize("u", [0.15, 0.5, -1.0])
def test_mean_radius_reaches_the_exact_one(certificate: str, u: float) -> None:
    config = SmoothingConfig(sigma=0.5, n0=1000, n=100_000, batch_size=10_000, certificate=certificate)
    smoothed = SmoothedClassifier(HALF_PLANES, 2, config)
    certificates = [smoothed.certify(place(u), index=index) for index in range(4)]
    assert {c.prediction for c in certificates} == {int(u > 0)}
    assert np.mean([c.radius for c in certificates]) >= 0.9 * abs(u)


@pytest.mark.parametrize(
    ("base", "u", "certificate"),
    [(THREE_SLABS, 0.1, "two_class"), (STRIPES, -0.25, "two_class"), (SOFT_TWO, 0.8, "lvm"), (SOFT_THREE, 0.9, "lvm")],
)
def test_mean_radius_reaches_that_of_the_exact_scores(base: Slabs | Lines, u: float, certificate: str) -> None:
    scores = base.smoothed(u, 0.5)
    best = int(scores.argmax())
    z = stats.norm.ppf([scores[best], np.delete(scores, best).max()])
    formula = 0.25 * (z[0] - z[1])
    assert 0 < formula <= exact_radius(base.smoothed, u, 0.5, best)
    config = SmoothingConfig(sigma=0.5, n0=1000, n=100_000, batch_size=10_000, certificate=certificate)
    certificates = [SmoothedClassifier(base, base.num_classes, config).certify(place(u), index=i) for i in range(4)]
    assert {c.prediction for c in certificates} == {best}
    assert 0.9 * formula <= np.mean([c.radius for c in certificates]) <= formula


def test_two_class_certifies_where_one_class_abstains() -> None:
    base = Slabs((-0.4, 0.0, 0.4), (0, 1, 2, 3), 4)
    below_half = Slabs((-0.3, 0.3), (0, 1, 2), 3)
    assert below_half.smoothed(0.0, 0.5)[1] < 0.5
    values = {"sigma": 0.5, "n": 20_000}
    for slabs, u in ((base, -0.75), (below_half, 0.0)):
        one = SmoothedClassifier(slabs, slabs.num_classes, SmoothingConfig(certificate="one_class", **values))
        two = SmoothedClassifier(slabs, slabs.num_classes, SmoothingConfig(certificate="two_class", **values))
        assert two.certify(place(u)).radius >= one.certify(place(u)).radius
    assert one.certify(place(0.0)).prediction == ABSTAIN
    assert two.certify(place(0.0)).prediction == 1


def votes_of(base: Slabs, u: float, config: SmoothingConfig, stage: Stage, n: int, index: int = 0) -> np.ndarray:
    smoothed = SmoothedClassifier(base, base.num_classes, config)
    return engine.Window(base, smoothed._noisy([place(u)], [index]), smoothed.setting).counts_of(stage, n)[0]


def test_bounds_spend_alpha_as_documented() -> None:
    config = SmoothingConfig(sigma=0.5, n=1000, alpha=0.01)
    counts = votes_of(THREE_SLABS, 0.1, config, Stage.ESTIMATION, 1000)
    certificate = SmoothedClassifier(THREE_SLABS, 3, config).certify(place(0.1))
    lower = stats.binomtest(int(counts[1]), 1000, alternative="greater").proportion_ci(1 - 0.009).low
    uppers = [stats.binomtest(int(counts[k]), 1000, alternative="less").proportion_ci(1 - 0.0005).high for k in (0, 2)]
    assert certificate.p_lower == pytest.approx(lower, rel=1e-9)
    assert certificate.p_upper == pytest.approx(min(max(uppers), 1 - lower), rel=1e-9)
    two = SmoothedClassifier(HALF_PLANES, 2, config).certify(place(0.2))
    one = SmoothedClassifier(HALF_PLANES, 2, SmoothingConfig(sigma=0.5, n=1000, alpha=0.01, certificate="one_class"))
    assert two.p_lower == one.certify(place(0.2)).p_lower
    assert two.p_upper == pytest.approx(1 - two.p_lower, abs=1e-15)


SIGMA_LVM = 1.0
COUNTEREXAMPLE = [
    {"simplex_map": "softmax", "temperature": 1.0},
    {"simplex_map": "softmax", "temperature": 1e-5},
    {"simplex_map": "sparsemax", "temperature": 1.0},
    {"simplex_map": "sparsemax", "temperature": 1e-5},
]


def faint_a_strong_b(batch: Tensor) -> Tensor:
    """
    Class A (0) by a hair's breadth for x < 0, class B (1) by a mile for x > 0. A sharp map sees votes and prefers A
    left of 0; a soft one sees A's scores as 1/2 and prefers B as far left as -0.4307. This is our reconstruction: the
    peer's failure is known to us by its two points and its rule of choice, not by its base classifier.
    """
    x = batch[:, 0]
    return torch.stack([torch.where(x < 0, 1e-4, 0.0), torch.where(x < 0, 0.0, 30.0)], dim=1)


@cache
def lvm_certificates(x: float, index: int) -> list[Certificate]:
    return [
        SmoothedClassifier(
            faint_a_strong_b, 2, SmoothingConfig(SIGMA_LVM, n=100_000, batch_size=10_000, certificate="lvm", **choice)
        ).certify(torch.tensor([x]), index=index)
        for choice in COUNTEREXAMPLE
    ]


def contradict(first: tuple[float, Certificate], second: tuple[float, Certificate]) -> bool:
    (x, a), (y, b) = first, second
    different = ABSTAIN not in (a.prediction, b.prediction) and a.prediction != b.prediction
    return different and abs(x - y) < a.radius + b.radius


def test_no_two_overlapping_balls_of_one_configuration_have_different_classes() -> None:
    right, left = lvm_certificates(-0.43, 0), lvm_certificates(-0.45, 1)
    for a, b in zip(right, left, strict=True):
        assert min(a.radius, b.radius) > 0.4
        assert not contradict((-0.43, a), (-0.45, b))


def test_choosing_the_map_per_input_certifies_two_classes_on_overlapping_balls() -> None:
    right, left = (max(lvm_certificates(*key), key=lambda c: c.radius) for key in ((-0.43, 0), (-0.45, 1)))
    assert (right.prediction, left.prediction) == (1, 0)
    assert min(right.radius, left.radius) > 0.4
    assert contradict((-0.43, right), (-0.45, left))


@pytest.mark.parametrize("certificate", ["one_class", "two_class", "lvm"])
@pytest.mark.parametrize(("base", "u"), [(HALF_PLANES, 0.0), (HALF_PLANES, 0.02), (FAR_CLASSES, 0.0)])
def test_predictions_are_wrong_no_more_often_than_alpha(certificate: str, base: Slabs, u: float) -> None:
    config = SmoothingConfig(sigma=0.5, n0=30, n=100, alpha=ALPHA, certificate=certificate)
    smoothed = SmoothedClassifier(base, base.num_classes, config)
    predictions = [smoothed.predict(place(u), index=index) for index in range(500)]
    right = [] if u == 0 else [1]
    assert not_above(sum(p not in (ABSTAIN, *right) for p in predictions), ALPHA, 500)


@pytest.mark.parametrize("certificate", ["one_class", "two_class", "lvm"])
def test_predictions_are_made_where_they_are_clear(certificate: str) -> None:
    config = SmoothingConfig(sigma=0.5, n=2000, certificate=certificate, temperature=0.1)
    for base, u, expected in ((SOFT_TWO, 0.3, 0), (SOFT_TWO, -0.3, 1), (SOFT_THREE, 1.5, 0), (SOFT_THREE, 0.0, 1)):
        assert SmoothedClassifier(base, base.num_classes, config).predict(place(u)) == expected


def test_vote_predictions_follow_the_binomial_test() -> None:
    config = SmoothingConfig(sigma=0.5, n=200, alpha=ALPHA)
    outcomes = set()
    for index in range(60):
        second, first = sorted(votes_of(STRIPES, -0.1, config, Stage.PREDICTION, 200, index))[-2:]
        certain = stats.binomtest(int(first), int(first + second)).pvalue <= ALPHA
        prediction = SmoothedClassifier(STRIPES, 4, config).predict(place(-0.1), index=index)
        assert (prediction == ABSTAIN) == (not certain)
        outcomes.add(prediction)
    assert outcomes >= {ABSTAIN, 1}


def test_selection_is_by_its_own_samples_and_estimation_by_others() -> None:
    seen: list[Tensor] = []

    def recorder(batch: Tensor) -> Tensor:
        seen.append(batch.clone())
        return HALF_PLANES(batch)

    for certificate in ("one_class", "two_class", "lvm"):
        seen.clear()
        config = SmoothingConfig(sigma=0.5, n0=130, n=2000, batch_size=500, certificate=certificate)
        SmoothedClassifier(recorder, 2, config).certify(place(0.3))
        # The second one is the check that rows do not see each other.
        assert [len(batch) for batch in seen] == [500] * 6
        assert len(torch.unique(seen[1], dim=0)) == 1
        selection, estimation = seen[0][:130], torch.cat(seen[2:])
        assert len(torch.unique(torch.cat([selection, estimation]), dim=0)) == 2130


@pytest.mark.usefixtures("registry")
def test_a_registered_certificate_is_used_by_name() -> None:
    with pytest.raises(ValueError, match="known: two_class, one_class, class_partition, lvm"):
        SmoothingConfig(sigma=1.0, certificate="nine_tenths")

    def choose(counts: np.ndarray, setting: Setting) -> Choice:
        return Choice(counts.argmax(axis=1))

    def bounds(counts: np.ndarray, n: int, choice: Choice, alpha: float, setting: Setting) -> Bounds:
        return Bounds(np.full(len(counts), 0.9), None)

    register_certificate("nine_tenths", Method("votes", choose, bounds))
    smoothed = SmoothedClassifier(HALF_PLANES, 2, SmoothingConfig(sigma=0.5, certificate="nine_tenths"))
    certificate = smoothed.certify(place(1.0))
    assert (certificate.prediction, certificate.method) == (1, "nine_tenths")
    assert certificate.radius == pytest.approx(0.5 * stats.norm.ppf(0.9))
    assert (type(certificate.radius), type(certificate.n), type(certificate.p_lower)) == (float, int, float)
    assert smoothed.predict(place(1.0)) == 1
    with pytest.raises(ValueError, match="already registered"):
        register_certificate("lvm", Method("votes", choose, bounds))


def test_the_known_names_are_the_registered_ones() -> None:
    sampled = [name for name in CERTIFICATES if name != "deterministic"]
    assert sorted(sampled) == sorted(METHODS)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([90, 6, 4, 0], [0, 1, 2, 2]),
        ([60, 20, 10, 10], [0, 1, 2, 2]),
        ([5, 80, 5, 5, 5, 0], [1, 0, 2, 3, 4, 1]),
        ([100, 0, 0], [0, 1, 1]),
        ([50, 50], [0, 1]),
    ],
)
def test_classes_are_grouped_by_their_selection_votes(counts: list[int], expected: list[int]) -> None:
    setting = Setting(SmoothingConfig(sigma=1.0), len(counts))
    choice = procedures.partition(np.array([counts]), setting)
    assert choice.groups[0].tolist() == expected
    assert choice.candidates[0] == int(np.argmax(counts))


def test_fewer_groups_than_classes_give_larger_radii() -> None:
    """A hundred classes, of which three ever occur."""
    base = Slabs((-0.6, 0.8), (0, 1, 2), 100)
    values = {"sigma": 0.5, "n": 4000}
    radii = {
        name: np.mean([c.radius for c in certify_some(base, 0.1, SmoothingConfig(certificate=name, **values))])
        for name in ("one_class", "two_class", "class_partition")
    }
    assert radii["one_class"] < radii["two_class"] < radii["class_partition"]


def certify_some(base: Slabs, u: float, config: SmoothingConfig) -> list[Certificate]:
    smoothed = SmoothedClassifier(base, base.num_classes, config)
    return [certificate for _, certificate in smoothed.certify_together([place(u)] * 8)]


@pytest.mark.parametrize("mean_bound", ["betting", "bernstein", "hoeffding"])
def test_mean_bounds_of_scores(mean_bound: str) -> None:
    certificates = certify_many(SOFT_THREE, 0.8, certificate="lvm", mean_bound=mean_bound)
    scores = SOFT_THREE.smoothed(0.8, 0.5)
    wrong = [c for c in certificates if c.p_lower > scores.max() or c.p_upper < np.sort(scores)[-2]]
    assert not_above(len(wrong), ALPHA, len(certificates))
    assert np.mean([c.radius for c in certificates]) > 0
