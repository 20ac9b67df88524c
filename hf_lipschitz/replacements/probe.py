"""What a model computes on inputs made from its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.probes import probe_inputs


_HIDDEN_TOKENS = 3
_SEED = 0
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


@torch.no_grad()
def probe_outputs(model: PreTrainedModel) -> list[Tensor]:
    """All floating-point tensors that a forward pass in evaluation mode returns, for one text, image or sound.

    A text has padding, so that masks are part of it. Repeated calls see the same inputs and random numbers; the mode
    and the global random state are as before afterwards.

    Raises:
        ValueError: no inputs are known with which the model runs.
    """
    failures = []
    for inputs in _candidates(model):
        with evaluating(model), torch.random.fork_rng():
            torch.manual_seed(_SEED)
            try:
                return _tensors(model(**inputs))
            except _FAILURES as error:
                failures.append(f"{', '.join(inputs)}: {type(error).__name__}: {error}")
    raise ValueError(
        f"{type(model).__name__} cannot be probed: it does not run on inputs made from its configuration "
        f"({'; '.join(failures)})"
    )


def _candidates(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every input that can be made, and then the main one alone; a single row, which needs no padding token."""
    made = {name: value[:1] if isinstance(value, Tensor) else value for name, value in probe_inputs(model).items()}
    if "input_ids" in made and "attention_mask" in inspect.signature(model.forward).parameters:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        made["attention_mask"][:, -_HIDDEN_TOKENS:] = 0
    others = {"input_ids", "pixel_values", "input_values", "input_features"} - {model.main_input_name}
    main = {name: value for name, value in made.items() if name not in others}
    return [made] if main.keys() == made.keys() else [made, main]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, (tuple, list)) else []
