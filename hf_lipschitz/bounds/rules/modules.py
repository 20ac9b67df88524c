"""Modules of this library whose constant is a theorem about them as a whole."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from hf_lipschitz.bounds.logs import scaled
from hf_lipschitz.bounds.regions import Region, length
from hf_lipschitz.bounds.registry import Call, module_rule
from hf_lipschitz.bounds.rules.norms import Normalization, grouped, normalised
from hf_lipschitz.bounds.values import Dependent
from hf_lipschitz.nn.activations import GroupSort, MaxMin, SlopeCorrected
from hf_lipschitz.nn.attention import BallRadii
from hf_lipschitz.nn.cpl import CPLBlock, CPLConvBlock2d
from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm
from hf_lipschitz.nn.sll import SLLBlock, SLLConvBlock2d


@module_rule(FloorStdLayerNorm)
def floor_layer_norm(call: Call, module: FloorStdLayerNorm, values: list[Dependent]) -> list[Dependent]:
    """See [`FloorStdLayerNorm`], and [`normalised`] for the part that the region plays."""
    module.check()
    norm = Normalization(
        tuple(module.normalized_shape),
        module.eps,
        module.weight,
        module.bias,
        module.offset,
        floor=module.s_min.item(),
    )
    (value,) = values
    if module.axis == -1:
        return [normalised(call, value, norm)]
    # The features are on another axis: tokens along the last one say nothing of the deviation.
    return [call.gives(value, module.lipschitz())]


@module_rule(FloorStdRMSNorm)
def floor_rms_norm(call: Call, module: FloorStdRMSNorm, values: list[Dependent]) -> list[Dependent]:
    """See [`FloorStdRMSNorm`]."""
    module.check()
    (value,) = values
    norm = Normalization(
        (value.shape[-1],),
        module.eps,
        module.weight,
        None,
        module.offset,
        floor=module.s_min.item(),
        is_centred=False,
    )
    return [normalised(call, value, norm)]


@module_rule(FloorStdGroupNorm)
def floor_group_norm(call: Call, module: FloorStdGroupNorm, values: list[Dependent]) -> list[Dependent]:
    """See [`FloorStdGroupNorm`]."""
    module.check()
    (value,) = values
    return [grouped(call, value, module.num_groups, module.weight, module.eps, module.s_min.item())]


@module_rule(CentredNorm)
def centred(call: Call, module: CentredNorm, values: list[Dependent]) -> list[Dependent]:
    """‖diag(γ)P‖ of a linear map, attained."""
    (value,) = values
    return [call.gives(value, module.lipschitz())]


@module_rule(BallRadii)
def balls(call: Call, module: BallRadii, values: list[Dependent]) -> list[Dependent]:
    """Projections onto balls of queries, keys and values: 1-Lipschitz, and r/‖x‖ where ‖x‖ > r, since the Jacobian
    there is (r/‖x‖)(I - xxᵀ/‖x‖²)."""
    module.check()
    results = []
    for value, radius in zip(values, module.radii.tolist(), strict=True):
        known = torch.full((1,), radius, dtype=torch.float64)
        norm = known if value.region.norm is None else torch.minimum(value.region.norm, known)
        slopes = _projection_slopes(value, radius)
        moved = None if value.region.radius is None else value.region.radius * slopes
        log = scaled(value.log_lipschitz, slopes.max().item())
        results.append(Dependent(log, value.shape, Region(norm=norm, radius=moved)))
    return results


def _projection_slopes(value: Dependent, radius: float) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    if value.region.center is None or value.region.radius is None or not math.isfinite(radius):
        return one
    least = length(value.region.center) - value.region.radius
    return torch.where(least > radius, radius / least, one) * (1 + 1e-12)


@module_rule(SLLBlock, CPLBlock, SLLConvBlock2d, CPLConvBlock2d)
def block(call: Call, module: nn.Module, values: list[Dependent]) -> list[Dependent]:
    """1, by the theorem of the block: Araujo et al. 2023, theorem 3; Meunier et al. 2022."""
    return [call.gives(values[0], 1.0)]


@module_rule(GroupSort, MaxMin)
def sorting(call: Call, module: GroupSort, values: list[Dependent]) -> list[Dependent]:
    """1: sorting moves no further than its argument (rearrangement inequality), and grows with each entry."""
    (value,) = values

    def run(end: Tensor | None) -> Tensor | None:
        return None if end is None else module.forward(end.expand(value.shape))

    is_last = module.dim in (-1, len(value.shape) - 1)
    tokens = {"norm": value.region.norm, "radius": value.region.radius} if is_last else {}
    return [call.gives(value, 1.0, Region(run(value.region.lower), run(value.region.upper), **tokens))]


@module_rule(SlopeCorrected)
def slope_corrected(call: Call, module: SlopeCorrected, values: list[Dependent]) -> list[Dependent]:
    """Slopes in [0, 1]."""
    return [call.gives(values[0], 1.0, Region(radius=values[0].region.radius))]


def at(module: nn.Module, centers: list[Tensor]) -> list[Tensor]:
    """What a module gives in float64."""
    wide = copy.deepcopy(module).double()
    outputs = type(wide).forward(wide, *centers)
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
