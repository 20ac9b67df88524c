"""From a model to a functional graph of whole operators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


_aten = torch.ops.aten


def check_model(model: nn.Module) -> None:
    """Raises a ValueError where the model is in training mode or has NaN or inf among its weights."""
    for name, module in model.named_modules():
        # Containers of torch's parametrizations stay in training mode, whatever the model is in.
        if module.training and "parametrizations" not in name.split("."):
            raise ValueError(
                f"the model, or a module of it ({name or 'the model itself'}), is in training mode: call "
                "model.eval() first"
            )
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device and has no data: load the model first")
        is_parameter = isinstance(tensor, nn.Parameter)
        # Buffers may be masks, which hold -inf.
        broken = ~torch.isfinite(tensor) if is_parameter else torch.isnan(tensor)
        if tensor.is_floating_point() and bool(broken.any()):
            raise ValueError(f"{key} holds NaN or inf: repair or reload it first")


def chosen_input(inputs: Mapping[str, Any], wrt: str | None) -> str:
    """The name of the input; the only floating-point one where `wrt` is `None`.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: there is no such input, it is not clear which is meant, or it holds NaN or inf.
    """
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


def own(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in memory of their own, which a model may change in place."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def exported(model: nn.Module, inputs: Mapping[str, Any]) -> ExportedProgram:
    """The graph of a model, functional and with each operator as whole as it was written.

    Einsums become products of matrices.

    Raises:
        Exception: of many kinds, where torch.export cannot follow the model.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's own copies of its tree specifications.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(model, (), dict(inputs), strict=False)
        return program.run_decompositions({_aten.einsum.default: _einsum})


def _einsum(*args: Any, **kwargs: Any) -> Tensor:
    return _aten.einsum.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def state_of(program: ExportedProgram) -> dict[str, Any]:
    """Parameters, buffers and constants by the names of the inputs of the graph, on the CPU."""
    signature, state = program.graph_signature, {**program.state_dict, **program.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    return {name: on_cpu(state[target]) for name, target in names.items()}


def on_cpu(value: Any) -> Any:
    """A tensor without its graph, on the CPU; anything else as it is."""
    return value.detach().cpu() if isinstance(value, Tensor) else value
