"""The penalty on the activations that enter chosen modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lipschitz.holders import CONVOLUTIONS
from hf_lipschitz.training.activation_decay import activation_decay
from hf_lipschitz.training.naming import matching_modules


ARGUMENT = "activation_decay_modules"


class ModuleCall(NamedTuple):
    """What went into a module, and how often it had been changed in place by then."""

    activations: Tensor
    version: int


def decayed_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `names` name, by dotted name.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        names (`Sequence[str]`):
            Names of modules, or endings of names after a dot.

    Raises:
        ValueError: a name matches nothing, or a list of modules, which is never called.
    """
    modules = {name: model.get_submodule(name) for name in matching_modules(model, names, ARGUMENT)}
    for name, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"{ARGUMENT}: {name} is a {type(module).__name__}, which nothing enters; name the modules in it"
            )
    return modules


@contextmanager
def captured_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[ModuleCall]]]:
    """Records what enters the named modules inside the block, with its autograd graph.

    It is the first floating-point tensor among the positional arguments of a call, or else among those given by name,
    `hidden_states` before others. Layers may be checkpointed.

    Args:
        model (`torch.nn.Module`), names (`Sequence[str]`):
            As for [`decayed_modules`].

    Yields:
        `dict[str, list[ModuleCall]]`: for each module its calls, in their order.

    Raises:
        ValueError: as [`decayed_modules`].
        RuntimeError: no floating-point tensor enters a module.
    """
    calls: dict[str, list[ModuleCall]] = {}
    with ExitStack() as stack:
        for name, module in decayed_modules(model, names).items():
            calls[name] = []
            handle = module.register_forward_pre_hook(_recorder(name, calls[name]), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def module_decay(
    model: nn.Module, calls: Mapping[str, list[ModuleCall]], attention_mask: Tensor | None = None
) -> Tensor:
    r"""
    \\(\sum_m \frac{1}{N_m} \sum_i \|h_{m,i}\|^2\\) over the calls m of the modules: a module that is called several
    times in a forward (shared layers) counts as that many modules, so that sharing changes nothing.

    The rows i are

    - the examples for activations `(B, d)`, for those with four or more axes, and for what enters a convolution, all
      of it flattened;
    - the tokens for activations `(B, T, d)` and `(B * T, d)`, and of those the ones that the attention mask counts,
      if there is one. A mask over samples of sound is taken to frames as the model does.

    The mean is over the rows of one micro-batch; over accumulated micro-batches and processes it is the mean of their
    means. It is a plain regularizer: for a Linear, ς²/2 times it is neither a bound nor an estimate of what noise on
    its weights adds to the loss, which depends on the layers after it.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism.
        calls (`Mapping[str, list[ModuleCall]]`):
            From [`captured_inputs`], around the one forward.
        attention_mask (`Tensor` of shape `(B, T)`, *optional*):
            Of the batch; non-zero where a token counts.

    Returns:
        `Tensor`: 0-dim, at least float32, part of the autograd graph.

    Raises:
        RuntimeError: a module was not called, no activations have a gradient, some were changed in place, or the
            attention mask does not fit them.
    """
    uncalled = [name for name, its_calls in calls.items() if not its_calls]
    if uncalled:
        raise RuntimeError(
            f"{ARGUMENT}: {', '.join(uncalled)} not called in this forward; name others (what holds a weight that "
            "another module reads is never called), and set layerdrop=0, which skips layers"
        )
    if not any(call.activations.requires_grad for its_calls in calls.values() for call in its_calls):
        raise RuntimeError(
            f"{ARGUMENT} changes nothing: the activations entering {', '.join(calls)} have no gradient; name modules "
            "after a layer that is trained, and checkpoint with use_reentrant=False"
        )
    penalties = []
    for name, its_calls in calls.items():
        for activations, version in its_calls:
            if activations._version != version:
                raise RuntimeError(f"{ARGUMENT}: what entered {name} was changed in place afterwards; name another")
            penalties.append(activation_decay(_rows(model, name, activations, attention_mask)))
    return torch.stack(penalties).sum()


def _recorder(name: str, calls: list[ModuleCall]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                calls.append(ModuleCall(value, value._version))
                return
        raise RuntimeError(f"{ARGUMENT}: no floating-point tensor enters {name}, a {type(module).__name__}")

    return record


def _rows(model: nn.Module, name: str, activations: Tensor, mask: Tensor | None) -> Tensor:
    if activations.ndim > 3 or isinstance(model.get_submodule(name), CONVOLUTIONS):
        return activations.flatten(1)
    if mask is None or (activations.ndim == 2 and len(activations) == len(mask)):
        return activations
    is_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in name.split(".")
    if activations.ndim == 3 and not is_decoder:
        mask = _frames(model, activations.shape[1], mask)
    is_flat = activations.ndim == 2 and mask.ndim == 2 and len(activations) == mask.numel()
    if is_decoder or not (is_flat or activations.shape[:-1] == mask.shape):
        raise RuntimeError(
            f"{ARGUMENT}: the attention mask, of shape {tuple(mask.shape)}, does not say which tokens count in what "
            f"enters {name}, of shape {tuple(activations.shape)}; name other modules"
        )
    return activations[mask.flatten().bool() if is_flat else mask.bool()]


def _frames(model: nn.Module, length: int, mask: Tensor) -> Tensor:
    """The mask over frames of a model of sound, whose own mask is over samples."""
    num_frames = getattr(model, "_get_feat_extract_output_lengths", None)
    reduce = getattr(model, "_get_feature_vector_attention_mask", None)
    if num_frames is None or reduce is None or mask.ndim != 2 or mask.shape[1] == length:
        return mask
    return reduce(length, mask) if int(num_frames(torch.tensor(mask.shape[1]))) == length else mask
