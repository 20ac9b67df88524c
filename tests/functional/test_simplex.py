from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from hf_lipschitz.certification import SmoothingConfig
from hf_lipschitz.functional.simplex import SIMPLEX_MAPS, register_simplex_map, softmax, sparsemax


MAPS = ["softmax", "sparsemax"]


def projection_by_root_finding(z: np.ndarray) -> np.ndarray:
    threshold = brentq(lambda t: np.maximum(z - t, 0).sum() - 1, z.min() - 1, z.max(), xtol=1e-15, rtol=1e-15)
    return np.maximum(z - threshold, 0)


def component_gradient_norms(name: str, z: torch.Tensor, temperature: float) -> torch.Tensor:
    function = SIMPLEX_MAPS[name].function
    jacobian = torch.autograd.functional.jacobian(lambda logits: function(logits, temperature), z)
    return jacobian.norm(dim=-1)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_sparsemax_is_the_projection_onto_the_simplex(num_classes: int, scale: float) -> None:
    z = scale * torch.randn(4, 5, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.apply_along_axis(projection_by_root_finding, -1, z.numpy())
    np.testing.assert_allclose(sparsemax(z).numpy(), expected, atol=1e-12)


def test_sparsemax_of_ties_and_of_one_large_logit() -> None:
    assert sparsemax(torch.zeros(4)).tolist() == [0.25] * 4
    assert sparsemax(torch.tensor([1e30, 0.0, -1e30])).tolist() == [1.0, 0.0, 0.0]


def test_softmax_matches_its_definition() -> None:
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    powers = np.exp(z.numpy() / 0.3)
    np.testing.assert_allclose(softmax(z, 0.3).numpy(), powers / powers.sum(-1, keepdims=True), rtol=1e-13)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1.0, 1e3])
def test_maps_stay_on_the_simplex_at_extreme_logits(name: str, temperature: float) -> None:
    z = torch.tensor([[3e38, -3e38, 0.0], [1e-30, 0.0, -1e-30], [5.0, 5.0, 5.0]], dtype=torch.float64)
    scores = SIMPLEX_MAPS[name].function(z, temperature)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_match_finite_differences(name: str) -> None:
    z = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: SIMPLEX_MAPS[name].function(logits, 0.7), (z,))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_no_component_is_steeper_than_its_constant(name: str, num_classes: int, temperature: float) -> None:
    constant = SIMPLEX_MAPS[name].lipschitz_constant(num_classes, temperature)
    generator = torch.Generator().manual_seed(2)
    for scale in (0.1, 1.0, 5.0):
        for _ in range(60):
            z = scale * temperature * torch.randn(num_classes, dtype=torch.float64, generator=generator)
            assert component_gradient_norms(name, z, temperature).max() <= constant


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_constants_are_attained(name: str, num_classes: int) -> None:
    constant = SIMPLEX_MAPS[name].lipschitz_constant(num_classes, 0.5)
    tie = torch.zeros(num_classes, dtype=torch.float64)
    if name == "softmax":
        tie[2:] = -40.0
    steepest = float(component_gradient_norms(name, tie, 0.5).max())
    assert steepest <= constant <= steepest * (1 + 1e-12)


def test_constants_in_closed_form() -> None:
    assert SIMPLEX_MAPS["softmax"].lipschitz_constant(7, 0.5) == pytest.approx(math.sqrt(2) / 2, rel=1e-14)
    assert SIMPLEX_MAPS["sparsemax"].lipschitz_constant(4, 0.5) == pytest.approx(math.sqrt(3), rel=1e-14)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sparsemax(torch.zeros(3), temperature)


@pytest.fixture
def registry() -> Iterator[None]:
    """Undoes the registrations of one test."""
    before = dict(SIMPLEX_MAPS)
    yield
    SIMPLEX_MAPS.clear()
    SIMPLEX_MAPS.update(before)


@pytest.mark.usefixtures("registry")
def test_a_registered_map_is_accepted_by_the_config() -> None:
    with pytest.raises(ValueError, match="known: softmax, sparsemax"):
        SmoothingConfig(sigma=1.0, simplex_map="uniform")

    @register_simplex_map("uniform", lambda num_classes, temperature: 0.0)
    def uniform(z: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return torch.full_like(z, 1 / z.shape[-1])

    assert SmoothingConfig(sigma=1.0, simplex_map="uniform").simplex_map == "uniform"
    with pytest.raises(ValueError, match="already registered"):
        register_simplex_map("uniform", lambda num_classes, temperature: 0.0)
