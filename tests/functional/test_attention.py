"""Bounds of attention, attacked by gradient ascent on exact Jacobians, and matched by tight constructions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from hf_lipschitz.functional.attention import (
    attention_bound_on_ball,
    attention_column_sum_bound,
    ball_attention_bound,
)


@dataclass(frozen=True)
class Shape:
    """A batch of attention layers of one shape; `cross` has a context of its own, `masked` hides keys at random."""

    queries: int = 4
    keys: int = 4
    width: int = 4
    heads: int = 1
    groups: int = 1
    inner: int = 3
    value: int = 3
    mask: str = "none"
    cross: bool = False
    bias_range: float = 0.0


SHAPES = (
    Shape(),
    Shape(queries=2, keys=2, width=3, inner=2, value=2),
    Shape(queries=6, keys=6, width=3, inner=1, value=1),
    Shape(mask="causal"),
    Shape(queries=5, keys=5, mask="padding"),
    Shape(mask="random", bias_range=2.0),
    Shape(heads=2, groups=2, inner=2, value=2),
    Shape(heads=4, groups=1, inner=2, value=2, width=3, queries=3, keys=3),
    Shape(queries=6, keys=3, cross=True),
    Shape(queries=4, keys=2, cross=True, heads=2, groups=1, inner=2, value=2, mask="random"),
)
LAYERS_OF_A_SHAPE = 20


def clip(x: Tensor, radius: Tensor) -> Tensor:
    return x / torch.clamp(torch.linalg.vector_norm(x, dim=-1, keepdim=True) / radius, min=1)


def attention(x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One layer, by definition; `x` of shape (n_q, width) makes the queries and `y` keys and values."""
    q = clip(torch.einsum("hde,ne->hnd", p["w_q"], x) + p["b_q"][:, None], p["radii"][0])
    k = clip(torch.einsum("hde,ne->hnd", p["w_k"], y) + p["b_k"][:, None], p["radii"][1])
    v = clip(torch.einsum("hde,ne->hnd", p["w_v"], y) + p["b_v"][:, None], p["radii"][2])
    repeats = len(q) // len(k)
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = p["scaling"] * q @ k.mT + p["bias"]
    weights = torch.softmax(scores.masked_fill(~p["mask"], torch.finfo(torch.float64).min), -1)
    return torch.einsum("ohd,hnd->no", p["w_o"], weights @ v)


def random_layers(shape: Shape, count: int) -> dict[str, Tensor]:
    def normal(*size: int) -> Tensor:
        return torch.randn(count, *size, dtype=torch.float64) * torch.rand(count, *[1] * len(size)).mul(2).exp()

    def masks() -> Tensor:
        size = (count, 1, shape.queries, shape.keys)
        if shape.mask == "causal":
            return torch.ones(size, dtype=torch.bool).tril()
        if shape.mask == "padding":
            lengths = torch.randint(1, shape.keys + 1, (count, 1, 1, 1))
            return (torch.arange(shape.keys) < lengths).expand(size)
        return torch.rand(size) < (0.6 if shape.mask == "random" else 2.0)

    bias = torch.rand(count, shape.heads, shape.queries, shape.keys, dtype=torch.float64) * shape.bias_range
    return {
        "w_q": normal(shape.heads, shape.inner, shape.width),
        "w_k": normal(shape.groups, shape.inner, shape.width),
        "w_v": normal(shape.groups, shape.value, shape.width),
        "w_o": normal(shape.width, shape.heads, shape.value),
        "b_q": normal(shape.heads, shape.inner),
        "b_k": normal(shape.groups, shape.inner),
        "b_v": normal(shape.groups, shape.value),
        "radii": torch.rand(count, 3, dtype=torch.float64) * 3 + 0.2,
        "scaling": torch.rand(count, dtype=torch.float64) * 1.5 + 0.1,
        "mask": masks(),
        "bias": bias,
    }


def claimed(shape: Shape, p: dict[str, Tensor], index: int) -> float:
    one = {name: value[index] for name, value in p.items()}
    radius_q, radius_k, radius_v = one["radii"].tolist()
    return ball_attention_bound(
        one["w_q"].flatten(0, 1),
        one["w_k"].flatten(0, 1),
        one["w_v"].flatten(0, 1),
        one["w_o"].flatten(1, 2),
        radius_q=radius_q,
        radius_k=radius_k,
        radius_v=radius_v,
        num_heads=shape.heads,
        num_key_value_heads=shape.groups,
        num_keys=shape.keys,
        num_queries=shape.queries,
        scaling=one["scaling"].item(),
        mask=shape.mask if shape.mask in ("none", "causal") else one["mask"],
        bias_range=shape.bias_range,
        wrt="joint" if shape.cross else "self",
    )


def jacobian_norms(z: Tensor, p: dict[str, Tensor], shape: Shape) -> Tensor:
    """Exact norms at `z` of shape (layers, tokens, width); in cross-attention the tokens of both inputs."""

    def output(z: Tensor, p: dict[str, Tensor]) -> Tensor:
        x, y = (z[: shape.queries], z[shape.queries :]) if shape.cross else (z, z)
        return attention(x, y, p)

    jacobians = vmap(jacfwd(output))(z, p)
    return torch.linalg.matrix_norm(jacobians.flatten(3, 4).flatten(1, 2), ord=2)


def ascend(shape: Shape, p: dict[str, Tensor], steps: int, radius: float | None = None) -> Tensor:
    """The largest Jacobian norm met on the way, a lower bound of each layer's Lipschitz constant."""
    tokens = shape.queries + (shape.keys if shape.cross else 0)
    count = len(p["w_q"])
    z = torch.randn(count, tokens, shape.width, dtype=torch.float64) * torch.rand(count, 1, 1).mul(3).sub(2).exp()
    z.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    best = torch.zeros(count, dtype=torch.float64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - step / steps) + 1e-3
        inside = z if radius is None else clip(z, torch.tensor(radius))
        norms = jacobian_norms(inside, p, shape)
        best = torch.maximum(best, norms.detach())
        optimizer.zero_grad()
        (-norms.log().sum()).backward()
        z.grad.nan_to_num_(0.0)
        optimizer.step()
    return best


def repeated(p: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in p.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_ascent_stays_below_the_bound_of_clipped_attention(shape: Shape) -> None:
    p = random_layers(shape, LAYERS_OF_A_SHAPE)
    bounds = torch.tensor([claimed(shape, p, i) for i in range(LAYERS_OF_A_SHAPE)], dtype=torch.float64)
    reached = ascend(shape, repeated(p, 2), steps=30).reshape(2, -1).amax(0)
    ratio = reached / bounds
    assert (ratio <= 1 + 1e-9).all()
    assert ratio.median() > 0.08


def one_layer(**changes: Tensor | float) -> dict[str, Tensor]:
    """A single layer with one head of size 2 over tokens of size 2, all projections off, for one query and context."""
    eye, zeros = torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 2, dtype=torch.float64)
    layer = {"w_q": 0 * eye, "w_k": 0 * eye, "w_v": 0 * eye, "w_o": eye.permute(1, 0, 2)}
    layer |= {"b_q": zeros, "b_k": zeros, "b_v": zeros, "scaling": 1.0, "bias": zeros[..., :1]}
    layer |= {"mask": torch.ones(1, 1, dtype=torch.bool), "radii": torch.ones(3)} | changes
    return {name: torch.as_tensor(value) for name, value in layer.items()}


def ratio_of(p: dict[str, Tensor], z: Tensor, shape: Shape) -> float:
    batch = {name: value[None] for name, value in p.items()}
    return (jacobian_norms(z[None], batch, shape) / claimed(shape, batch, 0)).item()


SMALL = 1e-4
FIRST = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None]
SECOND = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))[None]


@pytest.mark.parametrize("delta", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("source", ["scores", "bias"])
def test_value_term_is_attained_up_to_the_norm_of_equal_rows(source: str, delta: float) -> None:
    # One key is at one end of its ball and all others at the opposite one, or one has the bias: rows are alike.
    shape = Shape(queries=5, keys=5, width=2, inner=2, value=2, bias_range=delta if source == "bias" else 0.0)
    query = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[1.5, 0.0]] + [[-1.5, 0.0]] * 4, dtype=torch.float64)
    if source == "scores":
        radii = torch.tensor([2.0, 1.5, 1e-6], dtype=torch.float64)
        p = one_layer(w_k=FIRST, w_v=SECOND, b_q=query, radii=radii, scaling=delta / 6)
    else:
        bias = torch.tensor([delta, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(1, 5, 5)
        p = one_layer(w_v=SECOND, radii=torch.full((3,), 1e-6), bias=bias)
    top = 1 / (1 + 4 * math.exp(-delta))
    expected = math.sqrt(top**2 + (1 - top) ** 2 / 4) / math.sqrt(top)
    assert ratio_of(p, x, shape) == pytest.approx(expected, rel=1e-3)
    assert delta < 8 or expected > 0.998


def test_query_term_is_attained() -> None:
    # Two keys and two values at opposite points of their balls, seen with equal weights.
    shape = Shape(queries=2, keys=2, width=2, inner=2, value=2)
    p = one_layer(w_q=SECOND.roll(-1, 1), w_k=SMALL * FIRST, w_v=SMALL * FIRST, radii=torch.tensor([0.01, 0.7, 1.7]))
    x = torch.tensor([[1e6, 0.0], [-1e6, 0.0]], dtype=torch.float64)
    assert 0.999 < ratio_of(p, x, shape) <= 1 + 1e-9


@pytest.mark.parametrize(("queries", "groups"), [(2, 4), (50, 4), (3, 1), (50, 2)])
def test_key_term_is_attained_in_columns_and_in_repeats(queries: int, groups: int) -> None:
    shape = Shape(queries=queries, keys=2, width=2, heads=4, groups=groups, inner=2, value=2, cross=True)
    heads = torch.ones(4, 1, 1, dtype=torch.float64)
    p = one_layer(
        w_q=0 * FIRST * heads,
        w_k=SECOND.roll(-1, 1) * heads[:groups],
        w_v=SMALL * FIRST * heads[:groups],
        w_o=torch.eye(8, dtype=torch.float64).reshape(8, 4, 2),
        b_q=torch.tensor([[1.3, 0.0]], dtype=torch.float64).expand(4, 2),
        b_k=torch.zeros(groups, 2, dtype=torch.float64),
        b_v=torch.zeros(groups, 2, dtype=torch.float64),
        radii=torch.tensor([1.3, 1e-3, 1.7]),
    )
    context = torch.tensor([[1e6, 0.0], [-1e6, 0.0]], dtype=torch.float64)
    x = torch.cat([torch.zeros(queries, 2, dtype=torch.float64), context])
    # Of the groups that serve one head each, all move together, and ‖W_K‖ of the stacked matrix is √groups.
    assert 0.99 < ratio_of(p, x, shape) <= 1 + 1e-9


@pytest.mark.parametrize("mask", ["causal", "padding"])
def test_column_sums_of_masks_are_attained(mask: str) -> None:
    # Δ = 0 and keys hidden from some rows; then the value path is the matrix of uniform rows itself.
    shape = Shape(queries=2, keys=2, width=2, inner=2, value=2, mask=mask)
    visible = torch.tensor([[True, False], [True, True]]) if mask == "causal" else torch.tensor([[True, False]])
    visible = visible.expand(2, 2)[None]
    p = one_layer(w_v=SECOND, radii=torch.tensor([SMALL, SMALL, 1.0]), mask=visible)
    ratio = ratio_of(p, torch.zeros(2, 2, dtype=torch.float64), shape)
    # Causal: the norm of [[1, 0], [1/2, 1/2]] against √1.5.
    exact = torch.linalg.matrix_norm(visible[0].double() / visible[0].sum(-1, keepdim=True), ord=2).item()
    column_sum = 1.5 if mask == "causal" else 2.0
    assert ratio == pytest.approx(exact / math.sqrt(column_sum), rel=1e-3)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[8], SHAPES[9]], ids=str)
def test_column_sums_of_worst_scores_reach_the_bound(shape: Shape) -> None:
    delta = 1.7
    visible = random_layers(shape, 1)["mask"][0, 0]
    bound = attention_column_sum_bound(delta, num_keys=shape.keys, num_queries=shape.queries, mask=visible)
    seen = visible | ~visible.any(-1, keepdim=True)
    sums = []
    for column in range(shape.keys):
        scores = torch.zeros(shape.queries, shape.keys, dtype=torch.float64)
        scores[:, column] = delta
        sums.append(torch.softmax(scores.masked_fill(~seen, -math.inf), -1)[:, column].sum().item())
    assert bound == pytest.approx(max(sums), rel=1e-9)
    assert bound >= max(sums)


def test_column_sum_bounds_agree_with_each_other() -> None:
    causal = attention_column_sum_bound(0.7, num_keys=6, mask="causal")
    counts = torch.arange(1, 7)
    assert causal == pytest.approx(attention_column_sum_bound(0.7, num_keys=6, mask=counts), rel=1e-12)
    assert causal == pytest.approx(
        attention_column_sum_bound(0.7, num_keys=6, mask=torch.ones(6, 6).tril().bool()), rel=1e-12
    )
    none = [attention_column_sum_bound(0.7, num_keys=n) for n in (1, 10, 1000)]
    assert none == sorted(none)
    assert none[-1] < attention_column_sum_bound(0.7, num_keys=None) == pytest.approx(math.exp(0.7))
    assert attention_column_sum_bound(0.7, num_keys=5, num_queries=9, mask="any") == 9
    assert attention_column_sum_bound(math.inf, num_keys=5) == pytest.approx(5)
    assert attention_column_sum_bound(800.0, num_keys=None) == math.inf
    assert attention_column_sum_bound(0.0, num_keys=None, mask="causal") == math.inf


def test_row_that_sees_nothing_counts_as_one_that_sees_all() -> None:
    visible = torch.tensor([[False, False, False], [True, True, True]])
    assert attention_column_sum_bound(1.0, num_keys=3, num_queries=2, mask=visible) == pytest.approx(
        attention_column_sum_bound(1.0, num_keys=3, num_queries=2)
    )
    counts = torch.tensor([0, 3])
    assert attention_column_sum_bound(1.0, num_keys=3, num_queries=2, mask=counts) == pytest.approx(
        attention_column_sum_bound(1.0, num_keys=3, num_queries=2)
    )


def test_what_moves_decides_which_terms_count() -> None:
    radii = {"radius_q": 1.0, "radius_k": 2.0, "radius_v": 0.5}

    def bound(wrt: str, **changes: float) -> float:
        given = {"num_heads": 1, "num_keys": 4, "num_queries": 4, "scaling": 0.3} | radii | changes
        return ball_attention_bound(2.0, 3.0, 5.0, 7.0, wrt=wrt, **given)

    query, context = bound("query"), bound("context")
    assert query == pytest.approx(7 * 0.3 * 2 * 0.5 * 2)
    assert bound("self", num_queries=None) == pytest.approx(query + context)
    assert bound("joint") == pytest.approx(math.hypot(query, context))
    assert bound("self", num_queries=None, radius_v=math.inf) == math.inf
    assert bound("query", radius_q=math.inf) == query


def test_weight_of_zeros_moves_nothing_without_a_radius() -> None:
    zero = torch.zeros(4, 4)
    unclipped = {"radius_q": math.inf, "radius_k": math.inf, "radius_v": math.inf}
    assert ball_attention_bound(zero, zero, zero, 1.0, num_heads=2, num_keys=3, **unclipped) == 0


def test_default_scaling_is_that_of_the_head_size() -> None:
    w = torch.randn(6, 4)
    given = {"radius_q": 1.0, "radius_k": 1.0, "radius_v": 1.0, "num_heads": 2, "num_keys": 3}
    assert ball_attention_bound(w, w, w, 1.0, **given) == ball_attention_bound(w, w, w, 1.0, **given, scaling=3**-0.5)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[7]], ids=str)
def test_gradient_ascent_stays_below_the_bound_of_plain_attention_on_a_ball(shape: Shape) -> None:
    p = random_layers(shape, LAYERS_OF_A_SHAPE)
    p["radii"].fill_(math.inf)
    bounds = []
    for i in range(LAYERS_OF_A_SHAPE):
        one = {name: value[i] for name, value in p.items()}
        bound = attention_bound_on_ball(
            one["w_q"].flatten(0, 1),
            one["w_k"].flatten(0, 1),
            one["w_v"].flatten(0, 1),
            one["w_o"].flatten(1, 2),
            radius=0.8,
            bias_q=one["b_q"].flatten(),
            num_heads=shape.heads,
            num_key_value_heads=shape.groups,
            num_keys=shape.keys,
            scaling=one["scaling"].item(),
            mask=shape.mask if shape.mask in ("none", "causal") else one["mask"],
            bias_range=shape.bias_range,
        )
        bounds.append(bound)
    ratio = ascend(shape, p, steps=25, radius=0.8) / torch.tensor(bounds, dtype=torch.float64)
    assert (ratio <= 1 + 1e-9).all()
    assert ratio.median() > 0.05


def test_bound_on_a_ball_is_that_of_a_head_computed_by_hand() -> None:
    # Diagonal weights: ‖A‖ = 0.5·2·3, e = 0.5·3·4 and two equal heads.
    w_q, w_k, w_v = (scale * torch.eye(2, dtype=torch.float64).repeat(2, 1) for scale in (2.0, 3.0, 5.0))
    bias = torch.tensor([0.0, 4.0, 4.0, 0.0])
    radius, product, shift = 0.6, 3.0, 6.0
    spread = math.sqrt(7 / (1 + 6 * math.exp(-2 * radius * (product * radius + shift))))
    head = 5 * (spread + product * radius**2 + spread * radius * (product * radius + shift))
    found = attention_bound_on_ball(
        w_q, w_k, w_v, 1.5, radius=radius, bias_q=bias, num_heads=2, num_keys=7, scaling=0.5
    )
    assert head * math.sqrt(2) * 1.5 <= found
    assert found == pytest.approx(head * math.sqrt(2) * 1.5, rel=2e-3)


GIVEN = {"radius_q": 1.0, "radius_k": 1.0, "radius_v": 1.0, "num_heads": 2, "num_keys": 3, "scaling": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radius_k": 0.0}, "radius_k must be positive"),
        ({"radius_v": math.nan}, "radius_v must be positive"),
        ({"bias_range": -1.0}, "bias_range"),
        ({"wrt": "keys"}, "unknown wrt"),
        ({"mask": "window"}, "unknown mask"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"num_queries": 4}, "as many queries as keys"),
        ({"num_queries": 4, "wrt": "joint", "mask": "causal"}, "causal mask"),
        ({"num_keys": 0}, "num_keys must be"),
        ({"scaling": None}, "scaling is needed"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "boolean mask"),
        ({"mask": torch.tensor([1, 2, 4])}, "within 0 and num_keys"),
        ({"num_keys": None, "mask": torch.tensor([1])}, "any length"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ball_attention_bound(1.0, 1.0, 1.0, 1.0, **(GIVEN | changes))


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="boolean mask"):
        ball_attention_bound(1.0, 1.0, 1.0, 1.0, **(GIVEN | {"mask": torch.zeros(3, 3)}))
    with pytest.raises(TypeError, match="w_v must be"):
        ball_attention_bound(1.0, 1.0, "1.0", 1.0, **GIVEN)
    with pytest.raises(ValueError, match="radius must be positive"):
        attention_bound_on_ball(*[torch.eye(2)] * 4, radius=math.inf, num_heads=1, num_keys=2)
