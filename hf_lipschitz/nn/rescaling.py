"""The parametrization that divides a weight channel by channel: spectral rescaling, AOL and SLL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lipschitz.functional.checks import check_named_weight
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.functional.precision import subnormal_unit
from hf_lipschitz.functional.rescaling import check_num_iterations
from hf_lipschitz.functional.rescaling_conv import MAX_ITERATIONS, Side
from hf_lipschitz.functional.weights import operator_to_frobenius
from hf_lipschitz.nn.constraint import Constraint, whole
from hf_lipschitz.nn.parametrizations import farthest


# Keeps q = exp(log_q) within 2^-400 and 2^400.
LARGEST_LOG = 277.0
# Between two computations of the same t, say with another number of threads.
_REPETITION = 1 + 1e-12


class RescalingParametrization(Constraint):
    r"""W ↦ diag(max(1, t/c))⁻¹W (`exact=False`) or c diag(t)⁻¹W (`exact=True`), or the same on the right of W.

    t is that of [`spectral_rescaling`] or [`conv_spectral_rescaling`] for the channels of one side, computed at each
    read in float64. With diag(t)⁻¹W the value without `exact` is c times a contraction, as max(1, t/c) is at least
    t/c. Rounding to the dtype of W is an error of norm at most f u‖W‖_F, f of [`operator_to_frobenius`] and u the unit
    roundoff, and of f√n times half the least subnormal number for n entries, by which a value that differs from W is
    made smaller: a **sound bound** in every dtype.

    `side="input"` with learned weights q is the linear map of SLL, \(W T^{-1/2}\) with
    \(T_{ii} = \sum_j |W^TW|_{ij}\, q_j/q_i\) (Araujo et al. 2023, theorem 3), here \(T_{ii} \ge c^2\) where not
    `exact`; `side="output"` with N = 1 and q = 1 is AOL (Prach & Lampert 2022).

    Args:
        layout (`WeightLayout`):
            How the layer uses the tensor.
        weight (`Tensor`):
            The raw weight; only its shape, dtype and device are used.
        side (`str`):
            Which channels are divided, `"output"` or `"input"`.
        num_iterations (`int`):
            N, at most 3 for a convolution.
        learns_weights (`bool`):
            Whether the weights q = exp(`log_q`) of the channels are trained, as in SLL; 1 otherwise, and where a group
            of a convolution has one channel, as in depthwise ones.
        exact, name:
            See [`Constraint`].

    Raises:
        ValueError: N is out of range.
    """

    def __init__(
        self,
        layout: WeightLayout,
        weight: Tensor,
        *,
        side: Side,
        num_iterations: int,
        learns_weights: bool,
        exact: bool,
        name: str,
    ) -> None:
        super().__init__(layout, exact=exact, name=name)
        check_num_iterations(num_iterations)
        if layout.geometry is not None and num_iterations > MAX_ITERATIONS:
            raise ValueError(
                f"layer {name}: num_iterations must be at most {MAX_ITERATIONS} for a convolution, got "
                f"{num_iterations}"
            )
        self.side, self.num_iterations = side, num_iterations
        # Only ratios of weights within a group count.
        has_ratios = layout.channels_together(weight.shape, side) > 1
        channels = layout.channels(weight.shape, side)
        self.log_q = nn.Parameter(weight.new_zeros(channels)) if learns_weights and has_ratios else None

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta or self.is_suspended:
            return weight
        weight = whole(weight)
        with torch.autocast(weight.device.type, enabled=False):
            wide = weight.double()
            constant = self.lipschitz.clone()
            t = self.divisors(wide)
            ratio = t / torch.where(constant > 0, constant, 1.0)
            divisor = ratio if self.exact else ratio.clamp_min(1.0)
            value = self.layout.divided(wide, divisor, self.side) * (constant > 0)
            with torch.no_grad():
                unit = torch.finfo(weight.dtype).eps / 2
                factor = operator_to_frobenius(weight.shape, self.layout.geometry)
                rounding = unit * factor * self.layout.frobenius_ceilings(value, torch.float64).amax()
                lost = factor * subnormal_unit(weight.dtype) * weight.numel() ** 0.5
                scale = (constant - lost).clamp_min(0) / torch.where(constant > 0, constant + rounding, 1.0)
                if not self.exact:
                    scale = torch.where(ratio.amax() <= 1, 1.0, scale)
            return (value * scale).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def refresh(self, *, anew: bool = False) -> None:
        """Nothing is kept between reads; raises a ValueError where the raw weight is NaN or inf."""
        check_named_weight(self.name, whole(self.original))

    def divisors(self, weight: Tensor) -> Tensor:
        """t, float64: (channels,) or (count, channels)."""
        q = None if self.log_q is None else whole(self.log_q).double().clamp(-LARGEST_LOG, LARGEST_LOG).exp()
        return self.layout.rescaling(weight, self.side, self.num_iterations, q)

    @torch.no_grad()
    def present_bound(self) -> float:
        return self.divisors(whole(self.original).double()).amax().item() * _REPETITION

    @torch.no_grad()
    def scale(self) -> float:
        if self.original.is_meta:
            return 1.0
        t = self.divisors(whole(self.original).double())
        ratios = torch.where(t == 0, 1.0, self.lipschitz / torch.where(t == 0, 1.0, t))
        return farthest(ratios if self.exact else ratios.clamp(max=1.0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}, num_iterations={self.num_iterations}"
