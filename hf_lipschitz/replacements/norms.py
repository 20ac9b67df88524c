"""replace="norms": norms with a finite Lipschitz constant, and batch norms folded away."""

from __future__ import annotations

import logging

from torch import nn

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.dataflow import BATCH_NORMS, fusible_batch_norms
from hf_lipschitz.replacements.batch_norms import fuse
from hf_lipschitz.replacements.recognition import BATCH_NORM_KINDS, bounded_norm, is_norm
from hf_lipschitz.replacements.swap import swap


logger = logging.getLogger(__name__)

# Between the name of a batch norm and that of the layer it is folded into.
_INTO = "<"


def find(model: nn.Module, config: LipschitzConfig) -> tuple[str, ...]:
    """The norms that can be replaced.

    Layer, RMS and group norms are recognised by what they compute, whatever their class. A batch norm is folded into
    the convolution or Linear before it where nothing else uses what that gives; the entry is then
    `"batch_norm<layer"`. What cannot be covered keeps its place and is named in a warning.

    Args:
        model (`torch.nn.Module`):
            Plain, with its weights.
        config (`LipschitzConfig`):
            `norm` chooses `"floor"` or `"centred"`.

    Returns:
        `tuple[str]`: for [`apply`].

    Raises:
        ValueError: nothing can be replaced; or something cannot, and `config.strict`.
    """
    names, refused = [], {}
    for name, module in model.named_modules():
        if is_norm(module) and "parametrizations" not in name.split("."):
            try:
                bounded_norm(module, config.norm)
            except ValueError as error:
                refused[name] = str(error)
            else:
                names.append(name)
    fused, unfused = _batch_norms(model)
    names += [norm + _INTO + layer for norm, layer in fused]
    refused |= unfused
    if refused:
        named = "; ".join(
            f"{name} ({type(model.get_submodule(name)).__name__}): {why}" for name, why in refused.items()
        )
        if config.strict:
            raise ValueError(f"strict=True, and norms cannot be replaced: {named}. Set strict=False to leave them")
        logger.warning("replace=norms leaves %d norms as they are, without a bound: %s", len(refused), named)
    if not names:
        raise ValueError(f"{type(model).__name__} has no norm that can be replaced; leave 'norms' out of replace")
    return tuple(names)


def apply(model: nn.Module, config: LipschitzConfig, names: tuple[str, ...]) -> None:
    """Replaces the named norms, in place; also on the meta device.

    The parameters keep their names and are the same objects. Floor norms bring the buffer `s_min`, which changes
    nothing until `calibrate` sets it; centred norms change the function.

    Raises:
        ValueError: a name is not that of a norm as [`find`] gives them.
    """
    for entry in names:
        name, _, layer = entry.partition(_INTO)
        module = model.get_submodule(name)
        if layer:
            fuse(module, model.get_submodule(layer))
            swap(model, module, nn.Identity())
            continue
        try:
            swap(model, module, bounded_norm(module, config.norm))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}) cannot be replaced: {error}") from error
    if config.norm == "centred" and any(_INTO not in entry for entry in names):
        logger.warning("norm='centred' changes what the model computes: it needs training")


def _batch_norms(model: nn.Module) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """Pairs to fold, and why the other batch norms stay."""
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if not list(m.children())}
    there = [name for name, kind in kinds.items() if any(k in kind for k in BATCH_NORM_KINDS)]
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return (), dict.fromkeys(there, "not a batch norm of torch")
    try:
        fused = fusible_batch_norms(model)
    except ValueError as error:
        return (), dict.fromkeys(there, str(error))
    norms = {norm for norm, _ in fused}
    why = "it does not follow one layer of its own, or has no running statistics"
    return fused, {name: why for name in there if name not in norms}
