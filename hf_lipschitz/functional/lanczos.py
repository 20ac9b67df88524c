"""Leading eigenvectors of a batch of Hermitian matrices (Lanczos 1950); estimates, from which bounds are made."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.functional.products import unit


CHECK_EVERY = 8
# Of a few small matrices all eigenvectors take less time than the steps for one.
SMALL, FEW = 64, 8


def leading_vectors(g: Tensor, rtol: float, *, start: Tensor | None = None, max_steps: int = 96) -> Tensor:
    """Estimates the eigenvector of the largest eigenvalue of each matrix.

    Lanczos' iteration with full reorthogonalisation, until the largest Ritz value of no matrix of the batch has grown
    by more than `rtol` in the last few steps.

    Args:
        g (`Tensor` of shape `(batch, n, n)`):
            Hermitian, positive semi-definite up to rounding.
        rtol (`float`):
            Relative growth at which to stop.
        start (`Tensor` of shape `(batch, n)`, *optional*):
            Where to start, such as the vectors of nearby matrices; a fixed pseudo-random vector otherwise.
        max_steps (`int`, *optional*, defaults to 96):
            Steps at most, and no more than n.

    Returns:
        `Tensor` of shape `(batch, n)`, of norm one, or zero where the matrix is zero.
    """
    batch, n = g.shape[0], g.shape[-1]
    if n == 1:
        return torch.ones_like(g[..., 0])
    if n <= SMALL and batch <= FEW:
        return torch.linalg.eigh(g).eigenvectors[..., -1]
    basis = g.new_empty(batch, min(n, max_steps), n)
    real = g.real.dtype if g.is_complex() else g.dtype
    tridiagonal = torch.zeros(batch, basis.shape[1], basis.shape[1], dtype=real, device=g.device)
    q = unit(_start(g))
    if start is not None:
        # A little of the other vector, for a start may be orthogonal to the one that is looked for.
        q = unit(unit(torch.nan_to_num(start.to(g.dtype), 0, 0, 0).unsqueeze(-1)) + 3e-3 * q)
    breakdown = torch.finfo(real).eps ** 0.75
    for k in range(basis.shape[1]):
        basis[:, k] = q.squeeze(-1)
        image = g @ q
        tridiagonal[:, k, k] = (q.conj() * image).real.sum((-2, -1))
        if k == 0:
            before = tridiagonal[:, 0, 0]
        if k == 3 or (k + 1) % CHECK_EVERY == 0 or k + 1 == basis.shape[1]:
            now = torch.linalg.eigvalsh(tridiagonal[:, : k + 1, : k + 1])[:, -1]
            if bool((now - before <= rtol * now).all()):
                break
            before = now
        if k + 1 < basis.shape[1]:
            known = basis[:, : k + 1]
            rest = image
            # Once is unstable: what is left of the known vectors grows from step to step.
            for _ in range(2):
                rest = rest - known.mT @ (known.conj() @ rest)
            length = torch.linalg.vector_norm(rest, dim=(-2, -1))
            # What is left of an invariant subspace is rounding, and not orthogonal to it.
            is_new = length > breakdown * tridiagonal[:, 0, 0]
            tridiagonal[:, k, k + 1] = tridiagonal[:, k + 1, k] = length * is_new
            q = unit(rest) * is_new[:, None, None]
    weights = torch.linalg.eigh(tridiagonal[:, : k + 1, : k + 1]).eigenvectors[..., -1:]
    return unit(basis[:, : k + 1].mT @ weights.to(g.dtype)).squeeze(-1)


def leading_pairs(g: Tensor, width: int = 4, passes: int = 2) -> tuple[Tensor, Tensor]:
    """A rough largest eigenvalue of each matrix, of shape `(batch,)`, and its vector, by subspace iteration.

    It reads the matrices `passes + 1` times, so that many are compared at little cost.
    """
    generator = torch.Generator().manual_seed(0)
    n = g.shape[-1]
    block = torch.randn(n, min(n, width), generator=generator, dtype=torch.float64).to(g.device, g.dtype)
    q = block.expand(len(g), *block.shape)
    for _ in range(passes):
        q = torch.linalg.qr(g @ q).Q
    values, vectors = torch.linalg.eigh(q.mH @ (g @ q))
    return values[..., -1], (q @ vectors[..., -1:]).squeeze(-1)


def _start(g: Tensor) -> Tensor:
    """The image of a fixed vector without structure."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(g.shape[-1], 1, generator=generator, dtype=torch.float64)
    return g @ vector.to(g.device, g.dtype)
