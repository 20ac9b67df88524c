"""What every parametrization that bounds the norm of a weight has in common."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import parametrize

from hf_lipschitz.functional.layout import WeightLayout


class Owner(Protocol):
    """Where the raw weight of a constraint comes from, if not from the module that it parametrizes."""

    @property
    def original(self) -> Tensor:
        """The raw weight."""
        ...

    @property
    def sources(self) -> Iterator[nn.Parameter]:
        """The parameters that it is made of."""
        ...


class Constraint(nn.Module):
    """Base of the parametrizations whose value has spectral norm at most c at every read, whatever moved the weight.

    c is the 0-dim float64 buffer `lipschitz`, saved with the model. It bounds each of the matrices of the tensor, as
    stored: under `torch.autocast` a layer rounds its weight once more, in bfloat16 by up to 2⁻⁸ of each entry.

    Args:
        layout (`WeightLayout`):
            How the layer uses the tensor.
        exact (`bool`):
            Whether layers under the constant are scaled up to it as well.
        name (`str`):
            Of the layer, for error messages.
    """

    lipschitz: Tensor

    def __init__(self, layout: WeightLayout, *, exact: bool, name: str) -> None:
        super().__init__()
        self.layout, self.exact, self.name = layout, exact, name
        self.register_buffer("lipschitz", torch.tensor(torch.inf, dtype=torch.float64))
        # True only while a checkpoint is read: the value is then the raw weight, which may be anything.
        self.is_suspended = False
        # False where a plain model with the effective weights would compute something else.
        self.has_plain_form = True
        self._owner: tuple[parametrize.ParametrizationList | Owner] | tuple[()] = ()
        self._serial = next(_serials)
        live.add(self)

    def bind(self, owner: parametrize.ParametrizationList | Owner, constant: float | None) -> None:
        """Tells the constraint where its raw weight lives; `constant=None` keeps the norm that weight has."""
        self._owner = (owner,)
        self.keep_or_set_constant(constant)

    def keep_or_set_constant(self, constant: float | None) -> None:
        """Sets c to `constant`, or to the bound of the present raw weight where that is `None`."""
        self.refresh()
        if constant is not None:
            self.set_constant(constant)
        elif not self.original.is_meta:
            self.set_constant(self.present_bound())

    def set_constant(self, constant: float) -> None:
        """Sets c, a finite number of at least zero."""
        if not 0 <= constant < math.inf:
            raise ValueError(f"layer {self.name}: the Lipschitz constant must be finite and >= 0, got {constant}")
        self.lipschitz.fill_(constant)

    def check_constant(self) -> None:
        """Raises a ValueError where c, which may come from a file, is not a finite number of at least zero."""
        if not self.lipschitz.is_meta:
            self.set_constant(self.lipschitz.item())

    @property
    def is_bound(self) -> bool:
        """Whether [`bind`] was called."""
        return bool(self._owner)

    @property
    def original(self) -> Tensor:
        """The raw weight: what the parametrizations before this one, if any, make of the stored tensor."""
        owner = self._owner[0]
        if not isinstance(owner, parametrize.ParametrizationList) or owner[0] is self:
            return owner.original
        with torch.no_grad():
            weight = owner.original
            for stage in owner:
                if stage is self:
                    break
                weight = stage(weight)
            return weight

    @property
    def sources(self) -> Iterator[nn.Parameter]:
        """The parameters that the raw weight is made of."""
        owner = self._owner[0]
        if not isinstance(owner, parametrize.ParametrizationList):
            yield from owner.sources
            return
        yield owner.original
        for stage in owner:
            if stage is self:
                break
            yield from stage.parameters()

    @property
    def reference(self) -> Any:
        """What reads go by at present, where a constraint keeps anything between them."""
        return None

    def refresh(self, *, anew: bool = False) -> None:
        """Computes again what reads go by, where that is anything; `anew` forgets what it was before."""

    def present_bound(self) -> float:
        """The least constant under which the raw weight is left as it is: a bound of its norm."""
        raise NotImplementedError

    def scale(self) -> float:
        """Of the factors by which parts of the raw weight are multiplied, the one that is farthest from 1."""
        raise NotImplementedError

    def count_step(self) -> bool:
        """Whether the optimizer step that was just made is one to refresh after."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constraint:
        constant = self.lipschitz
        super()._apply(fn, recurse)
        if not constant.is_meta and not self.lipschitz.is_meta:
            self.lipschitz = constant.to(self.lipschitz.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._serial = next(_serials)
        live.add(self)

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz.item():.6g}, mode={'exact' if self.exact else 'cap'}"


live: weakref.WeakSet[Constraint] = weakref.WeakSet()
_serials = itertools.count()


def whole(weight: Tensor) -> Tensor:
    """All of a weight of which this process may hold a shard (FSDP2).

    Each process differentiates its own loss, and the shards get the mean of the gradients, as inside the forward.
    """
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    gathered = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        # Their sum is divided here: gloo has no mean.
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
