"""One rule an operator: from the constants of its arguments to that of its value.

A rule gets the arguments of a node in which each value that depends on the input is a [`Dependent`] and each other one
the tensor or number that it is. It returns log L of the value, and raises [`NoRule`] with the reason where it knows
none. Every gain is that of the map in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_lipschitz.bounds.domain import Dependent, log_root_sum_squares, log_sum, scaled
from hf_lipschitz.functional.geometry import conv_geometry
from hf_lipschitz.functional.weights import weight_norm_bound
from hf_lipschitz.nn.gains import centred_norm


_aten = torch.ops.aten
# Covers a dense float64 singular value decomposition of a matrix of some hundred rows.
_SVD_ALLOWANCE = 1 + 1e-11


class NoRule(Exception):
    """No finite constant is known of a node; the message says why."""


@dataclass(frozen=True)
class Call:
    """A node: arguments by the names of the operator's schema, with defaults, and the shape of the value."""

    arguments: dict[str, Any]
    shape: tuple[int, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def only(self, name: str) -> Dependent:
        """The argument `name`, where it alone depends on the input."""
        others = [key for key, value in self.arguments.items() if key != name and _depends(value)]
        value = self.arguments[name]
        if others or not isinstance(value, Dependent):
            raise NoRule(f"it depends on the input through {', '.join(others) or 'no tensor of its own'}")
        return value


Rule = Callable[[Call], float]
RULES: dict[Any, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def _depends(value: Any) -> bool:
    return isinstance(value, Dependent) or (isinstance(value, (list, tuple)) and any(map(_depends, value)))


def _elementwise(gain: float | Callable[[Call], float], *operators: Any) -> None:
    """f with slopes of at most `gain` in absolute value, entry by entry: ‖f(x) - f(y)‖ ≤ gain ‖x - y‖."""

    @rule(*operators)
    def apply(call: Call) -> float:
        return scaled(call.only("self").log_lipschitz, gain(call) if callable(gain) else gain)


_elementwise(1.0, _aten.relu.default, _aten.relu6.default, _aten.tanh.default, _aten.abs.default, _aten.neg.default)
_elementwise(1.0, _aten.hardtanh.default, _aten.sin.default, _aten.cos.default)
_elementwise(0.25, _aten.sigmoid.default)
_elementwise(1.099839321, _aten.silu.default)
_elementwise(1.5, _aten.hardswish.default)
_elementwise(1.088498162, _aten.mish.default)
_elementwise(lambda call: max(1.0, abs(call["negative_slope"])), _aten.leaky_relu.default)
_elementwise(lambda call: {"none": 1.128904146, "tanh": 1.128993069}[call["approximate"]], _aten.gelu.default)


@rule(
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints),
    *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.unflatten.int),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
    *(_aten.clone.default, _aten.contiguous.default, _aten.detach.default, _aten.alias.default),
    *(_aten.flip.default, _aten.roll.default, _aten.select.int, _aten.slice.Tensor),
    *(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int),
    _aten.constant_pad_nd.default,
)
def rearranged(call: Call) -> float:
    """The same entries in another order, fewer of them, or with constants around. A tuple holds each at most once.

    `detach` keeps the value, whatever becomes of gradients.
    """
    return call.only("self").log_lipschitz


@rule(_aten.expand.default)
def expanded(call: Call) -> float:
    """Each entry r times: √r, attained."""
    value = call.only("self")
    return scaled(value.log_lipschitz, math.sqrt(_copies(value, call.shape)))


def _copies(value: Dependent, shape: Sequence[int]) -> float:
    return math.prod(shape) / max(math.prod(value.shape), 1)


@rule(_aten.dropout.default)
def dropout(call: Call) -> float:
    """The identity at evaluation."""
    if call["train"]:
        raise NoRule("dropout is active: put the model in evaluation mode")
    return call.only("input").log_lipschitz


@rule(_aten.add.Tensor, _aten.sub.Tensor)
def added(call: Call) -> float:
    """Triangle inequality: L₁ + |α| L₂, each times √r where it is broadcast r-fold."""
    weights = {"self": 1.0, "other": abs(call["alpha"])}
    terms = []
    for name, weight in weights.items():
        value = call[name]
        if isinstance(value, Dependent):
            terms.append(scaled(value.log_lipschitz, weight * math.sqrt(_copies(value, call.shape))))
    return log_sum(terms)


@rule(_aten.mul.Tensor)
def multiplied(call: Call) -> float:
    """diag(c) x: the largest of √Σ c² over the entries of c that one entry of x meets, attained."""
    dependent = [name for name in ("self", "other") if isinstance(call[name], Dependent)]
    if len(dependent) != 1:
        raise NoRule("a product of two values that depend on the input has no constant of its own")
    factor = call["other" if dependent == ["self"] else "self"]
    return _times(call[dependent[0]], factor, call.shape)


@rule(_aten.div.Tensor)
def divided(call: Call) -> float:
    """[`multiplied`] by 1/c."""
    if isinstance(call["other"], Dependent):
        raise NoRule("a quotient by a value that depends on the input has no constant of its own")
    return _times(call["self"], 1 / torch.as_tensor(call["other"], dtype=torch.float64), call.shape)


def _times(value: Dependent, factor: Tensor | float, shape: tuple[int, ...]) -> float:
    squares = torch.as_tensor(factor, dtype=torch.float64).detach().square().expand(shape)
    gain = squares.sum_to_size(value.shape).amax().sqrt().item() if squares.numel() else 0.0
    if not math.isfinite(gain):
        raise NoRule("it is multiplied by a constant that is NaN or inf")
    return scaled(value.log_lipschitz, gain)


@rule(_aten.sum.dim_IntList, _aten.sum.default)
def summed(call: Call) -> float:
    """A sum of n entries: √n, by Cauchy-Schwarz, attained."""
    value = call.only("self")
    return scaled(value.log_lipschitz, math.sqrt(_reduced(value, call.shape)))


@rule(_aten.mean.dim, _aten.mean.default)
def averaged(call: Call) -> float:
    """A mean of n entries: 1/√n."""
    value = call.only("self")
    return scaled(value.log_lipschitz, 1 / math.sqrt(_reduced(value, call.shape)))


def _reduced(value: Dependent, shape: tuple[int, ...]) -> float:
    return max(math.prod(value.shape), 1) / max(math.prod(shape), 1)


@rule(_aten.cat.default, _aten.stack.default)
def concatenated(call: Call) -> float:
    """Side by side: √(L₁² + L₂² + ...)."""
    return log_root_sum_squares([part.log_lipschitz for part in call["tensors"] if isinstance(part, Dependent)])


@rule(_aten.linear.default)
def linear(call: Call) -> float:
    """σ₁(W), from the certified bracket."""
    return scaled(call.only("input").log_lipschitz, weight_norm_bound(call["weight"], None, certified=True).item())


@rule(_aten.addmm.default)
def matrix_product_and_bias(call: Call) -> float:
    """|α| σ₁ of the constant factor on the right, as in transformers' Conv1D."""
    value = call.only("mat1")
    gain = abs(call["alpha"]) * weight_norm_bound(call["mat2"], None, certified=True).item()
    return scaled(value.log_lipschitz, gain)


@rule(_aten.mm.default, _aten.matmul.default)
def matrix_product(call: Call) -> float:
    """σ₁ of the one factor that is constant, a matrix; the other may be a stack."""
    left, right = call.arguments.values()
    value, factor = (left, right) if isinstance(left, Dependent) else (right, left)
    if isinstance(factor, Dependent):
        raise NoRule("a product of two values that depend on the input has no constant of its own")
    if factor.dim() != 2:
        raise NoRule("a product with a constant that is no matrix has no rule yet")
    return scaled(value.log_lipschitz, weight_norm_bound(factor, None, certified=True).item())


@rule(
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
)
def convolution(call: Call) -> float:
    """Norm of the operator for any size of its input, from the certified bracket over frequencies."""
    value, kernel = call.only("input"), call["weight"]
    is_transposed = "output_padding" in call.arguments
    options = {name: _one_or_all(call[name]) for name in ("stride", "padding", "dilation")}
    if is_transposed:
        options["output_padding"] = _one_or_all(call["output_padding"])
    geometry = conv_geometry(kernel.shape, groups=call["groups"], transposed=is_transposed, **options)
    return scaled(value.log_lipschitz, weight_norm_bound(kernel, geometry, certified=True).item())


def _one_or_all(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


@rule(_aten._native_batch_norm_legit_no_training.default)
def batch_norm(call: Call) -> float:
    """max |γ| / √(var + ε) over channels, with the stored statistics."""
    value = call.only("input")
    gains = 1 / (call["running_var"].double() + call["eps"]).sqrt()
    if call["weight"] is not None:
        gains = gains * call["weight"].double().abs()
    largest = gains.amax().item()
    if not math.isfinite(largest):
        raise NoRule("its statistics or weight are NaN or inf, or a variance is not above -eps")
    return scaled(value.log_lipschitz, largest)


@rule(_aten.layer_norm.default)
def layer_norm(call: Call) -> float:
    """‖diag(γ) P‖ / √ε with P = I - 11ᵀ/d, attained at constant inputs; no smaller constant holds everywhere."""
    value = call.only("input")
    gain = centred_norm(call["weight"], 0.0, tuple(call["normalized_shape"]))
    if call["eps"] <= 0:
        raise NoRule("without eps its slope grows without bound")
    return scaled(value.log_lipschitz, gain / math.sqrt(call["eps"]))


@rule(_aten.softmax.int, _aten._softmax.default)
def softmax(call: Call) -> float:
    """diag(p) - ppᵀ has norm at most 1/2, attained at two equal entries."""
    return scaled(call.only("self").log_lipschitz, 0.5)


def _max_pool(call: Call, axes: int) -> float:
    """An entry is in at most ∏ ⌈k / (s / gcd(s, d))⌉ windows, each of which takes a maximum: the root of that."""
    value = call.only("self")
    kernel = _all_axes(call["kernel_size"], axes)
    stride = _all_axes(call["stride"] or kernel, axes)
    dilation = _all_axes(call["dilation"], axes)
    windows = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return scaled(value.log_lipschitz, math.sqrt(windows))


def _average_pool(call: Call, axes: int) -> float:
    """Product over axes of the exact norms of the 1-D averaging matrices: the divisor is a product over axes, too."""
    if call.arguments.get("divisor_override") is not None:
        raise NoRule("divisor_override has no rule yet")
    value = call.only("self")
    kernel = _all_axes(call["kernel_size"], axes)
    stride = _all_axes(call["stride"] or kernel, axes)
    padding = _all_axes(call["padding"], axes)
    shared = {"ceil_mode": call["ceil_mode"], "count_include_pad": call["count_include_pad"]}
    gain = 1.0
    for size, k, s, p in zip(value.shape[-axes:], kernel, stride, padding, strict=True):
        gain *= _norm_of_rows(functional.avg_pool1d(_basis(size), k, s, p, **shared))
    return scaled(value.log_lipschitz, gain)


def _adaptive_average_pool(call: Call, axes: int) -> float:
    """As [`_average_pool`]: windows and divisors are products over axes."""
    value = call.only("self")
    gain = 1.0
    for size, out in zip(value.shape[-axes:], call.shape[-axes:], strict=True):
        gain *= _norm_of_rows(functional.adaptive_avg_pool1d(_basis(size), out))
    return scaled(value.log_lipschitz, gain)


_POOLS: dict[Callable[[Call, int], float], tuple[Any, Any, Any]] = {
    _max_pool: (_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default),
    _average_pool: (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default),
    _adaptive_average_pool: (
        *(_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default),
        _aten.adaptive_avg_pool3d.default,
    ),
}
for _pool, _operators in _POOLS.items():
    for _axes, _operator in enumerate(_operators, start=1):
        RULES[_operator] = partial(_pool, axes=_axes)


def _all_axes(value: Sequence[int], axes: int) -> list[int]:
    return list(value) * axes if len(value) == 1 else list(value)


def _basis(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).unsqueeze(1)


def _norm_of_rows(images: Tensor) -> float:
    return torch.linalg.matrix_norm(images.squeeze(1), ord=2).item() * _SVD_ALLOWANCE
