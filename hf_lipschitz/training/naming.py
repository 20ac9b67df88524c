"""Modules by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def matching_modules(model: nn.Module, names: Sequence[str], argument: str) -> list[str]:
    """The dotted names of a model's modules that `names` name.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        names (`Sequence[str]`):
            Names of modules, or endings of names after a dot.
        argument (`str`):
            What the names were given as, for the error.

    Returns:
        `list[str]`: each once, in the order of the model.

    Raises:
        ValueError: there are no names, they are one string, or one matches nothing.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"{argument} must be a list of at least one name of a module, got {names!r}")
    known = [name for name, _ in model.named_modules() if name]
    matched: set[str] = set()
    for ending in names:
        found = {name for name in known if name == ending or name.endswith(f".{ending}")}
        if not found:
            raise ValueError(
                f"{argument}: {type(model).__name__} has no module {ending!r}; the last are {', '.join(known[-5:])}"
            )
        matched |= found
    return [name for name in known if name in matched]
