"""Batch norms folded into the layer before them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def fuse(norm: nn.Module, layer: nn.Module) -> None:
    r"""Makes `layer` compute what `norm` after `layer` computes in evaluation mode; `norm` can then go.

    With \(a_c = \gamma_c / \sqrt{\mathrm{var}_c + \varepsilon}\), in float64, output channel c of the weight is
    multiplied by a_c and the bias becomes \((b_c - \mathrm{mean}_c)\,a_c + \beta_c\). A layer without a bias gets one.
    On the meta device only the structure changes.

    Args:
        norm (`torch.nn.Module`):
            BatchNorm1d, 2d or 3d with running statistics.
        layer (`torch.nn.Module`):
            nn.Linear or a convolution, transposed or not, whose output only `norm` uses.

    Raises:
        ValueError: the batch norm has another number of features than the layer has outputs.
    """
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        raise ValueError(f"a batch norm of {norm.num_features} features cannot follow a layer of {channels} outputs")
    weight = layer.weight
    if layer.bias is None:
        zeros = torch.zeros(channels, dtype=weight.dtype, device=weight.device)
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))
    if weight.is_meta:
        return
    one = torch.ones(channels, dtype=torch.float64, device=weight.device)
    gamma = one if norm.weight is None else norm.weight.double()
    beta = 0 * one if norm.bias is None else norm.bias.double()
    scale = gamma * (norm.running_var.double() + norm.eps).rsqrt()
    layer.bias.copy_((layer.bias.double() - norm.running_mean.double()) * scale + beta)
    weight.copy_(_scaled_outputs(layer, scale))


def _scaled_outputs(layer: nn.Module, scale: Tensor) -> Tensor:
    weight = layer.weight.double()
    if not getattr(layer, "transposed", False):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # Stored as (in, out / groups, ...): the outputs of each group go with the inputs of that group.
    groups = layer.groups
    grouped = weight.unflatten(0, (groups, -1))
    return (grouped * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
