"""The registry of ways to constrain a layer, and the one that ships: Gram iteration."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry
from hf_lipschitz.nn.attachment import attach
from hf_lipschitz.nn.parametrizations import GramParametrization


Handler = Callable[[nn.Module, str, LipschitzConfig], nn.Module]

DENSE = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

METHODS: dict[str, Handler] = {}


def register_method(name: str) -> Callable[[Handler], Handler]:
    """Makes `lipschitzify(model, method=name)` call the decorated function on each targeted layer.

    The handler takes `(module, name, config)` and returns the module that takes its place, usually the same object
    with a parametrization on its weight.

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


def geometry_of(module: nn.Module) -> ConvGeometry | None:
    """How the layer uses its weight: `None` for a matrix (stored either way round), the geometry of a convolution."""
    if isinstance(module, CONVOLUTIONS):
        return conv_geometry(
            module.weight.shape,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            transposed=module.transposed,
            output_padding=module.output_padding,
        )
    return None


@register_method("gram")
def gram(module: nn.Module, name: str, config: LipschitzConfig) -> nn.Module:
    """Caps, or sets, the Gram bound of the weight (Delattre et al. 2023)."""
    parametrization = GramParametrization(
        geometry_of(module),
        exact=config.mode == "exact",
        rtol=config.rtol,
        refresh_every=config.refresh_every,
        name=name,
    )
    attach(module, "weight", parametrization, config.layer_lipschitz)
    return module
