from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from hf_lipschitz.bounds import graph_bound
from hf_lipschitz.certification import Certificate, SmoothedClassifier, SmoothingConfig
from hf_lipschitz.certification.methods import RADII
from hf_lipschitz.certification.noise import NOISES
from tests.certification.exact import DIRECTION, Lines, Slabs, place


CONFIG = SmoothingConfig(sigma=0.5, n=1000)
HALF_PLANES = Slabs((0.0,), (0, 1), 2)
CERTIFICATES = ["one_class", "two_class", "lvm"]


def test_the_certificate_says_how_it_was_made() -> None:
    config = replace(CONFIG, seed=-5, certificate="one_class")
    certificate = SmoothedClassifier(HALF_PLANES, 2, config, unit="pixel / 255").certify(place(0.5), index=12)
    assert certificate == Certificate(
        prediction=1, radius=certificate.radius, norm="l2", unit="pixel / 255", p_lower=certificate.p_lower,
        p_upper=None, alpha=1e-3, n=1000, method="one_class", stop_reason="fixed_n", sigma=0.5, seed=-5, index=12,
        noise="gaussian",
    )  # fmt: skip
    for name in ("radius", "p_lower", "alpha", "sigma"):
        assert type(getattr(certificate, name)) is float
    for name in ("prediction", "n", "seed", "index"):
        assert type(getattr(certificate, name)) is int


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_certificates_do_not_depend_on_the_batch_size_and_survive_json(certificate: str) -> None:
    config = replace(CONFIG, n0=70, n=1130, certificate=certificate)
    expected = SmoothedClassifier(HALF_PLANES, 2, config).certify(place(0.4), index=3)
    assert Certificate.from_dict(json.loads(json.dumps(expected.to_dict()))) == expected
    for batch_size in (1, 7, 64, 137, 5000):
        smoothed = SmoothedClassifier(HALF_PLANES, 2, replace(config, batch_size=batch_size))
        assert smoothed.certify(place(0.4), index=3) == expected


def test_seed_and_index_change_the_noise_and_nothing_else_does() -> None:
    def p_lower(seed: int, index: int) -> float:
        return SmoothedClassifier(HALF_PLANES, 2, replace(CONFIG, seed=seed)).certify(place(0.2), index=index).p_lower

    assert p_lower(0, 0) == p_lower(0, 0)
    assert len({p_lower(seed, index) for seed in range(4) for index in range(4)}) > 8


def test_global_generators_are_untouched() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    SmoothedClassifier(HALF_PLANES, 2, CONFIG).certify(place(0.5))
    SmoothedClassifier(HALF_PLANES, 2, CONFIG).predict(place(0.5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    numpy_state_after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state_after, numpy_state, strict=True))
    assert random.getstate() == python_state


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("num_classes", [2, 1000])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_too_few_samples_are_refused_with_enough(certificate: str, num_classes: int, n: int) -> None:
    config = replace(CONFIG, n0=3, n=n, certificate=certificate)
    with pytest.raises(ValueError, match=f"n = {n} samples certify nothing") as error:
        SmoothedClassifier(HALF_PLANES, num_classes, config)
    enough = int(re.search(r"raise n to (\d+)", str(error.value))[1])
    found = SmoothedClassifier(HALF_PLANES, 2, replace(config, n=enough)).certify(place(3.0))
    assert (found.prediction, found.radius > 0) == (1, True)
    sequential = replace(config, n=100, radii=[0.0], alpha=1e-40)
    with pytest.raises(ValueError, match="n = 100 samples certify nothing"):
        SmoothedClassifier(HALF_PLANES, num_classes, sequential)


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("alpha", [1e-12, 1e-50, 0.5])
def test_a_thousand_classes_and_extreme_alphas(certificate: str, alpha: float) -> None:
    def last_class(batch: Tensor) -> Tensor:
        return 50 * torch.nn.functional.one_hot(torch.full((len(batch),), 999), 1000).float()

    config = replace(CONFIG, n=10_000, alpha=alpha, certificate=certificate)
    found = SmoothedClassifier(last_class, 1000, config).certify(place(0.0))
    assert found.prediction == 999
    assert 0.5 < found.p_lower < 1
    assert found.p_upper is None or 0 < found.p_upper < 0.5
    assert 0 < found.radius < 0.5 * 5


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("scale", [2.0**-90, 1e-6, 1e6, 2.0**110])
def test_radii_scale_with_the_unit(certificate: str, scale: float) -> None:
    def two_points(scale: float) -> Certificate:
        base = Slabs((0.0,), (0, 1), 2)
        config = replace(CONFIG, sigma=0.5 * scale, certificate=certificate)
        smoothed = SmoothedClassifier(lambda batch: 10 * base(batch / scale), 2, config)
        return smoothed.certify(0.4 * scale * DIRECTION)

    assert two_points(scale).prediction == 1
    assert two_points(scale).radius == pytest.approx(two_points(1.0).radius * scale, rel=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4, 5)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    def by_mean(batch: Tensor) -> Tensor:
        assert batch.shape[1:] == shape
        mean = batch.flatten(1).mean(1) if shape else batch
        return torch.stack([mean, -mean], dim=1)

    assert SmoothedClassifier(by_mean, 2, CONFIG).certify(torch.full(shape, 2.0)).prediction == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_base_classifier_gets_float32_whatever_the_input_is(dtype: torch.dtype) -> None:
    def checking(batch: Tensor) -> Tensor:
        assert batch.dtype == torch.float32
        return HALF_PLANES(batch)

    x = place(0.5).to(dtype)
    assert SmoothedClassifier(checking, 2, CONFIG).certify(x) == SmoothedClassifier(HALF_PLANES, 2, CONFIG).certify(
        x.float()
    )


def test_a_module_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    smoothed = SmoothedClassifier(model, 2, CONFIG)
    for action in (smoothed.certify, smoothed.predict):
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            action(place(0.0))
    model.eval()
    smoothed.certify(place(0.0))
    model[1].train()
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        smoothed.certify(place(0.0))


@pytest.mark.parametrize("num_classes", [1, 0, -2, 2.0, True, None])
def test_bad_numbers_of_classes_are_refused(num_classes: object) -> None:
    with pytest.raises(ValueError, match="num_classes"):
        SmoothedClassifier(HALF_PLANES, num_classes, CONFIG)


@pytest.mark.parametrize("x", [torch.tensor([1, 2]), torch.tensor([True, False]), np.zeros(2), [0.0, 1.0]])
def test_inputs_that_are_not_floating_point_are_refused(x: object) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        SmoothedClassifier(HALF_PLANES, 2, CONFIG).certify(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        SmoothedClassifier(HALF_PLANES, 2, CONFIG).certify(torch.tensor([0.0, bad], dtype=torch.float64))


def test_other_bad_inputs_are_refused() -> None:
    smoothed = SmoothedClassifier(HALF_PLANES, 2, CONFIG)
    with pytest.raises(ValueError, match="empty"):
        smoothed.certify(torch.zeros(0))
    with pytest.raises(ValueError, match="lost in float32"):
        smoothed.certify(torch.tensor([0.0, 1e7]))
    for index in (1.0, "3", True):
        with pytest.raises(TypeError, match="index"):
            smoothed.certify(place(0.0), index=index)


def test_temperature_and_map_reach_the_scores() -> None:
    soft = Lines((1.0, -1.0), (0.0, 0.0))
    found = {
        (name, temperature): SmoothedClassifier(
            soft, 2, replace(CONFIG, certificate="lvm", n=10_000, simplex_map=name, temperature=temperature)
        ).certify(place(0.5))
        for name in ("softmax", "sparsemax")
        for temperature in (0.1, 1.0)
    }
    assert len({certificate.p_lower for certificate in found.values()}) == 4
    assert found["softmax", 1.0].p_lower == pytest.approx(soft.smoothed(0.5, 0.5)[0], abs=0.02)
    assert found["softmax", 0.1].p_lower == pytest.approx(
        Lines((1.0, -1.0), (0.0, 0.0), temperature=0.1).smoothed(0.5, 0.5)[0], abs=0.03
    )


class Normalising(nn.Module):
    """Its rows see each other through the statistics of the batch, although it is in eval mode."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        logits = HALF_PLANES(batch) + batch
        return logits - self.share * logits.mean(0, keepdim=True)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_rows_that_see_each_other_are_refused(share: float) -> None:
    with pytest.raises(RuntimeError, match="other rows of its batch"):
        SmoothedClassifier(Normalising(share), 2, CONFIG).certify(place(0.3))
    SmoothedClassifier(Normalising(0.0), 2, CONFIG).certify(place(0.3))


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(RuntimeError, match=r"other rows of its batch.*BatchNorm"):
        SmoothedClassifier(model, 2, CONFIG).certify(place(0.3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_logits_that_are_not_finite_name_the_input(bad: float, certificate: str) -> None:
    def broken(batch: Tensor) -> Tensor:
        logits = HALF_PLANES(batch)
        logits[batch[:, 0] > 50, 1] = bad
        return logits

    smoothed = SmoothedClassifier(broken, 2, replace(CONFIG, certificate=certificate))
    with pytest.raises(RuntimeError, match="on input 11;"):
        list(smoothed.certify_together([place(0.3), torch.tensor([100.0, 0.0]), place(0.1)], [4, 11, 7]))


@pytest.mark.parametrize("base", [HALF_PLANES, Lines((1.0, -1.0), (0.0, 0.1))], ids=["votes", "scores"])
@pytest.mark.parametrize("certificate", [*CERTIFICATES, "class_partition"])
def test_together_is_one_by_one(certificate: str, base: Slabs | Lines) -> None:
    xs = [place(u) for u in (0.4, -0.2, 0.05, 1.0, -2.0)]
    for config in (
        replace(CONFIG, certificate=certificate),
        replace(CONFIG, certificate=certificate, radii=[0.1, 0.3]),
    ):
        smoothed = SmoothedClassifier(base, 2, config)
        together = dict(smoothed.certify_together(xs, [7, 3, 9, 1, 0]))
        for i, index in enumerate([7, 3, 9, 1, 0]):
            assert together[i] == smoothed.certify(xs[i], index=index)


def test_indices_are_different_and_as_many_as_inputs() -> None:
    smoothed = SmoothedClassifier(HALF_PLANES, 2, CONFIG)
    for indices in ([0, 0], [1]):
        with pytest.raises(ValueError, match="as many different indices"):
            list(smoothed.certify_together([place(0.1), place(0.2)], indices))
    assert list(smoothed.certify_together([])) == []


def test_parts_of_a_batch_give_the_same() -> None:
    sizes = set()

    def recorder(batch: Tensor) -> Tensor:
        sizes.add(len(batch))
        return HALF_PLANES(batch)

    expected = SmoothedClassifier(HALF_PLANES, 2, CONFIG).certify(place(0.3))
    assert SmoothedClassifier(recorder, 2, replace(CONFIG, num_splits=10)).certify(place(0.3)) == expected
    assert sizes == {10}


@pytest.mark.parametrize(("noise", "norm"), [("laplace", "l1"), ("uniform", "l1"), ("exact", "l2")])
def test_other_noises(noise: str, norm: str) -> None:
    x = torch.full((2,), 130 / 255)

    def bright(batch: Tensor) -> Tensor:
        return HALF_PLANES(batch - 0.45)

    found = SmoothedClassifier(bright, 2, replace(CONFIG, sigma=0.25, noise=noise, n=10_000)).certify(x)
    assert (found.prediction, found.norm, found.noise) == (1, norm, noise)
    distance = float((x - 0.45) @ DIRECTION)
    assert 0 < found.radius < distance * (math.sqrt(2) if norm == "l1" else 1)


def test_exact_noise_is_for_pixels() -> None:
    smoothed = SmoothedClassifier(HALF_PLANES, 2, replace(CONFIG, noise="exact"))
    with pytest.raises(ValueError, match="uint8"):
        smoothed.certify(torch.tensor([0.1234, 0.5]))


class Affine(nn.Module):
    """Logits (u, -u) scaled, u the coordinate along a direction: of constant √2 · scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(scale * torch.stack([DIRECTION, -DIRECTION]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_lipschitz_scores_have_a_larger_radius_and_a_sound_one() -> None:
    model = Affine(0.3)
    bound = graph_bound(model, {"x": place(0.0)[None]})
    assert bound.value == pytest.approx(0.3 * math.sqrt(2), rel=1e-3)
    config = replace(CONFIG, sigma=0.2, n=20_000, certificate="lipschitz", score_lipschitz=bound)
    found = SmoothedClassifier(model, 2, config).certify(place(1.0))
    plain = SmoothedClassifier(model, 2, replace(config, certificate="lvm", score_lipschitz=None)).certify(place(1.0))
    assert plain.radius < found.radius <= 1.0
    assert found.radius > 0.8
    assert found.score_lipschitz == pytest.approx(0.3 * 0.5, rel=1e-3)
    gaussian = replace(config, mean_bound="subgaussian")
    assert 0.8 < SmoothedClassifier(model, 2, gaussian).certify(place(1.0)).radius <= 1.0


def test_bounds_that_prove_nothing_are_refused() -> None:
    model = Affine(0.3)
    local = graph_bound(model, {"x": place(0.0)[None]}, center=place(0.0)[None], radius=0.1)
    with pytest.raises(ValueError, match="global"):
        replace(CONFIG, certificate="lipschitz", score_lipschitz=local)
    with pytest.raises(TypeError, match="estimate"):
        replace(CONFIG, certificate="lipschitz", score_lipschitz=0.4)
    with pytest.raises(ValueError, match="needs score_lipschitz"):
        SmoothedClassifier(model, 2, replace(CONFIG, certificate="lipschitz"))
    with pytest.raises(ValueError, match="alone"):
        replace(CONFIG, certificate="lvm", score_lipschitz=graph_bound(model, {"x": place(0.0)[None]}))
    with pytest.raises(ValueError, match="gaussian"):
        replace(CONFIG, certificate="lipschitz", noise="exact")
    other = graph_bound(nn.Linear(3, 2).eval(), {"input": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="for this shape"):
        SmoothedClassifier(model, 2, replace(CONFIG, certificate="lipschitz", score_lipschitz=other)).certify(
            place(0.0)
        )


def test_the_certificate_names_the_dtype_of_the_base_classifier() -> None:
    class Cast(Affine):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.bfloat16))

    assert SmoothedClassifier(Affine(1.0), 2, CONFIG).certify(place(0.5)).dtype == "float32"
    assert SmoothedClassifier(Cast(1.0).bfloat16(), 2, CONFIG).certify(place(0.5)).dtype == "bfloat16"


def test_a_registered_noise_has_no_radius_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = replace(NOISES["laplace"], name="another")
    monkeypatch.setitem(NOISES, "another", noise)
    config = replace(CONFIG, noise="another")
    with pytest.raises(ValueError, match="no radius is known for noise='another'"):
        SmoothedClassifier(HALF_PLANES, 2, config)
    monkeypatch.setitem(RADII, "another", RADII["laplace"])
    expected = SmoothedClassifier(HALF_PLANES, 2, replace(CONFIG, noise="laplace")).certify(place(0.5))
    assert SmoothedClassifier(HALF_PLANES, 2, config).certify(place(0.5)).radius == expected.radius > 0


def test_bounds_and_radius_give_way_by_the_distance_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Lines((1.0, -1.0), (0.0, 0.0))
    config = replace(CONFIG, certificate="one_class", n=10_000)
    plain = SmoothedClassifier(base, 2, config).certify(place(0.3))
    monkeypatch.setitem(NOISES, "gaussian", replace(NOISES["gaussian"], slack=lambda x_size, sigma: 0.005 * x_size))
    found = SmoothedClassifier(base, 2, config).certify(place(0.3))
    assert found.p_lower == pytest.approx(plain.p_lower - 0.01, rel=1e-12)
    assert found.radius == pytest.approx(0.5 * stats.norm.ppf(plain.p_lower - 0.01), rel=1e-9)
