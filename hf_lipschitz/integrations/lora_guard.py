"""Plain PEFT adapters on constrained layers: what they reach is told, and merging them is refused."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.integrations.lora_layer import LipschitzLoraLinear
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.constraint import Constraint


logger = logging.getLogger(__name__)

FIX = (
    "To stay inside the ball, call unload() and get_peft_model(model, lipschitz_lora_config(LoraConfig(...))); or "
    "merge(model) of hf_lipschitz first, train plain LoRA, merge_and_unload() and lipschitzify(model) again."
)
# A norm is told again when it has grown by this factor.
GROWTH = 1.01
STEPS = 30


class Watch:
    """The guarded layers of one tuner, and the largest excess that was told."""

    def __init__(self) -> None:
        self.layers: list[GuardedLayer] = []
        self.told = 1.0

    def tell(self) -> None:
        """Logs how far the layers are outside, if that is further than before."""
        excesses = [(layer.excess(), layer) for layer in self.layers]
        outside = [(excess, layer) for excess, layer in excesses if excess > 1 + 1e-4]
        if not outside or max(excess for excess, _ in outside) <= self.told * GROWTH:
            return
        self.told, worst = max(outside, key=lambda pair: pair[0])
        logger.warning(
            "plain PEFT adapters took %d of %d constrained layers out of their ball: the norm of %s with its adapters "
            "is at least %.4g and its constant is %.4g. %s",
            len(outside),
            len(self.layers),
            worst.constraint.name,
            self.told * worst.constraint.lipschitz.item(),
            worst.constraint.lipschitz.item(),
            FIX,
        )


class GuardedLayer(nn.Module):
    """Mixed into the class of a tuner layer that wraps a constrained layer and is none of ours."""

    watch: Watch
    # In a tuple it is no second submodule.
    lipschitz_constraint: tuple[Constraint]

    @property
    def constraint(self) -> Constraint:
        """That of the layer inside, also while `materialized` has it off."""
        return self.lipschitz_constraint[0]

    def excess(self) -> float:
        """A lower bound of the norm with the adapters in force, over the constant; 0 where it cannot be measured."""
        constant = self.constraint.lipschitz
        return 0.0 if constant.is_meta or constant == 0 else norm_reached(self) / constant.item()

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: always; the adapter would be added to a computed weight, and so be dropped.
        """
        raise ValueError(
            f"layer {self.constraint.name} is constrained, and merging a plain adapter into it would drop the "
            f"adapter. {FIX}"
        )

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if getattr(kwargs.get("config"), "lipschitz", False):
            raise ValueError(
                f"layer {self.constraint.name} carries a plain adapter already: unload() it before adding "
                f"{adapter_name!r}, which is to stay inside the ball"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        has_changed = mode != self.training
        super().train(mode)
        if has_changed and not mode and self.watch.layers[0] is self:
            self.watch.tell()
        return self


class GuardedTuner(nn.Module):
    """Mixed into the class of a tuner with guarded layers, so that a refused merge has changed nothing."""

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse()
        return super().merge_and_unload(*args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._refuse()
        super().merge_adapter(*args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, GuardedLayer) and new_module is child.get_base_layer():
            # PEFT would assign the effective weight to the raw one.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _refuse(self) -> None:
        guarded = next((m for m in self.model.modules() if isinstance(m, GuardedLayer)), None)
        if guarded is not None:
            guarded.merge()


@functools.cache
def _with(mixin: type, cls: type) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def norm_reached(layer: nn.Module) -> float:
    """A lower bound of the spectral norm of a layer on vectors, by power iteration on what it computes.

    Biases and dropout are left out. It is exact in the limit for anything linear, whatever the adapter is.

    Returns:
        `float`: 0 for a layer that is no Linear or `Conv1D`, or whose weights are not all here.
    """
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or not all(map(_is_here, layer.parameters())):
        return 0.0
    weight = base.weight
    features = base.in_features if isinstance(base, nn.Linear) else base.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, features, generator=generator).to(weight.device, weight.dtype)
    with _without_dropout(layer), torch.inference_mode(False), torch.enable_grad():
        offset = layer(torch.zeros_like(start)).detach()
        return _largest_gain(lambda x: layer(x) - offset, start)


def _is_here(parameter: Tensor) -> bool:
    """Whether this process holds all of it: it is neither on the meta device nor a shard."""
    return not parameter.is_meta and not isinstance(parameter, DTensor) and parameter.numel() > 0


def _largest_gain(linear: Any, start: Tensor) -> float:
    x, gain = start / torch.linalg.vector_norm(start), 0.0
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        image = linear(x)
        gain = max(gain, torch.linalg.vector_norm(image.detach().double()).item())
        (back,) = torch.autograd.grad(image, x, image.detach())
        length = torch.linalg.vector_norm(back)
        if length == 0:
            break
        x = back / length
    return gain


@contextmanager
def _without_dropout(layer: nn.Module) -> Iterator[None]:
    dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout) and m.training]
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True


_tuner: weakref.ref[BaseTuner] | None = None


def _guard(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Module registration hook: sees tuners take a model, and tuner layers take a base layer."""
    global _tuner
    if name == "model" and isinstance(module, BaseTuner):
        _tuner = weakref.ref(module)
    if name != "base_layer" or not isinstance(module, BaseTunerLayer) or isinstance(module, LipschitzLoraLinear):
        return
    inside = next(constrained_layers(submodule), None) if submodule is not None else None
    if inside is None or isinstance(module, GuardedLayer):
        return
    tuner = _tuner() if _tuner is not None else None
    if tuner is not None and not isinstance(tuner, GuardedTuner):
        tuner.__class__ = _with(GuardedTuner, type(tuner))
        tuner.lipschitz_watch = Watch()
        logger.warning(
            "plain PEFT adapters go onto layers that lipschitzify constrained, such as %s: nothing bounds the norm of "
            "a layer with its adapters, and they cannot be merged. %s",
            inside.parametrization.name,
            FIX,
        )
    module.__class__ = _with(GuardedLayer, type(module))
    module.lipschitz_constraint = (inside.parametrization,)
    module.watch = tuner.lipschitz_watch if tuner is not None else Watch()
    module.watch.layers.append(module)
    module.register_state_dict_pre_hook(_tell_before_saving)


def _tell_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    if layer.watch.layers[0] is layer:
        layer.watch.tell()


@functools.cache
def register_guard() -> None:
    """Starts to watch which modules PEFT wraps. Safe to repeat."""
    register_module_module_registration_hook(_guard)
