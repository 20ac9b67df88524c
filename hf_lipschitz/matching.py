"""Which modules a configuration means: the semantics of PEFT's `target_modules` and `exclude_modules`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


Target = str | Collection[str] | None


def matching_names(model: nn.Module, candidates: Collection[str], target: Target, exclude: Target) -> list[str]:
    """The names among `candidates` that `target` means and `exclude` does not.

    As in PEFT, a list matches a module of exactly that name or whose name ends in `.` and that name, a string is a
    regular expression for the whole name, and `"all-linear"` means every Linear and Conv1D but the output embeddings.
    `None` means every candidate.

    Raises:
        ValueError: nothing matches; the message names near misses.
    """
    chosen = [name for name in candidates if is_meant(model, name, target, exclude)]
    if not chosen and candidates:
        raise ValueError(_explanation(list(candidates), target, exclude))
    return chosen


def is_meant(model: nn.Module, name: str, target: Target, exclude: Target) -> bool:
    """Whether `target` means the module `name` and `exclude` does not."""
    if target == "all-linear":
        target = _all_linear(model)
    return (target is None or _matches(name, target)) and (exclude is None or not _matches(name, exclude))


def _matches(name: str, pattern: str | Collection[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in pattern)


def _all_linear(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _explanation(candidates: list[str], target: Target, exclude: Target) -> str:
    if target is None or any(_matches(name, target) for name in candidates):
        return f"exclude_modules={exclude!r} leaves no layer to constrain; narrow it"
    asked = [target] if isinstance(target, str) else list(target)
    endings = sorted({name.rsplit(".", 1)[-1] for name in candidates} | set(candidates))
    near = sorted({miss for key in asked for miss in difflib.get_close_matches(key, endings, n=3, cutoff=0.5)})
    hint = f"did you mean {', '.join(near)}?" if near else f"layers here end in {', '.join(endings[:8])}"
    return f"target_modules={target!r} matches no layer that can be constrained; {hint}"
