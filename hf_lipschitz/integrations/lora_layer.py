"""The LoRA layer whose adapters enter the constraint of its base layer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.constraint import Constraint
from hf_lipschitz.nn.parametrizations import refresh_all
from hf_lipschitz.nn.references import Reference


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _State:
    """Which adapters are in force, at which scale, and which tensors they hold."""

    names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    def is_same(self, other: _State | None) -> bool:
        return (
            other is not None
            and (self.names, self.scales) == (other.names, other.scales)
            and all(mine is its for mine, its in zip(self.tensors, other.tensors, strict=True))
        )


class AdaptedWeight:
    """What a constraint is told to be its raw weight: that of the base layer plus the adapters in force."""

    def __init__(self, layer: LipschitzLoraLinear) -> None:
        self._layer = layer

    @property
    def original(self) -> Tensor:
        """The sum, without a graph."""
        with torch.no_grad():
            return self._layer.with_adapters(self._layer.raw_weight)

    @property
    def sources(self) -> Iterator[nn.Parameter]:
        """The parameters that the sum is made of."""
        layer = self._layer
        yield layer.raw_weight
        for name in layer.adapters_in_force:
            yield layer.lora_A[name].weight
            yield layer.lora_B[name].weight


class AdapterConstant(nn.Module):
    """The constant under which a saved adapter was trained: what loading reads, infinite otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.tensor(torch.inf, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterConstant:
        constant = self.constant
        super()._apply(fn, recurse)
        if not constant.is_meta and not self.constant.is_meta:
            self.constant = constant.to(self.constant.device)
        return self


class LipschitzLoraLinear(lora.Linear):
    r"""x ↦ P(W + Σ s B A) x + b, with P the constraint of the base layer and W its raw weight.

    The sum goes into the constraint itself, by a hook before it: whatever reads the weight of the base layer, such as
    `inspect` and `materialized`, sees the adapters in force. The constraint's reference is that of the sum, is
    refreshed when an optimizer moves A or B, and is exchanged when adapters are switched, so that disabling them gives
    the base layer bit by bit.

    The state dict holds, an adapter, the constant it was trained under. If the base layer it is loaded onto has
    another one, the smaller of both is taken and a warning says so.

    Args:
        base_layer (`torch.nn.Module`):
            A Linear or `Conv1D` that `lipschitzify` constrained.
        adapter_name (`str`):
            Of the first adapter.
        config (`LipschitzLoraConfig`):
            See [`lipschitz_lora_config`].
        kwargs:
            As PEFT passes them, `r` and `lora_alpha` among them.

    Raises:
        ValueError: `base_layer` is none of these.
    """

    other_param_names = (*lora.Linear.other_param_names, "lora_lipschitz")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        self._settled = _State()
        # In a tuple it is no second submodule; kept here it is at hand while `materialized` has it off the base layer.
        self._chain = (base_layer.parametrizations["weight"],)
        self._kept: dict[tuple[str, ...], tuple[_State, Reference | None]] = {}
        is_transposed = isinstance(base_layer, Conv1D)
        super().__init__(base_layer, adapter_name, config, is_target_conv_1d_layer=is_transposed, **kwargs)
        self.fan_in_fan_out = is_transposed
        self.register_state_dict_post_hook(_save_constants)
        self.register_load_state_dict_post_hook(_settle_after_loading)
        constraint = self.constraint
        self._hook = constraint.register_forward_pre_hook(self._before_constraint)
        constraint.bind(AdaptedWeight(self), constraint.lipschitz.item())
        _live.add(self)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {("lipschitz",): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if not getattr(config, "lipschitz", False):
            raise ValueError(
                f"adapter {adapter_name!r} is plain LoRA on a layer whose adapters stay inside the ball: pass "
                "lipschitz_lora_config(config)"
            )
        if not hasattr(self, "lora_lipschitz"):
            self.lora_lipschitz = nn.ModuleDict()
        self.lora_lipschitz[adapter_name] = AdapterConstant()
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    @property
    def constraint(self) -> Constraint:
        """The constraint of the base layer, which this layer feeds."""
        return self._chain[0][0]

    @property
    def raw_weight(self) -> nn.Parameter:
        """W."""
        return self._chain[0].original

    @property
    def adapters_in_force(self) -> list[str]:
        """Names of the adapters that the weight contains and that are not merged into W."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def with_adapters(self, weight: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """The sum of `weight` and of s B A for the named adapters, or those in force, in the dtype of `weight`."""
        names = self.adapters_in_force if names is None else names
        if any(side[name].weight.is_meta for name in names for side in (self.lora_A, self.lora_B)):
            return weight.to("meta")
        total = weight
        for name in names:
            total = total + self._delta(name)
        return total.to(weight.dtype)

    def _delta(self, name: str) -> Tensor:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dtype = torch.promote_types(a.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            product = (b.to(dtype) @ a.to(dtype)) * self.scaling[name]
        return product.mT if self.fan_in_fan_out else product

    def _before_constraint(self, constraint: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        total = self.with_adapters(args[0])
        if not total.is_meta:
            self._settle()
        return (total,)

    def _state(self) -> _State:
        names = self.adapters_in_force
        tensors = [side[name].weight for name in names for side in (self.lora_A, self.lora_B)]
        return _State(tuple(names), tuple(self.scaling[name] for name in names), tuple(tensors))

    def _settle(self) -> None:
        """Exchanges the reference of the constraint if the adapters in force are others than at the last read."""
        state = self._state()
        if state.is_same(self._settled):
            return
        self._lower_constant(state.names)
        self._kept[self._settled.names] = (self._settled, self.constraint.reference)
        self._settled = state
        kept_state, reference = self._kept.pop(state.names, (None, None))
        is_kept = state.is_same(kept_state) and reference is not None
        if is_kept:
            self.constraint.take(reference, has_history=True)
        self.constraint.refresh(anew=not is_kept)

    def _lower_constant(self, names: Sequence[str]) -> None:
        """Goes over to the constants with which adapters were saved, where these are the smaller ones."""
        for name in names:
            saved = self.lora_lipschitz[name].constant
            constant = self.constraint.lipschitz.item()
            if saved.is_meta or not torch.isfinite(saved):
                continue
            if saved != constant:
                logger.warning(
                    "layer %s: adapter %r was saved under the constant %.6g and the base has %.6g; the smaller holds",
                    self.constraint.name,
                    name,
                    saved.item(),
                    constant,
                )
                self.constraint.set_constant(min(saved.item(), constant))
            saved.fill_(torch.inf)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names= mixes adapters in one batch: call set_adapter and one batch an adapter")
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        for name in self.adapters_in_force:
            dropout = self.lora_dropout[name]
            if dropout.training and getattr(dropout, "p", 0.0) > 0:
                result = result + self._noise(name, x, dropout)
        return result

    def _noise(self, name: str, x: Tensor, dropout: nn.Module) -> Tensor:
        """What dropout on the input of one branch adds: of mean zero, and scaled as the constraint scales the sum."""
        with torch.no_grad():
            total = self.with_adapters(self.raw_weight)
            scale = torch.where(total == 0, torch.zeros_like(total), self.base_layer.weight / total)
        branch = (scale * self._delta(name)).to(total.dtype)
        noise = (dropout(x) - x).to(branch.device)
        return functional.linear(noise, branch.mT if self.fan_in_fan_out else branch)

    def train(self, mode: bool = True) -> LipschitzLoraLinear:
        if mode != self.training:
            self._settle()
            self.constraint.refresh()
        return super().train(mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to W; the function does not change if these are the ones in force.

        Raises:
            ValueError: the sum holds NaN or inf.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        self._settle()
        with torch.no_grad():
            total = self.with_adapters(self.raw_weight, names)
            if not torch.isfinite(total).all():
                raise ValueError(f"layer {self.constraint.name}: adapters {', '.join(names)} make NaN or inf of it")
            self.raw_weight.copy_(total)
        self.merged_adapters.extend(names)
        self._keep_reference_of_sum()

    def unmerge(self) -> None:
        """Takes merged adapters out of W again, up to rounding."""
        names = [n for n in self.merged_adapters if n in self.lora_A]
        with torch.no_grad():
            total = self.raw_weight
            for name in reversed(names):
                total = total - self._delta(name)
            self.raw_weight.copy_(total)
        self.merged_adapters.clear()
        self._keep_reference_of_sum()

    def _keep_reference_of_sum(self) -> None:
        self._kept.clear()
        self._settled = self._state()
        self.constraint.refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters in W or without them, that feeds its constraint itself again."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._disable_adapters = True
        self._settle()
        self._hook.remove()
        _live.discard(self)
        self.constraint.bind(self._chain[0], self.constraint.lipschitz.item())
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)


def lipschitz_lora_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> LipschitzLoraLinear:
    """What PEFT calls for each module that a [`LipschitzLoraConfig`] targets.

    Raises:
        ValueError: the module is not a Linear or `Conv1D` that `lipschitzify` constrained.
    """
    name = kwargs.get("target_name", "")
    if parameter_name is not None:
        raise ValueError(f"{name}.{parameter_name}: adapters inside the ball are for whole Linear and Conv1D modules")
    if not isinstance(target, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{name} is a {type(target).__name__}: adapters inside the ball are for Linear and Conv1D layers; leave "
            "it out of target_modules"
        )
    is_constrained = any(layer.name == "" and layer.tensor_name == "weight" for layer in constrained_layers(target))
    if not is_constrained or len(target.parametrizations["weight"]) != 1:
        raise ValueError(
            f"{name} is not constrained, so there is no ball to stay inside: call lipschitzify(model) before "
            "get_peft_model, or train plain LoRA, merge_and_unload() and then lipschitzify(model), or leave the layer "
            "out of target_modules"
        )
    if target.parametrizations["weight"].original.is_meta:
        raise ValueError(f"{name} has no data here: load the model before adapters are added, and without offloading")
    return LipschitzLoraLinear(target, adapter_name, config, **kwargs)


_live: weakref.WeakSet[LipschitzLoraLinear] = weakref.WeakSet()


def refresh_adapted_after_step(optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Optimizer post-step hook: refreshes the references of the sums that `optimizer` has just moved."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stepped = [
        layer.constraint
        for layer in list(_live)
        if any(id(source) in moved for source in AdaptedWeight(layer).sources)
    ]
    refresh_all([constraint for constraint in stepped if constraint.count_step()], have_changed=True)


def _save_constants(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, saved in layer.lora_lipschitz.items():
        constant = torch.minimum(layer.constraint.lipschitz, saved.constant)
        state_dict[f"{prefix}lora_lipschitz.{name}.constant"] = constant


def _settle_after_loading(layer: nn.Module, incompatible_keys: Any) -> None:
    layer._lower_constant(layer.adapters_in_force)
    layer._settled, layer._kept = layer._state(), {}
    layer.constraint.refresh(anew=True)
