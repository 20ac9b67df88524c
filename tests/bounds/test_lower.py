from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lipschitz.bounds.lower import lipschitz_lower_bound
from tests.families import bert
from tests.jacobians import jacobian_norm


def sigma(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double(), ord=2).item()


def sampled(function, points: Tensor) -> float:
    """Largest Jacobian norm of a function of rows at points of shape (count, n), one after the other."""
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: function(row[None])[0]))(points)
    return torch.linalg.matrix_norm(jacobians.detach(), ord=2).max().item()


@pytest.mark.parametrize("radius", [None, 1e-3, 0.5])
@pytest.mark.parametrize("shape", [(4, 20), (1, 3), (2, 3, 5)])
def test_of_a_linear_map_it_is_the_largest_singular_value(shape: tuple[int, ...], radius: float | None) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(7, shape[-1], dtype=torch.float64)
    value = lipschitz_lower_bound(lambda y: y @ weight.mT + 3.0, x, radius=radius, starts=2, steps=3)
    assert sigma(weight) * (1 - 1e-6) <= value <= sigma(weight) + 1e-9


def test_close_singular_values() -> None:
    scales = torch.linspace(0.5, 1, 300, dtype=torch.float64)
    value = lipschitz_lower_bound(lambda y: y * scales, torch.randn(1, 300, dtype=torch.float64), starts=1, steps=1)
    assert 1 - 1e-6 <= value <= 1


def test_a_smooth_net_is_steepest_where_it_was_not_started() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    line = torch.linspace(-6, 6, 201, dtype=torch.float64)
    x = torch.full((1, 2), 4.0, dtype=torch.float64)
    largest = sampled(net, torch.cartesian_prod(line, line))
    assert largest > 1.2 * sampled(net, x)
    assert largest * 0.999 <= lipschitz_lower_bound(net, x) <= sigma(net[0].weight) * sigma(net[2].weight)


def test_a_piecewise_linear_net_is_steepest_where_it_was_not_started() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = 3 * torch.randn(8, 4, dtype=torch.float64)
    points = torch.cat([scale * torch.randn(4000, 4, dtype=torch.float64) for scale in (0.1, 0.3, 1, 3, 10)])
    largest = sampled(net, points)
    assert largest > 1.1 * sampled(net, x)
    bound = sigma(net[0].weight) * sigma(net[2].weight) * sigma(net[4].weight)
    assert largest * 0.95 <= lipschitz_lower_bound(net, x) <= bound


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("with_position", [False, True])
def test_a_layer_norm_is_steepest_at_constant_tokens(eps: float, with_position: bool) -> None:
    norm = nn.LayerNorm(12, eps=eps).double()
    nn.init.normal_(norm.weight)
    position = with_position * torch.randn(3, 12, dtype=torch.float64)
    centering = torch.eye(12, dtype=torch.float64) - 1 / 12
    exact = sigma(norm.weight[:, None] * centering) / eps**0.5
    value = lipschitz_lower_bound(lambda y: norm(y + position), torch.randn(2, 3, 12, dtype=torch.float64))
    assert exact * 0.99 <= value <= exact * (1 + 1e-9)


def test_an_rms_norm_is_steepest_at_zero() -> None:
    norm = nn.RMSNorm(12, eps=1e-5).double()
    nn.init.normal_(norm.weight)
    value = lipschitz_lower_bound(norm, torch.randn(2, 3, 12, dtype=torch.float64))
    exact = norm.weight.abs().max().item() / 1e-5**0.5
    assert exact * 0.99 <= value <= exact * (1 + 1e-9)


@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.4])
def test_in_a_ball_only_its_points_count(radius: float) -> None:
    # Each entry is nearer to π/6, where the slope is 0, than to 0, where it is 1.
    x = torch.tensor([[0.5, 0.45, -0.6], [0.52, -0.55, 0.49]], dtype=torch.float64)
    exact = torch.cos(3 * (x.abs() - radius)).abs().max(), torch.cos(3 * (x.abs() + radius)).abs().max()
    value = lipschitz_lower_bound(lambda y: torch.sin(3 * y) / 3, x, radius=radius, starts=4)
    assert max(exact) * 0.98 <= value <= max(exact) * (1 + 1e-9)


def test_no_point_that_is_looked_at_is_far_outside_the_ball() -> None:
    x, radius, farthest = torch.randn(3, 4, dtype=torch.float64), 0.3, []

    def function(y: Tensor) -> Tensor:
        farthest.append(torch.linalg.vector_norm((y - x).reshape(3, -1), dim=-1).max().item())
        return torch.tanh(y)

    lipschitz_lower_bound(function, x, radius=radius, starts=4, steps=4)
    # The differences that confirm a derivative reach a little further.
    assert radius * 0.999 <= max(farthest) <= radius + 1e-4


def test_attention_with_a_fused_kernel() -> None:
    query, key, value = (torch.randn(6, 6, dtype=torch.float64) for _ in range(3))

    def attention(y: Tensor, scale: float = 3.0) -> Tensor:
        return functional.scaled_dot_product_attention(scale * y @ query, y @ key, y @ value)

    x = torch.randn(2, 5, 6, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        at_x = max(jacobian_norm(attention, row[None]).item() for row in x)
    assert lipschitz_lower_bound(attention, x, starts=3) >= 1.2 * at_x


def mean(y: Tensor) -> Tensor:
    return y.mean(0, keepdim=True).expand_as(y)


def scan(y: Tensor) -> Tensor:
    return y.flip(0).cumsum(0).flip(0)


MIXING = {
    # Of four rows; with the norm.
    "mean": (mean, 1.0),
    "mean without a batch axis": (lambda y: y.mean(0), 0.5),
    "deviation": (lambda y: 2 * (y - mean(y)), 2.0),
    "scan": (scan, sigma(torch.ones(4, 4).triu())),
    "sum": (lambda y: y.sum(), 12**0.5),
    "neighbours": (lambda y: torch.cat([y[1:2], y[:1] + y[1:2], y[2:]]), sigma(torch.tensor([[0, 1], [1, 1]]))),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("radius", [None, 0.3])
def test_rows_that_influence_each_other(name: str, radius: float | None) -> None:
    function, exact = MIXING[name]
    value = lipschitz_lower_bound(function, torch.randn(4, 3, dtype=torch.float64), radius=radius, starts=1, steps=2)
    assert exact * (1 - 1e-6) <= value <= exact + 1e-9


@pytest.mark.parametrize("steepest", [0, 2])
def test_of_separate_rows_the_steepest_counts(steepest: int) -> None:
    scales = torch.ones(3, 1, dtype=torch.float64)
    scales[steepest] = 5.0
    x = torch.randn(3, 4, dtype=torch.float64)

    def function(y: Tensor) -> Tensor:
        return scales * torch.atan(y - x - 1)[:, :1]

    # The slope is scale / (1 + distance²).
    assert 5 * (1 - 1e-6) <= lipschitz_lower_bound(function, x, starts=4) <= 5
    assert 4 * 0.999 <= lipschitz_lower_bound(function, x, radius=0.5, starts=4) <= 4


@pytest.mark.parametrize("starts", [1, 9])
def test_a_constant_function_is_flat(starts: int) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for function in (torch.ones_like, lambda y: bias, lambda y: 0 * y, lambda y: y.sign().abs(), lambda y: y[:, :0]):
        assert lipschitz_lower_bound(function, x, starts=starts, steps=3) == 0.0


def test_derivatives_of_autograd_that_are_none_do_not_count() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    # Zero everywhere, with derivative 1 at 0 for autograd.
    assert lipschitz_lower_bound(lambda y: y - torch.relu(y) + torch.relu(-y), x, starts=4) == 0.0
    # The slope is 1; autograd finds 5.
    assert 0.9 <= lipschitz_lower_bound(lambda y: 5 * y - 4 * y.detach(), x + 1, starts=4) <= 1
    # Autograd finds 0; pairs do not.
    assert 0.5 <= lipschitz_lower_bound(lambda y: y.detach().clone(), x + 1, starts=4) <= 1


def test_parts_of_the_input_space_where_the_function_is_not_finite() -> None:
    x = torch.full((2, 3), 2.0, dtype=torch.float64)
    assert lipschitz_lower_bound(lambda y: y.sqrt().clamp_min(0.5), x) == pytest.approx(1.0, rel=1e-2)
    value = lipschitz_lower_bound(lambda y: torch.where((y - x).norm() > 1e-9, 3 * y, torch.nan), x)
    assert value == pytest.approx(3.0, rel=1e-9)
    with pytest.raises(ValueError, match=r"NaN or inf at x and at all other starts"):
        lipschitz_lower_bound(lambda y: y / 0.0, x)


def test_it_depends_on_the_seed_alone_and_leaves_all_else_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    net[2].requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    before, x_before = copy.deepcopy(net.state_dict()), x.detach().clone()
    state = torch.random.get_rng_state()

    def found(seed: int) -> float:
        return lipschitz_lower_bound(net, x, starts=2, steps=2, seed=seed)

    first = found(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(5)
    with torch.no_grad():
        assert found(0) == first
    assert len({found(seed) for seed in range(4)}) > 1
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [parameter.requires_grad for parameter in net.parameters()] == [True, True, False, False]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_function_that_works_in_place() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    before = x.clone()
    assert lipschitz_lower_bound(lambda y: y.mul_(2.0).add_(1.0), x, starts=2, steps=2) == pytest.approx(2.0, 1e-9)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999), (torch.bfloat16, 0.05)])
def test_short_formats_lose_what_rounding_may_take(dtype: torch.dtype, least: float) -> None:
    weight, x = torch.diag(torch.tensor([1.0, 0.5, 0.25])).to(dtype), torch.randn(2, 3).to(dtype)
    assert least <= lipschitz_lower_bound(lambda y: y @ weight + 1, x, starts=2, steps=3) <= 1.0
    # Steps of the size of the rounding of f(x), which has no slope otherwise.
    assert lipschitz_lower_bound(lambda y: 0 * y + 1e-3 * y.detach().sign() + 1e6, x, starts=2, steps=3) == 0.0


def test_bert_is_at_least_as_steep_as_at_the_input() -> None:
    model = bert().double().eval()
    x = model.bert.embeddings.word_embeddings(torch.randint(1, 60, (2, 5))).detach()

    def logits(y: Tensor) -> Tensor:
        return model(inputs_embeds=y).logits

    with sdpa_kernel(SDPBackend.MATH):
        at_x = max(jacobian_norm(logits, row[None]).item() for row in x)
    assert lipschitz_lower_bound(logits, x, starts=1, steps=1) >= at_x * (1 - 1e-6)
    assert 2 * at_x <= lipschitz_lower_bound(logits, x, starts=2, steps=10) < float("inf")
    assert at_x * (1 - 1e-6) <= lipschitz_lower_bound(logits, x, radius=1e-6, starts=1, steps=2) <= at_x * (1 + 1e-3)


X = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X.long(), {}, TypeError, r"x\.double\(\)"),
        (X.to(torch.complex128), {}, TypeError, r"x\.double\(\)"),
        ([[1.0]], {}, TypeError, "list"),
        (X[:0], {}, ValueError, r"\(0, 3\)"),
        (X.sum(), {}, ValueError, r"x\[None\]"),
        (X * torch.nan, {}, ValueError, "finite input"),
        (X * torch.inf, {}, ValueError, "finite input"),
        (X, {"radius": 0.0}, ValueError, "radius must be positive"),
        (X, {"radius": -1.0}, ValueError, "radius must be positive"),
        (X, {"radius": float("nan")}, ValueError, "radius must be positive"),
        (X, {"radius": float("inf")}, ValueError, "pass None"),
        (X, {"starts": 0}, ValueError, "starts must be at least 1"),
        (X, {"steps": 0}, ValueError, "steps must be at least 1"),
        (X, {"power_iterations": 0}, ValueError, "power_iterations must be at least 1"),
    ],
)
def test_bad_input(x: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lipschitz_lower_bound(torch.tanh, x, **options)
