"""A last layer whose rows have norm one, for deterministic certificates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lipschitz.conversion import layer_obstacles
from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.functional.precision import subnormal_unit
from hf_lipschitz.functional.products import UNIT_ROUNDOFF
from hf_lipschitz.holders import DENSE, weight_layouts
from hf_lipschitz.nn.attachment import ConstrainedLayer, attach, constrained_layers
from hf_lipschitz.nn.constraint import Constraint, whole
from hf_lipschitz.nn.parametrizations import farthest
from hf_lipschitz.training.head import find_head


class UnitRows(Constraint):
    r"""
    W ↦ the rows \\(w_k / \|w_k\|\\), times c/√K: for K rows and c = √K each has norm one (last-layer normalisation,
    Singla et al. 2022, arXiv:2108.04062; Araujo et al. 2023, arXiv:2303.03169).

    The spectral norm is at most the Frobenius norm, which is c: a **sound bound** in every dtype, as the length is
    lowered by what rounding may add. Rows of zeros stay zero.

    Args:
        layout (`WeightLayout`):
            Of one matrix, stored either way round.
        name (`str`):
            Of the layer, for error messages.
    """

    def __init__(self, layout: WeightLayout, *, name: str) -> None:
        super().__init__(layout, exact=True, name=name)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            return weight
        # In float64, which no autocast touches.
        wide = whole(weight).double()
        norms = self._norms(wide)
        length = self.lipschitz.clone() / math.sqrt(norms.numel())
        columns = wide.numel() // norms.numel()
        lost = subnormal_unit(weight.dtype) * math.sqrt(columns)
        length = (length - lost).clamp_min(0) * (1 - torch.finfo(weight.dtype).eps - columns * UNIT_ROUNDOFF)
        return (wide / torch.where(norms == 0, 1.0, norms) * length).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def refresh(self, *, anew: bool = False) -> None:
        """Nothing is kept between reads; raises a ValueError where the raw weight is NaN or inf."""
        check_named_weight(self.name, whole(self.original))

    @torch.no_grad()
    def present_bound(self) -> float:
        norms = self._norms(whole(self.original).double())
        return norms.amax().item() * math.sqrt(norms.numel())

    @torch.no_grad()
    def scale(self) -> float:
        if self.original.is_meta:
            return 1.0
        norms = self._norms(whole(self.original).double())
        length = self.lipschitz / math.sqrt(norms.numel())
        return farthest(torch.where(norms == 0, 1.0, length / torch.where(norms == 0, 1.0, norms)))

    def _norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=0 if self.layout.is_transposed else 1, keepdim=True)


def normalize_head(model: nn.Module, head_module: str | None = None) -> str:
    r"""
    Puts [`UnitRows`] on the last layer of a classifier, in place; a head that has it already is left as it is.

    Every logit is then as Lipschitz as the features are. Of a difference of two logits the constant is
    \\(\|w_A - w_j\|\\) times theirs, which [`certify_deterministic`] uses: at most 2, and √2 only where the two rows
    are orthogonal, so that the margin over √2 is **no** certified radius in general.

    The state dict holds the raw weight and, under the plain key, the rows of norm one: a plain model loads the same
    function, from which `normalize_head` goes on. Where the body is constrained as well, that comes first, without the
    head: `lipschitzify(model, exclude_modules=["classifier"])`.

    Args:
        model (`torch.nn.Module`):
            A classifier, not wrapped for data parallelism.
        head_module (`str`, *optional*):
            Name of the last layer, where it is not found by itself.

    Returns:
        `str`: the dotted name of the layer.

    Raises:
        ValueError: there is no such layer, or it is a convolution, an adapter, tied to embeddings, constrained
            otherwise, or holds NaN or inf.

    Example::

        lipschitzify(model, exclude_modules=["classifier"])
        normalize_head(model)
    """
    name, head = find_head(model, head_module)
    if not isinstance(head, DENSE):
        raise ValueError(f"normalize_head is for a Linear, and {name} is a {type(head).__name__}: name another layer")
    if parametrize.is_parametrized(head, "weight") and isinstance(head.parametrizations.weight[-1], UnitRows):
        return name
    obstacle = layer_obstacles(model)[name]
    if obstacle is not None:
        raise ValueError(
            f"the rows of {name} cannot be normalised ({obstacle}): where lipschitzify constrained it, leave it out "
            f"there by exclude_modules=[{name!r}]"
        )
    layout = weight_layouts(head)["weight"]
    num_rows = head.weight.shape[1 if layout.is_transposed else 0]
    attach(head, "weight", UnitRows(layout, name=name).train(head.training), math.sqrt(num_rows))
    return name


def layers_with_norms(model: nn.Module) -> Iterator[ConstrainedLayer]:
    """The constrained layers whose constant is one of the spectral norm: all but a head of rows of norm one."""
    return (layer for layer in constrained_layers(model) if not isinstance(layer.parametrization, UnitRows))
