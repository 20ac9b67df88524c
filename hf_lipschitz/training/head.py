"""Finding the last layer of a model with a loss on its logits."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.holders import CONVOLUTIONS, DENSE


def find_head(model: nn.Module, head_module: str | None = None) -> tuple[str, nn.Module]:
    """The layer whose outputs are the logits.

    It is the model's output embeddings, if it has some (causal, masked and sequence-to-sequence language models: one
    output per token of the vocabulary), and otherwise the last Linear or convolution with one output per label. A
    layer that PEFT has wrapped counts as one layer, with its adapters.

    Args:
        model (`torch.nn.Module`):
            Not wrapped for data parallelism; its layers may be constrained.
        head_module (`str`, *optional*):
            The name of the layer, which is then taken without a search.

    Returns:
        `tuple[str, torch.nn.Module]`: dotted name and module.

    Raises:
        ValueError: no layer has one output per label or token, or `head_module` names no Linear or convolution.
    """
    layers = _layers(model)
    if head_module is not None:
        if head_module not in layers:
            raise ValueError(
                f"head_module={head_module!r} is no Linear or convolution of {type(model).__name__}; the last ones "
                f"are {', '.join(list(layers)[-3:])}"
            )
        return head_module, layers[head_module]
    embeddings = _output_embeddings(model)
    if embeddings is not None:
        return embeddings
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    heads = [name for name, module in layers.items() if _num_outputs(module) == num_labels]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings, and no Linear or convolution with "
            f"num_labels={num_labels} outputs: name the classifier's last layer by head_module='...' in "
            "LipschitzTrainingArguments"
        )
    return heads[-1], layers[heads[-1]]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, DENSE + CONVOLUTIONS + (BaseTunerLayer,)) and not name.startswith(wrapped):
            layers[name] = module
            if isinstance(module, BaseTunerLayer):
                wrapped = (*wrapped, f"{name}.")
    return layers


def _output_embeddings(model: nn.Module) -> tuple[str, nn.Module] | None:
    find = getattr(model, "get_output_embeddings", None)
    embeddings = None if find is None else find()
    if not isinstance(embeddings, DENSE + (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return None
    return next(((name, module) for name, module in model.named_modules() if module is embeddings), None)


def _num_outputs(module: nn.Module) -> int | None:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nf
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, CONVOLUTIONS) else None
