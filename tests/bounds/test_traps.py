"""Small functions on which a careless rule is below the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz import certify_deterministic, lipschitz_bound, verify_lipschitz
from tests.bounds.functions import Function


def bound_of(function: Callable[..., Tensor], x: Tensor, radius: float | None = None) -> float:
    return lipschitz_bound(Function(function), {"x": x}, radius=radius).value


def steepest(function: Callable[..., Tensor], x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2).item()


@pytest.mark.parametrize(
    "jump",
    [
        lambda x: x.type_as(torch.zeros(1, dtype=torch.int64)).double(),
        lambda x: x.sum(-1, dtype=torch.int64).double(),
        lambda x: x.int() + x,
        lambda x: x.cumsum(-1, dtype=torch.int32).double(),
    ],
)
def test_what_becomes_whole_numbers_jumps(jump: Callable[[Tensor], Tensor]) -> None:
    assert bound_of(jump, torch.full((3,), 0.999)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_has_the_eps_of_its_dtype(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(8).to(dtype).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 1, 8))
    eps = torch.finfo(dtype).eps
    bound = lipschitz_bound(norm, (torch.zeros(1, 8, dtype=dtype),))
    assert bound.value == pytest.approx(2 / math.sqrt(eps), rel=1e-9)
    x = torch.full((1, 8), 3 * math.sqrt(eps), dtype=dtype)
    local = lipschitz_bound(norm, (x,), radius=1e-3 * math.sqrt(eps)).value
    assert steepest(norm, x) <= local * (1 + 1e-5)
    assert local < 0.5 * bound.value


def test_strides_of_storage_are_no_selection_of_entries() -> None:
    def diagonal(x: Tensor) -> Tensor:
        return x[:, 1:].as_strided((2,), (3,), 0)

    assert bound_of(diagonal, torch.randn(2, 3)) >= 1


@pytest.mark.parametrize("gap", [1.0, 45.0, 400.0])
def test_softmax_with_a_clear_winner(gap: float) -> None:
    x = torch.zeros(11, dtype=torch.float64)
    x[0] = gap
    local = bound_of(lambda x: x.softmax(-1), x, radius=1e-9)
    p = math.exp(-gap) / (1 + 10 * math.exp(-gap))
    # diag(p) - ppᵀ at p = (1 - 10 q, q, ..., q): 110 q (1 - 10 q) / 10 along the winner.
    truth = 11 * p * (1 - 10 * p)
    assert truth <= local
    assert local <= 2 * 10 * p * 1.01 + 1e-299


def _tanh_gelu(u: mpmath.mpf) -> mpmath.mpf:
    return u / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (u + mpmath.mpf("0.044715") * u**3)))


SATURATED = {
    "tanh": (torch.tanh, mpmath.tanh, 25.0),
    "sigmoid": (torch.sigmoid, lambda u: 1 / (1 + mpmath.exp(-u)), 45.0),
    "sigmoid below": (torch.sigmoid, lambda u: 1 / (1 + mpmath.exp(-u)), -45.0),
    "tanh gelu": (lambda x: nn.functional.gelu(x, approximate="tanh"), _tanh_gelu, -8.0),
    "gelu": (nn.functional.gelu, lambda u: u * mpmath.ncdf(u), -20.0),
    "silu": (nn.functional.silu, lambda u: u / (1 + mpmath.exp(-u)), -60.0),
    "softplus": (nn.functional.softplus, lambda u: mpmath.log1p(mpmath.exp(u)), -60.0),
    "exp": (torch.exp, mpmath.exp, -60.0),
}


@pytest.mark.parametrize("name", SATURATED)
def test_saturated_activations_still_move(name: str) -> None:
    function, exact, at = SATURATED[name]
    x = torch.full((2,), at, dtype=torch.float64)
    with mpmath.workdps(60):
        truth = float(abs(mpmath.diff(exact, at)))
    assert 0 < truth <= bound_of(function, x, radius=1e-12) <= 1.01 * truth


def test_numbers_are_not_rounded_to_float32() -> None:
    x = torch.ones(2, dtype=torch.float64)
    assert bound_of(lambda x: x * 1e-50 * 1e30 * 1e20, x) == pytest.approx(1, rel=1e-9)
    at = torch.full((2,), 0.3 + 5e-9, dtype=torch.float64)
    assert bound_of(lambda x: torch.relu(x - 0.3), at, radius=1e-10) >= 1
    assert bound_of(lambda x: x / 3e-46, x) == pytest.approx(1 / 3e-46, rel=1e-9)


@pytest.mark.parametrize("radius", [None, 1e-3])
def test_factors_with_squares_below_float64(radius: float | None) -> None:
    small, large = (torch.full((3,), size, dtype=torch.float64) for size in (1e-200, 1e200))
    x = torch.ones(2, 3, dtype=torch.float64)
    assert bound_of(lambda x: (x * small) * large, x, radius) >= 1
    assert bound_of(lambda x: ((x * small).expand(4, 2, 3) * large).sum(0) / 4, x, radius) >= 1 - 1e-9

    def five_times(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 1e-36
        for _ in range(5):
            x = x * 1e36
        return x

    assert bound_of(five_times, torch.ones(3), radius) >= 1 - 1e-9

    def ten_times(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x * 1e-36
        for _ in range(10):
            x = x * 1e36
        return x

    assert bound_of(ten_times, torch.ones(3), radius) >= 1 - 1e-9


def test_a_query_that_sees_nothing_gives_zero() -> None:
    mask = torch.tensor([[False, False], [True, True]])

    def attended(x: Tensor) -> Tensor:
        values = 5.5 + x
        out = nn.functional.scaled_dot_product_attention(x, x, values, attn_mask=mask)
        return torch.relu(out[..., 0, :] + x[..., 0, :])

    x = torch.full((1, 2, 2), 0.1, dtype=torch.float64)
    radius = 0.05
    assert bound_of(attended, x, radius) >= 1
    assert bound_of(lambda x: torch.relu(1 - attended(x)), x, radius) >= 1


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)

    def padded(x: Tensor) -> Tensor:
        none = x.expand(3, 3)[: shape[0], : shape[1]]
        return torch.cat([(none * 2 + empty).flatten(), x])

    assert bound_of(padded, torch.ones(3), radius=0.1) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("scale", [(1.0, -3.0, 1.0), (-1.0, 1.0, 1.0)])
@pytest.mark.parametrize("by", ["product", "batch norm"])
def test_signs_after_the_head_are_in_the_certificate(scale: tuple[float, ...], by: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 3).double()
    factors = torch.tensor(scale, dtype=torch.float64)
    norm = nn.BatchNorm1d(3, eps=0.0).double()
    with torch.no_grad():
        norm.weight.copy_(factors)

    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.norm = head, norm

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * factors if by == "product" else self.norm(self.head(x))

    model = Signed().eval()
    for _ in range(10):
        x = torch.randn(1, 4, dtype=torch.float64)
        (found,) = certify_deterministic(model, (x,))
        logits = model(x)[0].detach()
        best = int(logits.argmax())
        rows = head.weight.detach() * factors[:, None]
        distances = [
            ((logits[best] - logits[j]) / torch.linalg.vector_norm(rows[best] - rows[j])).item()
            for j in range(3)
            if j != best
        ]
        assert found.radius == pytest.approx(min(distances), rel=1e-6)
        assert found.radius <= min(distances)


def test_an_input_that_all_rows_share_is_not_cut_into_rows() -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x * table

    x, table = torch.tensor([[1.0, 0.2], [0.3, 2.0]]), torch.tensor([1.0, 50.0])
    with pytest.raises(ValueError, match="one row at a time"):
        certify_deterministic(Shared().eval(), {"x": x, "table": table}, wrt="x", local=True)


def test_rows_that_see_each_other_are_not_certified_by_themselves() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - 0.5 * x.mean(0, keepdim=True)

    with pytest.raises(ValueError, match="one row at a time"):
        certify_deterministic(Centred().eval(), (torch.randn(3, 2),), local=True)


def test_inputs_that_are_changed_in_place() -> None:
    def turned(x: Tensor) -> Tensor:
        return 10 * torch.relu(x.mul_(-1))

    x = torch.tensor([-4.0])
    assert bound_of(turned, x, radius=0.5) == pytest.approx(10, rel=1e-6)
    assert torch.equal(x, torch.tensor([-4.0]))

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.relu(x.mul_(-1)), torch.zeros_like(x)], -1)

    (found,) = certify_deterministic(Turned().eval(), (torch.tensor([[-4.0]]),))
    assert found.prediction == 0
    assert 4 / math.sqrt(2) * (1 - 1e-6) <= found.radius <= 4


def test_sums_of_many_entries_are_followed_no_further() -> None:
    x = torch.zeros(1, 9_000_000)
    assert bound_of(lambda x: (x * 2 + x.flip(-1)).view(2, -1), x) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(
    "positions",
    [lambda x: x.topk(2, -1)[1].double(), lambda x: x.max(-1)[1] + x.sum(-1), lambda x: x.sort(-1)[1].to(x.dtype)],
)
def test_positions_are_to_blame(positions: Callable[[Tensor], Tensor]) -> None:
    bound = lipschitz_bound(Function(positions), {"x": torch.randn(2, 4)})
    assert bound.value == math.inf
    assert bound.blame
    assert "jump" in str(bound)
    with pytest.raises(ValueError, match="jump"):
        certify_deterministic(Function(lambda x: x.topk(2, -1)[1].double()), (torch.randn(2, 4),))


def test_a_generator_made_on_the_way_is_named() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    bound = lipschitz_bound(Function(noisy), {"x": torch.randn(3)})
    assert bound.value == math.inf
    assert "randn" in str(bound) or "export" in str(bound)


HIDDEN = torch.tensor([-math.inf, 0.0, 0.0], dtype=torch.float64)
AFTER_INFINITY = {
    "relu": lambda x: torch.relu(x + HIDDEN)[:, 1:],
    "leaky relu": lambda x: nn.functional.leaky_relu(x + HIDDEN)[:, 1:],
    "clamp": lambda x: (x + HIDDEN).clamp(-20, 20),
    "relu6": lambda x: nn.functional.relu6((x + HIDDEN) / 2),
    "masked fill": lambda x: torch.relu(x.masked_fill(torch.isinf(HIDDEN), -math.inf))[:, 1:],
    "largest": lambda x: torch.relu((x + HIDDEN).amax(-1)),
    "softmax": lambda x: (x + HIDDEN).softmax(-1),
    "above": lambda x: torch.relu(10 - torch.relu(x - HIDDEN)[:, 1:]),
}


@pytest.mark.parametrize("name", AFTER_INFINITY)
def test_entries_that_are_infinite_say_nothing_of_others(name: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    function = AFTER_INFINITY[name]
    assert steepest(function, x) <= bound_of(function, x, radius=0.1) * (1 + 1e-9)


def test_a_mask_in_half_precision_hides_as_much_as_its_numbers_say() -> None:
    """Scores of 150² outweigh a mask of -17000."""
    mask = torch.full((4, 4), -17000.0).half().fill_diagonal_(0)
    mask[0, 0] = 0
    query, key = torch.zeros(1, 4, 2).half(), torch.zeros(1, 4, 2).half()
    query[..., 0] = 150.0
    key[:, 0, 0] = 150.0

    class Attention(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)

    scores = (query.double() @ key.double().mT + mask.double()).softmax(-1)
    truth = torch.linalg.matrix_norm(scores, 2).item()
    assert truth > 1.9
    assert lipschitz_bound(Attention().eval(), (torch.randn(1, 4, 2).half(),)).value >= truth * (1 - 1e-9)


@pytest.mark.parametrize("eps", [1e-20, 1e-16, 1e-12, 1e-6])
@pytest.mark.parametrize("kind", ["added", "floor", "none"])
def test_norms_that_only_look_like_a_known_one(eps: float, kind: str) -> None:
    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), eps

        def forward(self, x: Tensor) -> Tensor:
            size = x.pow(2).mean(-1, keepdim=True).sqrt()
            return self.weight * x / {"added": size + eps, "floor": size.clamp(min=eps), "none": size}[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = OwnRMSNorm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x = 0.01 * eps * torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    model = Model().double().eval()
    assert steepest(model, x) <= lipschitz_bound(model, (torch.randn(1, 4, dtype=torch.float64),)).value


@pytest.mark.parametrize("local", [False, True])
def test_a_constant_classifier_has_no_edge(local: bool) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), 2)

    (found,) = certify_deterministic(Constant().eval(), (torch.randn(1, 3),), local=local)
    assert (found.prediction, found.radius > 1e300) == (1, True)


@pytest.mark.parametrize("model", [nn.RMSNorm(6), Function(lambda x: x * 0.7)], ids=["RMSNorm", "number"])
def test_attacks_stay_below(model: nn.Module) -> None:
    model, x = model.float().eval(), torch.randn(2, 6)
    assert verify_lipschitz(model, (x,), starts=4) <= lipschitz_bound(model, (x,)).value


def test_what_a_center_loses_to_cancellation_is_allowed_for() -> None:
    """In exact arithmetic the function is relu(x - 0.3), and active on the whole ball."""
    large, edge = torch.tensor(1e8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for k in range(1, 13):
        x = torch.full((1, 1), 0.3 + k * 1e-9, dtype=torch.float64)
        assert bound_of(lambda x: torch.relu((x + large) - large - edge), x, radius=1e-11) >= 1


def test_softmax_of_one_number_is_constant() -> None:
    x = torch.randn(3)
    assert bound_of(lambda x: x.sum().softmax(0), x, radius=0.1) == 0
    assert bound_of(lambda x: x.sum().softmax(0), x) == 0
