"""Projections onto balls, and the radii to which an attention layer clips its queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_lipschitz.functional.precision import float32_below


# Squares of norms about this large are normal float32 numbers.
SMALLEST_RADIUS = 1e-12


def clip_to_ball(x: Tensor, radius: Tensor | float) -> Tensor:
    r"""x / max(1, ‖x‖/r) along the last axis: the projection onto the ball of radius r, 1-Lipschitz.

    Norms are computed in float32, or float64 where `x` is float64, also under autocast. The r of the formula is a
    little below `radius`, by the rounding of a sum of squares (Higham 2002, eq. 3.5) and of the result, so that what
    is stored lies inside the ball of `radius`. Vectors inside, the zero vector among them, come back bit for bit
    and pass their gradient on unchanged; second derivatives exist as well.

    Args:
        x (`Tensor` of shape `(..., d)`):
            Floating point.
        radius (`Tensor` or `float`):
            r, at least 1e-12; `inf` changes nothing. A tensor must broadcast to `(..., 1)`.

    Returns:
        `Tensor` of the shape and dtype of `x`, of norm at most `radius`: a **sound bound**, rounding included.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    loss, least = _rounding(x)
    inner = torch.as_tensor(radius, dtype=wide.dtype, device=x.device) * (1 - loss) - least
    square = (wide * wide).sum(-1, keepdim=True)
    # The root of the square of a tiny vector has no bounded derivative.
    norm = torch.where(square > 0, square, 1.0).sqrt()
    is_outside = (square > 0) & (norm > inner)
    # Neither branch may divide inf by inf: its derivative would reach the other as NaN.
    scale = torch.where(is_outside, inner.clamp(min=0), 1.0) / torch.where(is_outside, norm, 1.0)
    return (wide * scale).to(x.dtype)


class BallRadii(nn.Module):
    """Clips queries, keys and values, of shape `(..., d)`, each kind to a ball of its own radius.

    The radii are the float32 buffer `radii` of shape (3,), for queries, keys and values in this order. It is saved
    with the model and stays float32 when the model is cast. At the initial `inf` nothing changes. After
    [`begin_calibration`] nothing is clipped, and the largest norms are recorded until [`end_calibration`] makes them,
    with a margin, the radii.

    Args:
        device (`torch.device`, *optional*):
            Of the buffer; `meta` where a checkpoint is about to fill it.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("radii", torch.full((3,), torch.inf, dtype=torch.float32, device=device))
        self._largest: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._largest is not None:
            self._record(query, key, value)
            return query, key, value
        radius_q, radius_k, radius_v = self.radii.unbind()
        return clip_to_ball(query, radius_q), clip_to_ball(key, radius_k), clip_to_ball(value, radius_v)

    @property
    def query(self) -> float:
        """Radius of the queries."""
        return self.radii[0].item()

    @property
    def key(self) -> float:
        """Radius of the keys."""
        return self.radii[1].item()

    @property
    def value(self) -> float:
        """Radius of the values."""
        return self.radii[2].item()

    @property
    def is_finite(self) -> bool:
        """Whether all three radii are."""
        return not self.radii.is_meta and bool(torch.isfinite(self.radii).all())

    @torch.no_grad()
    def set_radii(self, query: float | None = None, key: float | None = None, value: float | None = None) -> None:
        """Sets those that are given, rounded down to float32.

        Raises:
            ValueError: a radius is NaN or below 1e-12.
        """
        given = {"query": query, "key": key, "value": value}
        for index, (name, radius) in enumerate(given.items()):
            if radius is None:
                continue
            _check_radius(name, radius)
            self.radii[index] = float32_below(radius)

    def check(self) -> None:
        """Raises a ValueError where the radii, which may come from a file, are not radii."""
        if not self.radii.is_meta:
            for name in ("query", "key", "value"):
                _check_radius(name, getattr(self, name))

    def begin_calibration(self) -> None:
        """From here on calls change nothing, and the norms that pass are recorded."""
        self._largest = torch.full((3,), -1.0, dtype=torch.float32, device=self.radii.device)

    def end_calibration(self, margin: float) -> None:
        """Makes (1 + `margin`) times the largest norms seen the radii, so that on the same data nothing is clipped.

        Raises:
            ValueError: `margin` is negative or not finite, or a norm was not finite.
            RuntimeError: no calibration was begun, or nothing passed since.
        """
        if self._largest is None:
            raise RuntimeError("end_calibration without begin_calibration: call that first, then run the model")
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin must be at least 0 and finite, got {margin}")
        largest, self._largest = self._largest.tolist(), None
        if min(largest) < 0:
            raise RuntimeError(
                "nothing passed through an attention layer since begin_calibration: its radii cannot be calibrated. "
                "Run the model on data that reach every layer"
            )
        if not all(math.isfinite(norm) for norm in largest):
            raise ValueError(
                "queries, keys or values are not finite on the calibration data: check them or the weights"
            )
        # One float32 above covers the rounding down in set_radii and here.
        self.set_radii(*(max(SMALLEST_RADIUS, norm * (1 + margin)) * (1 + 2.0**-22) for norm in largest))

    @property
    def has_data(self) -> bool:
        """Whether anything passed since [`begin_calibration`]."""
        return self._largest is not None and self._largest[0].item() >= 0

    def cancel_calibration(self) -> None:
        """Ends a calibration without using it."""
        self._largest = None

    @torch.no_grad()
    def _record(self, *kinds: Tensor) -> None:
        largest = torch.stack([_ceiling_of_norms(x).to(self._largest) for x in kinds])
        self._largest = torch.where(largest > self._largest, largest, self._largest)
        # A comparison with NaN is false.
        self._largest = torch.where(largest.isnan(), torch.inf, self._largest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BallRadii:
        before = self.radii
        super()._apply(fn, recurse)
        if self.radii.dtype != before.dtype:
            self.radii = before.to(self.radii.device)
        return self

    def extra_repr(self) -> str:
        if self.radii.is_meta:
            return "on the meta device"
        return f"query={self.query:.4g}, key={self.key:.4g}, value={self.value:.4g}"


def _rounding(x: Tensor) -> tuple[float, float]:
    """What a computed norm of `x` and a product with it may miss, relative to the norm and as a number.

    A sum of d squares is off by a factor of 1 ± (d + 1)u at most, its root by half of that; three more roundings
    follow in the dtype of the norm, and one in that of `x`, which for subnormal entries is absolute.
    """
    length = x.shape[-1]
    wide = torch.finfo(torch.promote_types(x.dtype, torch.float32))
    own = torch.finfo(x.dtype)
    loss = (length / 2 + 8) * wide.eps / 2 + own.eps
    return loss, math.sqrt(length) * own.smallest_normal * own.eps


def _ceiling_of_norms(x: Tensor) -> Tensor:
    """The least radius that clips none of the vectors."""
    loss, least = _rounding(x)
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    largest = norms.amax() if norms.numel() else norms.new_zeros(())
    return (largest + least) / (1 - 2 * loss)


def _check_radius(name: str, radius: float) -> None:
    if not radius >= SMALLEST_RADIUS * (1 - 2.0**-23):
        raise ValueError(f"the radius of the {name} must be at least {SMALLEST_RADIUS:g} or inf, got {radius}")
