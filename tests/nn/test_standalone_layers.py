from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_lipschitz.nn import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    SLLConv1d,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from tests.operators import conv_norm, dense_norm


LINEARS = [AOLLinear, SLLLinear, CPLLinear, SpectralLinear]
CONVOLUTIONS = [AOLConv2d, SLLConv2d, CPLConv2d, SpectralConv2d]
GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "groups": 2},
    {"stride": 3},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "dilation": 2},
]


def disturb(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    # The end of training refreshes the bound of the norm, as an optimizer step does.
    layer.eval()


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_layers_stay_within_their_constant(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    for shape in ((5, 9), (9, 5), (200, 150)):
        for lipschitz in (1.0, 0.5, 3.0):
            layer = kind(*shape, dtype=dtype, lipschitz=lipschitz)
            disturb(layer)
            norm = dense_norm(layer.weight)
            assert (0.25 if kind in LINEARS[:2] else 0.95) * lipschitz < norm <= lipschitz * (1 + 1e-9)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("options", GEOMETRIES)
def test_convolutions_stay_within_their_constant(kind: type[nn.Conv2d], options: dict[str, object]) -> None:
    layer = kind(4, 6, 3, lipschitz=2.0, **options)
    assert isinstance(layer, nn.Conv2d)
    disturb(layer)
    for size in ((7, 7), (6, 5)):
        assert 0.2 < conv_norm(copy.deepcopy(layer), size) <= 2 * (1 + 1e-6)


def test_sequences() -> None:
    layer = SLLConv1d(3, 4, 5, stride=2, padding=2)
    disturb(layer)
    assert 0.2 < conv_norm(layer, (12,)) <= 1 + 1e-6


def test_weights_are_those_of_the_theorem() -> None:
    layer = SLLLinear(5, 7, dtype=torch.float64)
    disturb(layer)
    raw, q = layer.parametrizations.weight.original, layer.parametrizations.weight[0].log_q.exp()
    t = ((raw.mT @ raw).abs() * q).sum(1) / q
    torch.testing.assert_close(layer.weight, raw / t.sqrt(), rtol=1e-9, atol=0)
    layer = AOLLinear(5, 7, dtype=torch.float64)
    disturb(layer)
    raw = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, raw / (raw @ raw.mT).abs().sum(1).sqrt()[:, None], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_orthogonal_and_depth_costs_nothing(kind: type[nn.Linear]) -> None:
    x = torch.randn(8, 32, dtype=torch.float64)
    layers = nn.Sequential(*(kind(32, 32, dtype=torch.float64) for _ in range(30)))
    norms = layers(x).norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0.05 if kind in LINEARS[2:] else 1e-4, atol=0)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_start_as_isometries(kind: type[nn.Conv2d]) -> None:
    x = torch.randn(2, 4, 6, 6)
    for options in ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1, "groups": 2}):
        y = kind(4, 4, **options)(x)
        assert 0.95 < (y.norm() / x.norm()).item() <= 1 + 1e-5
    patches = kind(4, 16, 2, stride=2)(x)
    assert 0.95 < (patches.norm() / x.norm()).item() <= 1 + 1e-5


@pytest.mark.parametrize("kind", [*LINEARS, *CONVOLUTIONS])
def test_they_train_save_and_load(kind: type[nn.Module]) -> None:
    is_linear = kind in LINEARS
    build = (lambda: kind(4, 6)) if is_linear else (lambda: kind(4, 6, 3))
    x = torch.randn(2, 4) if is_linear else torch.randn(2, 4, 5, 5)
    layer = build()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer(x)
    (before - 1).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    assert not torch.allclose(layer(x), before)
    other = build()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_bad_arguments_are_named() -> None:
    for kind in LINEARS:
        with pytest.raises(ValueError, match="must be finite and >= 0"):
            kind(3, 3, lipschitz=float("inf"))
    with pytest.raises(ValueError, match="at most 3"):
        SLLConv2d(2, 2, 3, num_iterations=4)
