"""Interpolation of images: a linear map of each axis."""

from __future__ import annotations

from typing import Any

import torch

from hf_lipschitz.bounds.registry import Call, rule
from hf_lipschitz.bounds.values import Dependent


_aten = torch.ops.aten
# Covers a dense float64 singular value decomposition of a matrix of some hundred rows.
_SVD_ALLOWANCE = 1 + 1e-11


@rule(
    *(_aten.upsample_bilinear2d.vec, _aten.upsample_bicubic2d.vec, _aten._upsample_bilinear2d_aa.vec),
    *(_aten._upsample_bicubic2d_aa.vec, _aten.upsample_nearest2d.vec, _aten._upsample_nearest_exact2d.vec),
    *(_aten.upsample_bilinear2d.default, _aten.upsample_bicubic2d.default, _aten._upsample_bilinear2d_aa.default),
    *(_aten._upsample_bicubic2d_aa.default, _aten.upsample_nearest2d.default),
)
def resized(call: Call) -> Dependent:
    """The product over both axes of the exact norms of the 1-D matrices, for the weights are products over axes."""
    name = "input" if "input" in call.arguments else "self"
    value = call.only(name)
    gain = 1.0
    for axis in (-2, -1):
        gain *= _norm_along(call, name, axis, value.shape[axis], call.shape[axis])
    return call.gives(value, gain)


def _norm_along(call: Call, name: str, axis: int, size: int, out: int) -> float:
    """Of the matrix by which one axis is resized; the other has two entries and keeps them.

    Two channels and two entries, for torch misreads the memory layout of images with one of either.
    """
    rows = torch.eye(size, dtype=torch.float64)[:, None, None, :].expand(size, 2, 2, size)
    images, target = (rows.contiguous(), [2, out]) if axis == -1 else (rows.mT.contiguous(), [out, 2])
    arguments: dict[str, Any] = {**call.arguments, name: images}
    factors = arguments.get("scale_factors")
    if factors is not None:
        arguments["scale_factors"] = [1.0, factors[1]] if axis == -1 else [factors[0], 1.0]
    else:
        arguments["output_size"] = target
    for key, position in (("scales_h", -2), ("scales_w", -1)):
        if key in arguments and position != axis:
            arguments[key] = None
    resized_rows = call.operator(**arguments)
    matrix = resized_rows[:, 0, 0, :] if axis == -1 else resized_rows[:, 0, :, 0]
    return torch.linalg.matrix_norm(matrix, ord=2).item() * _SVD_ALLOWANCE if matrix.numel() else 0.0
