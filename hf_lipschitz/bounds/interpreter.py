"""Walks an exported graph: what does not depend on the chosen input is computed, the rest goes by [`RULES`]."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from hf_lipschitz.bounds.domain import Dependent, LipschitzBound, Refusal, log_root_sum_squares
from hf_lipschitz.bounds.rules import RULES, Call, NoRule


# Relative rounding of one logarithm, exponential, sum or gain, generously.
_ROUNDING = 1e-14

_aten = torch.ops.aten
# They read the shape of their argument and none of its entries.
_BY_SHAPE = {
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default),
}


def graph_bound(model: nn.Module, inputs: Mapping[str, Any], *, wrt: str | None = None) -> LipschitzBound:
    r"""A global Lipschitz constant of a model with respect to one of its inputs.

    The model is exported once and its graph walked with log-space constants: linear maps multiply, sums add, values
    side by side take the root of the sum of squares; each rule of `bounds/rules.py` states its proof. A module that is
    called twice is in the graph twice, and in-place operators are made functional first. An operator without a rule
    gives inf and is named.

    Args:
        model (`torch.nn.Module`):
            In evaluation mode, without constrained layers ([`materialized`] gives such a model).
        inputs (`Mapping[str, Any]`):
            Keyword arguments of `forward`. The bound is for their shapes, and for the values of all
            but `wrt`.
        wrt (`str`, *optional*):
            The input; defaults to the only floating-point one.

    Returns:
        [`LipschitzBound`]: a **sound bound** of all outputs together in Frobenius norms, for all values of `wrt`; inf
        with `.blame` where an operator has no rule.

    Raises:
        TypeError: `wrt` is not a floating-point tensor.
        ValueError: `wrt` is no input or not clear; the model is in training mode; a parameter is NaN or inf; the model
            cannot be exported, as with control flow that depends on data.
    """
    name = _chosen(inputs, wrt)
    if any(module.training for module in model.modules()):
        raise ValueError("the model, or a module of it, is in training mode: call model.eval() first")
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) and not _is_mask(tensor):
            raise ValueError(f"{key} holds NaN or inf: repair or reload it first")
    return _walk(_exported(model, inputs), name, inputs)


def _is_mask(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) and not bool(torch.isnan(tensor).any())


def _chosen(inputs: Mapping[str, Any], wrt: str | None) -> str:
    floating = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if wrt is None:
        if len(floating) != 1:
            raise ValueError(f"wrt must name the input: floating-point inputs are {', '.join(floating) or 'none'}")
        return floating[0]
    if wrt not in inputs:
        raise ValueError(f"wrt={wrt!r} is not an input; inputs are {', '.join(inputs)}")
    if wrt not in floating:
        raise TypeError(
            f"wrt={wrt!r} is not a floating-point tensor: a Lipschitz constant needs one, as inputs_embeds"
        )
    return wrt


def _exported(model: nn.Module, inputs: Mapping[str, Any]) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), dict(inputs), strict=False)
            # Without a table of decompositions: functional operators, each as whole as it was written.
            return program.run_decompositions({})
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be exported by torch.export: {error}") from error


def _walk(program: ExportedProgram, wrt: str, inputs: Mapping[str, Any]) -> LipschitzBound:
    values: dict[Node, Any] = {}
    causes: dict[Node, tuple[Refusal, ...]] = {}
    constants = _constants(program) | dict(inputs)
    outputs: list[Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(node, wrt, constants)
            causes[node] = ()
        elif node.op == "get_attr":
            values[node], causes[node] = operator.attrgetter(node.target)(program.graph_module), ()
        elif node.op == "output":
            outputs = [arg for arg in pytree.tree_leaves(node.args) if isinstance(arg, Node)]
        else:
            values[node], causes[node] = _value(node, values, causes)
    logs = [values[node].log_lipschitz for node in outputs if isinstance(values[node], Dependent)]
    blame = tuple(dict.fromkeys(refusal for node in outputs for refusal in causes[node]))
    total = _up(log_root_sum_squares(logs), len(values))
    if not any(node.op == "placeholder" and isinstance(values[node], Dependent) for node in values):
        raise ValueError(f"the exported graph has no input named {wrt!r}: forward may take it as **kwargs")
    reached = {node.name: value.log_lipschitz for node, value in values.items() if isinstance(value, Dependent)}
    return LipschitzBound(total, blame, reached)


def _up(log: float, count: int) -> float:
    return log if math.isinf(log) else log + count * _ROUNDING * (1 + abs(log))


def _constants(program: ExportedProgram) -> dict[str, Any]:
    signature, state = program.graph_signature, {**program.state_dict, **program.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {name: state[target] for name, target in names.items()}


def _placeholder(node: Node, wrt: str, constants: Mapping[str, Any]) -> Any:
    if node.name == wrt:
        return Dependent(0.0, tuple(node.meta["val"].shape))
    if node.name not in constants:
        raise ValueError(f"the exported graph has an input {node.name!r}: pass inputs as a flat mapping of tensors")
    return constants[node.name]


def _value(
    node: Node, values: Mapping[Node, Any], causes: Mapping[Node, tuple[Refusal, ...]]
) -> tuple[Any, tuple[Refusal, ...]]:
    def known(x: Any) -> Any:
        is_shape_enough = isinstance(x, Node) and node.target in _BY_SHAPE
        if is_shape_enough and isinstance(values[x], Dependent):
            like = x.meta["val"]
            return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return values[x] if isinstance(x, Node) else x

    args, kwargs = pytree.tree_map(known, (node.args, node.kwargs))
    before = tuple(dict.fromkeys(refusal for source in node.all_input_nodes for refusal in causes[source]))
    leaves = pytree.tree_leaves((args, kwargs))
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    is_constant = not any(isinstance(leaf, Dependent) for leaf in leaves)
    if is_constant and not is_random and not isinstance(node.target, torch._ops.HigherOrderOperator):
        with torch.no_grad():
            return node.target(*args, **kwargs), before
    if node.target is operator.getitem:
        return Dependent(args[0].log_lipschitz, _shape(node)), before
    try:
        log = _by_rule(node, args, kwargs)
    except NoRule as error:
        refusal = Refusal(node.name, str(node.target), f"{error}{_place(node)}")
        return Dependent(math.inf, _shape(node)), (*before, refusal)
    return Dependent(log, _shape(node)), before


def _by_rule(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    if node.target not in RULES:
        raise NoRule("the operator has no rule")
    arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
        arguments[argument.name] = given
    return RULES[node.target](Call(arguments, _shape(node)))


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _place(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    inner = list(stack.values())[-1][0] if stack else ""
    return f", in {inner}" if inner else ""
