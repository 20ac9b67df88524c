"""The diagonal T of SLL and CPL blocks, and the tied weight that makes two layers of a residual branch a block."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hf_lipschitz.functional.geometry import ConvGeometry
from hf_lipschitz.functional.rescaling import rescaling_of_matrix
from hf_lipschitz.functional.rescaling_conv import rescaling_of_kernel
from hf_lipschitz.functional.weights import norms_and_directions
from hf_lipschitz.nn.constraint import whole
from hf_lipschitz.nn.rescaling import LARGEST_LOG


BlockKind = Literal["sll", "cpl"]
BLOCK_KINDS = ("sll", "cpl")


def sll_root(rows: Tensor, log_q: Tensor, num_iterations: int = 1, geometry: ConvGeometry | None = None) -> Tensor:
    r"""√(2/T) of the SLL block \(x - 2 V^T T^{-1} s(Vx + b)\), with 0 for the channels whose row of V is zero.

    The root, one factor for V and one for s: 2/T itself leaves float32 where V is near 1e20.

    \(T_{ii} = \big(\sum_j |(VV^T)^m|_{ij}\, q_j/q_i\big)^{1/m}\), m = 2^{N-1}, the squares of the divisors of
    [`spectral_rescaling`], and those of [`conv_spectral_rescaling`] for a convolution (Araujo et al. 2023, theorem 3).
    A zero row has T = 0 and takes no part: there is no epsilon beside q.

    Args:
        rows (`Tensor` of shape `(h, d)`, or a kernel `(h, d / groups, k_1, ...)`):
            V.
        log_q (`Tensor` of shape `(h,)`):
            log q, cut at ±277.
        num_iterations (`int`, *optional*, defaults to 1):
            N ≥ 1, at most 3 for a convolution; not checked.
        geometry (`ConvGeometry`, *optional*):
            Of the convolution.

    Returns:
        `Tensor` of shape `(h,)`, in the dtype of `rows`; differentiable. \(VV^T \preceq T\) is a **sound bound** as in
        [`spectral_rescaling`].
    """
    q = log_q.double().clamp(-LARGEST_LOG, LARGEST_LOG).exp()
    # Only float64 compiles as one graph.
    wide = rows.double() if torch.compiler.is_compiling() else rows
    with torch.autocast(rows.device.type, enabled=False):
        if geometry is None:
            t = rescaling_of_matrix(wide, num_iterations=num_iterations, q=q)
        else:
            t = rescaling_of_kernel(wide, geometry, num_iterations=num_iterations, q=q)
    # A t that is NaN gives NaN, never a block that is not constrained.
    is_zero = t == 0
    return torch.where(is_zero, 0.0, math.sqrt(2) / torch.where(is_zero, 1.0, t)).to(rows.dtype)


def cpl_root(rows: Tensor, geometry: ConvGeometry | None = None, rtol: float = 1e-3) -> Tensor:
    r"""√2/σ of the CPL block \(x - (2/\sigma^2) V^T s(Vx + b)\), σ ≥ σ₁(V), and 0 where V = 0 (Meunier et al. 2022).

    σ is the upper end of a bracket, never an estimate by power iteration: one that is 5 % low makes the block
    1.22-Lipschitz.

    Args:
        rows (`Tensor` of shape `(h, d)`, or a kernel `(h, d / groups, k_1, ...)`):
            V.
        geometry (`ConvGeometry`, *optional*):
            Of the convolution.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Width of the bracket.

    Returns:
        `Tensor`, 0-dim, in the dtype of `rows`. σ is a **sound bound**; its gradient is that of its leading direction,
        an estimate, and has none of its own.

    Raises:
        ValueError: V holds NaN or inf.
    """
    with torch.autocast(rows.device.type, enabled=False):
        (found,) = norms_and_directions([rows.detach()], geometry, rtol)
        left, right = found.left.to(rows.dtype), found.right.to(rows.dtype)
        along = left @ (rows.reshape(left.numel(), right.numel()) @ right)
        bound = found.bound + (along - along.detach()).double()
        is_zero = bound == 0
        return torch.where(is_zero, 0.0, math.sqrt(2) / torch.where(is_zero, 1.0, bound)).to(rows.dtype)


class TiedParametrization(nn.Module):
    r"""The weight of the outer layer of a residual branch, \(-2 V^T T^{-1}\) of the weight V of its inner layer.

    x ↦ x + W_out s(Vx + b) + b_out is then an SLL block (\(T\) of [`sll_root`]) or a CPL block (\(T = \sigma^2 I\) of
    [`cpl_root`]), and 1-Lipschitz for every elementwise s with slopes in [0, 1]: with y the change of s(Vx + b) for a
    change x of the input, \(\|x - 2V^TT^{-1}y\|^2 = \|x\|^2 - 4 x^TV^TT^{-1}y + 4 y^TT^{-1}VV^TT^{-1}y \le \|x\|^2 -
    4 (Vx - y)^T T^{-1} y \le \|x\|^2\), as \(VV^T \preceq T\) and each y_i lies between 0 and (Vx)_i.

    The raw tensor is log q of the h hidden features, zeros at first; for CPL an empty one that needs no gradient. It
    is registered with `unsafe=True`, as its shape is not that of the weight.

    Rounding the weight to float32 is an error E of relative size 2⁻²³; the allowance ε = 6e-5 in T leaves
    \(\|Ey\|^2/(4\epsilon)\), below 1e-8 of the constant. In half precision E is too large for that.

    Args:
        parent (`torch.nn.Module`):
            Holds both layers; a copy of the parent copies the tie.
        inner, outer (`str`):
            Their dotted names in `parent`.
        kind (`str`):
            `"sll"` or `"cpl"`.
        num_iterations (`int`):
            N of SLL.
        inner_is_transposed, outer_is_transposed (`bool`):
            Whether the layer stores its weight as (in, out), as the `Conv1D` of transformers.
        name (`str`):
            Of the parent in the model, for error messages.

    The value is in the dtype of V. Reading it raises a RuntimeError where either layer was replaced, as by an adapter,
    since x ↦ x + W_out s(Vx + b) is then not the function of the branch.
    """

    def __init__(
        self,
        parent: nn.Module,
        inner: str,
        outer: str,
        *,
        kind: BlockKind,
        num_iterations: int,
        inner_is_transposed: bool = False,
        outer_is_transposed: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        if kind not in BLOCK_KINDS:
            raise ValueError(f"kind must be one of {', '.join(BLOCK_KINDS)}, got {kind!r}")
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        self.kind, self.num_iterations, self.name = kind, num_iterations, name
        self.inner, self.outer = inner, outer
        self.inner_is_transposed, self.outer_is_transposed = inner_is_transposed, outer_is_transposed
        # In tuples, so that they are no submodules.
        self._parent = (parent,)
        self._layers = (parent.get_submodule(inner), parent.get_submodule(outer))

    def rows(self) -> Tensor:
        """V, of shape (h, d).

        Raises:
            RuntimeError: one of the two layers is no longer where it was.
        """
        names = (self.inner, self.outer)
        for name, layer in zip(names, self._layers, strict=True):
            present = self._parent[0].get_submodule(name)
            if present is not layer:
                raise RuntimeError(
                    f"block {self.name}: its layer {name} was replaced by {type(present).__name__}, which breaks the "
                    "tie of the two weights; leave both layers of a block out, e.g. of the target modules of adapters"
                )
        weight = whole(self._layers[0].weight)
        return weight.mT if self.inner_is_transposed else weight

    def forward(self, free: Tensor) -> Tensor:
        rows = self.rows()
        if rows.is_meta:
            return rows if self.outer_is_transposed else rows.mT
        root = cpl_root(rows) if self.kind == "cpl" else sll_root(rows, whole(free), self.num_iterations)
        root = root.reshape(-1, 1)
        value = -(rows * root) * root
        return value if self.outer_is_transposed else value.mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        hidden = weight.shape[0] if self.outer_is_transposed else weight.shape[1]
        return weight.new_zeros(hidden if self.kind == "sll" else 0)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, inner={self.inner}, num_iterations={self.num_iterations}"
