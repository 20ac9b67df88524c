"""The registry of ways to constrain a layer, and those that ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from hf_lipschitz.configuration import NUM_ITERATIONS, LipschitzConfig
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.holders import weight_layouts
from hf_lipschitz.nn.attachment import attach
from hf_lipschitz.nn.constraint import Constraint
from hf_lipschitz.nn.parametrizations import GramParametrization
from hf_lipschitz.nn.rescaling import RescalingParametrization


Handler = Callable[[nn.Module, str, LipschitzConfig], nn.Module]

METHODS: dict[str, Handler] = {}


def register_method(name: str) -> Callable[[Handler], Handler]:
    """Makes `lipschitzify(model, method=name)` call the decorated function on each targeted layer.

    The handler takes `(module, name, config)` and returns the module that takes its place, usually the same object
    with parametrizations on the tensors that [`weight_layouts`] names.

    Raises:
        ValueError: the name is taken.

    Example::

        @register_method("frobenius")
        def frobenius(module, name, config):
            parametrize.register_parametrization(module, "weight", FrobeniusBall(config.layer_lipschitz))
            return module
    """

    def register(handler: Handler) -> Handler:
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already; choose another name")
        METHODS[name] = handler
        return handler

    return register


def layer_constant(module: nn.Module, config: LipschitzConfig) -> float | None:
    """What a layer is constrained to: the constant of the configuration, times its share of the residual budget."""
    return None if config.layer_lipschitz is None else config.layer_lipschitz * lipschitz_share(module)


def lipschitz_share(module: nn.Module) -> float:
    """By how much the constant of the layer is multiplied; 1 unless a residual branch ends in it."""
    return getattr(module, "lipschitz_share", 1.0)


@register_method("gram")
def gram(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """Caps, or sets, the Gram bound of the weight (Delattre et al. 2023)."""
    return _constrain(module, name, config, _gram_parametrization)


@register_method("cpl")
def cpl(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """W T^{-1/2} with T = σ²I, σ an upper bound of the spectral norm (Meunier et al. 2022)."""
    return _constrain(module, name, config, _gram_parametrization)


@register_method("rescaling")
def rescaling(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """Divides each output channel by its number of spectral rescaling (Delattre et al. 2024)."""
    return _constrain(module, name, config, _channel_parametrization("output", learns_weights=False))


@register_method("aol")
def aol(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """Spectral rescaling of the output channels with one iteration (Prach & Lampert 2022)."""
    return _constrain(module, name, config, _channel_parametrization("output", learns_weights=False))


@register_method("sll")
def sll(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """W T^{-1/2}, which divides each input channel, with trained weights q (Araujo et al. 2023, theorem 3)."""
    return _constrain(module, name, config, _channel_parametrization("input", learns_weights=True))


Maker = Callable[[WeightLayout, Tensor, str, LipschitzConfig], Constraint]


def _constrain(module: nn.Module, name: str, config: LipschitzConfig, make: Maker) -> nn.Module:
    layouts = weight_layouts(module)
    for tensor_name, layout in layouts.items():
        full_name = name if tensor_name == "weight" else f"{name}.{tensor_name}".removeprefix(".")
        constraint = make(layout, getattr(module, tensor_name), full_name, config)
        attach(module, tensor_name, constraint.train(module.training), layer_constant(module, config))
    return module


def _gram_parametrization(layout: WeightLayout, weight: Tensor, name: str, config: LipschitzConfig) -> Constraint:
    if config.mode == "exact" and config.layer_lipschitz is None and layout.count is not None:
        raise ValueError(
            f"layer {name} holds {layout.count} matrices of different norms, which mode='exact' with "
            "layer_lipschitz=None does not leave unchanged: use mode='cap', or exclude it by exclude_modules"
        )
    return GramParametrization(
        layout, exact=config.mode == "exact", rtol=config.rtol, refresh_every=config.refresh_every, name=name
    )


def _channel_parametrization(side: Literal["output", "input"], *, learns_weights: bool) -> Maker:
    def make(layout: WeightLayout, weight: Tensor, name: str, config: LipschitzConfig) -> Constraint:
        num_iterations = config.num_iterations or NUM_ITERATIONS[config.method]
        return RescalingParametrization(
            layout,
            weight,
            side=side,
            num_iterations=num_iterations,
            learns_weights=learns_weights,
            exact=config.mode == "exact",
            name=name,
        )

    return make
