"""How a layer uses a stored tensor: as a matrix, as several, or as a convolution kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lipschitz.functional.geometry import ConvGeometry
from hf_lipschitz.functional.products import frobenius_ceiling
from hf_lipschitz.functional.rescaling import rescale_rows, rescaling_of_matrix
from hf_lipschitz.functional.rescaling_conv import (
    Side,
    num_channels,
    rescale_kernel,
    rescaling_of_kernel,
)
from hf_lipschitz.functional.weights import weight_norm_bound


class WeightLayout(NamedTuple):
    """What linear maps a tensor stands for. The default is one matrix of shape (out, in).

    Args:
        geometry (`ConvGeometry`, *optional*):
            Of the convolution whose kernel the tensor is.
        count (`int`, *optional*):
            How many matrices lie one after the other along the first axis, each a map by itself, as those of the
            experts of a mixture or of queries, keys and values. `None` is one matrix; further axes are flattened into
            its columns.
        is_transposed (`bool`, *optional*, defaults to `False`):
            Whether a matrix is stored as (in, out).
    """

    geometry: ConvGeometry | None = None
    count: int | None = None
    is_transposed: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """A view: the kernel as it is, one matrix as (rows, columns), several as (count, rows, columns)."""
        if self.geometry is not None:
            return weight
        if self.count is None:
            return weight.flatten(1)
        return weight.reshape(self.count, -1, weight.shape[-1])

    def channels(self, shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
        """Shape of one number a channel of a side: (channels,) or (count, channels)."""
        if self.geometry is not None:
            return (num_channels(shape, self.geometry, side),)
        first, *rest = shape
        if self.count is None:
            columns = 1
            for size in rest:
                columns *= size
            return (first,) if self._is_on_rows(side) else (columns,)
        rows = first // self.count if len(shape) == 2 else shape[1]
        return (self.count, rows if self._is_on_rows(side) else shape[-1])

    def channels_together(self, shape: tuple[int, ...], side: Side) -> int:
        """How many channels of a side are rows of one matrix."""
        channels = self.channels(shape, side)[-1]
        return channels if self.geometry is None else channels // self.geometry.groups

    def rescaling(self, weight: Tensor, side: Side, num_iterations: int, q: Tensor | None = None) -> Tensor:
        """t of [`spectral_rescaling`] or [`conv_spectral_rescaling`] for the channels of a side, float64; **sound** as
        they are. `q` and the result have the shape of [`channels`]."""
        if self.geometry is not None:
            return rescaling_of_kernel(weight, self.geometry, side=side, num_iterations=num_iterations, q=q)
        return rescaling_of_matrix(self._rows(weight, side), num_iterations=num_iterations, q=q)

    def divided(self, weight: Tensor, t: Tensor, side: Side) -> Tensor:
        """The tensor with each channel of a side divided by its t, and zeros where t = 0."""
        if self.geometry is not None:
            return rescale_kernel(weight, self.geometry, t, side=side)
        rows = rescale_rows(self._rows(weight, side), t)
        return (rows if self._is_on_rows(side) else rows.mT).reshape(weight.shape)

    def norm_bound(self, weight: Tensor, rtol: float = 1e-3, *, certified: bool = False) -> Tensor:
        """[`weight_norm_bound`] of the largest of the maps: a **sound bound**, 0-dim float64."""
        return weight_norm_bound(self.matrices(weight), self.geometry, rtol, certified=certified).amax()

    def frobenius_ceilings(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[`frobenius_ceiling`] of each map: 0-dim, or of shape (count,)."""
        return frobenius_ceiling(self.matrices(weight), dtype, batch=0 if self.count is None else 1)

    def _is_on_rows(self, side: Side) -> bool:
        return self.is_transposed == (side == "input")

    def _rows(self, weight: Tensor, side: Side) -> Tensor:
        matrices = self.matrices(weight)
        return matrices if self._is_on_rows(side) else matrices.mT
