"""Replacing what no weight bounds: norms, attention, activations, residual sums, feed-forward pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from hf_lipschitz.blocks import apply_blocks, block_layers, find_blocks, layout_of
from hf_lipschitz.configuration import REPLACEMENTS, LipschitzConfig
from hf_lipschitz.replacements import activations, attention, norms, residuals


logger = logging.getLogger(__name__)

BLOCKS = "blocks"
# Separates the parts of an entry: names of modules, and the number of an axis.
SEPARATOR = "<"

Replaced = Mapping[str, tuple[str, ...]]


class Kind(NamedTuple):
    """`find` names what can be replaced in a plain model, `apply` does it, also on the meta device."""

    find: Callable[[nn.Module, LipschitzConfig], tuple[str, ...]]
    apply: Callable[[nn.Module, LipschitzConfig, tuple[str, ...]], None]


KINDS = {
    "norms": Kind(norms.find, norms.apply),
    "attention": Kind(attention.find, attention.apply),
    "activations": Kind(activations.find, activations.apply),
    "residuals": Kind(residuals.find, residuals.apply),
}


def find_replacements(model: nn.Module, config: LipschitzConfig) -> dict[str, tuple[str, ...]]:
    """What `config` asks to replace in a plain model, by kind, with what each kind names; the model is unchanged.

    Raises:
        ValueError: a kind that is asked for by name has nothing to replace, or something that cannot be replaced. With
            `replace="all"` and `strict=False` that is a warning, but for attention that cannot be clipped.
    """
    found: dict[str, tuple[str, ...]] = {}
    blocks = find_blocks(model) if config.sll_blocks else ()
    if blocks:
        found[BLOCKS] = blocks
    taken = set(block_layers(model, blocks)) | _inside(model, blocks)
    is_all = config.replace == REPLACEMENTS
    for kind, (find, _) in KINDS.items():
        if kind not in config.replace:
            continue
        try:
            names = find(model, config)
        except ValueError as error:
            if not is_all or config.strict or kind == "attention":
                raise
            logger.warning('replace="all" leaves out %s: %s', kind, error)
            continue
        names = tuple(entry for entry in names if entry.partition(SEPARATOR)[0] not in taken)
        if names:
            found[kind] = names
        elif not is_all:
            raise ValueError(f"{type(model).__name__} has no {kind} to replace; leave {kind!r} out of replace")
    return found


def apply_replacements(model: nn.Module, config: LipschitzConfig, found: Replaced) -> None:
    """Replaces what [`find_replacements`] named, in place; also on the meta device.

    Raises:
        ValueError: a name is not that of such a part.
    """
    if BLOCKS in found:
        kind = "cpl" if config.method == "cpl" else "sll"
        apply_blocks(model, found[BLOCKS], kind, config.num_iterations or 1)
    for kind, (_, apply) in KINDS.items():
        if kind in found:
            apply(model, config, found[kind])


def _inside(model: nn.Module, blocks: tuple[str, ...]) -> set[str]:
    """The activations and norms of blocks, which are replaced with them."""
    found = set()
    for name in blocks:
        layout = layout_of(model.get_submodule(name))
        found |= {f"{name}.{part}" for part in (layout.activation, layout.norm) if part is not None}
    return found
