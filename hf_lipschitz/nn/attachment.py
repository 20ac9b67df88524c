"""Putting parametrizations on modules, finding them, and taking them off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.nn.parametrizations import GramParametrization


class ConstrainedLayer(NamedTuple):
    """A parametrized tensor of a model: `module.tensor_name`, under the dotted `name` of its module."""

    name: str
    module: nn.Module
    tensor_name: str
    parametrization: GramParametrization

    @property
    def effective_weight(self) -> Tensor:
        """The weight that the layer uses, detached."""
        with torch.no_grad():
            return getattr(self.module, self.tensor_name).detach()


def constrained_layers(model: nn.Module) -> Iterator[ConstrainedLayer]:
    """Every tensor of `model` under a [`GramParametrization`], each module once."""
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name, chain in module.parametrizations.items():
            if isinstance(chain[0], GramParametrization):
                yield ConstrainedLayer(name, module, tensor_name, chain[0])


def attach(module: nn.Module, tensor_name: str, parametrization: GramParametrization, constant: float | None) -> None:
    """Registers the parametrization on `module.tensor_name`; `constant=None` keeps the layer's present norm.

    The state dict of the module then holds the raw weight and the constant under the parametrized keys, and the
    effective weight under the plain key, so that the weights load as well where this library is not installed.

    Raises:
        ValueError: the weight holds NaN or inf, or the tensor is parametrized already.
    """
    if parametrize.is_parametrized(module):
        raise ValueError(f"layer {parametrization.name} is parametrized already: remove its parametrizations first")
    check_named_weight(parametrization.name, module.get_parameter(tensor_name))
    parametrize.register_parametrization(module, tensor_name, parametrization, unsafe=True)
    parametrization.bind(module.parametrizations[tensor_name], constant)
    if not hasattr(module, "_lipschitz_state_dict_hooks"):
        module._lipschitz_state_dict_hooks = True
        module.register_state_dict_pre_hook(_refresh_before_saving)
        module.register_state_dict_post_hook(_add_effective_weights)
        module.register_load_state_dict_pre_hook(_drop_effective_weights)
        module.register_load_state_dict_post_hook(_refresh_after_loading)


def bake(layer: ConstrainedLayer) -> None:
    """Replaces the parametrization by its value, a plain parameter of the original class. Not to be undone."""
    requires_grad = layer.parametrization.original.requires_grad
    swap_out(layer)
    layer.module.get_parameter(layer.tensor_name).requires_grad_(requires_grad)


def swap_out(layer: ConstrainedLayer) -> tuple[type[nn.Module], nn.ModuleDict]:
    """Puts the effective weight, frozen, in the place of the parametrization; returns what [`swap_in`] needs."""
    module, tensor_name = layer.module, layer.tensor_name
    weight = nn.Parameter(layer.effective_weight, requires_grad=False)
    parametrized = type(module), module.parametrizations
    # The class is reset on this instance; deleting the property from it would break every copy of the module.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    module._parameters = {tensor_name: weight, **module._parameters}
    return parametrized


def swap_in(layer: ConstrainedLayer, parametrized: tuple[type[nn.Module], nn.ModuleDict]) -> None:
    """Undoes [`swap_out`]."""
    del layer.module._parameters[layer.tensor_name]
    layer.module.__class__, layer.module._modules["parametrizations"] = parametrized


def _own(module: nn.Module) -> Iterator[tuple[str, GramParametrization]]:
    return ((layer.tensor_name, layer.parametrization) for layer in constrained_layers(module) if layer.name == "")


def _refresh_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for _, parametrization in _own(module):
        parametrization.refresh(anew=True)


def _add_effective_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for layer in constrained_layers(module):
        if layer.name == "" and not layer.parametrization.original.is_meta:
            state_dict[prefix + layer.tensor_name] = layer.effective_weight


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
    for tensor_name, _ in _own(module):
        plain, raw = prefix + tensor_name, f"{prefix}parametrizations.{tensor_name}.original"
        if plain in state_dict and raw not in state_dict:
            error_msgs.append(
                f"{plain} comes without {raw}: these are the weights of a plain model. Load them before "
                "`lipschitzify(model)`, or into `merge(model)`."
            )
        state_dict.pop(plain, None)


def _refresh_after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    for _, parametrization in _own(module):
        parametrization.check_constant()
        parametrization.refresh(anew=True)
