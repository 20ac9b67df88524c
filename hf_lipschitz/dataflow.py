"""How the layers of a model are connected, read off the autograd graph of one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_lipschitz.holders import CONVOLUTIONS, DENSE
from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.probes import probe_inputs


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Backward nodes by the beginning of their names, as torch calls them.
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "MkldnnLinear", "GroupedMm")
_CONVOLUTION_PRODUCTS = ("Convolution", "CudnnConvolution", "MkldnnConvolution", "Thnn", "SlowConv", "ConvDepthwise")
_VIEWS = (
    *("View", "UnsafeView", "Reshape", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Slice", "Select"),
    *("Clone", "ToCopy", "Alias", "AsStrided", "Roll", "Index", "IndexSelect", "Unflatten", "Split", "SplitWithSizes"),
    *("Contiguous", "NativeDropout", "FusedDropout", "ConstantPadNd"),
)
_BATCH_NORM_NODES = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


@dataclass(frozen=True)
class ResidualEnds:
    """The layers in which residual branches end.

    Args:
        layers (`tuple[str]`):
            Dotted names, one for each branch: a layer that is called twice, as in ALBERT, is there twice.
        others (`int`):
            Residual sums of which no branch ends in a Linear, convolution or `Conv1D`, but in a norm, an activation
            or a product.
    """

    layers: tuple[str, ...]
    others: int


@dataclass
class _Trace:
    """One forward pass: the nodes of its graph, and which modules made which of them."""

    holders: dict[int, str]
    sources: set[Node] = field(default_factory=set)
    outputs: list[Node] = field(default_factory=list)
    made_by: dict[Node, list[str]] = field(default_factory=dict)
    read_by: dict[str, list[Node | None]] = field(default_factory=dict)

    @cached_property
    def order(self) -> list[Node]:
        """Every node, each after those that it depends on."""
        done: dict[Node, None] = {}
        stack = [(node, False) for node in self.outputs]
        while stack:
            node, is_expanded = stack.pop()
            if node in done:
                continue
            if is_expanded:
                done[node] = None
                continue
            stack.append((node, True))
            stack.extend((other, False) for other, _ in node.next_functions if other is not None and other not in done)
        return list(done)

    @cached_property
    def depth(self) -> dict[Node, int]:
        """The most products on a way from the input to a node, for the nodes that depend on the input."""
        depths: dict[Node, int] = {}
        for node in self.order:
            before = [depths[other] for other, _ in node.next_functions if other in depths]
            if before or node in self.sources:
                depths[node] = max(before, default=0) + _is(node, _PRODUCTS + _CONVOLUTION_PRODUCTS)
        return depths

    @cached_property
    def uses(self) -> Counter[Node]:
        """How often the result of a node is used, the outputs of the model included."""
        edges = (other for node in self.order for other, _ in node.next_functions if other is not None)
        return Counter([*edges, *self.outputs])

    def layer(self, node: Node) -> str | None:
        """The Linear, convolution or Conv1D whose product with its weight `node` is."""
        if not _is(node, _PRODUCTS + _CONVOLUTION_PRODUCTS):
            return None
        for other, _ in node.next_functions:
            while other is not None and _is(other, _VIEWS):
                other = other.next_functions[0][0]
            name = self.holders.get(id(getattr(other, "variable", None)))
            if name is not None:
                return name
        return None

    def inputs(self, node: Node) -> list[Node]:
        """The operands of a node that depend on the input of the model."""
        return [other for other, _ in node.next_functions if other in self.depth]

    def origin(self, node: Node) -> Node:
        """What `node` is a rearrangement or a scaled copy of: views, casts, gains and batch norms are taken off."""
        while True:
            operands = self.inputs(node)
            harmless = _is(node, _VIEWS + _BATCH_NORM_NODES) or (_is(node, ("Mul", "Div")) and len(operands) == 1)
            # The bias of a layer that multiplies and adds in two steps.
            harmless = harmless or (_is(node, ("Add",)) and len(operands) == 1)
            if not harmless or len(operands) != 1:
                return node
            node = operands[0]

    def depends(self, node: Node, on: Node) -> bool:
        """Whether there is a way from `on` to `node`."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current is on:
                return True
            # Nothing that depends on `on` comes with less depth.
            new = {o for o in self.inputs(current) if o not in seen and self.depth[o] >= self.depth[on]}
            seen |= new
            stack.extend(new)
        return False


def residual_ends(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> ResidualEnds:
    """Finds the layers whose products are added to a skip connection, by running the model once.

    A residual sum adds two values that depend on the input, of which one, the branch, depends on the other. The branch
    ends in a layer if nothing is between them but views, casts, dropout, a batch norm, or a product with a parameter
    or a constant. A sum of sums is followed to each of its terms, as where attention and feed-forward part run side by
    side. Where both terms end in layers and neither depends on the other, as with the projected shortcuts of ResNet,
    the one with more products behind it is the branch.

    Args:
        model (`torch.nn.Module`):
            Plain: no weight parametrized.
        inputs (`Mapping[str, Any]`, *optional*):
            Keyword arguments of `forward`; made by [`probe_inputs`] when left out.

    Returns:
        [`ResidualEnds`], in the order of the computation.

    Raises:
        ValueError: no inputs can be made, or no output depends on them.
    """
    trace = _trace(model, inputs)
    sums = [node for node in trace.order if _is(node, ("Add",)) and len(trace.inputs(node)) == 2]
    found: dict[Node, list[str]] = {}
    forks, inner, others = [], set(), 0
    for node in reversed(sums):
        if node in inner:
            continue
        first, second = (trace.origin(operand) for operand in trace.inputs(node))
        if first is second:
            continue
        branch = second if trace.depends(second, first) else first if trace.depends(first, second) else None
        if branch is None:
            forks.append((node, first, second))
            continue
        if trace.depth[first] == trace.depth[second]:
            # No product in between: part of an activation or of rotary positions.
            continue
        ends = _ends(trace, branch, inner)
        others += ends is None
        found[node] = ends or []
    for node, first, second in forks:
        layers = trace.layer(first), trace.layer(second)
        if node not in inner and None not in layers and trace.depth[first] != trace.depth[second]:
            found[node] = [layers[trace.depth[second] > trace.depth[first]]]
    return ResidualEnds(tuple(name for node in sums for name in found.get(node, ())), others)


def _ends(trace: _Trace, branch: Node, inner: set[Node]) -> list[str] | None:
    """Layers in which a branch ends, one for each term of a sum; None where one ends in something else."""
    name = trace.layer(branch)
    if name is not None:
        return [name]
    terms = trace.inputs(branch)
    if not _is(branch, ("Add",)) or len(terms) != 2:
        return None
    inner.add(branch)
    ends = [_ends(trace, trace.origin(term), inner) for term in terms]
    return None if None in ends else [name for end in ends for name in end]


def fusible_batch_norms(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> tuple[tuple[str, str], ...]:
    """Finds each batch norm that in evaluation mode only scales and shifts what one layer gives, by running the model.

    The layer is a convolution, or a Linear on inputs of shape (n, features), called once, with a weight of its own;
    nothing but the batch norm uses its output, and the batch norm is called once and has running statistics.

    Args:
        model, inputs:
            As in [`residual_ends`].

    Returns:
        `tuple[tuple[str, str]]`: pairs of names, the batch norm's and the layer's.

    Raises:
        ValueError: no inputs can be made, or no output depends on them.
    """
    modules = dict(model.named_modules())
    norms = {name: module for name, module in modules.items() if isinstance(module, BATCH_NORMS)}
    if not norms:
        return ()
    trace = _trace(model, inputs)
    calls = Counter(name for names in trace.made_by.values() for name in names)
    shared = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    pairs = []
    for name, norm in norms.items():
        read = trace.read_by.get(name, [])
        makers = trace.made_by.get(read[0], []) if len(read) == 1 and read[0] is not None else []
        if len(makers) != 1 or trace.uses[read[0]] != 1 or norm.running_var is None or calls[makers[0]] != 1:
            continue
        weight = modules[makers[0]]._parameters.get("weight")
        if weight is not None and shared[id(weight)] == 1:
            pairs.append((name, makers[0]))
    return tuple(pairs)


def _trace(model: nn.Module, inputs: Mapping[str, Any] | None) -> _Trace:
    """Runs the model once in evaluation mode, with all of its parameters and inputs in the graph."""
    given = {} if inputs is None else dict(inputs)
    given = {n: _in_graph(v) for n, v in (given or probe_inputs(model)).items()}
    tokens = [v for v in given.values() if isinstance(v, Tensor) and not v.is_floating_point() and v.dim() == 2]
    # XLNet puts positions first.
    tokens += [ids.T for ids in tokens]
    trace = _Trace({id(m.weight): n for n, m in model.named_modules() if isinstance(m, DENSE + CONVOLUTIONS)})
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    trace.sources = {torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(module, nn.Embedding):
                if first is not None and any(first.shape == t.shape and torch.equal(first, t) for t in tokens):
                    trace.sources.add(output.grad_fn)
            elif isinstance(module, BATCH_NORMS):
                trace.read_by.setdefault(name, []).append(None if first is None else first.grad_fn)
            elif isinstance(module, CONVOLUTIONS) or output.dim() == 2:
                trace.made_by.setdefault(output.grad_fn, []).append(name)
            else:
                trace.made_by.setdefault(None, []).append(name)

        return module.register_forward_hook(hook)

    watched = (nn.Embedding, *BATCH_NORMS, *DENSE, *CONVOLUTIONS)
    handles = [watch(name, module) for name, module in model.named_modules() if isinstance(module, watched)]
    try:
        with evaluating(model), _all_require_grad(model), torch.inference_mode(False), torch.enable_grad():
            trace.outputs = [t.grad_fn for t in _tensors(model(**given)) if t.grad_fn is not None]
            # The graph is walked while the parameters require gradients, and lives as long as its nodes are held.
            _ = trace.depth, trace.uses
    finally:
        for handle in handles:
            handle.remove()
    if not trace.depth:
        raise ValueError(
            f"the outputs of {type(model).__name__} do not depend on {', '.join(given)} in a way that autograd records"
        )
    return trace


@contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _in_graph(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_(True) if is_real else value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _is(node: Node, kinds: tuple[str, ...]) -> bool:
    return node.name().split("Backward")[0] in kinds
