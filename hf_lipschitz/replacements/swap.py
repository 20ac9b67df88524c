"""Putting one module in the place of another."""

from __future__ import annotations

from torch import nn


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `model` holds `old`, which may be under several names; `new` gets the mode of `old`.

    Raises:
        ValueError: `model` does not hold `old`.
    """
    places = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    if not places:
        raise ValueError(f"{type(model).__name__} does not hold the {type(old).__name__} that is to be replaced")
    new.train(old.training)
    for parent, key in places:
        setattr(parent, key, new)
