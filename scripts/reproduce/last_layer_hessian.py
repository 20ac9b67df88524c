r"""The Hessian of the mean cross-entropy with respect to the weight of a model's last layer, exactly, in float64.

With h_i the rows entering the last layer, p_i the softmax of its logits and N rows, it is
\\(H = \frac1N \sum_i (\mathrm{diag}(p_i) - p_i p_i^T) \otimes h_i h_i^T\\), of size Kd for K classes and d inputs.
It has no negative eigenvalue, and the labels have no part in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import softmax
from torch import Tensor, nn

from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.training.head import find_head
from hf_lipschitz.training.head_calls import captured, example_activations


Array = NDArray[np.float64]


def last_layer_rows(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], head_module: str | None = None
) -> tuple[Array, Array]:
    """What enters the last layer, `(N, d)`, and its logits, `(N, K)`, of every example of `batches`."""
    _, head = find_head(model, head_module)
    inputs, logits = [], []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            with captured(head) as calls:
                outputs = model(**{name: tensor.to(head.weight.device) for name, tensor in batch.items()})
            (call,) = calls
            inputs.append(example_activations(call, outputs.logits).double().cpu().numpy())
            logits.append(outputs.logits.double().cpu().numpy())
    return np.concatenate(inputs), np.concatenate(logits)


def hessian_operator(inputs: Array, logits: Array) -> LinearOperator:
    """H, by its product with a weight of shape `(K, d)` that is flattened row by row."""
    p = softmax(logits, axis=-1)
    shape = (p.shape[1], inputs.shape[1])

    def product(vector: Array) -> Array:
        moved = inputs @ vector.reshape(shape).T
        gradients = p * (moved - (p * moved).sum(-1, keepdims=True))
        return (gradients.T @ inputs).reshape(-1) / len(inputs)

    size = shape[0] * shape[1]
    return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=np.float64)


def largest_eigenvalue(inputs: Array, logits: Array) -> float:
    """λ_max of H, by Lanczos iteration to machine precision; at most mean‖h‖²/2."""
    if hessian_trace(inputs, logits) == 0:
        return 0.0
    operator = hessian_operator(inputs, logits)
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    return float(eigsh(operator, k=1, which="LA", v0=start, return_eigenvectors=False)[0])


def hessian_trace(inputs: Array, logits: Array) -> float:
    """tr H, the mean of ‖h‖²(1 - ‖p‖²)."""
    p = softmax(logits, axis=-1)
    return float(np.mean((inputs**2).sum(-1) * (p * (1 - p)).sum(-1)))


def mean_square_norm(inputs: Array) -> float:
    """The mean of ‖h‖²."""
    return float(np.mean((inputs**2).sum(-1)))
