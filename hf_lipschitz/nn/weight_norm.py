"""torch's weight norm under a constraint: taken apart so that both train, and put together again for plain files.

In half precision a plain module rounds g v/‖v‖ once more, so that a merged model differs by that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


class WeightNormStage(nn.Module):
    """v ↦ g v/‖v‖, as torch's weight norm, with g held here, so that a constraint can follow (Salimans & Kingma 2016).

    Args:
        magnitude (`Tensor`):
            g.
        dim (`int`):
            The axis that is not summed over.
        original_class (`type`):
            Of the module while it had torch's weight norm.
    """

    def __init__(self, magnitude: nn.Parameter, dim: int, original_class: type[nn.Module]) -> None:
        super().__init__()
        self.magnitude = magnitude
        self.dim = dim
        self.original_class = original_class

    def forward(self, direction: Tensor) -> Tensor:
        return torch._weight_norm(direction, self.magnitude, self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            self.magnitude.copy_(torch.norm_except_dim(weight, 2, self.dim))
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def has_weight_norm(module: nn.Module, tensor_name: str) -> bool:
    """Whether torch's weight norm, and nothing else, is on the tensor."""
    if not parametrize.is_parametrized(module, tensor_name):
        return False
    chain = module.parametrizations[tensor_name]
    return len(module.parametrizations) == 1 and len(chain) == 1 and type(chain[0]) is _WeightNorm


def take_apart(module: nn.Module, tensor_name: str) -> WeightNormStage:
    """Takes torch's weight norm off; the direction v becomes the plain parameter, the stage holds the magnitude."""
    chain = module.parametrizations[tensor_name]
    magnitude, direction, dim = chain.original0, chain.original1, chain[0].dim
    original_class = type(module)
    # The class is reset on this instance; deleting the property from it would break every copy of the module.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    parameter = nn.Parameter(direction.detach(), requires_grad=direction.requires_grad)
    module._parameters = {tensor_name: parameter, **module._parameters}
    return WeightNormStage(magnitude, dim, original_class)


def put_together(module: nn.Module, tensor_name: str, stage: WeightNormStage) -> None:
    """Puts torch's weight norm on the plain parameter, as the original class had it."""
    requires_grad = stage.magnitude.requires_grad
    parametrize.register_parametrization(module, tensor_name, _WeightNorm(stage.dim), unsafe=True)
    module.__class__ = stage.original_class
    module.parametrizations[tensor_name].original0.requires_grad_(requires_grad)


def plain_names(tensor_name: str, stage: WeightNormStage | None) -> tuple[str, ...]:
    """The names that a plain module has for the tensor in its state dict."""
    prefix = f"parametrizations.{tensor_name}.original"
    return (tensor_name,) if stage is None else (f"{prefix}0", f"{prefix}1")


def plain_tensors(tensor_name: str, weight: Tensor, stage: WeightNormStage | None) -> dict[str, Tensor]:
    """The weight as a plain module stores it."""
    tensors = (weight,) if stage is None else _WeightNorm(stage.dim).right_inverse(weight)
    return dict(zip(plain_names(tensor_name, stage), tensors, strict=True))
