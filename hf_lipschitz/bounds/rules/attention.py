"""Scaled dot-product attention on tokens of bounded norm."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.bounds.logs import log_sum, scaled
from hf_lipschitz.bounds.regions import Region, length
from hf_lipschitz.bounds.registry import Call, NoRule, rule
from hf_lipschitz.bounds.rules.norms import share_of
from hf_lipschitz.bounds.values import Dependent


_aten = torch.ops.aten
# Covers sums of some thousand terms, exponentials and roots in float64.
_ROUNDING = 1 + 1e-11
# Above what float64 loses where squares underflow.
_TINY = 1e-300


class _Tokens(NamedTuple):
    """Queries, keys or values with one head for each of the queries: log L, norms `(..., n, 1)`, and the ball."""

    log_lipschitz: float
    norm: Tensor
    center: Tensor | None
    radius: Tensor | None


@rule(_aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Dependent:
    r"""With P the attention matrix, s the scale, \(m_i = \sum_j P_{ij}v_j\), an output moves by

    \(\sum_j P_{ij}\,dv_j + s\sum_j P_{ij}(dq_i\cdot k_j + q_i\cdot dk_j)(v_j - m_i)\).

    First term: ‖P‖₂ ≤ √c, c the largest column sum, for rows sum to 1. Second: a covariance under P_i, at most
    \(s\,S_k S_v\|dq_i\|\) with S² the largest variance of keys or values in a direction. Third: by Cauchy-Schwarz at
    most \(s\|q_i\|S_v(\sum_j P_{ij}\|dk_j\|^2)^{1/2}\). So

    \(L \le \sqrt c\,L_v + s\max_i S_kS_v\,L_q + s\sqrt{\max_j\sum_i P_{ij}(\|q_i\|S_v)^2}\,L_k\).

    Everywhere on norms r_q, r_k, r_v: S_k ≤ r_k, S_v ≤ r_v, and P_ij ≤ e^{b_ij} / (e^{b_ij} + Σ_{l≠j} e^{b_il - Δ_i})
    for an additive mask b and Δ_i = 2s‖q_i‖r_k, by which two scores differ at most; the keys may be shifted by any
    common vector. On a ball,
    with t_ij the most that a score moves, P_ij ≤ P⁰_ij e^{t_ij} / Σ_l P⁰_il e^{-t_il}, and S² is at most the norm of
    Σ_j P_ij (k⁰_j - m)(k⁰_j - m)ᵀ plus what the radii of the keys add (Minkowski). The lesser of both is taken. Each
    key that serves ρ heads counts √ρ. The proof of [`ball_attention_bound`] in `functional` is the same.
    """
    if call["dropout_p"]:
        raise NoRule("attention dropout is active: put the model in evaluation mode")
    names = ("query", "key", "value")
    if any(isinstance(call[name], Dependent) and len(call[name].shape) < 2 for name in names):
        raise NoRule("it attends over vectors without a token axis")
    if isinstance(call["attn_mask"], Dependent):
        raise NoRule("its mask or bias depends on the input")
    shapes = [tuple(call[name].shape) for name in names]
    repeats = _repeats(call, shapes)
    query, key, value = (_tokens(call[name], 1 if name == "query" else repeats) for name in names)
    scale = abs(call["scale"] if call["scale"] is not None else shapes[0][-1] ** -0.5)
    mask = _mask(call, shapes)
    weights, spread_k, spread_v = _on_norms(query, key, value, scale, mask)
    radius = None
    if query.center is not None and key.center is not None and value.center is not None:
        local = _on_ball(query, key, value, scale, mask)
        weights = torch.minimum(weights, local[0])
        spread_k, spread_v = (torch.minimum(a, b) for a, b in zip((spread_k, spread_v), local[1:], strict=True))
        radius = _moved(query, key, value, scale, spread_k, spread_v)
    by_value = weights.sum(-2).max().sqrt().item()
    by_query = (scale * spread_k * spread_v).max().item()
    by_key = scale * length(weights.sqrt() * query.norm * spread_v, -2).max().item()
    gains = (by_value * math.sqrt(repeats), by_query, by_key * math.sqrt(repeats))
    terms = []
    for tokens, gain in zip((value, query, key), gains, strict=True):
        if tokens.log_lipschitz == -math.inf:
            continue
        if not math.isfinite(gain):
            raise NoRule("queries, keys and values have no bounded norm, and dot products grow with them")
        terms.append(scaled(tokens.log_lipschitz, gain * _ROUNDING))
    return Dependent(log_sum(terms), call.shape, _region(call, value, repeats, radius, mask.is_blind))


def _repeats(call: Call, shapes: list[tuple[int, ...]]) -> int:
    query, key, value = shapes
    if key[:-2] != value[:-2] or query[: len(query) - 3] != key[: len(key) - 3]:
        raise NoRule("its queries, keys and values have different batch axes")
    if len(query) < 3 or query[-3] == key[-3]:
        return 1
    if not call["enable_gqa"] or query[-3] % key[-3]:
        raise NoRule("its queries and keys have different numbers of heads")
    return query[-3] // key[-3]


def _tokens(given: Any, repeats: int) -> _Tokens:
    if isinstance(given, Tensor):
        center = given.detach().to("cpu", torch.float64)
        norm = length(center)
        log, radius, shape = -math.inf, torch.zeros_like(norm), center.shape
    else:
        region, shape, log = given.region, given.shape, given.log_lipschitz
        center, norm, radius = region.center, region.norm, region.radius
        norm = torch.full((1,), math.inf, dtype=torch.float64) if norm is None else norm
        center = None if radius is None or center is None else center.expand(shape)

    def by_head(x: Tensor | None, width: int) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(*shape[:-1], width)
        return x.repeat_interleave(repeats, -3) if repeats > 1 else x

    return _Tokens(log, by_head(norm, 1), by_head(center, shape[-1]), by_head(radius, 1))


class _Mask(NamedTuple):
    """Added to the scores, `(..., queries, keys)`, -inf where a key is hidden; and which rows see none."""

    added: Tensor
    is_blind: Tensor


def _mask(call: Call, shapes: list[tuple[int, ...]]) -> _Mask:
    queries, keys = shapes[0][-2], shapes[1][-2]
    mask = torch.zeros(queries, keys, dtype=torch.float64)
    given = call["attn_mask"]
    if given is not None:
        given = given.detach().to("cpu")
        if given.dtype == torch.bool:
            mask = torch.where(given, 0.0, -math.inf).double()
        else:
            # What transformers adds to hide a key is the least number of the dtype. In exact arithmetic it hides up to
            # exp of minus that, which is nothing but in half precision.
            hidden = given.double() <= torch.finfo(torch.float32).min / 4
            mask = torch.where(hidden, -math.inf, given.double())
    if call["is_causal"]:
        mask = mask + torch.full((queries, keys), -math.inf, dtype=torch.float64).triu(1)
    # A row that sees nothing is uniform or zero.
    is_blind = torch.isinf(mask).all(-1, keepdim=True)
    mask = torch.where(is_blind, 0.0, mask)
    return _Mask(mask, is_blind)


def _on_norms(
    query: _Tokens, key: _Tokens, value: _Tokens, scale: float, mask: _Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """P, S_k and S_v from norms alone, and from the distance of the keys to their middle."""
    largest = _from_middle(key).amax(-2, keepdim=True)
    apart = 2 * scale * (query.norm * largest).nan_to_num(nan=math.inf)
    others = torch.where(torch.isinf(mask.added), -math.inf, mask.added - apart)
    most = share_of(mask.added.expand(others.shape), others)[0]
    weights = torch.where(torch.isfinite(mask.added), most.nan_to_num(nan=1.0), 0.0)
    return weights, largest.expand_as(query.norm), _from_middle(value).amax(-2, keepdim=True).expand_as(query.norm)


def _from_middle(tokens: _Tokens) -> Tensor:
    if tokens.center is None or tokens.radius is None:
        return tokens.norm
    middle = tokens.center.mean(-2, keepdim=True)
    away = length(tokens.center - middle) + tokens.radius
    is_nearer = away.amax(-2, keepdim=True) < tokens.norm.amax(-2, keepdim=True)
    return torch.where(is_nearer, away, tokens.norm)


def _on_ball(query: _Tokens, key: _Tokens, value: _Tokens, scale: float, mask: _Mask) -> tuple[Tensor, Tensor, Tensor]:
    """P, S_k and S_v from the attention at the center."""
    middle = key.center.mean(-2, keepdim=True)
    keys = key.center - middle
    present = (scale * query.center @ keys.mT + mask.added).softmax(-1)
    lengths = length(query.center)
    sizes = length(keys)
    most = scale * (lengths * key.radius.mT + query.radius * sizes.mT + query.radius * key.radius.mT)
    # exp of minus a large number is zero, and the quotient then at most 1 by the other bound.
    least = (present * torch.exp(-most)).sum(-1, keepdim=True)
    weights = torch.where(least > 0, present * torch.exp(most.clamp(max=700.0)) / least, 1.0)
    weights = torch.where(most > 700.0, 1.0, weights).clamp(max=1.0)
    weights = torch.where(torch.isfinite(mask.added), weights, 0.0) * _ROUNDING
    return weights, _deviation(weights, present, key), _deviation(weights, present, value)


def _deviation(weights: Tensor, present: Tensor, tokens: _Tokens) -> Tensor:
    """√‖Σ_j P_ij (x_j - m_i)(x_j - m_i)ᵀ‖ for each row, m_i the mean at the center."""
    away = tokens.center - tokens.center.mean(-2, keepdim=True)
    mean = present @ away
    moments = torch.einsum("...ij,...ja,...jb->...iab", weights, away, away)
    outer = (weights @ away).unsqueeze(-1) * mean.unsqueeze(-2)
    total = weights.sum(-1).unsqueeze(-1).unsqueeze(-1)
    scatter = moments - outer - outer.mT + total * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    # What cancels is lost relative to the moments.
    lost = 1e-12 * torch.linalg.matrix_norm(moments) + _TINY
    norm = (torch.linalg.matrix_norm(scatter) + lost).sqrt().unsqueeze(-1)
    return norm + length(weights.sqrt() * tokens.radius.mT)


def _moved(query: _Tokens, key: _Tokens, value: _Tokens, scale: float, spread_k: Tensor, spread_v: Tensor) -> Tensor:
    """How far each output moves: the derivative above, along the way from the center."""
    by_value, by_key = (tokens.radius.amax(-2, keepdim=True) for tokens in (value, key))
    return by_value + scale * spread_v * (spread_k * query.radius + query.norm * by_key)


def _region(call: Call, value: _Tokens, repeats: int, radius: Tensor | None, is_blind: Tensor) -> Region:
    """An output is a mean of values, or zero where it sees none."""
    norm = value.norm.amax(-2, keepdim=True).expand(*call.shape[:-1], 1)
    given = call["value"]
    if isinstance(given, Tensor):
        low = high = given.detach().to("cpu", torch.float64)
    else:
        low, high = given.region.lower, given.region.upper
        if low is None or high is None:
            return Region(norm=norm, radius=radius)
    low, high = (x.expand(tuple(given.shape)) for x in (low, high))
    if repeats > 1:
        low, high = (x.repeat_interleave(repeats, -3) for x in (low, high))
    low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    low = torch.where(is_blind, low.clamp(max=0), low)
    high = torch.where(is_blind, high.clamp(min=0), high)
    return Region(low, high, norm=norm, radius=radius)
