"""The tables of rules, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_lipschitz.bounds.logs import scaled
from hf_lipschitz.bounds.regions import UNKNOWN, Region
from hf_lipschitz.bounds.values import Dependent
from hf_lipschitz.functional.geometry import ConvGeometry
from hf_lipschitz.functional.weights import weight_norm_bound


class NoRule(Exception):
    """No finite constant is known of a node; the message says why."""


class Norms:
    """Certified operator norms of weights, each computed once."""

    def __init__(self) -> None:
        # The weights themselves are kept, for an id may be used again.
        self._known: dict[Any, tuple[Any, float]] = {}

    def of(self, weight: Tensor, geometry: ConvGeometry | None = None) -> float:
        """Of a matrix or kernel of the model, which is not changed meanwhile."""
        return self._of((id(weight), geometry), (weight,), weight, geometry)

    def of_product(self, weight: Tensor, gain: Tensor, product: Tensor) -> float:
        """Of a weight of the model with its columns multiplied by the gain of a norm, the same at each walk."""
        return self._of((id(weight), *gain.tolist()), (weight,), product, None)

    def _of(self, key: Any, kept: Any, weight: Tensor, geometry: ConvGeometry | None) -> float:
        if key not in self._known:
            self._known[key] = (kept, norm_of(weight, geometry))
        return self._known[key][1]


def norm_of(weight: Tensor, geometry: ConvGeometry | None = None) -> float:
    """The same of a weight that was only just made."""
    return weight_norm_bound(weight, geometry, certified=True).item()


@dataclass(frozen=True)
class Call:
    """A node of the graph.

    Args:
        arguments (`dict[str, Any]`):
            By the names of the operator's schema, with defaults. Each value that depends on the input is a
            [`Dependent`], each other one the tensor or number that it is.
        shape (`tuple[int]`):
            Of the value; of the first one of a tuple.
        operator (`Any`):
            The operator, to be run on other arguments.
        norms (`Norms`):
            Of the weights.
        modules (`Mapping[int, Module]`):
            Those that are in the graph as a whole.
    """

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    operator: Any = None
    norms: Norms = field(default_factory=Norms)
    modules: Mapping[int, nn.Module] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def only(self, name: str) -> Dependent:
        """The argument `name`, where it alone depends on the input."""
        others = [key for key, value in self.arguments.items() if key != name and depends(value)]
        value = self.arguments[name]
        if others or not isinstance(value, Dependent):
            raise NoRule(f"it depends on the input through {', '.join(others) or 'no tensor of its own'}")
        return value

    def gives(self, source: Dependent, gain: float, region: Region = UNKNOWN, **more: Any) -> Dependent:
        """A value with `gain` times the constant of `source`."""
        return Dependent(scaled(source.log_lipschitz, gain), self.shape, region, **more)


Rule = Callable[[Call], Any]
RULES: dict[Any, Rule] = {}

ModuleRule = Callable[[Call, nn.Module, list[Dependent]], list[Dependent]]
MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of operators: from a [`Call`] to a [`Dependent`], or a tuple of them.

    It raises [`NoRule`] with the reason where it knows no constant. A rule states the proof of its gain, which is that
    of the map in exact arithmetic; what it says of the region must hold wherever the arguments lie in theirs. The
    center is added by the interpreter.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def module_rule(*kinds: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Registers a function as the rule of modules of exactly these classes, which are then not looked into.

    Such a module takes tensors by position and returns as many, of the same shapes.
    """

    def register(function: ModuleRule) -> ModuleRule:
        for kind in kinds:
            MODULE_RULES[kind] = function
        return function

    return register


def depends(value: Any) -> bool:
    """Whether a value, or a part of a list, depends on the input."""
    return isinstance(value, Dependent) or (isinstance(value, (list, tuple)) and any(map(depends, value)))
