"""Walks an exported graph: what does not depend on the chosen input is computed, the rest goes by the rules."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from hf_lipschitz.bounds.advice import advice_for
from hf_lipschitz.bounds.export import on_cpu
from hf_lipschitz.bounds.logs import exponential, log_root_sum_squares, log_sum
from hf_lipschitz.bounds.regions import Region, length, settled
from hf_lipschitz.bounds.registry import MODULE_RULES, RULES, Call, Norms, NoRule
from hf_lipschitz.bounds.result import Cost
from hf_lipschitz.bounds.rules.modules import at
from hf_lipschitz.bounds.values import Dependent
from hf_lipschitz.bounds.whole import WHOLE
from hf_lipschitz.nn.attention import BallRadii


# Relative rounding of one logarithm, exponential, sum or gain, generously.
_ROUNDING = 1e-14
# Rounding of the entries of a center in one operator, relative to the norm of the whole; covers sums of thousands.
_BLUR = 1e-13

_RETURNED = OutputKind.USER_OUTPUT
_aten = torch.ops.aten
# They read the shape of their argument and none of its entries.
_BY_SHAPE = {
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default),
    *(_aten.empty_like.default, _aten.new_empty.default, _aten.sym_size.int),
}


class Ball(NamedTuple):
    """The inputs within `radius` of `center`, in the Frobenius norm of the whole tensor."""

    center: Tensor
    radius: float


@dataclasses.dataclass
class Walk:
    """What a walk found.

    Args:
        outputs (`list[Dependent]`):
            Those outputs of the graph that depend on the input.
        log_value (`float`):
            log L of all outputs together, rounded up.
        costs (`tuple[Cost]`):
            See [`LipschitzBound`].
        values (`dict[str, Dependent | list[Dependent]]`):
            All nodes that depend on the input, by name.
    """

    outputs: list[Dependent]
    log_value: float
    costs: tuple[Cost, ...]
    values: dict[str, Any]

    @property
    def per_node(self) -> dict[str, float]:
        """log L by node."""
        return {name: _log_of(value) for name, value in self.values.items()}


class Interpreter:
    """The graph of a model, to be walked once or for many balls of inputs.

    Args:
        program (`ExportedProgram`):
            Functional.
        wrt (`str`):
            The input.
        constants (`Mapping[str, Any]`):
            The values of the other inputs of the graph, by name.
        modules (`Mapping[int, Module]`):
            Those that are single nodes.
        prefix (`str`, *optional*):
            Left out of the names of modules.
    """

    def __init__(
        self,
        program: ExportedProgram,
        wrt: str,
        constants: Mapping[str, Any],
        modules: Mapping[int, nn.Module],
        prefix: str = "",
    ) -> None:
        self.program, self.wrt, self.constants, self.modules = program, wrt, constants, modules
        self.prefix = prefix
        self.norms = Norms()

    @torch.no_grad()
    def walk(self, ball: Ball | None = None) -> Walk:
        """Bounds each node, for all inputs or for those in a ball.

        Raises:
            ValueError: the graph has no such input, or one that is not known.
        """
        self._ball, self._values, self._refusals = ball, {}, {}
        outputs: list[Node] = []
        for node in self.program.graph.nodes:
            if node.op == "output":
                outputs = self._outputs(node)
            else:
                self._values[node] = self._value(node)
        reached = {node: _log_of(value) for node, value in self._values.items() if _is_dependent(value)}
        if not any(node.op == "placeholder" for node in reached):
            raise ValueError(f"the exported graph has no input named {self.wrt!r}: forward may take it as **kwargs")
        ends = [node for node in outputs if node in reached]
        log = log_root_sum_squares([reached[node] for node in ends])
        log = log if math.isinf(log) else log + len(self._values) * _ROUNDING * (1 + abs(log))
        costs = self._blamed(ends) if log == math.inf else self._chain(ends, reached)
        found = [self._values[node] for node in ends]
        return Walk(found, log, costs, {node.name: self._values[node] for node in reached})

    def _outputs(self, node: Node) -> list[Node]:
        """Those that the model returns: inputs and buffers that it changes in place are not among them."""
        returned = {spec.arg.name for spec in self.program.graph_signature.output_specs if spec.kind is _RETURNED}
        leaves = [arg for arg in pytree.tree_leaves(node.args) if isinstance(arg, Node)]
        return [arg for arg in leaves if arg.name in returned]

    def _value(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return on_cpu(operator.attrgetter(node.target)(self.program.graph_module))
        args, kwargs = pytree.tree_map(self._known, (node.args, node.kwargs))
        if node.target is _aten.rms_norm.default:
            args, kwargs = _with_eps(node, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else args[0]
        if not any(isinstance(leaf, Dependent) for leaf in leaves) and not is_random and not is_higher:
            return self._constant(node, args, kwargs)
        try:
            return self._by_rule(node, args, kwargs)
        except NoRule as error:
            self._refusals[node] = str(error)
            return self._nothing(node)

    def _placeholder(self, node: Node) -> Any:
        if node.name == self.wrt:
            shape = tuple(node.meta["val"].shape)
            if self._ball is None:
                return Dependent(0.0, shape)
            center = self._ball.center.detach().to("cpu", torch.float64)
            return Dependent(0.0, shape, settled(Region(center=center), shape, self._ball.radius))
        if node.name not in self.constants:
            raise ValueError(
                f"the exported graph has an input {node.name!r}: pass inputs as a flat mapping of tensors"
            )
        return on_cpu(self.constants[node.name])

    def _known(self, argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return self._values[argument] if isinstance(argument, Node) else argument

    def _constant(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is WHOLE:
            module = self.modules[args[1]]
            outputs = type(module).forward(module.cpu(), *args[0])
            return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        return node.target(*args, **kwargs)

    def _by_rule(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target in _BY_SHAPE and isinstance(args[0], Dependent):
            like = node.args[0].meta["val"]
            shape_only = torch.zeros(like.shape, dtype=like.dtype)
            return node.target(shape_only, *args[1:], **kwargs)
        if node.target is WHOLE:
            return self._by_module(node, args)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.numel():
            return Dependent(-math.inf, tuple(value.shape))
        if node.target not in RULES:
            raise NoRule("the operator has no rule")
        arguments = {}
        for index, argument in enumerate(node.target._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = given
        call = Call(arguments, _shape(node), node.target, self.norms, self.modules)
        found = RULES[node.target](call)
        is_whole = isinstance(value, Tensor) and not value.is_floating_point()
        if is_whole and isinstance(found, Dependent) and found.log_lipschitz < math.inf:
            raise NoRule(f"its values are {value.dtype}, and jump as the input moves")
        blurs = None
        if self._ball is not None:
            blurred = dataclasses.replace(call, arguments=pytree.tree_map(_blurred, arguments))
            blurs = RULES[node.target](blurred)
        return self._settled(found, self._centers(node, args, kwargs), blurs)

    def _by_module(self, node: Node, args: tuple[Any, ...]) -> list[Dependent]:
        module = self.modules[args[1]]
        values = [value if isinstance(value, Dependent) else _as_dependent(value) for value in args[0]]
        call = Call({"inputs": values}, tuple(node.meta["val"][0].shape), node.target, self.norms, self.modules)
        found = MODULE_RULES[type(module)](call, module, values)
        centers: list[Tensor | None] = [None] * len(found)
        blurs = None
        if self._ball is not None and all(value.region.center is not None for value in values):
            centers = at(module, [value.region.center.expand(value.shape) for value in values])
            blurs = MODULE_RULES[type(module)](call, module, [_blurred(value) for value in values])
        return self._settled(found, centers, blurs)

    def _settled(self, found: Any, centers: Any, blurs: Any) -> Any:
        if isinstance(found, (tuple, list)):
            centers = centers if isinstance(centers, (tuple, list)) else [None] * len(found)
            blurs = blurs if isinstance(blurs, (tuple, list)) else [None] * len(found)
            parts = zip(found, centers, blurs, strict=True)
            return [self._settled(part, center, blur) for part, center, blur in parts]
        # Saved statistics, as of a batch norm, stand beside the value.
        centers = centers[0] if isinstance(centers, (tuple, list)) else centers
        if centers is not None and not centers.is_floating_point():
            centers = None
        if centers is None and not found.region.is_known:
            return found
        reach, log_blur = math.inf, -math.inf
        if centers is not None:
            # What the arguments are blurred by, as far as it comes through, and the rounding here.
            own = _BLUR * length(centers.nan_to_num(nan=math.inf), None).item()
            log_blur = log_sum([blurs.log_lipschitz, math.log(own) if own > 0 else -math.inf])
            reach = exponential(found.log_lipschitz) * self._ball.radius * (1 + len(self._values) * _ROUNDING)
            reach += exponential(log_blur)
        region = dataclasses.replace(found.region, center=centers)
        return dataclasses.replace(found, region=settled(region, found.shape, reach), log_blur=log_blur)

    def _centers(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value at the center of the ball, in float64; `None` where there is none."""
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Dependent)]
        if self._ball is None or any(leaf.region.center is None for leaf in leaves):
            return None

        def wide(leaf: Any) -> Any:
            if isinstance(leaf, Dependent):
                return leaf.region.center.expand(leaf.shape).contiguous()
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.double()
            is_float = isinstance(leaf, torch.dtype) and leaf.is_floating_point
            return torch.float64 if is_float else leaf

        args, kwargs = pytree.tree_map(wide, (args, kwargs))
        return node.target(*args, **kwargs)

    def _nothing(self, node: Node) -> Any:
        """A value of which nothing is known but, on a ball, its center."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [Dependent(math.inf, tuple(part.shape) if isinstance(part, Tensor) else ()) for part in value]
        return Dependent(math.inf, _shape(node))

    def _blamed(self, ends: list[Node]) -> tuple[Cost, ...]:
        """The refusals on the way to an output that are not the consequence of others, in the order of the graph."""
        on_the_way, waiting = set(), list(ends)
        while waiting:
            node = waiting.pop()
            if node not in on_the_way:
                on_the_way.add(node)
                waiting += node.all_input_nodes
        tainted: set[Node] = set()
        costs = []
        for node in self.program.graph.nodes:
            is_consequence = any(source in tainted for source in node.all_input_nodes)
            if is_consequence or node in self._refusals:
                tainted.add(node)
            if node in self._refusals and node in on_the_way and not is_consequence:
                costs.append(self._cost(node, math.inf, self._refusals[node]))
        return tuple(costs) or tuple(self._first_unknown(on_the_way))

    def _first_unknown(self, on_the_way: set[Node]) -> Iterator[Cost]:
        """Of nodes without a constant although all that goes into them has one, as positions of a maximum."""
        unknown = {
            node
            for node in on_the_way
            if _is_dependent(self._values.get(node)) and _log_of(self._values[node]) == math.inf
        }
        for node in self.program.graph.nodes:
            if node in unknown and not unknown & set(node.all_input_nodes):
                yield self._cost(node, math.inf, "positions of its entries jump as the input moves")

    def _chain(self, ends: list[Node], reached: Mapping[Node, float]) -> tuple[Cost, ...]:
        """From an output back along the largest constants; the factors multiply to the whole."""
        costs = []
        node = max(ends, key=reached.__getitem__, default=None)
        while node is not None and reached[node] > -math.inf:
            sources = [source for source in node.all_input_nodes if source in reached]
            largest = max(sources, key=reached.__getitem__, default=None)
            if largest is not None and reached[largest] > -math.inf and node.target is not operator.getitem:
                costs.append(self._cost(node, reached[node] - reached[largest]))
            node = largest
        return tuple(sorted(costs, key=lambda cost: -cost.log_factor))

    def _cost(self, node: Node, log_factor: float, reason: str = "") -> Cost:
        stack = node.meta.get("nn_module_stack") or {}
        module = next(reversed(stack.values()))[0] if stack else ""
        module = module.removeprefix(self.prefix)
        operator_name = str(node.target)
        if node.target is WHOLE:
            operator_name = type(self.modules[node.args[1]]).__name__
        is_clipped = any(isinstance(inner, BallRadii) and inner.is_finite for inner in self.modules.values())
        advice = advice_for(operator_name, reason, is_clipped=is_clipped, log_factor=log_factor)
        return Cost(node.name, operator_name, module, log_factor, reason, advice)


def _with_eps(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The eps that torch takes where none is given: that of the dtype it computes in, which is not that of centers."""
    eps = args[3] if len(args) > 3 else kwargs.get("eps")
    if eps is None:
        is_wide = node.meta["val"].dtype == torch.float64
        eps = torch.finfo(torch.float64 if is_wide else torch.float32).eps
    return args[:3], {**kwargs, "eps": eps}


def _blurred(value: Any) -> Any:
    """A value with its blur in the place of its constant: rules are linear in constants, for given regions."""
    if not isinstance(value, Dependent):
        return value
    return Dependent(value.log_blur, value.shape, value.region)


def _as_dependent(value: Tensor) -> Dependent:
    center = value.detach().double()
    norm = length(center)
    zero = torch.zeros(1, dtype=torch.float64)
    return Dependent(-math.inf, tuple(value.shape), Region(center, center, norm, center, zero))


def _is_dependent(value: Any) -> bool:
    return isinstance(value, Dependent) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, Dependent) for part in value)
    )


def _log_of(value: Any) -> float:
    if isinstance(value, Dependent):
        return value.log_lipschitz
    return max(part.log_lipschitz for part in value if isinstance(part, Dependent))


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return tuple(first.shape) if isinstance(first, Tensor) else ()
