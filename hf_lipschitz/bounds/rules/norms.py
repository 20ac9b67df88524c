"""Normalizations and softmax, by the least deviation on the region where one is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lipschitz.bounds.logs import scaled
from hf_lipschitz.bounds.regions import Region, length
from hf_lipschitz.bounds.registry import Call, NoRule, rule
from hf_lipschitz.bounds.rules.elementwise import channelwise, with_rows_times
from hf_lipschitz.bounds.values import Dependent, Gained
from hf_lipschitz.nn.gains import centred_norm, gain_of, largest_gain


_aten = torch.ops.aten
# Slopes that underflow are not zero.
_TINY = 1e-300


@dataclass(frozen=True)
class Normalization:
    r"""γ (x - x̄)/max(s, s_min) + β with s = √(var + ε) over the last axes, or without the mean.

    Args:
        shape (`tuple[int]`):
            Of the axes that are normalised, the last ones.
        eps (`float`):
            ε.
        weight, bias (`Tensor`, *optional*):
            γ and β.
        offset (`float`, *optional*, defaults to `0.0`):
            Added to γ.
        floor (`float`, *optional*, defaults to `0.0`):
            s_min.
        is_centred (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted.
    """

    shape: tuple[int, ...]
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    offset: float = 0.0
    floor: float = 0.0
    is_centred: bool = True

    @property
    def gain(self) -> float:
        """‖diag(γ)P‖, or max |γ| without the mean."""
        if self.is_centred:
            return centred_norm(self.weight, self.offset, self.shape)
        return largest_gain(self.weight, self.offset)


def normalised(call: Call, value: Dependent, norm: Normalization) -> Dependent:
    r"""‖diag(γ)P‖ / s for the least s on the region, at least \(\max(s_{min}, \sqrt\varepsilon)\), which constant
    tokens attain; without ε or floor no constant holds everywhere.

    The Jacobian is diag(γ)MP/s with 0 ⪯ M ⪯ I where s is above the floor (MATH of [`FloorStdLayerNorm`]), and
    diag(γ)P/s_min below. A token c moved by at most ρ has a deviation of at least (‖Pc‖ - ρ)/√d.
    """
    width = math.prod(norm.shape)
    least = _least_deviation(value, norm, width)
    least = torch.sqrt(least.square() + norm.eps).clamp(min=norm.floor) * (1 - 1e-12)
    if not bool((least > 0).all()):
        raise NoRule("without eps or a floor its slope grows without bound")
    slopes = norm.gain / least
    radius = None
    if len(norm.shape) == 1 and value.region.radius is not None:
        radius = value.region.radius * slopes
    gained = None
    if norm.weight is not None and len(norm.shape) == 1:
        gain = gain_of(norm.weight, norm.offset).detach().to("cpu", torch.float64)
        gained = Gained(scaled(value.log_lipschitz, (1 / least).max().item()), gain)
    return call.gives(value, slopes.max().item(), _image(norm, width, radius), gained=gained)


@rule(_aten.layer_norm.default)
def layer_norm(call: Call) -> Dependent:
    """See [`normalised`]."""
    value = call.only("input")
    shape = tuple(call["normalized_shape"])
    return normalised(call, value, Normalization(shape, call["eps"], call["weight"], call["bias"]))


@rule(_aten.rms_norm.default)
def rms_norm(call: Call) -> Dependent:
    """See [`normalised`], without the mean."""
    value = call.only("input")
    norm = Normalization(tuple(call["normalized_shape"]), call["eps"], call["weight"], is_centred=False)
    return normalised(call, value, norm)


@rule(_aten.group_norm.default)
def group_norm(call: Call) -> Dependent:
    """max |γ| / s for the least deviation s of a group on the region, at least √ε; see [`grouped`]."""
    value = call.only("input")
    return grouped(call, value, call["num_groups"], call["weight"], call["eps"], 0.0)


def grouped(call: Call, value: Dependent, groups: int, weight: Tensor | None, eps: float, floor: float) -> Dependent:
    """A layer norm of each group of channels with all their positions, and then one factor a channel."""
    if eps <= 0 and floor <= 0:
        raise NoRule("without eps or a floor its slope grows without bound")
    width = value.size // (value.shape[0] * groups)
    least = torch.zeros((), dtype=torch.float64)
    offsets = value.region.offsets()
    if offsets is not None:
        center, moved = (
            x.expand(value.shape).reshape(value.shape[0], groups, -1) for x in (value.region.center, offsets)
        )
        spread = torch.linalg.vector_norm(center - center.mean(-1, keepdim=True), dim=-1)
        least = (spread - length(moved, keepdim=False)).clamp(min=0) / math.sqrt(width)
    least = (least.square() + eps).sqrt().clamp(min=floor) * (1 - 1e-12)
    return call.gives(value, largest_gain(weight, 0.0) / least.min().item())


@rule(_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)
def batch_norm(call: Call) -> Dependent:
    """max |γ| / √(var + ε) over channels, with the stored statistics; rows of a convolution before it."""
    value = call.only("input")
    if call.arguments.get("training"):
        raise NoRule("batch norm is in training mode: call model.eval()")
    if call["running_var"] is None:
        raise NoRule("without running statistics it normalises by those of the batch")
    gains = 1 / (call["running_var"].detach().double() + call["eps"]).sqrt()
    if call["weight"] is not None:
        gains = gains * call["weight"].detach().double()
    largest = gains.abs().amax().item()
    if not math.isfinite(largest):
        raise NoRule("its statistics or weight are NaN or inf, or a variance is not above -eps")
    log, weighted = scaled(value.log_lipschitz, largest), None
    if value.weighted is not None and value.weighted.axis % len(value.shape) == 1:
        shape = (-1, *[1] * (len(value.shape) - 2))
        log = min(log, channelwise(value.weighted, gains.reshape(shape).expand(value.shape)))
        weighted = with_rows_times(value.weighted, gains)
    return Dependent(log, call.shape, _standardised(call, value), weighted=weighted)


@rule(_aten.softmax.int, _aten._softmax.default)
def softmax(call: Call) -> Dependent:
    r"""diag(p) - ppᵀ has norm at most 1/2, attained at two equal entries; also at most the largest 2p(1 - p), the sum
    of a row of absolute values, on the region."""
    value = call.only("self")
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if not value.shape:
        return Dependent(-math.inf, (), Region(one, one))
    lower, upper = value.region.lower, value.region.upper
    gain = 0.5
    if lower is not None and upper is not None:
        low, high = (end.expand(value.shape).movedim(call["dim"], -1) for end in (lower, upper))
        least, most = share_of(low, high), share_of(high, low)
        nearest = torch.where(most[0] < 0.5, most[0] * most[1], least[0] * least[1])
        nearest = torch.where((least[0] <= 0.5) & (most[0] >= 0.5), 0.25, nearest).nan_to_num(nan=0.25)
        gain = min(gain, 2 * nearest.max().item() * (1 + 1e-9) + _TINY)
        zero = least[0].nan_to_num(nan=0.0).movedim(-1, call["dim"])
        one = most[0].nan_to_num(nan=1.0).movedim(-1, call["dim"])
    is_last = call["dim"] in (-1, len(value.shape) - 1)
    return call.gives(value, gain, Region(zero, one, norm=torch.ones(1, dtype=torch.float64) if is_last else None))


def share_of(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """exp(own_i) / (exp(own_i) + Σ_{j≠i} exp(others_j)) along the last axis, and what is left to 1."""
    none = torch.full_like(others[..., :1], -math.inf)
    before = torch.cat([none, others[..., :-1].logcumsumexp(-1)], -1)
    after = torch.cat([others.flip(-1)[..., :-1].logcumsumexp(-1).flip(-1), none], -1)
    ahead = own - torch.logaddexp(before, after)
    return torch.sigmoid(ahead), torch.sigmoid(-ahead)


def _least_deviation(value: Dependent, norm: Normalization, width: int) -> Tensor:
    region = value.region
    if region.center is None:
        return torch.zeros((), dtype=torch.float64)
    axes = tuple(range(-len(norm.shape), 0))
    if len(norm.shape) == 1 and region.radius is not None:
        moved = region.radius
    else:
        offsets = region.offsets()
        if offsets is None:
            return torch.zeros((), dtype=torch.float64)
        moved = length(offsets.expand(value.shape), axes)
    center = region.center.expand(value.shape)
    if norm.is_centred:
        center = center - center.mean(axes, keepdim=True)
    spread = length(center, axes)
    return (spread - moved).clamp(min=0) / math.sqrt(width)


def _image(norm: Normalization, width: int, radius: Tensor | None) -> Region:
    """An entry is at most √(d - 1) deviations from the mean, √d without the mean; a token √d in norm."""
    gain = gain_of(norm.weight, norm.offset)
    one = torch.ones((), dtype=torch.float64)
    gain = one if gain is None else gain.detach().to("cpu", torch.float64)
    bias = 0 * one if norm.bias is None else norm.bias.detach().to("cpu", torch.float64)
    half = math.sqrt(width - 1 if norm.is_centred else width) * gain.abs()
    token = None
    if len(norm.shape) == 1:
        token = (math.sqrt(width) * gain.abs().max() + length(bias.expand(norm.shape), None)).reshape(1)
    return Region(bias - half, bias + half, norm=token, radius=radius)


def _standardised(call: Call, value: Dependent) -> Region:
    low, high = value.region.lower, value.region.upper
    if low is None or high is None:
        return Region()
    shape = (-1, *[1] * (len(value.shape) - 2))
    mean, var = (call[name].detach().double().reshape(shape) for name in ("running_mean", "running_var"))
    gain = 1 / (var + call["eps"]).sqrt()
    bias = torch.zeros((), dtype=torch.float64)
    if call["weight"] is not None:
        gain = gain * call["weight"].detach().double().reshape(shape)
    if call["bias"] is not None:
        bias = call["bias"].detach().double().reshape(shape)
    ends = (low - mean) * gain + bias, (high - mean) * gain + bias
    return Region(torch.minimum(*ends), torch.maximum(*ends))
