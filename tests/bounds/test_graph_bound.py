from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hf_lipschitz.bounds import graph_bound
from tests.families import bert, resnet


def exact(model: nn.Module, x: Tensor) -> float:
    """Norm of the Jacobian of all outputs together at x."""
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v).flatten(), x.double(), vectorize=True)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2).item()


def sigma(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double(), ord=2).item()


class Function(nn.Module):
    """A forward as one writes it, with two layers to call."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_place(m: Function, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y.view(-1)
    y.mul_(5.0)
    return z + m.second(x).view(-1).add_(z)


FUNCTIONS = {
    # Function, and the constant that hand computation gives.
    "product": (lambda m, x: m.second(torch.relu(m.first(x))), lambda a, b, _: a * b),
    "residual": (lambda m, x: x + m.second(torch.relu(m.first(x))), lambda a, b, _: 1 + a * b),
    "called twice": (lambda m, x: m.first(torch.relu(m.first(x))), lambda a, b, _: a * a),
    "shared weight": (lambda m, x: functional.linear(m.first(x), m.first.weight), lambda a, b, _: a * a),
    "reused activation": (lambda m, x: torch.cat([(y := torch.relu(m.first(x))), y, y], -1), lambda a, *_: a * 3**0.5),
    "in place": (in_place, lambda a, b, _: 5 * a + (b + 5 * a)),
    "broadcast": (lambda m, x: m.first(x)[..., :1] * torch.ones(6), lambda a, *_: a * 6**0.5),
    "broadcast sum": (lambda m, x: m.first(x)[..., :1] + x, lambda a, *_: a * 6**0.5 + 1),
    "expand": (lambda m, x: m.first(x).expand(4, -1, -1), lambda a, *_: a * 2),
    "detach": (lambda m, x: m.first(x).detach() + m.second(x), lambda a, b, _: a + b),
    "difference": (lambda m, x: torch.sub(m.first(x), m.second(x), alpha=-3.0), lambda a, b, _: a + 3 * b),
    "scale and quotient": (lambda m, x: m.first(x) * 3.0 / torch.full((6,), 0.5), lambda a, *_: 6 * a),
    "token mean": (lambda m, x: m.first(x).mean(0), lambda a, b, n: a / n**0.5),
    "sum": (lambda m, x: m.first(x).sum(), lambda a, b, n: a * (6 * n) ** 0.5),
    "split": (lambda m, x: torch.stack(m.first(x).split(2, -1)), lambda a, *_: a),
    "rotation": (
        lambda m, x: (y := m.first(x)) * 0.6 + torch.cat([-y[..., 3:], y[..., :3]], -1) * 0.8,
        lambda a, *_: a,
    ),
    "a sum of shifts": (lambda m, x: (y := m.first(x)) + y.roll(1, -1), lambda a, *_: 2 * a),
    "a difference that cancels": (lambda m, x: (y := m.first(x)) - y.flip(-1).flip(-1), lambda *_: 0.0),
    "overlap": (lambda m, x: torch.cat([(y := m.first(x))[:, 1:], y[:, :4]], -1), lambda a, *_: a * 2**0.5),
    "matrix from the right": (lambda m, x: x[None] @ m.first.weight, lambda a, *_: a),
    "matrix from the left": (lambda m, x: m.first.weight @ x.mT, lambda a, *_: a),
    "addmm": (lambda m, x: torch.addmm(m.first.bias, x, m.first.weight, alpha=-2), lambda a, *_: 2 * a),
    "constant": (lambda m, x: m.first(torch.ones_like(x)), lambda *_: 0.0),
    "unused": (lambda m, x: (m.first(x), m.second(x))[0], lambda a, *_: a),
    "zeroed": (lambda m, x: m.first(x) * 0.0 + m.second(x), lambda a, b, _: b),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_what_hand_computation_gives(name: str) -> None:
    body, by_hand = FUNCTIONS[name]
    model, x = Function(body).eval(), torch.randn(3, 6, dtype=torch.float64)
    bound = graph_bound(model, {"x": x})
    assert bound.log_value < math.inf
    expected = by_hand(sigma(model.first.weight), sigma(model.second.weight), 3)
    assert expected * (1 - 1e-9) <= bound.value <= expected * (1 + 1e-3) ** 2
    if name not in ("detach",):
        assert exact(model, x) <= bound.value


def convolutional(data: st.DataObject) -> tuple[nn.Module, Tensor]:
    channels = 2
    layers: list[nn.Module] = []
    for _ in range(data.draw(st.integers(1, 4))):
        k, s, d = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        p, is_ceil = data.draw(st.integers(0, k // 2)), data.draw(st.booleans())
        layers.append(
            data.draw(
                st.sampled_from(
                    [
                        nn.Conv2d(channels, channels, k, s, padding=k, dilation=d),
                        nn.Conv2d(channels, channels, k, padding="same", dilation=d),
                        nn.ConvTranspose2d(channels, channels, k, s, dilation=d),
                        nn.MaxPool2d(k, s, p, d if k == 1 else 1, ceil_mode=is_ceil),
                        nn.AvgPool2d(k, s, p, is_ceil, data.draw(st.booleans())),
                        nn.AdaptiveAvgPool2d(data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))),
                        nn.BatchNorm2d(channels),
                        nn.Sequential(nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Mish(), nn.LeakyReLU(-2.0)),
                    ]
                )
            )
        )
    model = nn.Sequential(*layers).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.running_var, 0.1, 2)
    return model, torch.randn(1, channels, 9, 8, dtype=torch.float64)


class Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@settings(max_examples=25)
@given(data=st.data())
def test_jacobians_are_under_it(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model, x = convolutional(data)
    bound = graph_bound(Named(model).eval(), {"x": x})
    assert bound.log_value < math.inf
    for scale in (0.1, 1.0, 10.0):
        assert exact(model, scale * x) <= bound.value * (1 + 1e-9)


@pytest.mark.parametrize("is_affine", [True, False])
def test_layer_norm_is_attained_at_constant_tokens(is_affine: bool) -> None:
    norm = nn.LayerNorm(5, eps=1e-3, elementwise_affine=is_affine).double().eval()
    if is_affine:
        nn.init.normal_(norm.weight)
    x = torch.ones(1, 5, dtype=torch.float64)
    assert graph_bound(Named(norm).eval(), {"x": x}).value == pytest.approx(exact(norm, x), rel=1e-6)


ELEMENTWISE = [
    *(nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Hardtanh(), nn.Sigmoid(), nn.SiLU(), nn.Hardswish(), nn.Mish()),
    *(nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(-2.0), nn.LeakyReLU(0.1)),
]


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=str)
def test_slopes_are_attained_and_not_passed(activation: nn.Module) -> None:
    grid = torch.linspace(-6, 6, 120_001, dtype=torch.float64, requires_grad=True)
    activation(grid).sum().backward()
    steepest = grid.grad.abs().max().item()
    bound = graph_bound(Named(activation).eval(), {"x": grid.detach()}).value
    assert steepest <= bound <= steepest * (1 + 1e-4)


LINEAR_MAPS = [
    *(nn.AvgPool2d(3, 1), nn.AvgPool2d(2, 2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    *(nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((5, 1)), nn.BatchNorm2d(2)),
]


@pytest.mark.parametrize("module", LINEAR_MAPS, ids=str)
def test_pools_and_batch_norm_are_exact(module: nn.Module) -> None:
    if isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight, -2, 2)
        nn.init.uniform_(module.running_var, 0.1, 2)
    module, x = module.double().eval(), torch.randn(1, 2, 7, 6, dtype=torch.float64)
    assert graph_bound(Named(module).eval(), {"x": x}).value == pytest.approx(exact(module, x), rel=1e-9)


def test_softmax_is_attained_at_two_equal_entries() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert graph_bound(Named(nn.Softmax(-1)).eval(), {"x": x}).value == pytest.approx(exact(nn.Softmax(-1), x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1), nn.AvgPool2d(3, 1), nn.AdaptiveAvgPool2d(2)])
def test_images_without_a_batch_axis(pool: nn.Module) -> None:
    pool, x = pool.double().eval(), torch.zeros(1, 7, 7, dtype=torch.float64)
    x[0, 3, 3] = 1.0
    bound = graph_bound(Named(pool).eval(), {"x": x}).value
    assert exact(pool, x) <= bound
    if isinstance(pool, nn.MaxPool2d):
        assert bound == pytest.approx(3.0)


def test_other_inputs_are_constants_whatever_their_order() -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate

    x, gate = torch.randn(2, 3), torch.tensor([1.0, -4.0, 2.0])
    for inputs in ({"x": x, "gate": gate}, {"gate": gate, "x": x}):
        assert graph_bound(Gated().eval(), inputs, wrt="x").value == pytest.approx(4.0)
    with pytest.raises(ValueError, match="wrt must name the input"):
        graph_bound(Gated().eval(), {"x": x, "gate": gate})


def test_an_unknown_operator_is_inf_and_named() -> None:
    model = Function(lambda m, x: m.second(torch.special.erfcx(m.first(x))) * 0.0).eval()
    bound = graph_bound(model, {"x": torch.randn(3, 6, dtype=torch.float64)})
    assert bound.value == math.inf
    assert [refusal.operator for refusal in bound.blame] == ["aten.special_erfcx.default"]
    assert "special_erfcx" in str(bound)


def test_a_product_of_dependent_values_is_inf() -> None:
    bound = graph_bound(Function(lambda m, x: m.first(x) * x).eval(), {"x": torch.randn(3, 6, dtype=torch.float64)})
    assert bound.value == math.inf
    assert "multiplies two values" in bound.blame[0].reason


def test_resnet_is_finite_and_above_its_jacobian() -> None:
    model = resnet().double().eval()
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    bound = graph_bound(model, {"pixel_values": pixels})
    assert bound.log_value < math.inf
    assert math.isfinite(bound.log_value)

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(pixel_values=x).logits

    assert exact(Logits(), pixels) <= bound.value


def test_attention_on_unbounded_tokens_is_inf_and_named() -> None:
    model = Function(lambda m, x: functional.scaled_dot_product_attention(m.first(x), m.second(x), x)).eval()
    bound = graph_bound(model, {"x": torch.randn(1, 3, 6, dtype=torch.float64)})
    assert bound.value == math.inf
    assert [cost.operator for cost in bound.blame] == ["aten.scaled_dot_product_attention.default"]
    assert "no bounded norm" in bound.blame[0].reason
    assert "replace=('weights', 'attention')" in bound.blame[0].advice


def test_the_factors_of_bert_multiply_to_the_whole() -> None:
    model = bert().eval()
    inputs = {"inputs_embeds": torch.randn(1, 5, model.config.hidden_size), "attention_mask": torch.ones(1, 5).long()}
    bound = graph_bound(model, inputs)
    assert sum(cost.log_factor for cost in bound.blame) == pytest.approx(bound.log_value, rel=1e-9)
    assert bound.blame[0].operator == "aten.layer_norm.default"
    assert "encoder.layer" in bound.blame[0].module
    assert "replace=('weights', 'norms')" in str(bound)


def test_bad_input() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model = Function(lambda m, v: m.first(v))
    with pytest.raises(ValueError, match="training mode"):
        graph_bound(model, {"x": x})
    model.eval()
    with pytest.raises(TypeError, match="floating-point"):
        graph_bound(model, {"x": x.long()}, wrt="x")
    with pytest.raises(ValueError, match="not an input"):
        graph_bound(model, {"x": x}, wrt="y")
    with torch.no_grad():
        model.first.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"first.weight holds NaN"):
        graph_bound(model, {"x": x})
