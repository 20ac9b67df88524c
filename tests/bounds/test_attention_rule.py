"""The rule of scaled dot-product attention: against its closed form, and against exact Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_lipschitz.bounds import graph_bound
from hf_lipschitz.functional.attention import ball_attention_bound
from hf_lipschitz.nn import BallRadii
from tests.bounds.functions import exact, in_ball


HEADS, WIDTH, TOKENS = 2, 4, 5


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values are clipped to balls."""

    def __init__(self, kv_heads: int = HEADS, **options) -> None:
        super().__init__()
        self.kv_heads, self.options = kv_heads, options
        self.q = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.k, self.v = (nn.Linear(HEADS * WIDTH, kv_heads * WIDTH) for _ in range(2))
        self.o = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.balls = BallRadii()
        self.balls.set_radii(1.5, 1.25, 0.75)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k, v = self.balls(q, k, v)
        if self.kv_heads != HEADS and "enable_gqa" not in self.options:
            k, v = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, **self.options)
        return self.o(mixed.transpose(1, 2).flatten(-2))


def padding() -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[:, -2:] = False
    return mask


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


BIAS = torch.linspace(0, 2, TOKENS).double().expand(TOKENS, TOKENS)
CASES = {
    "plain": ({}, {"mask": "none"}),
    "causal": ({"is_causal": True}, {"mask": "causal"}),
    "padding": ({"attn_mask": padding()}, {"mask": padding()}),
    "additive": ({"attn_mask": additive(padding())}, {"mask": padding()}),
    "bias": ({"attn_mask": BIAS}, {"mask": "none", "bias_range": 2.0}),
    "scale": ({"scale": -0.9}, {"mask": "none", "scaling": 0.9}),
    "grouped": ({"enable_gqa": True}, {"mask": "none"}),
    "grouped by hand": ({}, {"mask": "none"}),
}


def made(name: str) -> tuple[Attention, dict]:
    torch.manual_seed(0)
    options, by_hand = CASES[name]
    return Attention(1 if "grouped" in name else HEADS, **options), by_hand


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_closed_form(name: str) -> None:
    model, by_hand = made(name)
    expected = ball_attention_bound(
        *(layer.weight for layer in (model.q, model.k, model.v, model.o)),
        radius_q=1.5,
        radius_k=1.25,
        radius_v=0.75,
        num_heads=HEADS,
        num_keys=TOKENS,
        num_key_value_heads=model.kv_heads,
        **by_hand,
    )
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    found = graph_bound(model, {"x": x}).value
    if name == "bias":
        assert found < expected
        expected = with_bias(model)
    assert found == pytest.approx(expected, rel=2e-3)


def with_bias(model: Attention) -> float:
    """By entries of the bias, in the place of their range."""
    scale, (r_q, r_k, r_v) = WIDTH**-0.5, (1.5, 1.25, 0.75)
    shared = BIAS.exp() * math.exp(-2 * scale * r_q * r_k)
    rest = shared.sum(-1, keepdim=True) - shared
    root = (BIAS.exp() / (BIAS.exp() + rest)).sum(0).max().sqrt().item()
    q, k, v, o = (torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (model.q, model.k, model.v, model.o))
    return o * (root * v + scale * r_k * r_v * q + root * scale * r_q * r_v * k)


SLOW = {"causal", "padding", "scale", "grouped by hand"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
@pytest.mark.parametrize("radius", [0.3, 1e-3])
@pytest.mark.parametrize("size", [0.2, 2.0])
def test_balls_are_tighter_and_above_the_jacobian(name: str, radius: float, size: float) -> None:
    model, _ = made(name)
    x = size * torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    everywhere = graph_bound(model, {"x": x}).value
    local = graph_bound(model, {"x": x}, center=x, radius=radius).value
    largest = max(exact(model, point) for point in in_ball(x, radius, 9))
    assert largest <= local <= everywhere * (1 + 1e-9)
    if radius == 1e-3:
        # Of large tokens nearly all are clipped, and their radial direction, which is lost then, is counted.
        assert local <= (4 if size < 1 else 10) * largest
        assert local < 0.75 * everywhere


def test_constant_queries_cost_nothing() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 1, 1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            keys = functional.layer_norm(x, (WIDTH,))[None, None]
            return functional.scaled_dot_product_attention(self.query, keys, x[None, None])

    model, x = Pooling().double().eval(), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    assert graph_bound(model, {"x": x}).value == math.inf
    local = graph_bound(model, {"x": x}, center=x, radius=0.01).value
    assert max(exact(model, point) for point in in_ball(x, 0.01, 6)) <= local < math.inf


def test_a_row_that_sees_nothing() -> None:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[0] = False
    model = Attention(attn_mask=additive(mask))
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    assert exact(model, x) <= graph_bound(model, {"x": x}).value


@pytest.mark.parametrize("radius", [None, 0.1])
def test_attention_by_hand_is_finite_on_bounded_tokens(radius: float | None) -> None:
    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.layer_norm(x, (WIDTH,), eps=1e-2)
            return torch.softmax(y @ y.mT / 2, -1) @ y

    model, x = ByHand().eval(), torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    center = None if radius is None else x
    points = in_ball(x, radius or 5.0, 9)
    bound = graph_bound(model, {"x": x}, center=center, radius=radius).value
    assert max(exact(model, point) for point in points) <= bound < math.inf
