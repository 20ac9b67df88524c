"""Each rule against exact norms of Jacobians, globally and on balls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from hf_lipschitz.bounds import BoundedGraph, LipschitzBound, graph_bound, module_rule, rule
from hf_lipschitz.bounds.registry import MODULE_RULES, RULES
from hf_lipschitz.bounds.rules.elementwise import _CURVES, GELU, SILU, TANH_GELU, Curve
from hf_lipschitz.nn import (
    CentredNorm,
    CPLBlock,
    FloorStdGroupNorm,
    FloorStdLayerNorm,
    FloorStdRMSNorm,
    GroupSort,
    MaxMin,
    SLLBlock,
    SLLConvBlock2d,
    SlopeCorrected,
)
from tests.bounds.functions import Function, exact, in_ball


CURVES: dict[str, Curve] = {str(operator): curve for operator, curve in _CURVES.items() if curve.on is not None}
CURVES |= {"gelu": GELU, "tanh gelu": TANH_GELU, "silu": SILU}
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal")


def bound_of(model: nn.Module, x: Tensor, radius: float | None = None) -> LipschitzBound:
    return graph_bound(model, {"x": x}, center=None if radius is None else x, radius=radius)


@pytest.mark.parametrize("name", CURVES)
@settings(max_examples=10)
@given(low=st.floats(-6, 6), width=st.floats(1e-3, 8))
def test_slopes_on_intervals_are_the_largest_there(name: str, low: float, width: float) -> None:
    curve = CURVES[name]
    if any(part in name for part in POSITIVE):
        low = abs(low) + 0.05
    grid = torch.linspace(low, low + width, 20_001, dtype=torch.float64, requires_grad=True)
    curve.function(grid).sum().backward()
    steepest = grid.grad.abs().max()
    found = curve.on(grid[0].detach(), grid[-1].detach())
    assert steepest <= found * (1 + 1e-9)
    assert found <= steepest * (1 + 1e-3) + 1e-4 or "relu" in name


SELECTIONS = {
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "zero pad": lambda x: functional.pad(x, (1, -1, 2, 0), value=3.0),
    "reflect pad": lambda x: functional.pad(x, (2, 1), mode="reflect"),
    "replicate pad": lambda x: functional.pad(x, (2, 1), mode="replicate"),
    "circular pad": lambda x: functional.pad(x, (2, 1), mode="circular"),
    "gather": lambda x: x.gather(1, torch.tensor([[[0, 0, 1, 1, 2]]])),
    "index": lambda x: x[0, [0, 0, 2], [1, 1, 3]],
    "roll and cat": lambda x: torch.cat([x.roll(1, -1), x.flip(1), torch.ones(1, 3, 5)], 1),
    "where": lambda x: torch.where(torch.eye(3, 5).bool(), x, torch.tensor(2.0, dtype=torch.float64)),
    "masked_fill": lambda x: x.masked_fill(torch.eye(3, 5).bool(), -math.inf).clamp(-9, 9),
    "unfold": lambda x: x.unfold(-1, 3, 1),
    "windows": lambda x: torch.stack([x[:, 0::2, 0], x[:, 1::2, 1].expand(1, 2)]),
    "stack of views": lambda x: torch.stack([x.transpose(1, 2), x.reshape(1, 5, 3)]),
    "unbind": lambda x: torch.stack([x.unbind(1)[1] * 2, x.unbind(1)[0]]),
    "scaled copies": lambda x: torch.cat([x * 2.0, -x, x / 4], 1),
    "slice of a chunk": lambda x: x.chunk(2, -1)[0][..., 1:],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_exact(name: str) -> None:
    model, x = Function(SELECTIONS[name]), torch.randn(1, 3, 5, dtype=torch.float64)
    assert bound_of(model, x).value == pytest.approx(exact(model, x), rel=1e-9)


LINEAR = {
    "bilinear": lambda x: functional.interpolate(x, (7, 3), mode="bilinear"),
    "bilinear, antialias": lambda x: functional.interpolate(x, (3, 2), mode="bilinear", antialias=True),
    "bicubic": lambda x: functional.interpolate(x, scale_factor=1.5, mode="bicubic", align_corners=True),
    "nearest": lambda x: functional.interpolate(x, scale_factor=(2.0, 0.5), mode="nearest"),
    "vector": lambda x: x @ torch.arange(4.0, dtype=torch.float64),
    "vector from the left": lambda x: torch.arange(5.0, dtype=torch.float64) @ x,
    "stack of matrices": lambda x: torch.arange(20.0, dtype=torch.float64).reshape(2, 2, 5) @ x,
    "einsum": lambda x: torch.einsum("bchw,wk->bkch", x, torch.arange(8.0, dtype=torch.float64).reshape(4, 2)),
    "mean over two axes": lambda x: x.mean((1, 3), keepdim=True),
    "amax": lambda x: x.amax(-1),
    "difference with the mean": lambda x: torch.rsub(x, 1.0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_are_exact(name: str) -> None:
    model, x = Function(LINEAR[name]), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    value = bound_of(model, x).value
    assert exact(model, x) * (1 - 1e-9) <= value
    if name not in ("amax", "stack of matrices"):
        assert value <= exact(model, x) * (1 + 1e-3)


def norms() -> dict[str, nn.Module]:
    weight, bias = (nn.Parameter(torch.linspace(-1.0, 2.0, 6)) for _ in range(2))
    made = {
        "floor layer norm": FloorStdLayerNorm(6, weight=weight, bias=bias),
        "floor layer norm on axis 1": FloorStdLayerNorm(3, axis=1),
        "floor RMS norm": FloorStdRMSNorm(weight),
        "floor group norm": FloorStdGroupNorm(1, 3),
        "centred norm": CentredNorm(6, weight=weight, bias=bias),
    }
    for module in made.values():
        if hasattr(module, "set_floor"):
            module.set_floor(0.25)
    return made


@pytest.mark.parametrize("name", norms())
def test_bounded_norms_have_their_constant(name: str) -> None:
    module = norms()[name]
    model, x = Function(lambda x, norm: norm(x), norm=module), torch.randn(1, 3, 6, dtype=torch.float64)
    assert bound_of(model, x).value == pytest.approx(module.lipschitz(), rel=1e-9)
    local = bound_of(model, x, radius=0.01).value
    largest = max(exact(model, point) for point in in_ball(x, 0.01, 6))
    assert largest <= local <= module.lipschitz() * (1 + 1e-9)
    if "axis" not in name:
        assert local <= 1.3 * largest


NORMALISERS = {
    "layer norm": nn.LayerNorm(6),
    "layer norm over two axes": nn.LayerNorm((3, 6)),
    "RMS norm": nn.RMSNorm(6, eps=1e-3),
    "group norm": nn.GroupNorm(3, 3),
    "softmax": nn.Softmax(-1),
}


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("radius", [1.0, 0.01])
def test_norms_on_balls(name: str, radius: float) -> None:
    module, x = NORMALISERS[name], 3 * torch.randn(1, 3, 6, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -2, 2)
    model = Function(lambda x, norm: norm(x), norm=module)
    local, everywhere = bound_of(model, x, radius).value, bound_of(model, x).value
    largest = max(exact(model, point) for point in in_ball(x, radius, 12))
    assert largest <= local <= everywhere * (1 + 1e-9)
    if radius == 0.01:
        assert local <= 2.2 * largest


def test_the_gain_of_a_norm_goes_into_the_next_layer() -> None:
    norm, layer = nn.LayerNorm(6, eps=1e-2), nn.Linear(6, 4)
    norm.weight.data = torch.tensor([5.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    layer.weight.data[:, 0] = 0.01
    model = Function(lambda x, norm, layer: layer(norm(x)), norm=norm, layer=layer)
    product = torch.linalg.matrix_norm(layer.weight.double() * norm.weight.double(), 2).item() / 0.1
    value = bound_of(model, torch.ones(1, 6, dtype=torch.float64)).value
    assert value == pytest.approx(product, rel=1e-3)
    assert exact(model, torch.ones(1, 6)) <= value


def test_units_that_are_off_on_the_ball_take_their_rows_with_them() -> None:
    layer = nn.Linear(6, 8)
    layer.bias.data = torch.tensor([-9.0, -9.0, -9.0, -9.0, 9.0, 9.0, 9.0, 9.0])
    model = Function(lambda x, layer: torch.relu(layer(x)), layer=layer)
    x = torch.zeros(1, 6, dtype=torch.float64)
    on = torch.linalg.matrix_norm(layer.weight[4:].double(), 2).item()
    assert bound_of(model, x, 1e-3).value == pytest.approx(on, rel=1e-3)
    layer.bias.data.fill_(-9.0)
    assert bound_of(model, x, 1e-3).value == 0.0
    assert bound_of(model, x).value > 0.0


def test_batch_norm_goes_into_the_convolution_before_it() -> None:
    convolution, norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
    norm.running_var = torch.tensor([0.01, 1.0, 100.0])
    model = Function(lambda x, a, b: b(a(x)), a=convolution, b=norm)
    gains = (norm.running_var.double() + norm.eps).rsqrt()
    by_hand = torch.linalg.matrix_norm(gains[:, None] * convolution.weight.double()[:, :, 0, 0], 2).item()
    assert bound_of(model, torch.randn(1, 2, 3, 3, dtype=torch.float64)).value == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    "module", [MaxMin(), GroupSort(3), SLLBlock(6, 9), CPLBlock(6, 9), SlopeCorrected(nn.GELU())], ids=str
)
def test_one_lipschitz_modules_are_one(module: nn.Module) -> None:
    model, x = Function(lambda x, module: module(module(x)), module=module), torch.randn(2, 6, dtype=torch.float64)
    assert bound_of(model, x).value == pytest.approx(1.0, rel=1e-9)
    assert exact(model, x) <= 1 + 1e-6


def test_a_convolutional_block_is_one() -> None:
    model = Function(lambda x, block: block(x), block=SLLConvBlock2d(2, 4))
    assert bound_of(model, torch.randn(1, 2, 5, 5, dtype=torch.float64)).value == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh", "gelu", "silu"])
def test_activations_of_transformers_are_single_operators(name: str) -> None:
    model = Function(lambda x, activation: activation(x), activation=ACT2FN[name])
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64, requires_grad=True)
    model(grid).sum().backward()
    steepest = grid.grad.abs().max().item()
    assert steepest <= bound_of(model, grid.detach()).value <= steepest * (1 + 1e-4)
    assert "forward" not in model.activation.__dict__


def test_products_of_bounded_values_are_finite() -> None:
    norm, gate = nn.RMSNorm(6, eps=1e-2), nn.Linear(6, 6)
    model = Function(lambda x, n, g: functional.silu(g(y := n(x))) * y, norm=norm, gate=gate)
    x = torch.randn(2, 6, dtype=torch.float64)
    value = bound_of(model, x).value
    assert max(exact(model, scale * x) for scale in (1e-3, 0.1, 1.0, 10.0)) <= value < 1e4
    quotient = Function(lambda x: x.tanh() / (2 + x.tanh()))
    assert exact(quotient, -2 * torch.ones(1)) <= bound_of(quotient, torch.ones(1)).value <= 2.0 + 1e-6
    product = Function(lambda x: x.tanh() @ x.tanh().mT)
    assert exact(product, x) <= bound_of(product, x).value < 10


@pytest.mark.parametrize(
    "body",
    [
        lambda x: torch.topk(x, 3).values,
        lambda x: torch.sort(x, descending=True).values,
        lambda x: x.max(-1).values,
        lambda x: torch.maximum(x, x.flip(-1)),
        lambda x: torch.logsumexp(x, -1),
        lambda x: x.exp().tanh(),
        lambda x: functional.softplus(x),
        lambda x: functional.elu(x, 2.0),
        lambda x: functional.selu(x),
        lambda x: functional.hardsigmoid(x),
    ],
)
def test_other_operators_are_above_their_jacobians(body) -> None:
    model = Function(body)
    for scale in (0.1, 1.0, 5.0):
        x = scale * torch.randn(2, 6, dtype=torch.float64)
        for bound in (bound_of(model, x), bound_of(model, x, 0.1)):
            assert exact(model, x) <= bound.value * (1 + 1e-9)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.round(),
        lambda x: torch.where(x > 0, x, -x),
        lambda x: x[..., x.argmax()],
        lambda x: x.int().double(),
        lambda x: x / x.sum(),
        lambda x: x.sqrt(),
    ],
)
def test_what_jumps_or_has_no_slope_is_inf(body) -> None:
    assert bound_of(Function(body), torch.rand(6, dtype=torch.float64) + 0.5).value == math.inf


def test_root_on_a_ball_away_from_zero_is_finite() -> None:
    x = torch.full((3,), 4.0, dtype=torch.float64)
    assert bound_of(Function(torch.sqrt), x, 1.0).value == pytest.approx(0.5 / math.sqrt(3), rel=1e-6)


def test_a_rule_and_a_module_rule_of_ones_own() -> None:
    operator = torch.ops.aten.special_erfcx.default

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().mul_(0.5).round()

    @rule(operator)
    def erfcx(call):
        return call.gives(call.only("self"), 7.0)

    @module_rule(Halves)
    def halves(call, module, values):
        return [call.gives(values[0], 0.5)]

    try:
        model = Function(lambda x, h: torch.special.erfcx(h(x)), h=Halves())
        assert bound_of(model, torch.ones(3, dtype=torch.float64)).value == pytest.approx(3.5)
    finally:
        del RULES[operator], MODULE_RULES[Halves]


def test_many_balls_of_one_graph() -> None:
    model = Function(lambda x, layer: layer(x).tanh(), layer=nn.Linear(3, 3))
    x = torch.randn(2, 3, dtype=torch.float64)
    graph = BoundedGraph(model, {"x": x})
    values = [graph.bound(center=x, radius=radius).value for radius in (1e-3, 0.1, 10.0)]
    assert values == sorted(values)
    assert values[-1] <= graph.bound().value * (1 + 1e-12)
    assert exact(model, x) <= values[0]
    assert graph.bound(center=x, radius=0.1) == graph_bound(model, {"x": x}, center=x, radius=0.1)
    assert graph.fits(x + 1, {})
    assert not graph.fits(x[:1], {})
