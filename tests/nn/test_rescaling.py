"""The parametrization that divides by channel, on tensors of every layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz import lipschitzify, merge
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.nn.attachment import attach, constrained_layers
from hf_lipschitz.nn.rescaling import RescalingParametrization
from tests.operators import conv_norm, dense_norm


METHODS = ("rescaling", "aol", "sll")
LAYOUTS = {
    "matrix": (WeightLayout(), (5, 8)),
    "transposed": (WeightLayout(is_transposed=True), (8, 5)),
    "experts": (WeightLayout(count=3), (3, 5, 8)),
    "transposed experts": (WeightLayout(count=3, is_transposed=True), (3, 8, 5)),
    "stacked": (WeightLayout(count=3), (15, 8)),
    "heads": (WeightLayout(is_transposed=True), (8, 2, 3)),
}


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def held(layout: WeightLayout, weight: Tensor, constant: float | None, side: str, exact: bool, n: int) -> Holder:
    holder = Holder(weight)
    constraint = RescalingParametrization(
        layout, weight, side=side, num_iterations=n, learns_weights=True, exact=exact, name="weight"
    )
    attach(holder, "weight", constraint, constant)
    nn.init.normal_(constraint.log_q)
    return holder


def matrices(layout: WeightLayout, weight: Tensor) -> list[Tensor]:
    """(out, in) each, taken apart by hand."""
    if layout.count is None:
        parts = [weight.reshape(weight.shape[0], -1)]
    else:
        parts = list(weight.reshape(layout.count, -1, weight.shape[-1]))
    return [part.mT if layout.is_transposed else part for part in parts]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_value_is_the_closed_form_and_under_the_constant(name: str, side: str, exact: bool, n: int) -> None:
    layout, shape = LAYOUTS[name]
    weight = torch.randn(shape, dtype=torch.float64) * torch.logspace(-1, 1, shape[-1], dtype=torch.float64)
    holder = held(layout, weight, 0.7, side, exact, n)
    constraint = holder.parametrizations.weight[0]
    q = constraint.log_q.detach().exp().reshape(-1, constraint.log_q.shape[-1])
    raw = matrices(layout, weight)
    for index, (before, after) in enumerate(zip(raw, matrices(layout, holder.weight.detach()), strict=True)):
        rows = before if side == "output" else before.mT
        power = torch.linalg.matrix_power(rows @ rows.mT, 2 ** (n - 1))
        t = ((power.abs() * q[index]).sum(1) / q[index]) ** (0.5 / 2 ** (n - 1))
        divisor = t / 0.7 if exact else (t / 0.7).clamp_min(1)
        expected = rows / divisor[:, None]
        torch.testing.assert_close(after if side == "output" else after.mT, expected, rtol=1e-7, atol=0)
        assert dense_norm(after) <= 0.7 * (1 + 1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_does_not_leave_the_ball(name: str, dtype: torch.dtype) -> None:
    layout, shape = LAYOUTS[name]
    for scale in (1e-3, 1.0, 1e3):
        holder = held(layout, (torch.randn(shape) * scale).to(dtype), 1.0, "input", True, 1)
        for part in matrices(layout, holder.weight.detach()):
            assert 0.2 < dense_norm(part) <= 1 + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_present_norm_changes_nothing_and_half_of_it_does(method: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (3, 2)), nn.Conv1d(3, 4, 2, padding=1)).to(dtype)
        twin = copy.deepcopy(model)
        lipschitzify(model, method=method, layer_lipschitz=None)
        assert torch.equal(model[0].weight, twin[0].weight)
        assert torch.equal(model[2].weight, twin[2].weight)
        for layer in constrained_layers(model):
            layer.parametrization.set_constant(layer.parametrization.lipschitz.item() / 2)
        assert not torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("method", METHODS)
def test_extreme_weights(method: str) -> None:
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        layer = nn.Linear(6, 6)
        layer.weight.data.mul_(scale)
        layer.weight.data[2] = 0
        layer.weight.data[:, 3] = 0
        model = lipschitzify(nn.Sequential(layer), method=method, mode="exact")
        assert 0.3 < dense_norm(model[0].weight) <= 1 + 1e-9
    model = lipschitzify(nn.Sequential(nn.Linear(6, 6)), method=method, mode="exact")
    model[0].parametrizations.weight.original.data[0, 0] = torch.nan
    assert model[0].weight.isnan().any()
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    assert not lipschitzify(nn.Sequential(zero), method=method)[0].weight.any()


def test_weights_of_channels_far_apart() -> None:
    model = lipschitzify(nn.Sequential(nn.Linear(6, 6)), method="sll", mode="exact")
    log_q = model[0].parametrizations.weight[0].log_q
    for spread in (1e1, 1e3, 1e30):
        log_q.data = torch.linspace(-spread, spread, 6)
        weight = model[0].weight
        assert dense_norm(weight) <= 1 + 1e-9
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_and_the_same_gradients(method: str) -> None:
    layers = [nn.Linear(20, 30), nn.ReLU(), nn.Unflatten(1, (3, 10)), nn.Conv1d(3, 4, 3), nn.Flatten()]
    model = lipschitzify(nn.Sequential(*layers), layer_lipschitz=0.5, method=method)
    x = torch.randn(7, 20)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for ours, parameter in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    ],
    ids=str,
)
def test_convolutions_of_every_kind(layer: nn.Module, method: str) -> None:
    layer = copy.deepcopy(layer)
    nn.init.normal_(layer.weight)
    model = lipschitzify(nn.Sequential(layer), method=method, layer_lipschitz=0.5)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert 0.02 < conv_norm(merge(model)[0], (7, 6)) <= 0.5 * (1 + 1e-6)


def test_the_gradient_is_that_of_autograd_in_float64() -> None:
    weight = torch.randn(4, 5, dtype=torch.float64)

    def value(w: Tensor, log_q: Tensor) -> Tensor:
        holder = held(WeightLayout(), torch.ones(4, 5, dtype=torch.float64), 0.5, "input", True, 2)
        return torch.func.functional_call(
            holder, {"parametrizations.weight.original": w, "parametrizations.weight.0.log_q": log_q}, ()
        )

    Holder.forward = lambda self: self.weight
    log_q = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(value, (weight.requires_grad_(), log_q.requires_grad_()), atol=1e-6)


def test_too_many_iterations_for_a_convolution() -> None:
    with pytest.raises(ValueError, match="layer 0: num_iterations must be at most 3 for a convolution, got 4"):
        lipschitzify(nn.Sequential(nn.Conv1d(2, 2, 3)), method="sll", num_iterations=4)


@pytest.mark.parametrize("mode", ["cap", "exact"])
@pytest.mark.parametrize("method", ["gram", *METHODS])
def test_subnormal_numbers_do_not_leave_the_ball(method: str, mode: str) -> None:
    layer = nn.Linear(64, 64, bias=False).half()
    nn.init.ones_(layer.weight)
    for share in (0.51, 0.7, 3.3):
        constant = 64 * share * 2.0**-24
        model = lipschitzify(nn.Sequential(copy.deepcopy(layer)), method=method, mode=mode, layer_lipschitz=constant)
        assert dense_norm(model[0].weight) <= constant


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_named_when_it_is_loaded(method: str) -> None:
    model = lipschitzify(nn.Sequential(nn.Linear(4, 4)), method=method)
    state = model.state_dict()
    state["0.parametrizations.weight.original"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 0: weight holds NaN"):
        model.load_state_dict(state)
