"""Products with the Jacobian of a function at a point, and vectors taken row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


Function = Callable[[Tensor], Tensor]


def gradient(output: Tensor, source: Tensor, weights: Tensor | None = None, create_graph: bool = False) -> Tensor:
    if not output.requires_grad:
        return torch.zeros_like(source)
    return torch.autograd.grad(
        output, source, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )[0]


def norm(t: Tensor) -> float:
    return torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item()


class Linearized:
    """A function at a point, with products with its Jacobian and the transpose of it.

    Jᵀu is linear in u, and its derivative with respect to u is J.
    """

    def __init__(self, function: Function, point: Tensor) -> None:
        self.x = point.detach().requires_grad_()
        # A copy, for the function may work in place.
        self.y = function(self.x.clone())
        self._u = torch.zeros_like(self.y, requires_grad=True)
        self._transposed = gradient(self.y, self.x, self._u, create_graph=True)

    def forwards(self, v: Tensor) -> Tensor:
        """Jv, of the shape of the output."""
        return gradient(self._transposed, self._u, v)

    def backwards(self, w: Tensor) -> Tensor:
        """Jᵀw, of the shape of the input."""
        return gradient(self.y, self.x, w)

    def slope(self, v: Tensor, w: Tensor) -> Tensor:
        """The gradient of wᵀJ(x)v with respect to x, of the shape of the input.

        Jᵀw is differentiated, and not Jv: torch takes the statistics of a layer norm for constants in the derivative
        of the latter.
        """
        return gradient(gradient(self.y, self.x, w, create_graph=True), self.x, v)


@dataclass
class Rows:
    """Norms of the rows of tensors of shape `(batch, ...)`, or with `count` 1 of whole tensors of any shape."""

    count: int

    def norms(self, t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t.reshape(self.count, -1), dim=-1)

    def column(self, values: Tensor, like: Tensor) -> Tensor:
        """One value a row, in a shape that broadcasts with `like`."""
        return values.reshape((self.count, *[1] * (like.dim() - 1))[: like.dim()])

    def unit(self, t: Tensor) -> Tensor:
        """Rows of norm one; those of zeros, NaN and inf become zero."""
        t = torch.nan_to_num(t, 0.0, 0.0, 0.0)
        norms = self.norms(t)
        return t / self.column(torch.where(norms > 0, norms, 1), t)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).reshape(self.count, -1).sum(-1)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(self.column(condition, a), a, b)

    def direction(self, at: Linearized, v: Tensor, iterations: int) -> Tensor:
        """The combination of v, JᵀJv, ..., of `iterations` vectors in all, that J stretches most, of each row.

        The vectors are made orthogonal as they come; v and the result have the shape of the input.
        """
        basis, images, q = [], [], self.unit(v)
        for _ in range(iterations):
            basis.append(q)
            images.append(torch.nan_to_num(at.forwards(q), 0.0, 0.0, 0.0))
            q = self._rest(at.backwards(images[-1]), basis)
        stack = torch.stack([image.reshape(self.count, -1) for image in images], dim=1)
        stack = stack / torch.linalg.matrix_norm(stack, keepdim=True).clamp_min(torch.finfo(stack.dtype).tiny)
        weights = torch.linalg.eigh((stack @ stack.mT).to(torch.float64)).eigenvectors[..., -1].to(v.dtype)
        return self.unit(sum(self.column(weights[:, k], v) * q for k, q in enumerate(basis)))

    def _rest(self, t: Tensor, basis: list[Tensor]) -> Tensor:
        """What of t is orthogonal to the basis, of norm one, or zero where that is rounding."""
        before = self.norms(t)
        for _ in range(2):
            for q in basis:
                t = t - self.column(self.inner(q, t), t) * q
        is_new = self.norms(t) > torch.finfo(t.dtype).eps ** 0.75 * before
        return self.unit(t) * self.column(is_new, t)
