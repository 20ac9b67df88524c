"""calibrate: setting the constants of replaced norms and attention from data, without a change of the function."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from hf_lipschitz.conversion import materialized
from hf_lipschitz.nn.calibration import calibrated_modules
from hf_lipschitz.nn.modes import evaluating


logger = logging.getLogger(__name__)

_LABELS = ("labels", "label", "label_ids")


def calibrate(
    model: nn.Module, dataloader: Iterable[Any], *, margin: float = 0.05, max_batches: int | None = None
) -> nn.Module:
    """Sets the constants of every calibrated module (floors of norms, radii of attention) from data, in place.

    The model runs on the batches in evaluation mode and without gradients. Meanwhile its calibrated modules compute
    what the original ones do and watch the extremes; then each constant is set a factor 1 + `margin` beyond. Right
    after, the logits on the same batches are those of the original model to 1e-6. On other data they differ where an
    input is more extreme than all of these, and the constants hold all the same: they come from the architecture, not
    from the data.

    Padding is computed as well and counts, as no mask reaches the norms. A constant is one number a module, so its
    extreme over all data decides: one odd input makes it loose.

    Args:
        model (`torch.nn.Module`):
            Lipschitzified with `replace=("norms", ...)`, or any model that holds calibrated modules.
        dataloader (`Iterable`):
            Of batches: mappings of tensors (`dict`, `BatchEncoding`), tensors, or tuples that begin with either.
            Labels, and keys that `forward` does not take, are dropped.
        margin (`float`, *optional*, defaults to `0.05`):
            Relative; at least 0. Twice the margin costs about that much more in every constant.
        max_batches (`int`, *optional*):
            Stops after as many.

    Returns:
        `torch.nn.Module`: the same object, in the mode it was in.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`, or a batch is none of the above.
        ValueError: nothing to calibrate, no batch, NaN or inf in the data or inside the model, a bad `margin` or
            `max_batches`. After an error the constants are what they were.

    Example::

        lipschitzify(model, replace=("weights", "norms", "attention"), layer_lipschitz=None)
        calibrate(model, DataLoader(tokenized, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer)))
    """
    _check(model, margin, max_batches)
    modules = dict(calibrated_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has nothing to calibrate: lipschitzify it with "
            'replace=("weights", "norms", "attention") first'
        )
    with _restored_after_an_error(modules):
        for module in modules.values():
            module.begin_calibration()
        with materialized(model) as plain, evaluating(plain), torch.no_grad():
            count = _run(plain, itertools.islice(dataloader, max_batches))
        if count == 0:
            raise ValueError("the dataloader gave no batch: nothing to calibrate on")
        unseen = _end(modules, margin)
    if unseen:
        logger.warning("calibrate: nothing reached %s; their constants are what they were", ", ".join(unseen))
    logger.info("calibrate: %d modules on %d batches, margin %g", len(modules) - len(unseen), count, margin)
    return model


def _check(model: Any, margin: float, max_batches: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a number of at least 0, got {margin!r}; 0.05 is the usual choice")
    if max_batches is not None and (isinstance(max_batches, bool) or max_batches < 1):
        raise ValueError(f"max_batches must be at least 1, or None for all, got {max_batches!r}")


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for index, batch in enumerate(batches):
        args, kwargs = _arguments(model, batch, device)
        for name, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"batch {index} holds NaN or inf in {name!r}: clean the data before calibrating")
        model(*args, **kwargs)
        count += 1
    return count


def _arguments(model: nn.Module, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch must be a mapping of tensors, a tensor, or a tuple that begins with one, got "
            f"{type(batch).__name__}; give the dataloader a collate_fn"
        )
    taken = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    labels = {*_LABELS, *(find_labels(type(model)) if isinstance(model, PreTrainedModel) else ())}
    kept = {name: value for name, value in batch.items() if name not in labels and (takes_all or name in taken)}
    if not kept:
        raise ValueError(
            f"a batch has the keys {', '.join(map(str, batch))}, and {type(model).__name__}.forward takes none of them"
        )
    return (), {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kept.items()}


def _end(modules: Mapping[str, nn.Module], margin: float) -> list[str]:
    """Ends the calibration of each module; the names of those that nothing reached."""
    unseen = []
    for name, module in modules.items():
        try:
            module.end_calibration(margin)
        except RuntimeError:
            unseen.append(name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len(unseen) == len(modules):
        raise ValueError("the batches reached no module that is to be calibrated: check that the model uses them")
    return unseen


@contextmanager
def _restored_after_an_error(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: [buffer.clone() for buffer in module.buffers(recurse=False)] for name, module in modules.items()}
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            with contextlib.suppress(RuntimeError, ValueError):
                module.end_calibration(0.0)
            for buffer, old in zip(module.buffers(recurse=False), before[name], strict=True):
                buffer.copy_(old)
        raise
