"""Operators that pick, move, repeat and pad entries: the constant counts how often each entry is there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hf_lipschitz.bounds.logs import log_root_sum_squares
from hf_lipschitz.bounds.regions import Region
from hf_lipschitz.bounds.registry import RULES, Call, NoRule, depends, rule
from hf_lipschitz.bounds.terms import CONSTANT, Term, counted, log_of_terms, origin_of, origin_of_itself
from hf_lipschitz.bounds.values import Dependent, Origin, Weighted


_aten = torch.ops.aten
# Operator: the arguments that hold entries, and those that hold a number to fill in.
_SELECTIONS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints),
            *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.unflatten.int, _aten.movedim.int),
            *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
            *(_aten.flip.default, _aten.roll.default, _aten.select.int, _aten.slice.Tensor, _aten.unfold.default),
            *(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int),
            *(_aten.expand.default, _aten.repeat.default, _aten.repeat_interleave.self_int, _aten.tile.default),
            *(_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.take_along_dim.default),
            *(_aten.reflection_pad1d.default, _aten.reflection_pad2d.default, _aten.reflection_pad3d.default),
            *(_aten.replication_pad1d.default, _aten.replication_pad2d.default, _aten.replication_pad3d.default),
            *(_aten.mT.default, _aten.numpy_T.default, _aten.pixel_shuffle.default, _aten.pixel_unshuffle.default),
            *(_aten.diagonal.default, _aten.narrow.default),
        ),
        (("self",), ()),
    ),
    _aten.constant_pad_nd.default: (("self",), ("value",)),
    _aten.pad.default: (("self",), ("value",)),
    _aten.masked_fill.Scalar: (("self",), ("value",)),
    _aten.masked_fill.Tensor: (("self", "value"), ()),
    _aten.where.self: (("self", "other"), ()),
    _aten.cat.default: (("tensors",), ()),
    _aten.stack.default: (("tensors",), ()),
    _aten.slice_scatter.default: (("self", "src"), ()),
    _aten.select_scatter.default: (("self", "src"), ()),
}
_SELECTIONS[_aten.im2col.default] = (("self",), ())


def selected(call: Call) -> Dependent | tuple[Dependent, ...]:
    r"""Each entry of the value is one of the entries of the arguments, or a constant.

    An entry that is there m times gives √m, attained; values from different arguments, or earlier values of the graph,
    stand side by side, \(\sqrt{\sum_b m_b L_b^2}\). Entries are followed through all such operators in a row, so that
    cutting a tensor in parts and joining them again costs nothing; see [`log_of_terms`].
    """
    data, _ = _SELECTIONS[call.operator]
    _check_constant(call, data)
    sources = _sources(call, data)
    results = _selected(call, sources, {id(source): origin_of(source) for source in sources})
    if any(result.log_lipschitz == math.inf for result in results):
        # Sums of too many terms: then the entries are those of the sources.
        results = _selected(call, sources, {id(source): origin_of_itself(source) for source in sources})
    if len(results) == 1 and len(sources) == 1 and sources[0].weighted is not None:
        results = [dataclasses.replace(results[0], weighted=_weighted(call, data, sources[0], results[0]))]
    return tuple(results) if len(results) > 1 or _gives_tuple(call) else results[0]


def _selected(call: Call, sources: list[Dependent], origins: dict[int, Origin]) -> list[Dependent]:
    data, numbers = _SELECTIONS[call.operator]
    bases = {id(origin.base): origin for origin in origins.values()}
    offsets = dict(zip(bases, itertools.accumulate([0, *(base.size for base in bases.values())]), strict=False))
    most = max(len(origin.terms) for origin in origins.values())
    terms = [_pushed_term(call, data, numbers, origins, offsets, number) for number in range(most)]
    count = len(terms[0])
    regions = _regions(call, data, sources, count)
    results = []
    for number, region in enumerate(regions):
        own = tuple(term[number] for term in terms)
        logs = [log_of_terms(base, own, offsets[key]) for key, base in bases.items()]
        origin = next(iter(bases.values()))._replace(terms=own) if len(bases) == 1 else None
        results.append(Dependent(log_root_sum_squares(logs), tuple(own[0].index.shape), region, origin))
    return results


def _gives_tuple(call: Call) -> bool:
    return call.operator in (
        *(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int),
    )


def _pushed_term(
    call: Call,
    data: tuple[str, ...],
    numbers: tuple[str, ...],
    origins: dict[int, Origin],
    offsets: dict[int, int],
    number: int,
) -> list[Term]:
    """One term of each entry of each part of the value."""

    def term_of(source: Dependent) -> Term | None:
        terms = origins[id(source)].terms
        return terms[number] if number < len(terms) else None

    def index(source: Dependent) -> Tensor:
        term, shift = term_of(source), offsets[id(origins[id(source)].base)]
        if term is None:
            return torch.full(source.shape, CONSTANT, dtype=torch.float64)
        return torch.where(term.index >= 0, term.index + shift, CONSTANT).expand(source.shape)

    def factor(source: Dependent) -> Tensor:
        term = term_of(source)
        return torch.zeros(source.shape, dtype=torch.float64) if term is None else term.factor.expand(source.shape)

    parts = [_as_list(_pushed(call, data, numbers, of, fill)) for of, fill in ((index, CONSTANT), (factor, 0.0))]
    return [Term(*pair) for pair in zip(*parts, strict=True)]


def _as_list(parts: Any) -> list[Tensor]:
    return list(parts) if isinstance(parts, (tuple, list)) else [parts]


for _operator in _SELECTIONS:
    RULES[_operator] = selected


@rule(
    *(_aten.clone.default, _aten.contiguous.default, _aten.detach.default, _aten.alias.default),
    *(_aten.lift_fresh_copy.default, _aten.detach_.default),
)
def same(call: Call) -> Dependent:
    """The same value. `detach` keeps it, whatever becomes of gradients."""
    return call.only("self")


@rule(_aten._to_copy.default, _aten.to.dtype, _aten.type_as.default)
def converted(call: Call) -> Dependent:
    """The same value in exact arithmetic; to integers it would jump."""
    value = call.only("self")
    dtype = call.arguments.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise NoRule(f"values become {dtype}, and jump")
    return value


@rule(_aten.dropout.default, _aten.alpha_dropout.default, _aten.feature_dropout.default)
def dropout(call: Call) -> Dependent:
    """The identity at evaluation."""
    if call["train"]:
        raise NoRule("dropout is active: put the model in evaluation mode")
    return call.only("input")


def _weighted(call: Call, data: tuple[str, ...], source: Dependent, result: Dependent) -> Weighted | None:
    """Whole tokens of a linear layer, each at most once, come from the same tokens of its argument."""
    weighted = source.weighted
    is_dense = weighted.geometry is None and weighted.axis == -1 and source.shape and result.shape
    if not is_dense or result.shape[-1] != source.shape[-1]:
        return None
    width = source.shape[-1]
    index = _pushed(call, data, _SELECTIONS[call.operator][1], lambda source: counted(source.shape), CONSTANT)
    is_whole = bool((index.remainder(width) == torch.arange(width)).all()) and bool((index >= 0).all())
    tokens = torch.div(index, width, rounding_mode="floor")
    is_one = bool((tokens == tokens[..., :1]).all()) and tokens[..., 0].unique().numel() == tokens[..., 0].numel()
    return weighted if is_whole and is_one else None


def _check_constant(call: Call, data: tuple[str, ...]) -> None:
    others = [name for name, value in call.arguments.items() if name not in data and depends(value)]
    if others:
        raise NoRule(f"which entries it takes depends on the input, through {', '.join(others)}")


def _sources(call: Call, data: tuple[str, ...]) -> list[Dependent]:
    leaves = pytree.tree_leaves([call[name] for name in data])
    return [leaf for leaf in leaves if isinstance(leaf, Dependent)]


def _pushed(
    call: Call,
    data: tuple[str, ...],
    numbers: tuple[str, ...],
    of: Callable[[Dependent], Tensor],
    constant: float | None,
) -> Any:
    """The value of the operator on other entries; `constant` takes the place of all constants, `None` keeps them."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Dependent):
            # A view of the graph need not be one of an expanded tensor.
            return of(leaf).contiguous()
        if isinstance(leaf, Tensor):
            wide = leaf.detach().double()
            return wide if constant is None else torch.full_like(wide, constant)
        return leaf

    arguments = dict(call.arguments)
    for name in data:
        arguments[name] = pytree.tree_map(other, arguments[name])
    if constant is not None:
        arguments |= dict.fromkeys(numbers, constant)
    if call.operator is _aten.pad.default and arguments["mode"] != "constant":
        arguments["value"] = None
    positional = [arguments[a.name] for a in call.operator._schema.arguments if not a.kwarg_only]
    named = {a.name: arguments[a.name] for a in call.operator._schema.arguments if a.kwarg_only}
    return call.operator(*positional, **named)


def _regions(call: Call, data: tuple[str, ...], sources: list[Dependent], count: int) -> list[Region]:
    if not any(source.region.is_known for source in sources):
        return [Region()] * count
    bounds = {}
    for name, unknown in (("lower", -math.inf), ("upper", math.inf)):

        def of(source: Dependent, name: str = name, unknown: float = unknown) -> Tensor:
            known = getattr(source.region, name)
            known = torch.tensor(unknown, dtype=torch.float64) if known is None else known
            return known.expand(source.shape)

        pushed = _pushed(call, data, (), of, None)
        bounds[name] = list(pushed) if isinstance(pushed, (tuple, list)) else [pushed]
    tokens = _token_bounds(call, data, sources, count) if len(sources) == 1 else [{}] * count
    return [
        Region(lower=lower, upper=upper, **more)
        for lower, upper, more in zip(bounds["lower"], bounds["upper"], tokens, strict=True)
    ]


def _token_bounds(call: Call, data: tuple[str, ...], sources: list[Dependent], count: int) -> list[dict[str, Tensor]]:
    """Norms along the last axis, where each token of the value is made of tokens of the one source."""
    (source,) = sources
    given = {name: part for name in ("norm", "radius") if (part := getattr(source.region, name)) is not None}
    if not given or not source.shape:
        return [{}] * count
    pushed = _pushed(call, data, _SELECTIONS[call.operator][1], lambda source: counted(source.shape), CONSTANT)
    parts = pushed if isinstance(pushed, (tuple, list)) else (pushed,)
    results = []
    for part in parts:
        bounds = {}
        # Constants in between move no norm of a difference, but one of a value.
        has_constants = bool((part < 0).any())
        for name, known in given.items():
            if part.dim() and part.numel() and not (name == "norm" and has_constants):
                bounds[name] = _of_tokens(part, known.expand(*source.shape[:-1], 1).flatten(), source.shape[-1])
        results.append(bounds)
    return results


def _of_tokens(index: Tensor, squares_root: Tensor, width: int) -> Tensor:
    """√Σ of the squares over the tokens that meet; inf where an entry is there twice."""
    ordered = index.sort(-1).values
    first, second = ordered[..., 1:], ordered[..., :-1]
    is_repeated = ((first == second) & (first >= 0)).any(-1, keepdim=True)
    token = torch.where(ordered >= 0, torch.div(ordered, width, rounding_mode="floor"), CONSTANT)
    is_new = torch.cat([torch.ones_like(token[..., :1], dtype=torch.bool), token[..., 1:] != token[..., :-1]], -1)
    known = squares_root[token.clamp(min=0).long()].square()
    total = torch.where(is_new & (token >= 0), known, 0.0).sum(-1, keepdim=True).sqrt()
    return torch.where(is_repeated, math.inf, total)
