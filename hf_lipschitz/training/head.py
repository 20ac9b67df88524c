"""Finding the last layer of a classifier."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.holders import CONVOLUTIONS, DENSE


def find_head(model: nn.Module, head_module: str | None = None) -> tuple[str, nn.Module]:
    """The layer whose outputs are the logits: the last Linear or convolution with one output per label.

    Args:
        model (`torch.nn.Module`):
            A classifier, not wrapped for data parallelism; its layers may be constrained.
        head_module (`str`, *optional*):
            The name of the layer, which is then taken without a search.

    Returns:
        `tuple[str, torch.nn.Module]`: dotted name and module.

    Raises:
        ValueError: no layer has one output per label, or `head_module` names no Linear or convolution.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DENSE + CONVOLUTIONS)}
    if head_module is not None:
        if head_module not in layers:
            raise ValueError(
                f"head_module={head_module!r} is no Linear or convolution of {type(model).__name__}; the last ones "
                f"are {', '.join(list(layers)[-3:])}"
            )
        return head_module, layers[head_module]
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    heads = [name for name, module in layers.items() if _num_outputs(module) == num_labels]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no Linear or convolution with num_labels={num_labels} outputs: name the "
            "classifier's last layer by head_module='...' in LipschitzTrainingArguments"
        )
    return heads[-1], layers[heads[-1]]


def _num_outputs(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return module.nf
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
