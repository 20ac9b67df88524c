"""Interpolation of images: a linear map of each axis."""

from __future__ import annotations

import math
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
    """Of the matrix by which rows, or columns, of an image of width 1 are resized; scale factors are kept."""
    images = torch.eye(size, dtype=torch.float64)[:, None, :, None]
    target = [out, 1]
    if axis == -1:
        images, target = images.mT, [1, out]
    arguments: dict[str, Any] = {**call.arguments, name: images}
    factors = arguments.get("scale_factors")
    if factors is not None:
        factor = factors[axis]
        arguments["scale_factors"] = [factor, 1.0] if axis == -2 else [1.0, factor]
    else:
        arguments["output_size"] = target
    for key, position in (("scales_h", -2), ("scales_w", -1)):
        if key in arguments and position != axis:
            arguments[key] = None
    matrix = call.operator(**arguments).reshape(size, out)
    return torch.linalg.matrix_norm(matrix, ord=2).item() * _SVD_ALLOWANCE if math.prod(matrix.shape) else 0.0
