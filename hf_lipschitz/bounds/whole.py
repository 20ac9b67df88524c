"""Modules that stand in the graph as one node: those of which a rule knows more than of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_lipschitz.bounds.registry import MODULE_RULES
from hf_lipschitz.nn.activations import SlopeCorrected


# Of transformers.activations, written out by hand there: the same function by one operator.
_BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": lambda x: functional.gelu(x, approximate="tanh"),
    "FastGELUActivation": lambda x: functional.gelu(x, approximate="tanh"),
    "AccurateGELUActivation": lambda x: functional.gelu(x, approximate="tanh"),
    "QuickGELUActivation": lambda x: functional.silu(1.702 * x) / 1.702,
}


@torch.library.custom_op("hf_lipschitz::whole", mutates_args=())
def whole(inputs: list[Tensor], key: int) -> list[Tensor]:
    """A module as one operator of a graph, which is only read."""
    raise RuntimeError("hf_lipschitz::whole stands for a module in a graph and cannot be run")


@whole.register_fake
def _(inputs: list[Tensor], key: int) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


WHOLE = torch.ops.hf_lipschitz.whole.default


@contextmanager
def whole_modules(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[dict[int, nn.Module]]:
    """Inside the block, modules with a rule of their own are single nodes in what is exported.

    Args:
        model (`torch.nn.Module`):
            Its modules get another `forward` for the time being.
        stand_ins (`Mapping[str, Module]`):
            By name, modules with a rule that compute what the model's own do.

    Yields:
        `dict[int, Module]`: the modules by the key under which they stand in the graph.
    """
    by_key: dict[int, nn.Module] = {}
    changed: list[nn.Module] = []
    try:
        for name, module in model.named_modules():
            forward = _by_hand(module)
            stand_in = stand_ins.get(name, module)
            if type(stand_in) in MODULE_RULES and not _is_plain(stand_in):
                by_key[len(by_key)] = stand_in
                forward = _as_node(len(by_key) - 1)
            if forward is not None and "forward" not in module.__dict__:
                module.__dict__["forward"] = forward
                changed.append(module)
        yield by_key
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, SlopeCorrected) and not module.is_corrected


def _by_hand(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    kind = type(module)
    return _BY_HAND.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


def _as_node(key: int) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def forward(*inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = WHOLE([*inputs, *named.values()], key)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return forward
