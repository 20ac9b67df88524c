"""The parametrization that keeps a layer's weight inside a ball of the spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.nn.constraint import Constraint, live, whole
from hf_lipschitz.nn.references import FLOAT32_RANGE, Reference, constrain, is_outside, moved, new_references


class GramParametrization(Constraint):
    r"""W ↦ W / max(1, b/c), with b ≥ σ₁(W) (`exact=False`), or W c/b (`exact=True`).

    b = b_ref + f‖W - W_ref‖_F, where b_ref is the upper end of the bracket of a reference weight W_ref. By Weyl's
    inequality the value has spectral norm at most c at every read, whatever changed the weight since the reference was
    taken; when the reference is refreshed after each optimizer step the second term is zero. Its gradient is that of b
    at the reference, u vᵀ for the leading pair, and none through ‖W - W_ref‖_F. Rounding to the dtype of W is part of
    b_ref: it adds at most f u‖W‖_F, u the unit roundoff; f is 1 for a matrix and √taps or more for a convolution.

    Args:
        layout (`WeightLayout`):
            How the layer uses the tensor; of several matrices each has a bound and a factor of its own.
        exact (`bool`):
            Whether layers under the constant are scaled up to it as well.
        rtol (`float`):
            Width of the bracket at a refresh.
        refresh_every (`int`):
            Optimizer steps between two refreshes.
        name (`str`):
            Of the layer, for error messages.

    The constant c is the 0-dim float64 buffer `lipschitz`, saved with the model.
    """

    def __init__(self, layout: WeightLayout, *, exact: bool, rtol: float, refresh_every: int, name: str) -> None:
        super().__init__(layout, exact=exact, name=name)
        self.rtol = rtol
        self.refresh_every = refresh_every
        self._reference: Reference | None = None
        self._is_loose = False
        self._has_history = False
        self._is_wide = False
        self._steps_since_refresh = 0

    def set_constant(self, constant: float) -> None:
        super().set_constant(constant)
        self._is_wide = constant != 0 and is_outside(constant, FLOAT32_RANGE)

    @property
    def reference(self) -> Reference | None:
        """What reads go by at present."""
        return self._reference

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            return weight
        weight = whole(weight)
        reference = self._reference
        if reference is None or reference.weight.device != weight.device:
            self._refer_to(weight)
            reference = self._reference
        return constrain(weight, reference, self.lipschitz, self.layout, exact=self.exact, is_wide=self._is_wide)

    def right_inverse(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            self._reference = None
        else:
            self._refer_to(weight)
        return weight

    def _refer_to(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            (reference,) = new_references([self.name], [weight.detach()], self.layout, self.rtol, [None])
        self.take(reference, has_history=False)

    def refresh(self, *, anew: bool = False) -> None:
        """[`refresh_all`] of this one."""
        refresh_all([self], anew=anew)

    def present_bound(self) -> float:
        self.refresh()
        return self._reference.bound.amax().item()

    @torch.no_grad()
    def scale(self) -> float:
        self.refresh()
        reference = self._reference
        if reference is None or self.original.is_meta:
            return 1.0
        bounds = reference.bound.reshape(-1)
        ratios = torch.where(bounds == 0, 1.0, self.lipschitz / torch.where(bounds == 0, 1.0, bounds))
        return farthest(ratios if self.exact else ratios.clamp(max=1.0))

    def count_step(self) -> bool:
        """Whether the optimizer step that was just made is one to refresh after."""
        self._steps_since_refresh += 1
        return self._steps_since_refresh >= self.refresh_every

    def is_up_to_date(self, weight: Tensor) -> bool:
        """Whether the reference is `weight`, with a bound of its own."""
        reference = self._reference
        return (
            reference is not None
            and not self._is_loose
            and reference.weight.device == weight.device
            and reference.weight.dtype == weight.dtype
            and torch.equal(reference.weight, weight)
        )

    def take(self, reference: Reference, *, has_history: bool) -> None:
        """Makes `reference` the one that reads go by; `has_history` says whether it depends on the one before it."""
        self._reference, self._is_loose, self._steps_since_refresh = reference, False, 0
        self._has_history = has_history

    def start(self) -> Tensor | None:
        """The singular vectors of the shorter axis of the reference, where the next bound may start from."""
        if self._reference is None or self.layout.geometry is not None:
            return None
        rows, columns = self.layout.matrices(self._reference.weight).shape[-2:]
        return self._reference.right if rows >= columns else self._reference.left

    def train(self, mode: bool = True) -> GramParametrization:
        if mode != self.training and self.is_bound and not self.is_suspended:
            self.refresh()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GramParametrization:
        reference = self._reference
        super()._apply(fn, recurse)
        if reference is not None:
            self._reference = moved(reference, fn, self.layout)
            self._is_loose |= self._reference is not None and not torch.equal(
                self._reference.bound.to(reference.bound.device), reference.bound
            )
        return self


def farthest(factors: Tensor) -> float:
    """The one of several factors that is farthest from 1, as a ratio."""
    flat = factors.detach().reshape(-1)
    return flat[flat.clamp_min(torch.finfo(flat.dtype).tiny).log().abs().argmax()].item()


@torch.no_grad()
def refresh_all(
    parametrizations: Iterable[GramParametrization], *, have_changed: bool = False, anew: bool = False
) -> None:
    """Takes the present raw weights as the references; weights of one shape are bounded in one call.

    Args:
        parametrizations (`Iterable[GramParametrization]`):
            Those without data, and those whose weight is their reference, are left as they are.
        have_changed (`bool`, *optional*, defaults to `False`):
            Saves the comparison with the reference, where it is known that the weight is another one.
        anew (`bool`, *optional*, defaults to `False`):
            Makes references that depend on the weights alone, not on earlier ones from which their computation
            started; what is saved has them, so that a resumed run is the uninterrupted one bit by bit.

    Raises:
        ValueError: a weight is NaN or inf; the message names the layer.
    """
    # References made under inference mode could not be trained with afterwards.
    with torch.inference_mode(False):
        _refresh_all(parametrizations, have_changed, anew)


def _refresh_all(parametrizations: Iterable[GramParametrization], have_changed: bool, anew: bool) -> None:
    alike: dict[tuple[Any, ...], list[tuple[GramParametrization, Tensor]]] = {}
    for parametrization in parametrizations:
        weight = parametrization.original.detach()
        if weight.is_meta:
            continue
        weight = whole(weight)
        is_wrong = have_changed or (anew and parametrization._has_history)
        if not is_wrong and parametrization.is_up_to_date(weight):
            parametrization._steps_since_refresh = 0
            continue
        key = (weight.shape, weight.dtype, weight.device, parametrization.layout, parametrization.rtol)
        alike.setdefault(key, []).append((parametrization, weight))
    for pairs in alike.values():
        owners, weights = [p for p, _ in pairs], [w for _, w in pairs]
        starts = [None if anew else owner.start() for owner in owners]
        # Those that are bounded together also stop together.
        has_history = len(owners) > 1 or starts[0] is not None
        made = new_references([p.name for p in owners], weights, owners[0].layout, owners[0].rtol, starts)
        for owner, reference in zip(owners, made, strict=True):
            owner.take(reference, has_history=has_history)


def refresh_after_step(optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Optimizer post-step hook: refreshes the references of the weights that `optimizer` has just moved.

    Raises:
        ValueError: a weight became NaN or inf.
    """
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    bound = [p for p in list(live) if isinstance(p, GramParametrization) and p.is_bound]
    stepped = [p for p in bound if any(id(source) in moved for source in p.sources)]
    # Gathering sharded weights is a meeting of all processes, so all of them go by the order of construction.
    stepped.sort(key=lambda p: p._serial)
    refresh_all([p for p in stepped if p.count_step()], have_changed=True)
