"""Which parameters of a plain model are linear maps, and their norms by brute force: a list of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

from tests.operators import CONVOLUTIONS, unit_inputs


# Tensors that are used as matrices by something else than a Linear, a convolution or a `Conv1D`.
BY_CLASS: dict[type[nn.Module], tuple[str, ...]] = {
    MixtralExperts: ("gate_up_proj", "down_proj"),
    MixtralTopKRouter: ("weight",),
    GptOssExperts: ("gate_up_proj", "down_proj"),
    GptOssTopKRouter: ("weight",),
    XLNetRelativeAttention: ("q", "k", "v", "o", "r"),
    nn.MultiheadAttention: ("in_proj_weight",),
}
ORDINARY = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)


def linear_maps(model: nn.Module) -> set[str]:
    """Dotted names of the tensors that a model without constraints uses as linear maps."""
    return {
        f"{name}.{tensor_name}".removeprefix(".")
        for name, module in model.named_modules()
        for tensor_name in (("weight",) if isinstance(module, ORDINARY) else BY_CLASS.get(type(module), ()))
    }


@torch.no_grad()
def exact_norm(module: nn.Module, tensor_name: str, weight: Tensor) -> float:
    """Largest singular value, in float64, among the linear maps that `module` makes of one tensor.

    That is: of each expert; of each of the three matrices of an `in_proj_weight`; of a convolution, on inputs a little
    larger than its kernel.
    """
    weight = weight.detach().double()
    if isinstance(module, nn.modules.conv._ConvNd):
        matrices = _operators(module, weight)
    elif isinstance(module, nn.MultiheadAttention) and tensor_name == "in_proj_weight":
        matrices = weight.unflatten(0, (3, -1))
    elif isinstance(module, XLNetRelativeAttention):
        matrices = weight.flatten(1)
    else:
        matrices = weight
    return torch.linalg.svdvals(matrices).max().item()


def _operators(module: nn.modules.conv._ConvNd, kernel: Tensor) -> Tensor:
    """The dense matrix of each group of a convolution: (groups, inputs, outputs), or transposed."""
    assert not module.transposed
    sides = list(zip(module.kernel_size, module.stride, strict=True))
    if all(stride >= size for size, stride in sides) and not any(module.padding):
        return kernel.flatten(1).unflatten(0, (module.groups, -1))
    size = [k + 3 if k > 1 else 1 for k in module.kernel_size]
    units = unit_inputs(kernel.shape[1], size).repeat(1, module.groups, *[1] * len(size))
    if isinstance(module.padding, str):
        units = pad(units, module._reversed_padding_repeated_twice)
        padding: tuple[int, ...] | int = 0
    else:
        padding = module.padding
    outputs = CONVOLUTIONS[len(size)](units, kernel, None, module.stride, padding, module.dilation, module.groups)
    return outputs.unflatten(1, (module.groups, -1)).flatten(2).transpose(0, 1)
