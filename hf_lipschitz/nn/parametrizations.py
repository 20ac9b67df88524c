"""The parametrization that keeps a layer's weight inside a ball of the spectral norm."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hf_lipschitz.functional.geometry import ConvGeometry
from hf_lipschitz.functional.weights import operator_to_frobenius
from hf_lipschitz.nn.references import FLOAT32_RANGE, Reference, constrain, is_outside, moved, new_references


class GramParametrization(nn.Module):
    r"""W ↦ W / max(1, b/c), with b ≥ σ₁(W) (`exact=False`), or W c/b (`exact=True`).

    b = b_ref + f‖W - W_ref‖_F, where b_ref is the upper end of the bracket of a reference weight W_ref. By Weyl's
    inequality the value has spectral norm at most c at every read, whatever changed the weight since the reference was
    taken; when the reference is refreshed after each optimizer step the second term is zero. Its gradient is that of b
    at the reference, u vᵀ for the leading pair, and none through ‖W - W_ref‖_F. Rounding to the dtype of W is part of
    b_ref: it adds at most f u‖W‖_F, u the unit roundoff; f is 1 for a matrix and √taps or more for a convolution.

    Args:
        geometry (`ConvGeometry`, *optional*):
            Of the convolution whose kernel this is; `None` for a matrix.
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

    def __init__(
        self, geometry: ConvGeometry | None, *, exact: bool, rtol: float, refresh_every: int, name: str
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.exact = exact
        self.rtol = rtol
        self.refresh_every = refresh_every
        self.name = name
        self.register_buffer("lipschitz", torch.tensor(torch.inf, dtype=torch.float64))
        self._reference: Reference | None = None
        self._is_loose = False
        self._has_history = False
        self._is_wide = False
        # True only while a checkpoint is read: the value is then the raw weight, which may be anything.
        self.is_suspended = False
        self._steps_since_refresh = 0
        self._owner: tuple[parametrize.ParametrizationList] | tuple[()] = ()
        self._serial = next(_serials)
        _live.add(self)

    def bind(self, owner: parametrize.ParametrizationList, constant: float | None) -> None:
        """Tells the parametrization where its raw weight lives; `constant=None` keeps the norm that weight has."""
        self._owner = (owner,)
        self.keep_or_set_constant(constant)

    def keep_or_set_constant(self, constant: float | None) -> None:
        """Sets c to `constant`, or to the bound of the present raw weight where that is `None`."""
        reference = self.refresh()
        if constant is not None:
            self.set_constant(constant)
        elif reference is not None:
            self.set_constant(reference.bound.item())

    def set_constant(self, constant: float) -> None:
        """Sets c, a finite number of at least zero."""
        if not 0 <= constant < math.inf:
            raise ValueError(f"layer {self.name}: the Lipschitz constant must be finite and >= 0, got {constant}")
        self.lipschitz.fill_(constant)
        self._is_wide = constant != 0 and is_outside(constant, FLOAT32_RANGE)

    def check_constant(self) -> None:
        """Raises a ValueError where c, which may come from a file, is not a finite number of at least zero."""
        if not self.lipschitz.is_meta:
            self.set_constant(self.lipschitz.item())

    @property
    def reference(self) -> Reference | None:
        """What reads go by at present."""
        return self._reference

    @property
    def is_bound(self) -> bool:
        """Whether [`bind`] was called."""
        return bool(self._owner)

    @property
    def original(self) -> Tensor:
        """The raw weight."""
        return self._owner[0].original

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            return weight
        weight = _whole(weight)
        reference = self._reference
        if reference is None or reference.weight.device != weight.device:
            self._refer_to(weight)
            reference = self._reference
        factor = operator_to_frobenius(weight.shape, self.geometry)
        return constrain(
            weight, reference, self.lipschitz, exact=self.exact, operator_factor=factor, is_wide=self._is_wide
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            self._reference = None
        else:
            self._refer_to(weight)
        return weight

    def _refer_to(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.detach().clone()
            (reference,) = new_references([self.name], [weight], self.geometry, self.rtol, [None])
        self.take(reference, has_history=False)

    def refresh(self, *, anew: bool = False) -> Reference | None:
        """[`refresh_all`] of this one."""
        refresh_all([self], anew=anew)
        return None if self.original.is_meta else self._reference

    @torch.no_grad()
    def scale(self) -> float:
        """What the raw weight is multiplied by right after a refresh."""
        reference = self.refresh()
        if reference is None or reference.bound == 0:
            return 1.0
        ratio = (self.lipschitz / reference.bound).item()
        return ratio if self.exact else min(ratio, 1.0)

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
        """The singular vector of the shorter axis of the reference, where the next bound may start from."""
        if self._reference is None or self.geometry is not None:
            return None
        rows, columns = self._reference.weight.shape
        return self._reference.right if rows >= columns else self._reference.left

    def train(self, mode: bool = True) -> GramParametrization:
        if mode != self.training and self.is_bound:
            self.refresh()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GramParametrization:
        constant, reference = self.lipschitz, self._reference
        super()._apply(fn, recurse)
        if not constant.is_meta and not self.lipschitz.is_meta:
            self.lipschitz = constant.to(self.lipschitz.device)
        if reference is not None:
            self._reference = moved(reference, fn, operator_to_frobenius(reference.weight.shape, self.geometry))
            self._is_loose |= self._reference is not None and bool(
                self._reference.bound.to(reference.bound.device) != reference.bound
            )
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._serial = next(_serials)
        _live.add(self)

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz.item():.6g}, mode={'exact' if self.exact else 'cap'}"


_live: weakref.WeakSet[GramParametrization] = weakref.WeakSet()
_serials = itertools.count()


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
        weight = _whole(weight)
        is_wrong = have_changed or (anew and parametrization._has_history)
        if not is_wrong and parametrization.is_up_to_date(weight):
            parametrization._steps_since_refresh = 0
            continue
        key = (weight.shape, weight.dtype, weight.device, parametrization.geometry, parametrization.rtol)
        alike.setdefault(key, []).append((parametrization, weight))
    for pairs in alike.values():
        owners, weights = [p for p, _ in pairs], [w for _, w in pairs]
        starts = [None if anew else owner.start() for owner in owners]
        # Those that are bounded together also stop together.
        has_history = len(owners) > 1 or starts[0] is not None
        made = new_references([p.name for p in owners], weights, owners[0].geometry, owners[0].rtol, starts)
        for owner, reference in zip(owners, made, strict=True):
            owner.take(reference, has_history=has_history)


def _whole(weight: Tensor) -> Tensor:
    """All of a weight of which this process may hold a shard (FSDP2)."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def refresh_after_step(optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Optimizer post-step hook: refreshes the references of the weights that `optimizer` has just moved.

    Raises:
        ValueError: a weight became NaN or inf.
    """
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stepped = [p for p in list(_live) if p.is_bound and id(p.original) in moved]
    # Gathering sharded weights is a meeting of all processes, so all of them go by the order of construction.
    stepped.sort(key=lambda p: p._serial)
    refresh_all([p for p in stepped if p.count_step()], have_changed=True)
