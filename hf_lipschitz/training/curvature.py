"""The curvature penalties by name, and how one is computed while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.training.cure import cure, input_kind
from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.gauss_newton import gauss_newton
from hf_lipschitz.training.hessian import hutchinson, trace
from hf_lipschitz.training.sam import sam
from hf_lipschitz.training.weights import trained_weights


# Kernels without a second derivative.
ONCE_DIFFERENTIABLE = ("flash", "flex")


@dataclass(frozen=True)
class Curvature:
    """A penalty and what it needs.

    Args:
        penalty (`Callable`):
            From a [`CurvatureProblem`] to the 0-dim penalty.
        is_of_weights (`bool`, *optional*, defaults to `True`):
            Whether it is about chosen weights, and not about the inputs.
        is_second_order (`bool`, *optional*, defaults to `True`):
            Whether the forward is differentiated twice.
        is_mean (`bool`, *optional*, defaults to `False`):
            Whether, for given probes, it is a mean over examples. All micro-batches and processes of an optimizer step
            then share the probes, so that the penalty is that of the whole batch.
        radius (`float`, *optional*):
            What the radius is by default, for a penalty that has one.
    """

    penalty: Callable[[CurvatureProblem], Tensor]
    is_of_weights: bool = True
    is_second_order: bool = True
    is_mean: bool = False
    radius: float | None = None


CURVATURES: dict[str, Curvature] = {
    "hutchinson": Curvature(hutchinson),
    "trace": Curvature(trace, is_mean=True),
    "gauss_newton": Curvature(gauss_newton),
    "cure": Curvature(cure, is_of_weights=False, is_mean=True, radius=1.5),
    "sam": Curvature(sam, is_second_order=False, radius=0.05),
}


def task_curvature(
    model: nn.Module,
    layers: Sequence[nn.Module] | None,
    task_loss: Callable[[Mapping[str, Any]], tuple[Tensor, Any]],
    inputs: Mapping[str, Any],
    generator: torch.Generator,
    curvature: str,
    radius: float | None = None,
    input_scale: Tensor | float = 1.0,
    head_module: str | None = None,
) -> Tensor:
    """A penalty on the curvature of the task loss of a micro-batch, by its name.

    Forwards run in evaluation mode: the curvature is then that of the function which is evaluated and certified, batch
    statistics are updated once a step only, and no dropout mask is drawn, so that the penalty leaves the masks of the
    task loss as they are. Models of transformers then keep their activations as well: gradient checkpointing, which is
    for training mode, saves no memory here. Attention runs in plain tensor operations where it is differentiated
    twice, since the fused kernels cannot be. No `.grad`, buffer or global generator is touched.

    For a constrained layer the weight is the effective one. The raw one is scale-free: its Hessian would shrink
    whenever it grows, with the function unchanged.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism, nor compiled.
        layers (`Sequence[torch.nn.Module]`, *optional*):
            Modules of the model with a `weight`; frozen ones do not count. `None` means every trained weight of the
            model. A penalty on the inputs has no use for it.
        task_loss (`Callable`):
            Takes the inputs, runs a forward of `model` and returns its 0-dim mean loss and its outputs. Called up to
            twice.
        inputs (`Mapping[str, Any]`):
            Keyword arguments of the forward, labels included.
        generator (`torch.Generator`):
            Where probes come from. `"cure"` and `"sam"` draw nothing.
        curvature (`str`):
            A key of `CURVATURES`.
        radius (`float`, *optional*):
            The step h of `"cure"`, the ρ of `"sam"`; by default that of the entry.
        input_scale (`Tensor` or `float`, *optional*, defaults to 1.0):
            For `"cure"` on images: how far pixel values move when the unit of h moves by one; [`pixel_scale`] makes
            that pixels in [0, 1].
        head_module (`str`, *optional*):
            For `"gauss_newton"` on tokens: name of the last layer, where it is not found by itself.

    Returns:
        `Tensor`: 0-dim; its gradient reaches the raw weights through the parametrizations. Whether it is exact, an
        estimate or a bound stands with each entry.

    Raises:
        ValueError: no weight is trained, the model or the batch does not have what the penalty needs, or the radius is
            no positive number or has no meaning.
    """
    check_curvature(model, curvature)
    entry = CURVATURES[curvature]
    radius = curvature_radius(curvature, radius)
    kernels = sdpa_kernel(SDPBackend.MATH) if entry.is_second_order else nullcontext()
    with parametrize.cached(), evaluating(model), kernels:
        _fill_cache(model)
        if layers is None or not entry.is_of_weights:
            weights = trained_weights(model)
        else:
            weights = [layer.weight for layer in layers if layer.weight.requires_grad]
        if not weights:
            raise ValueError(
                "the curvature penalty needs a trained weight: set requires_grad of some, or curvature_weight=0"
            )
        return entry.penalty(
            CurvatureProblem(model, weights, task_loss, inputs, generator, radius, input_scale, head_module)
        )


def curvature_radius(curvature: str, radius: float | None = None) -> float:
    """`radius`, or that of the entry where it is `None`; 0 for a penalty that has none.

    Raises:
        ValueError: the name is unknown, or the radius is no positive number or has no meaning.
    """
    entry = _entry(curvature)
    if radius is None:
        return entry.radius or 0.0
    if entry.radius is None:
        having = " and ".join(repr(name) for name, other in CURVATURES.items() if other.radius is not None)
        raise ValueError(f"curvature={curvature!r} has no radius, only {having} have: leave curvature_radius None")
    if not 0 < radius < math.inf:
        raise ValueError(f"curvature_radius must be positive and finite, got {radius}; None is {entry.radius}")
    return radius


def check_curvature(model: nn.Module, curvature: str) -> None:
    """Raises what [`task_curvature`] would about the model, before there is a batch.

    Raises:
        ValueError: the name is unknown, the attention cannot be differentiated twice, or the model has no input that a
            penalty on inputs could move.
    """
    entry = _entry(curvature)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if entry.is_second_order and any(kernel in attention for kernel in ONCE_DIFFERENTIABLE):
        raise ValueError(
            f"curvature={curvature!r} needs attention that is differentiable twice, and {attention!r} is not: load "
            "the model with attn_implementation='sdpa'"
        )
    if not entry.is_of_weights:
        input_kind(model)


def _entry(curvature: str) -> Curvature:
    if curvature not in CURVATURES:
        raise ValueError(f"unknown curvature {curvature!r}; known: {', '.join(CURVATURES)}")
    return CURVATURES[curvature]


def _fill_cache(model: nn.Module) -> None:
    """Reads each effective weight with gradients: a first read under no_grad would cache it without them.

    Trained ones first: torch caches a copy of a module under the key of the original, and PEFT trains copies of
    modules that it keeps beside the frozen originals.
    """
    layers = list(constrained_layers(model))
    for layer in sorted(layers, key=lambda layer: not any(s.requires_grad for s in layer.parametrization.sources)):
        getattr(layer.module, layer.tensor_name)
