"""Entries that are sums of a few multiples of entries of an earlier value, and the norm of that linear map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.bounds.values import Dependent, Origin


CONSTANT = -1.0
# Of the sums that are followed, and of the products of entries that their Gram matrix may take.
_MOST_TERMS, _MOST_PRODUCTS = 4, 2**25
# Covers the sums of a few dozen products in float64.
_ALLOWANCE = 1 + 1e-12
_ROUNDOFF = 2.0**-53
# Products below it may have underflowed.
_LEAST = 1e-290


class Term(NamedTuple):
    """For each entry a position in the base, -1 for none, and the factor there; both float64."""

    index: Tensor
    factor: Tensor


def origin_of(value: Dependent) -> Origin:
    """Where the entries of a value come from; itself, if nothing is known."""
    return origin_of_itself(value) if value.origin is None else value.origin


def origin_of_itself(value: Dependent) -> Origin:
    """Each entry is one of this value."""
    return Origin(value, value.log_lipschitz, value.size, (Term(counted(value.shape), _ONE.expand(value.shape)),))


def counted(shape: Sequence[int]) -> Tensor:
    """Positions in a tensor of this shape, in float64."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(tuple(shape))


def log_of_terms(origin: Origin, terms: Sequence[Term], first: int = 0) -> float:
    r"""log of the constant of the base times the norm of the map A from it, of which the rows are the terms.

    With one term a row, AᵀA is diagonal and the norm is exact: the largest \(\sqrt{\sum f^2}\) over the entries of the
    base. With more, \(\|A\|^2 = \|A^\top A\|_2 \le \|A^\top A\|_\infty\), the largest sum of absolute values of a row
    (Gershgorin), which is exact for rotations of pairs, as rotary positions are.

    Args:
        origin (`Origin`):
            Base and size.
        terms (`Sequence[Term]`):
            Of which those with an index in [first, first + size) count.
        first (`int`, *optional*, defaults to 0):
            Where the base begins.

    Returns:
        `float`: a **sound bound**; inf where there are too many terms.
    """
    if len(terms) > _MOST_TERMS or len(terms) ** 2 * terms[0].index.numel() > max(
        _MOST_PRODUCTS, terms[0].index.numel()
    ):
        return math.inf
    inside = [_inside(term, first, origin.size) for term in terms]
    is_met = any(bool(((term.index >= first) & (term.index < first + origin.size)).any()) for term in terms)
    if origin.log_lipschitz == math.inf and is_met:
        # Nothing is known of such a value, not even that zero times it is zero.
        return math.inf
    norm = _norm(inside, origin.size)
    return origin.log_lipschitz + math.log(norm) if norm > 0 else -math.inf


def multiplied(origin: Origin, factor: Tensor, shape: Sequence[int]) -> Origin | None:
    """Of the product with a constant, both of which broadcast to `shape`; `None` where factors under- or overflow."""
    factor = factor.expand(tuple(shape))
    terms = []
    for term in origin.terms:
        before = term.factor.expand(tuple(shape))
        product = before * factor
        is_lost = (product.abs() < _LEAST) & (before != 0) & (factor != 0) | ~torch.isfinite(product)
        if bool(is_lost.any()):
            return None
        terms.append(Term(term.index.expand(tuple(shape)), product))
    return origin._replace(terms=tuple(terms))


def added(first: Origin | None, second: Origin | None, shape: Sequence[int]) -> Origin | None:
    """Of the sum of two values of one base; `None` where the bases differ or the terms are too many."""
    if (
        first is None
        or second is None
        or first.base is not second.base
        or len(first.terms) + len(second.terms) > _MOST_TERMS
    ):
        return None
    terms = (*first.terms, *second.terms)
    shape = tuple(shape)
    return first._replace(terms=tuple(Term(term.index.expand(shape), term.factor.expand(shape)) for term in terms))


_ONE = torch.ones((), dtype=torch.float64)


def _inside(term: Term, first: int, size: int) -> Term:
    index = term.index.flatten() - first
    factor = term.factor.expand(term.index.shape).flatten()
    is_inside = (index >= 0) & (index < size)
    return Term(torch.where(is_inside, index, 0.0).long(), torch.where(is_inside, factor, 0.0))


def _norm(terms: list[Term], size: int) -> float:
    if not terms[0].index.numel():
        return 0.0
    largest = max(term.factor.abs().max().item() for term in terms)
    if largest == 0:
        return 0.0
    if len(terms) == 1:
        ((index, factor),) = terms
        most = torch.bincount(index[factor != 0], minlength=size).max().item()
        total = torch.bincount(index, (factor / largest).square(), size).max().sqrt().item()
        return total * largest * (_ALLOWANCE + most * _ROUNDOFF)
    keys = torch.cat([a.index * size + b.index for a in terms for b in terms])
    products = torch.cat([(a.factor / largest) * (b.factor / largest) for a in terms for b in terms])
    pairs, places = keys.unique(return_inverse=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, places, products)
    rows = torch.bincount(torch.div(pairs, size, rounding_mode="floor"), sums.abs(), size)
    most = len(terms) ** 2 * torch.cat([index for index, _ in terms]).bincount().max().item()
    return rows.max().sqrt().item() * largest * (_ALLOWANCE + most * _ROUNDOFF)
