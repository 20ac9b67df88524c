"""A soft alternative to constraints: the excess of layers' norms over a target, to be added to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.functional.weights import norms_and_directions
from hf_lipschitz.holders import uses_weight_otherwise, weight_layouts
from hf_lipschitz.matching import Target, matching_names
from hf_lipschitz.nn.attachment import ConstrainedLayer, constrained_layers
from hf_lipschitz.nn.constraint import whole
from hf_lipschitz.training.loss_checks import check_positive


class PenalisedWeight(NamedTuple):
    """A tensor that is one linear map or several, in its autograd graph, under the dotted name of its module."""

    name: str
    weight: Tensor
    layout: WeightLayout


def penalised_norms(
    model: nn.Module, *, target_modules: Target = None, exclude_modules: Target = None, rtol: float = 1e-3
) -> Tensor:
    r"""
    b(W_l) ≥ σ₁, the library's bound of the spectral norm of what each layer of a model does: of a matrix to `rtol`, of
    a convolution on inputs of any size.

    The gradient of each is \\(uv^T\\) of the leading pair of singular vectors, an **estimate**, or that pair's at the
    worst frequency of a convolution; a subgradient where σ₁ is repeated. It cannot be differentiated twice.

    Layers whose weight is not trained, or not used as it is stored, are left out; factors of adapters are layers of
    their own. Of one that is constrained with `mode="cap"` W is the raw weight, for the norm of the effective one
    stays where the constraint holds it, whatever the gradient; those of `mode="exact"` have the norm that they are
    given, and are left out.

    Args:
        model (`torch.nn.Module`):
            Constrained or not; not wrapped for data parallelism.
        target_modules (`str` or `list[str]`, *optional*), exclude_modules (`str` or `list[str]`, *optional*):
            Which layers, with the semantics of [`LipschitzConfig`]; by default every one of [`weight_layouts`].
        rtol (`float`, *optional*, defaults to `1e-3`):
            Relative width of the brackets of the norms.

    Returns:
        `Tensor` of shape `(L,)`: float32, or float64 for a model of that. **Upper bounds**.

    Raises:
        ValueError: no trained layer is meant, or a weight holds NaN or inf.
    """
    bounds = [
        bound for group in _alike(_penalised(model, target_modules, exclude_modules)) for bound in _bounds(group, rtol)
    ]
    return torch.stack([bound.to(bounds[0].device) for bound in bounds])


def norm_penalty(norms: Tensor, target: float, *, power: int = 2) -> Tensor:
    r"""
    \\(\sum_l \max(0,\, b_l - c)^p\\). With p = 2 it is a spectral norm regularisation (Yoshida & Miyato 2017,
    arXiv:1705.10941) that leaves norms under c alone.

    A penalty constrains nothing: norms end where it and the task balance, and no certificate may take c for a bound.

    Args:
        norms (`Tensor` of shape `(L,)`):
            b, from [`penalised_norms`]. A layer under the target by less than the width of its bracket may count as
            over it by that.
        target (`float`):
            c ≥ 0.
        power (`int`, *optional*, defaults to 2):
            p, 1 or 2.

    Returns:
        `Tensor`: 0-dim, an **upper bound** of the penalty of the exact norms.

    Raises:
        ValueError: c or p is out of range.
    """
    check_positive("target", target, or_zero=True)
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    return (norms - target).clamp_min(0).pow(power).sum()


def _penalised(model: nn.Module, target: Target, exclude: Target) -> list[PenalisedWeight]:
    # By identity, as tied weights are one; each is held here, so that no other tensor gets its id.
    found: dict[int, PenalisedWeight] = {}
    for w in _trained_weights(model):
        found.setdefault(id(w.weight), w)
    names = dict.fromkeys(w.name for w in found.values())
    if not names:
        raise ValueError(
            f"norm_penalty: {type(model).__name__} has no Linear or convolution with a trained weight, but for those "
            "constrained with mode='exact': leave the penalty out"
        )
    meant = set(matching_names(model, list(names), target, exclude))
    return [w._replace(weight=whole(w.weight)) for w in found.values() if w.name in meant]


def _trained_weights(model: nn.Module) -> Iterator[PenalisedWeight]:
    constrained = {(id(layer.module), layer.tensor_name): layer for layer in constrained_layers(model)}
    for name, module in model.named_modules():
        if "parametrizations" in name.split(".") or uses_weight_otherwise(module):
            continue
        for tensor_name, layout in weight_layouts(module).items():
            layer = constrained.get((id(module), tensor_name))
            if layer is not None and layer.parametrization.exact:
                continue
            weight = getattr(module, tensor_name) if layer is None else _raw(layer)
            if weight.is_floating_point() and weight.requires_grad:
                yield PenalisedWeight(name, weight, layout)


def _raw(layer: ConstrainedLayer) -> Tensor:
    """What the constraint is put on, with gradients through a weight norm before it."""
    chain = layer.module.parametrizations[layer.tensor_name]
    return chain.original if layer.stage is None else layer.stage(chain.original)


def _alike(weights: list[PenalisedWeight]) -> list[list[PenalisedWeight]]:
    """Those of one shape together, which are bounded in one call."""
    groups: dict[object, list[PenalisedWeight]] = {}
    for w in weights:
        key = (w.weight.shape, w.weight.dtype, w.weight.device, w.layout)
        groups.setdefault(key, []).append(w)
    return list(groups.values())


def _bounds(group: list[PenalisedWeight], rtol: float) -> list[Tensor]:
    layout = group[0].layout
    pieces = [piece for w in group for piece in _pieces(w)]
    try:
        found = norms_and_directions([piece.detach() for piece in pieces], layout.geometry, rtol)
    except ValueError:
        for w in group:
            check_named_weight(w.name, w.weight)
        raise
    return [_Bound.apply(piece, norm.bound, norm.left, norm.right) for piece, norm in zip(pieces, found, strict=True)]


def _pieces(w: PenalisedWeight) -> list[Tensor]:
    matrices = w.layout.matrices(w.weight)
    return [matrices] if w.layout.count is None else list(matrices.unbind())


class _Bound(torch.autograd.Function):
    """A given bound as a function of the weight, with gradient u vᵀ."""

    @staticmethod
    def forward(ctx, weight: Tensor, bound: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return bound.to(left.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        left, right = ctx.saved_tensors
        direction = torch.outer(left * gradient.to(left.dtype), right)
        return direction.reshape(ctx.shape).to(ctx.dtype), None, None, None
