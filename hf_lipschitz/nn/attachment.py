"""Putting constraints on modules, finding them, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.nn.blocks import TiedParametrization
from hf_lipschitz.nn.constraint import Constraint
from hf_lipschitz.nn.parametrized import own_parametrizations, plain_class
from hf_lipschitz.nn.weight_norm import (
    WeightNormStage,
    has_weight_norm,
    plain_names,
    plain_tensors,
    put_together,
    take_apart,
)


class ConstrainedLayer(NamedTuple):
    """A parametrized tensor of a model: `module.tensor_name`, under the dotted `name` of its module."""

    name: str
    module: nn.Module
    tensor_name: str
    parametrization: Constraint

    @property
    def full_name(self) -> str:
        """Of the tensor in a plain model."""
        return f"{self.name}.{self.tensor_name}" if self.name else self.tensor_name

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer uses, detached."""
        with torch.no_grad():
            return getattr(self.module, self.tensor_name).detach()

    @property
    def stage(self) -> WeightNormStage | None:
        """The weight norm before the constraint."""
        first = self.module.parametrizations[self.tensor_name][0]
        return first if isinstance(first, WeightNormStage) else None

    @property
    def plain_tensors(self) -> dict[str, Tensor]:
        """What a plain module stores in the place of the constrained tensor; empty tensors where it has no equal."""
        found = plain_tensors(self.tensor_name, self.effective_weight, self.stage)
        if self.parametrization.has_plain_form:
            return found
        # Of a wrong shape, so that a plain model refuses the file instead of computing something else.
        return {name: tensor[..., :0].contiguous() for name, tensor in found.items()}


def constrained_layers(model: nn.Module) -> Iterator[ConstrainedLayer]:
    """Every tensor of `model` under a [`Constraint`], each module once."""
    for name, module in model.named_modules():
        yield from _layers_of(module, name)


def attach(module: nn.Module, tensor_name: str, constraint: Constraint, constant: float | None) -> None:
    """Registers the constraint on `module.tensor_name`; `constant=None` keeps the layer's present norm.

    The state dict of the module then holds the raw weight and the constant under the parametrized keys, and the
    effective weight under the plain key, so that the weights load as well where this library is not installed. torch's
    weight norm stays, in front of the constraint.

    Raises:
        ValueError: the weight holds NaN or inf, or the tensor is parametrized already.
    """
    stage = take_apart(module, tensor_name) if has_weight_norm(module, tensor_name) else None
    if parametrize.is_parametrized(module, tensor_name):
        raise ValueError(f"layer {constraint.name} is parametrized already: remove its parametrizations first")
    check_named_weight(constraint.name, module.get_parameter(tensor_name))
    if stage is not None:
        # Registering takes the direction for a weight and sets the magnitude to its norm.
        magnitude = stage.magnitude.detach().clone()
        parametrize.register_parametrization(module, tensor_name, stage, unsafe=True)
        with torch.no_grad():
            stage.magnitude.copy_(magnitude)
    parametrize.register_parametrization(module, tensor_name, constraint, unsafe=True)
    constraint.bind(module.parametrizations[tensor_name], constant)
    if not hasattr(module, "_lipschitz_state_dict_hooks"):
        module._lipschitz_state_dict_hooks = True
        module.register_state_dict_pre_hook(_refresh_before_saving)
        module.register_state_dict_post_hook(_add_effective_weights)
        module.register_load_state_dict_pre_hook(_drop_effective_weights)
        module.register_load_state_dict_post_hook(_refresh_after_loading)


class SwappedOut(NamedTuple):
    """A module whose parametrizations were taken off, and what puts them back."""

    module: nn.Module
    parametrized_class: type[nn.Module]
    parametrizations: nn.ModuleDict

    def swap_in(self) -> None:
        """Undoes [`swap_out`]."""
        for tensor_name in self.parametrizations:
            del self.module._parameters[tensor_name]
        self.module.__class__ = self.parametrized_class
        self.module._modules["parametrizations"] = self.parametrizations


def parametrized_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a constraint, or with the tied weight of an SLL or CPL block."""
    return [module for module in model.modules() if _is_ours(module)]


def bake(module: nn.Module) -> None:
    """Replaces the constraints of a module by their values, plain parameters of the original class, for good."""
    layers = list(_layers_of(module, ""))
    trained = [any(source.requires_grad for source in layer.parametrization.sources) for layer in layers]
    stages = [layer.stage for layer in layers]
    swap_out(module)
    for layer, requires_grad, stage in zip(layers, trained, stages, strict=True):
        module.get_parameter(layer.tensor_name).requires_grad_(requires_grad)
        if stage is not None:
            put_together(module, layer.tensor_name, stage)


@torch.no_grad()
def swap_out(module: nn.Module) -> SwappedOut:
    """Puts the effective weights, frozen, in the place of the parametrizations."""
    parametrized = SwappedOut(module, type(module), module.parametrizations)
    weights = {name: getattr(module, name).detach() for name in module.parametrizations}
    # The class is reset on this instance; deleting the property from it would break every copy of the module.
    module.__class__ = plain_class(module)
    del module._modules["parametrizations"]
    plain = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    module._parameters = {**plain, **module._parameters}
    return parametrized


def _is_ours(module: nn.Module) -> bool:
    chains = own_parametrizations(module).values()
    return any(isinstance(chain[-1], (Constraint, TiedParametrization)) for chain in chains)


def _layers_of(module: nn.Module, name: str) -> Iterator[ConstrainedLayer]:
    for tensor_name, chain in own_parametrizations(module).items():
        if isinstance(chain[-1], Constraint):
            yield ConstrainedLayer(name, module, tensor_name, chain[-1])


def _refresh_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for layer in _layers_of(module, ""):
        layer.parametrization.refresh(anew=True)


def _add_effective_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for layer in _layers_of(module, ""):
        if not layer.parametrization.original.is_meta:
            state_dict.update({prefix + name: tensor for name, tensor in layer.plain_tensors.items()})


def _drop_effective_weights(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    for layer in _layers_of(module, ""):
        raw = f"{prefix}parametrizations.{layer.tensor_name}.original"
        for name in plain_names(layer.tensor_name, layer.stage):
            if prefix + name in state_dict and raw not in state_dict:
                error_msgs.append(
                    f"{prefix + name} comes without {raw}: these are the weights of a plain model. Load them before "
                    "`lipschitzify(model)`, or into `merge(model)`."
                )
            state_dict.pop(prefix + name, None)


def _refresh_after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    for layer in _layers_of(module, ""):
        layer.parametrization.check_constant()
        layer.parametrization.refresh(anew=True)
