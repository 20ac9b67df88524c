"""Normalizations with a finite Lipschitz constant that equal the usual ones on the data they were calibrated on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.functional.precision import float32_below
from hf_lipschitz.nn.gains import INFLATION, affine, centred_norm, gain_of, largest_gain, rounded_up


class _Floor(nn.Module):
    """The floor of the deviation: the buffer `s_min`, its calibration, and its persistence."""

    s_min: Tensor
    eps: float

    def _init_floor(self, device: torch.device | None) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {self.eps}: without it the norm divides by zero")
        self._least: Tensor | None = None
        start = torch.tensor(float32_below(math.sqrt(self.eps)), dtype=torch.float64, device=device)
        self.register_buffer("s_min", start)

    def set_floor(self, value: float) -> None:
        """Sets `s_min`, rounded down to float32.

        Raises:
            ValueError: `value` is not positive and finite.
        """
        if not 0 < value < math.inf:
            raise ValueError(f"the floor s_min must be positive and finite, got {value}")
        self.s_min.fill_(float32_below(value))

    def check(self) -> None:
        """Raises a ValueError where `s_min`, which may come from a file, is not positive and finite."""
        if not self.s_min.is_meta and not 0 < self.s_min.item() < math.inf:
            raise ValueError(f"s_min must be positive and finite, got {self.s_min.item()}: calibrate the model again")

    def begin_calibration(self) -> None:
        """From here on the floor is not applied, and the least deviation that passes is recorded."""
        self._least = torch.full((), torch.inf, dtype=torch.float64, device=self.s_min.device)

    def end_calibration(self, margin: float) -> None:
        """Sets `s_min` to the least deviation seen, divided by 1 + `margin`.

        Every token that passed counts, padding included: a norm computes that as well, and no mask reaches it.

        Raises:
            RuntimeError: no calibration was begun, or nothing passed since; `s_min` is then what it was.
            ValueError: `margin` is negative or not finite, or a deviation was not finite.
        """
        if self._least is None:
            raise RuntimeError("end_calibration without begin_calibration: call that first, then run the model")
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin must be at least 0 and finite, got {margin}")
        least, self._least = self._least.item(), None
        if math.isnan(least):
            raise ValueError("the input of a norm is not finite on the calibration data: check them or the weights")
        if least == math.inf:
            raise RuntimeError("nothing passed through the norm since begin_calibration: run the model on data")
        self.set_floor(least / (1 + margin))

    def _floor_of(self, s: Tensor) -> Tensor:
        return self.s_min.to(device=s.device, dtype=s.dtype)

    @torch.no_grad()
    def _observe(self, s: Tensor) -> None:
        # An infinite deviation is the mark of a broken input as much as NaN is.
        least = torch.where(torch.isfinite(s), s, torch.nan).amin() if s.numel() else s.new_full((), torch.inf)
        self._least = torch.minimum(self._least, least.to(self._least))

    def _least_divisor(self) -> float:
        self.check()
        return max(self.s_min.item(), math.sqrt(self.eps) / INFLATION)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Floor:
        before = self.s_min
        super()._apply(fn, recurse)
        if self.s_min.dtype != before.dtype:
            self.s_min = before.to(self.s_min.device)
        return self

    def _floor_repr(self) -> str:
        return "s_min on the meta device" if self.s_min.is_meta else f"s_min={self.s_min.item():.4g}"


class FloorStdLayerNorm(_Floor, nn.LayerNorm):
    r"""\(\gamma\,(x - \bar x)/\max(s, s_{\min}) + \beta\) with \(s = \sqrt{\mathrm{var}(x) + \varepsilon}\): layer
    norm with a floor under its divisor. Where s ≥ s_min it calls torch's layer norm and is bit-equal to it.

    Its Lipschitz constant is \(\|\mathrm{diag}(\gamma)P\|_2 / \max(s_{\min}, \sqrt\varepsilon)\). Proof. Let
    \(u = Px\), so that \(s^2 = \|u\|^2/d + \varepsilon\). The map is continuous and piecewise smooth. Where s < s_min
    its Jacobian is \(\mathrm{diag}(\gamma)P/s_{\min}\). Elsewhere it is \(\mathrm{diag}(\gamma)MP/s\) with
    \(M = I - uu^\top/(ds^2)\), and \(0 \preceq M \preceq I\) as \(\|u\|^2 \le ds^2\). M commutes with P, for u has
    mean zero, so its norm is at most \(\|\mathrm{diag}(\gamma)P\|\,\|M\|/s\), and \(s \ge \max(s_{\min},
    \sqrt\varepsilon)\). A constant x attains it.

    `s_min` is a float64 buffer that is saved, and that stays float64 when the model is cast. At first it is √ε, and
    the function is that of layer norm.

    Args:
        normalized_shape (`int` or `tuple[int]`):
            The axes that are normalised, the last ones.
        eps (`float`, *optional*, defaults to `1e-5`):
            ε > 0.
        weight, bias (`torch.nn.Parameter`, *optional*):
            γ and β, of shape `normalized_shape`. They are taken over, not copied; left out, they are 1 and 0.
        axis (`int`, *optional*, defaults to `-1`):
            Of the features; 1 for feature maps `(n, c, ...)`. Another one than -1 needs a single normalised axis.
        offset (`float`, *optional*, defaults to `0.0`):
            Added to `weight`: 1 where a model stores γ - 1.

    Raises:
        ValueError: `eps` is not positive, or `axis` does not go with `normalized_shape`.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        *,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        axis: int = -1,
        offset: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps=eps, elementwise_affine=False)
        if axis != -1 and len(self.normalized_shape) != 1:
            raise ValueError(f"axis={axis} needs one normalised axis, got normalized_shape={self.normalized_shape}")
        self.weight, self.bias, self.axis, self.offset = weight, bias, axis, offset
        self.elementwise_affine = weight is not None
        self._init_floor(None if weight is None else weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == -1:
            return self._normalised(x)
        return self._normalised(x.movedim(self.axis, -1)).movedim(-1, self.axis)

    def _normalised(self, x: Tensor) -> Tensor:
        gain = gain_of(self.weight, self.offset)
        usual = F.layer_norm(x, self.normalized_shape, gain, self.bias, self.eps)
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred, s = _centred(_wide(x), axes, self.eps)
        if self._least is not None:
            self._observe(s)
            return usual
        floor = self._floor_of(s)
        floored = affine(centred / floor, gain, self.bias)
        # In the memory layout of layer norm, so that what follows rounds alike.
        return torch.where(s < floor, floored.to(usual.dtype), usual).contiguous()

    def lipschitz(self) -> float:
        """The Lipschitz constant at the present γ and `s_min`: a **sound bound** of the function in exact arithmetic,
        and attained by it.

        Raises:
            ValueError: γ holds NaN or inf, or `s_min` is not positive.
        """
        return rounded_up(centred_norm(self.weight, self.offset, self.normalized_shape) / self._least_divisor())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}, {self._floor_repr()}"


class FloorStdRMSNorm(_Floor):
    r"""\(\gamma\,x/\max(s, s_{\min})\) with \(s = \sqrt{\overline{x^2} + \varepsilon}\) over the last axis.

    Its Lipschitz constant is \(\max|\gamma| / \max(s_{\min}, \sqrt\varepsilon)\), by the proof of
    [`FloorStdLayerNorm`] with x in the place of u and I in that of P. The arithmetic is that of the RMS norms of
    transformers, in float32 or wider, with a floor under s: where s ≥ s_min it is bit-equal to them.

    `s_min` is as in [`FloorStdLayerNorm`].

    Args:
        weight (`torch.nn.Parameter`, *optional*):
            γ of shape `(d,)`, taken over and not copied.
        eps (`float`, *optional*, defaults to `1e-6`):
            ε > 0.
        offset (`float`, *optional*, defaults to `0.0`):
            Added to `weight`: 1 where a model stores γ - 1, as Gemma does.
        gain_in_float32 (`bool`, *optional*, defaults to `False`):
            Whether half precision is left for float32 until γ has been applied (Gemma), or before (Llama, T5).
        follows_weight (`bool`, *optional*, defaults to `False`):
            Whether the result has the dtype of a γ in half precision (T5, of which parts stay in float32), or that of
            the input.

    Raises:
        ValueError: `eps` is not positive.
    """

    def __init__(
        self,
        weight: nn.Parameter | None = None,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        gain_in_float32: bool = False,
        follows_weight: bool = False,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.eps, self.offset, self.gain_in_float32 = eps, offset, gain_in_float32
        self.follows_weight = follows_weight
        self._init_floor(None if weight is None else weight.device)

    @property
    def variance_epsilon(self) -> float:
        """The name that transformers has for `eps`."""
        return self.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        square = wide.pow(2).mean(-1, keepdim=True) + self.eps
        reciprocal = square.rsqrt()
        if self._least is not None:
            self._observe(square.sqrt())
        else:
            floor = self._floor_of(square)
            reciprocal = torch.where(square.sqrt() < floor, 1 / floor, reciprocal)
        normalised = wide * reciprocal
        if self.weight is None:
            return normalised.to(x.dtype)
        if self.gain_in_float32:
            return (normalised * gain_of(self.weight.to(wide.dtype), self.offset)).to(x.dtype)
        is_half = self.follows_weight and self.weight.dtype.itemsize < 4
        return gain_of(self.weight, self.offset) * normalised.to(self.weight.dtype if is_half else x.dtype)

    def lipschitz(self) -> float:
        """As [`FloorStdLayerNorm.lipschitz`]."""
        return rounded_up(largest_gain(self.weight, self.offset) / self._least_divisor())

    def extra_repr(self) -> str:
        shape = "" if self.weight is None else f"{tuple(self.weight.shape)}, "
        return f"{shape}eps={self.eps}, {self._floor_repr()}"


class FloorStdGroupNorm(_Floor, nn.GroupNorm):
    r"""Group norm with a floor under the deviation of each group; bit-equal to torch's where s ≥ s_min.

    Its Lipschitz constant is at most \(\max|\gamma| / \max(s_{\min}, \sqrt\varepsilon)\), by the proof of
    [`FloorStdLayerNorm`] for each group; the mean costs nothing where a channel has two positions or more, as a
    difference of the two has mean zero.

    `s_min` is as in [`FloorStdLayerNorm`].

    Args:
        num_groups, num_channels, eps:
            As in `torch.nn.GroupNorm`.
        weight, bias (`torch.nn.Parameter`, *optional*):
            γ and β of shape `(num_channels,)`, taken over and not copied.

    Raises:
        ValueError: `eps` is not positive, or the groups do not divide the channels.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps=eps, affine=False)
        self.weight, self.bias, self.affine = weight, bias, weight is not None
        self._init_floor(None if weight is None else weight.device)

    def forward(self, x: Tensor) -> Tensor:
        usual = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        centred, s = _centred(_wide(x).reshape(len(x), self.num_groups, -1), (-1,), self.eps)
        if self._least is not None:
            self._observe(s)
            return usual
        floor = self._floor_of(s)
        shape = (1, -1, *[1] * (x.dim() - 2))
        gain, bias = (None if p is None else p.reshape(shape) for p in (self.weight, self.bias))
        floored = affine((centred / floor).reshape(x.shape), gain, bias).to(usual.dtype)
        return torch.where(s < floor, floored.reshape(centred.shape), usual.reshape(centred.shape)).reshape(x.shape)

    def lipschitz(self) -> float:
        """As [`FloorStdLayerNorm.lipschitz`], attained where a channel has two positions or more."""
        return rounded_up(largest_gain(self.weight, 0.0) / self._least_divisor())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._floor_repr()}"


class CentredNorm(nn.Module):
    r"""\(\gamma\,(x - \bar x) + \beta\): what is left of layer norm without its division, and linear.

    It is another function than layer norm, so that a pretrained model needs training with it. `is_centred=False`
    leaves the mean, in the place of an RMS norm.

    Args:
        normalized_shape (`int` or `tuple[int]`):
            The last axes, of which the mean is taken.
        weight, bias (`torch.nn.Parameter`, *optional*):
            γ and β, taken over and not copied.
        axis, offset:
            As in [`FloorStdLayerNorm`].
        is_centred (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        axis: int = -1,
        offset: float = 0.0,
        is_centred: bool = True,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if axis != -1 and len(self.normalized_shape) != 1:
            raise ValueError(f"axis={axis} needs one normalised axis, got normalized_shape={self.normalized_shape}")
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.axis, self.offset, self.is_centred = axis, offset, is_centred

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, -1)
        if self.is_centred:
            axes = tuple(range(-len(self.normalized_shape), 0))
            moved = moved - moved.mean(axes, keepdim=True)
        return affine(moved, gain_of(self.weight, self.offset), self.bias).movedim(-1, self.axis)

    def lipschitz(self) -> float:
        r"""\(\|\mathrm{diag}(\gamma)P\|_2\), or max|γ| without the mean: a **sound bound**, attained.

        Raises:
            ValueError: γ holds NaN or inf.
        """
        if self.is_centred:
            return centred_norm(self.weight, self.offset, self.normalized_shape)
        return largest_gain(self.weight, self.offset)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, axis={self.axis}, is_centred={self.is_centred}"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(axes, keepdim=True)
    return centred, (centred.square().mean(axes, keepdim=True) + eps).sqrt()
