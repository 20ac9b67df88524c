"""Lipschitz bounds of softmax attention: with clipped queries, keys and values everywhere, and of any on a ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_matrix
from hf_lipschitz.functional.products import gamma
from hf_lipschitz.functional.spectral_norm import spectral_norm_bound


MASKS = ("none", "causal", "any")
INPUTS = ("self", "query", "context", "joint")

# Of some ten operations in float64, and of a sum that is exact up to its last rounding.
_ROUNDING = 1 + 1e-12
_LARGEST_EXPONENT = 700.0


def attention_column_sum_bound(
    score_range: float, *, num_keys: int | None, num_queries: int | None = None, mask: str | Tensor = "none"
) -> float:
    r"""Bound c of the column sums of a softmax attention matrix, so that its spectral norm is at most √c.

    A row whose \(m_i\) visible scores lie within Δ of each other has no weight above
    \(1/(1 + (m_i - 1)e^{-\Delta})\). A column is the sum of those of the rows that see it; the rows sum to at most 1,
    and \(\|P\|_2^2 \le \|P\|_1\|P\|_\infty \le c\).

    Args:
        score_range (`float`):
            Δ, the largest difference of two visible scores of a row, additive biases included.
        num_keys (`int`, *optional*):
            n_k. `None` stands for self-attention of any length.
        num_queries (`int`, *optional*):
            n_q; `num_keys` when left out.
        mask (`str` or `Tensor`, *optional*, defaults to `"none"`):
            `"none"`: every row sees every key, which excludes padding. `"causal"`: row i sees its first i keys or
            more. `"any"`: whatever the mask is, c = n_q. A boolean tensor of shape `(..., n_q, n_k)`, true where a key
            is visible, gives the largest c of its matrices, and an integer tensor of shape `(..., n_q)` the
            number of visible keys of each row. A row that sees nothing counts as one that sees everything: softmax
            makes it uniform or zero, both of which are covered.

    Returns:
        `float`: a **sound bound**, rounded up; `inf` where there is none.

    Raises:
        ValueError: a size, the range or the mask makes no sense, or they do not fit together.
        TypeError: `mask` is neither a string nor a boolean or integer tensor.
    """
    if not score_range >= 0:
        raise ValueError(f"score_range must be at least 0, got {score_range}")
    if num_keys is None and (num_queries is not None or isinstance(mask, Tensor)):
        raise ValueError("num_keys=None means self-attention of any length: give num_keys with num_queries or a mask")
    num_queries = num_keys if num_queries is None else num_queries
    for name, size in (("num_keys", num_keys), ("num_queries", num_queries)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    decay = math.exp(-score_range)
    if isinstance(mask, Tensor):
        return _ROUNDING * _column_sum_of_mask(mask, decay, num_queries, num_keys)
    if mask not in MASKS:
        raise ValueError(f"unknown mask {mask!r}; known: {', '.join(MASKS)}, or a boolean or integer tensor")
    if num_keys is None:
        return _ROUNDING * math.exp(score_range) if mask == "none" and score_range < _LARGEST_EXPONENT else math.inf
    if mask == "any":
        return float(num_queries)
    if mask == "none":
        return _ROUNDING * num_queries / (1 + (num_keys - 1) * decay)
    if num_queries > num_keys:
        raise ValueError(f"a causal mask needs num_queries <= num_keys, got {num_queries} and {num_keys}")
    return _ROUNDING * math.fsum(1 / (1 + i * decay) for i in range(num_queries))


def ball_attention_bound(
    w_q: Tensor | float,
    w_k: Tensor | float,
    w_v: Tensor | float,
    w_o: Tensor | float,
    *,
    radius_q: float,
    radius_k: float,
    radius_v: float,
    num_heads: int,
    num_keys: int | None,
    num_key_value_heads: int | None = None,
    num_queries: int | None = None,
    scaling: float | None = None,
    mask: str | Tensor = "none",
    bias_range: float = 0.0,
    wrt: str = "self",
) -> float:
    r"""Global Lipschitz bound of multi-head attention whose queries, keys and values are clipped to balls.

    Each query, key and value of a head and token is multiplied by min(1, r/‖·‖), with one radius a kind, before
    ordinary softmax attention. With s the `scaling`, c of [`attention_column_sum_bound`] for
    \(\Delta = 2|s|r_qr_k\) plus the range of the additive bias, and ρ = num_heads / num_key_value_heads,

    \(L = \|W_O\|\,\big(\sqrt{c\rho}\,\|W_V\| + |s|r_kr_v\|W_Q\| + \sqrt{c\rho}\,|s|r_qr_v\|W_K\|\big)\).

    Proof. Clipping is 1-Lipschitz. With P the attention matrix and \(m_i = \sum_j P_{ij}v_j\), an output moves by
    \(\sum_j P_{ij}\,dv_j + s\sum_j P_{ij}(dq_i\cdot k_j + q_i\cdot dk_j)(v_j - m_i)\). The first term is P applied to
    dv, and ‖P‖ ≤ √c. In the second, \(\sum_j P_{ij}(k_j\cdot dq_i)(v_j - m_i)\cdot u\) is a covariance, at most the
    product of the standard deviations, r_k‖dq_i‖ r_v. In the third, the covariance is at most
    \(r_qr_v\big(\sum_j P_{ij}\|dk_j\|^2\big)^{1/2}\), and the sum over i of its square at most
    \(r_q^2r_v^2c\sum_j\|dk_j\|^2\). Squares add up over heads, each key and value serves ρ of them, and no factor in
    the number of heads is left. Biases of the projections change nothing.

    Args:
        w_q, w_k, w_v, w_o (`Tensor` of shape `(out, in)` or `float`):
            The projections, as `nn.Linear` stores them, or upper bounds of the Lipschitz constants of the maps to all
            queries, keys and values, and from the joined heads to the output: a norm or a rotation with a scale
            between the projection and the product belongs in there.
        radius_q, radius_k, radius_v (`float`):
            Positive; `inf` is no clipping.
        num_heads (`int`):
            Of the queries.
        num_keys (`int`, *optional*):
            The number of keys, `None` for self-attention of any length.
        num_key_value_heads (`int`, *optional*):
            `num_heads` when left out; fewer in grouped-query attention.
        num_queries (`int`, *optional*):
            `num_keys` when left out.
        scaling (`float`, *optional*):
            What the products are multiplied by; 1/√d when left out, d the rows of `w_q` divided by `num_heads`.
        mask (`str` or `Tensor`, *optional*, defaults to `"none"`):
            See [`attention_column_sum_bound`].
        bias_range (`float`, *optional*, defaults to `0.0`):
            Largest difference, within a row, of the biases added to the scores of visible keys.
        wrt (`str`, *optional*, defaults to `"self"`):
            `"self"`: queries, keys and values come from one input. Cross-attention: `"query"` moves the input of the
            queries alone, `"context"` that of keys and values alone, `"joint"` both, in the norm
            \(\sqrt{\|dx\|^2 + \|dy\|^2}\).

    Returns:
        `float`: a **sound bound** in exact arithmetic of the stored weights, computed in float64 and rounded up; `inf`
        where a radius is.

    Raises:
        ValueError: a size, radius, mask or `wrt` is impossible, or `scaling` is missing where `w_q` is a number.
        TypeError: a weight is neither a floating-point tensor nor a number.
    """
    if wrt not in INPUTS:
        raise ValueError(f"unknown wrt {wrt!r}; known: {', '.join(INPUTS)}")
    if wrt == "self" and num_queries not in (None, num_keys):
        raise ValueError("wrt='self' has as many queries as keys: leave num_queries out, or use 'joint'")
    for name, radius in (("radius_q", radius_q), ("radius_k", radius_k), ("radius_v", radius_v)):
        if not radius > 0:
            raise ValueError(f"{name} must be positive, got {radius}")
    _check_not_negative("bias_range", bias_range)
    repeats = _repeats(num_heads, num_key_value_heads)
    scaling = abs(scaling) if scaling is not None else _default_scaling(w_q, num_heads)
    score_range = _ROUNDING * (2 * _product(scaling, radius_q, radius_k) + bias_range)
    column_sum = attention_column_sum_bound(score_range, num_keys=num_keys, num_queries=num_queries, mask=mask)
    spread = math.sqrt(column_sum * repeats)
    by_query = _product(scaling, radius_k, radius_v, _norm("w_q", w_q))
    by_key = _product(spread, scaling, radius_q, radius_v, _norm("w_k", w_k))
    by_context = _product(spread, _norm("w_v", w_v)) + by_key
    total = {
        "self": by_query + by_context,
        "query": by_query,
        "context": by_context,
        "joint": math.hypot(by_query, by_context),
    }
    return _ROUNDING * _product(_norm("w_o", w_o), total[wrt])


def attention_bound_on_ball(
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor | float,
    *,
    radius: float,
    num_heads: int,
    num_keys: int | None,
    bias_q: Tensor | None = None,
    num_key_value_heads: int | None = None,
    scaling: float | None = None,
    mask: str | Tensor = "none",
    bias_range: float = 0.0,
) -> float:
    r"""Lipschitz bound of ordinary self-attention on the tokens of norm at most R, which no clipping enforces.

    For head h let \(A = sW_Q^\top W_K\), \(e = |s|\,\|W_K^\top b_Q\|\) and \(\Delta = 2R(\|A\|R + e)\) plus the range
    of the additive bias. Then

    \(L_h = \|W_V\|\big(\sqrt c + \|A\|R^2 + \sqrt c\,R(\|A\|R + e)\big)\) and \(L = \|W_O\|\sqrt{\sum_h L_h^2}\).

    The biases of keys and values cancel in the softmax and in the covariance; that of the queries does not. The proof
    is that of [`ball_attention_bound`] with the tokens themselves in the place of the keys.

    Args:
        w_q, w_k, w_v (`Tensor` of shape `(out, in)`):
            As `nn.Linear` stores them. Nothing may stand between them and the products: with rotary positions or
            norms of queries and keys the bound does not apply.
        w_o (`Tensor` or `float`):
            The output projection or an upper bound of its norm.
        radius (`float`):
            R, positive and finite; after a LayerNorm √d max|γ| + ‖β‖.
        num_heads (`int`):
            Of the queries.
        num_keys (`int`, *optional*):
            The number of tokens, `None` for any.
        bias_q (`Tensor` of shape `(out,)`, *optional*):
            Bias of the queries.
        num_key_value_heads, scaling, mask, bias_range:
            See [`ball_attention_bound`].

    Returns:
        `float`: a **sound bound** on that set, computed in float64 and rounded up.

    Raises:
        ValueError: a size, the radius or the mask is impossible, or the weights do not fit together.
        TypeError: a weight is not a floating-point tensor.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    _check_not_negative("bias_range", bias_range)
    for name, w in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v)):
        check_matrix(w, name)
    repeats = _repeats(num_heads, num_key_value_heads)
    scaling = abs(scaling) if scaling is not None else _default_scaling(w_q, num_heads)
    queries = _heads("w_q", w_q, num_heads)
    keys = _heads("w_k", w_k, num_heads // repeats).repeat_interleave(repeats, 0)
    values = _heads("w_v", w_v, num_heads // repeats)
    if queries.shape != keys.shape:
        raise ValueError(f"w_q and w_k have heads of shapes {tuple(queries.shape[1:])} and {tuple(keys.shape[1:])}")
    inner = queries.shape[1]
    loss = gamma(inner + 2, is_complex=False) * _frobenius(queries) * _frobenius(keys)
    products = spectral_norm_bound(queries.mT @ keys, certified=True)[1] + loss
    shifts = torch.zeros_like(products)
    if bias_q is not None:
        bias = bias_q.detach().double().reshape(num_heads, inner, 1)
        lost = gamma(inner + 2, is_complex=False) * _frobenius(keys) * _frobenius(bias)
        shifts = torch.linalg.vector_norm(keys.mT @ bias, dim=(1, 2)) + lost
    value_norms = spectral_norm_bound(values, certified=True)[1].repeat_interleave(repeats)
    bounds = []
    for product, shift, value in zip(products.tolist(), shifts.tolist(), value_norms.tolist(), strict=True):
        slope = _ROUNDING * scaling * (product * radius + shift)
        score_range = _ROUNDING * (2 * radius * slope + bias_range)
        spread = math.sqrt(attention_column_sum_bound(score_range, num_keys=num_keys, mask=mask))
        bounds.append(_product(value, spread + scaling * product * radius**2 + _product(spread, radius, slope)))
    return _ROUNDING * _product(_norm("w_o", w_o), math.hypot(*bounds))


def _column_sum_of_mask(mask: Tensor, decay: float, num_queries: int, num_keys: int) -> float:
    if mask.dtype == torch.bool:
        if mask.dim() < 2 or mask.shape[-2] not in (1, num_queries) or mask.shape[-1] != num_keys:
            raise ValueError(
                f"a boolean mask must have shape (..., {num_queries}, {num_keys}), got {tuple(mask.shape)}"
            )
        mask = mask.expand(*mask.shape[:-2], num_queries, num_keys)
        visible = mask | ~mask.any(-1, keepdim=True)
        weights = 1 / (1 + (visible.sum(-1, keepdim=True) - 1).double() * decay)
        return (visible * weights).sum(-2).max().item()
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            "an additive mask does not say what is visible: give a boolean mask, and the range of the rest as a bias"
        )
    if mask.dim() < 1 or mask.shape[-1] != num_queries:
        raise ValueError(f"counts of visible keys must have shape (..., {num_queries}), got {tuple(mask.shape)}")
    if not bool(((mask >= 0) & (mask <= num_keys)).all()):
        raise ValueError(f"counts of visible keys must be within 0 and num_keys = {num_keys}")
    counts = torch.where(mask == 0, num_keys, mask).double()
    return (1 / (1 + (counts - 1) * decay)).sum(-1).max().item()


def _norm(name: str, w: Tensor | float) -> float:
    if isinstance(w, Tensor):
        check_matrix(w, name)
        if w.dim() != 2:
            raise ValueError(f"{name} must be one matrix, got shape {tuple(w.shape)}")
        return spectral_norm_bound(w, 1e-4, certified=True)[1].item()
    if isinstance(w, bool) or not isinstance(w, (int, float)):
        raise TypeError(f"{name} must be a torch.Tensor or a number, got {type(w).__name__}")
    _check_not_negative(name, w)
    return float(w)


def _product(*factors: float) -> float:
    """0 · inf is 0: a weight of zeros moves nothing, whatever the radius."""
    return 0.0 if 0 in factors else math.prod(factors)


def _repeats(num_heads: int, num_key_value_heads: int | None) -> int:
    groups = num_heads if num_key_value_heads is None else num_key_value_heads
    if num_heads < 1 or groups < 1 or num_heads % groups:
        raise ValueError(f"num_heads must be a multiple of num_key_value_heads, got {num_heads} and {groups}")
    return num_heads // groups


def _default_scaling(w_q: Tensor | float, num_heads: int) -> float:
    if not isinstance(w_q, Tensor):
        raise ValueError("scaling is needed where w_q is a number: pass scaling=1/sqrt(d) of the module")
    if w_q.dim() != 2 or w_q.shape[0] % num_heads:
        raise ValueError(f"w_q must have shape (num_heads * d, in), got {tuple(w_q.shape)} for {num_heads} heads")
    return (w_q.shape[0] // num_heads) ** -0.5


def _heads(name: str, w: Tensor, num_heads: int) -> Tensor:
    if w.dim() != 2 or w.shape[0] % num_heads:
        raise ValueError(f"{name} must have shape (heads * d, in), got {tuple(w.shape)} for {num_heads} heads")
    return w.detach().double().reshape(num_heads, -1, w.shape[1])


def _frobenius(heads: Tensor) -> Tensor:
    return torch.linalg.vector_norm(heads, dim=(1, 2))


def _check_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
