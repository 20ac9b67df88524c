"""The bound of a module by its exported graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.bounds import rules as _rules  # noqa: F401  registers them
from hf_lipschitz.bounds.export import check_model, chosen_input, exported, own, state_of
from hf_lipschitz.bounds.interpreter import Ball, Interpreter, Walk
from hf_lipschitz.bounds.result import Cost, LipschitzBound
from hf_lipschitz.bounds.whole import whole_modules


class BoundedGraph:
    r"""The exported graph of a model, of which any number of bounds can be asked.

    The model is exported once and its graph walked with log-space constants: linear maps multiply, sums add, values
    side by side take the root of the sum of squares, and ranges of values, everywhere or on a ball of inputs, give
    slopes of what has no constant of its own. Each rule in `bounds/rules` states its proof. A module that is called
    twice is in the graph twice, and in-place operators are made functional first. An operator without a rule gives inf
    and is named.

    Args:
        model (`torch.nn.Module`):
            In evaluation mode, without constrained layers ([`materialized`] gives such a model). It must not change
            while this object is used.
        inputs (`Mapping[str, Any]`):
            Keyword arguments of `forward`. Bounds are for their shapes, and for the values of all but `wrt`.
        wrt (`str`, *optional*):
            The input; defaults to the only floating-point one.
        stand_ins (`Mapping[str, Module]`, *optional*):
            By name of a module, one with a rule of its own (`module_rule`) that computes the same.
        prefix (`str`, *optional*):
            Left out of the names of modules in what is printed.

    Raises:
        TypeError: `wrt` is not a floating-point tensor.
        ValueError: `wrt` is no input or not clear; the model is in training mode; a weight holds NaN or inf. Whatever
            the model itself raises on `inputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        wrt: str | None = None,
        stand_ins: Mapping[str, nn.Module] | None = None,
        prefix: str = "",
    ) -> None:
        self.wrt = chosen_input(inputs, wrt)
        check_model(model)
        self._inputs = inputs = own(inputs)
        self._shape = tuple(inputs[self.wrt].shape)
        with torch.no_grad():
            model(**own(inputs))
        self._refusal: Cost | None = None
        with whole_modules(model, stand_ins or {}) as modules:
            try:
                program = exported(model, own(inputs))
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                advice = "control flow that depends on data has no graph: rewrite it, or load another implementation"
                inner = type(model.get_submodule(prefix.rstrip("."))).__name__
                self._refusal = Cost("torch.export", inner, "", math.inf, reason, advice)
                return
        self._interpreter = Interpreter(program, self.wrt, {**inputs, **state_of(program)}, modules, prefix)

    def bound(self, *, center: Tensor | None = None, radius: float | None = None) -> LipschitzBound:
        """The bound for all inputs, or for those within `radius` of `center`.

        Args:
            center (`Tensor`, *optional*):
                Of the shape of the input; floating point and finite.
            radius (`float`, *optional*):
                Of the ball in the Frobenius norm of the whole tensor: with a batch, each row may use all of it.

        Returns:
            [`LipschitzBound`]: a **sound bound** of all outputs together; inf with `.blame` where no constant is
            known, and where torch.export cannot follow the model.

        Raises:
            TypeError, ValueError: one of the two is missing, or has a wrong type, shape or value.
        """
        if self._refusal is not None:
            return LipschitzBound(math.inf, (self._refusal,), {}, self.wrt, radius, shape=self._shape)
        walk = self.walk(center=center, radius=radius)
        return LipschitzBound(walk.log_value, walk.costs, walk.per_node, self.wrt, radius, shape=self._shape)

    def walk(self, *, center: Tensor | None = None, radius: float | None = None) -> Walk:
        """As [`BoundedGraph.bound`], with what is known of the outputs.

        Raises:
            ValueError: the model cannot be exported, besides.
        """
        if self._refusal is not None:
            raise ValueError(str(self._refusal))
        return self._interpreter.walk(self._ball(center, radius))

    def fits(self, x: Tensor, others: Mapping[str, Any]) -> bool:
        """Whether the bounds are for inputs like x as well, with these other inputs."""
        if tuple(x.shape) != self._shape or set(others) != set(self._inputs) - {self.wrt}:
            return False
        return all(_is_same(value, self._inputs[name]) for name, value in others.items())

    def _ball(self, center: Tensor | None, radius: float | None) -> Ball | None:
        if center is None and radius is None:
            return None
        if center is None or radius is None:
            raise ValueError("a ball needs both center and radius; leave both out for all inputs")
        if isinstance(radius, bool) or not isinstance(radius, (int, float)):
            raise TypeError(f"radius must be a number, got {type(radius).__name__}")
        if not 0 < radius < math.inf:
            raise ValueError(f"radius must be positive and finite, got {radius}")
        if not isinstance(center, Tensor) or not center.is_floating_point():
            raise TypeError(f"center must be a floating-point tensor, as {self.wrt} is")
        if tuple(center.shape) != self._shape:
            raise ValueError(f"center has shape {tuple(center.shape)}, and {self.wrt} has {self._shape}")
        if not bool(torch.isfinite(center).all()):
            raise ValueError("center holds NaN or inf")
        return Ball(center, float(radius))


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    return type(a) is type(b) and a == b


def graph_bound(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    wrt: str | None = None,
    center: Tensor | None = None,
    radius: float | None = None,
    stand_ins: Mapping[str, nn.Module] | None = None,
) -> LipschitzBound:
    """One bound of [`BoundedGraph`]."""
    return BoundedGraph(model, inputs, wrt=wrt, stand_ins=stand_ins).bound(center=center, radius=radius)
