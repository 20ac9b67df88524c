"""The weights that the modules of a model use, constrained ones by their values, and others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.nn.parametrized import own_parametrizations


def trained_weights(model: nn.Module) -> list[Tensor]:
    """Every tensor that modules use as a parameter and that is trained, each once.

    Of a parametrized one it is the value, and what it is made of is left out. Inside `parametrize.cached()` the values
    are those of the forward.
    """
    found: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            found |= {id(tensor): tensor for tensor in _own_tensors(module).values() if tensor.requires_grad}
    return list(found.values())


@contextmanager
def replaced(model: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block, each module that uses one of `weights` finds the value in its place, tied ones everywhere.

    No parameter is written: instances get an attribute in front of the parameter, and parametrized ones their original
    class, for the length of the block.

    Args:
        model (`torch.nn.Module`):
            Inside `parametrize.cached()`, if any of its weights is parametrized.
        weights (`Sequence[Tensor]`):
            As [`trained_weights`] finds them.
        values (`Sequence[Tensor]`):
            Of the same shapes. They may have a graph.

    Raises:
        ValueError: a weight belongs to a recurrent layer of torch, which keeps its weights elsewhere as well.
    """
    chosen = {id(weight): value for weight, value in zip(weights, values, strict=True)}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if "parametrizations" in name.split("."):
                continue
            own = _own_tensors(module)
            if not any(id(tensor) in chosen for tensor in own.values()):
                continue
            if isinstance(module, nn.RNNBase):
                raise ValueError(
                    f"curvature='sam' cannot move the weights of {type(module).__name__} {name}: name other modules "
                    "by curvature_modules"
                )
            stack.enter_context(_attributes(module, {n: chosen.get(id(t), t) for n, t in own.items()}))
        yield


@contextmanager
def _attributes(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    present = module.__class__
    if own_parametrizations(module):
        # The properties of the parametrized class would come first.
        module.__class__ = parametrize.type_before_parametrizations(module)
    module.__dict__.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del module.__dict__[name]
        module.__class__ = present


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    return {name: getattr(module, name) for name in (*names, *own_parametrizations(module))}
