"""Certified accuracy of a few evaluation examples, at the model that is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_lipschitz.certification import (
    Certificate,
    Processes,
    SmoothedClassifier,
    SmoothingConfig,
    WindowOfInputs,
    certified_accuracy,
)
from hf_lipschitz.conversion import materialized
from hf_lipschitz.integrations.sharing import processes_of
from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.training.augmentation import PIXELS, TOKENS
from hf_lipschitz.training.probe_examples import Group, PixelRows, groups_and_labels, image_processor_of


if TYPE_CHECKING:
    from accelerate import Accelerator


def probe_batches(
    dataset: Any, collator: Callable[[list[Any]], Mapping[str, Any]], size: int
) -> Iterator[Mapping[str, Any]]:
    """Examples of a dataset, collated one by one: evenly spaced ones, or the first of a dataset without a length.

    No random number is drawn, so each evaluation and each process has the same examples.

    Args:
        dataset (`Dataset` or `IterableDataset`), collator (`Callable`):
            `dataset` and `collate_fn` of the evaluation's dataloader.
        size (`int`):
            How many examples, or all of a smaller dataset.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"a probe set needs at least one example, got {size}")
    if not hasattr(dataset, "__len__"):
        yield from (collator([example]) for example in islice(dataset, size))
        return
    count = min(size, len(dataset))
    yield from (collator([dataset[i * len(dataset) // count]]) for i in range(count))


def probe_certificates(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    processor: Any,
    config: SmoothingConfig,
    accelerator: Accelerator | None = None,
) -> tuple[list[Certificate], list[int]]:
    """Certifies the smoothed classifier of `model`, as it is now, on labelled batches.

    The noise is on the word embeddings of a text, cut to its own length, or on pixels in [0, 1] before normalisation,
    and is keyed by (`config.seed`, place of the example): what [`CertifiedClassificationPipeline`] draws for a list of
    the same examples. The model runs in evaluation mode on plain effective weights, without gradients, and is as it
    was afterwards; no global random state is read or moved.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A classifier of texts or images.
        batches (`Iterable[Mapping[str, Any]]`):
            As a data collator makes them: `pixel_values` of the processor, or `input_ids`, with an `attention_mask`
            where they are padded, and what else there is for each token; and `labels` of shape `(B,)`.
        processor:
            The image processor that made the pixels, or a processor that has one; not used for texts.
        config (`SmoothingConfig`):
            The noise, the samples and the certificate.
        accelerator (`accelerate.Accelerator`, *optional*):
            Deals the noisy copies out over its processes. Each has to give the same batches, and gets all
            certificates.

    Returns:
        `tuple[list[Certificate], list[int]]`: certificates in the order of the examples, and their labels.

    Raises:
        ValueError: see [`check_probe`]; there is no example, a label is not one class index, a batch holds what cannot
            be carried over to noisy copies, pixels are not in [0, 1], or a model has other logits from embeddings than
            from tokens.
        RuntimeError: the processes have different examples, or logits are not finite or depend on other rows.
    """
    core = model if accelerator is None else accelerator.unwrap_model(model, keep_torch_compile=False)
    check_probe(core, processor, config)
    processes = processes_of(accelerator)
    with evaluating(core), materialized(core), torch.no_grad():
        failure, groups, labels = None, [], []
        try:
            groups, labels = groups_and_labels(core, batches, processor)
            for group in groups:
                group.check(processes.rank, processes.size)
        except Exception as error:  # noqa: BLE001  it has to reach the other processes
            failure = error
        processes.raise_together(failure)
        _check_alike(groups, labels, processes)
        found: dict[int, Certificate] = {}
        for group in groups:
            found |= group.certificates(core.config.num_labels, config, processes)
    return [found[place] for place in range(len(labels))], labels


def certified_accuracy_metrics(
    certificates: Sequence[Certificate], labels: Sequence[int], radii: Sequence[float]
) -> dict[str, float]:
    """[`certified_accuracy`] by the names that metrics have: `certified_accuracy@0.25` is the share of the examples
    with the right class and a radius above 0.25. Abstentions count as wrong.

    Raises:
        ValueError: see [`certified_accuracy`]; or two radii have the same name.
    """
    names = [f"certified_accuracy@{radius:g}" for radius in radii]
    if len(set(names)) < len(names):
        raise ValueError(f"radii need different names to six digits, got {list(radii)}")
    return dict(zip(names, certified_accuracy(certificates, labels, radii), strict=True))


def check_probe(model: nn.Module, processor: Any, config: SmoothingConfig) -> None:
    """Raises what [`probe_certificates`] would, as far as that is known before there is a batch.

    Raises:
        ValueError: `model` is no single-label classifier of texts or images, an image processor is missing, or the
            certificate has no noise, needs a Lipschitz constant or cannot certify anything with so few samples.
    """
    name, kind = type(model).__name__, getattr(model, "main_input_name", None)
    if config.certificate == "deterministic":
        raise ValueError(
            "certified accuracy at evaluation is that of the smoothed classifier: give the noise a sigma above 0"
        )
    if config.certificate == "lipschitz":
        raise ValueError(
            "certificate='lipschitz' needs a constant, which changes with every step: choose 'two_class' or 'lvm'"
        )
    if kind not in (PIXELS, TOKENS) or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"certified accuracy is for pixel_values, or for input_ids of an encoder or decoder; {name} takes "
            f"{'tokens twice' if kind == TOKENS else kind}: evaluate without it"
        )
    if kind == PIXELS and PIXELS not in getattr(image_processor_of(processor), "model_input_names", ()):
        raise ValueError(
            "the radius is in pixels of [0, 1] and needs the normalisation: pass the image processor, as the "
            "trainer's processing_class"
        )
    if model.config.num_labels < 2 or model.config.problem_type in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{name} has num_labels={model.config.num_labels} and problem_type={model.config.problem_type!r}: "
            "certificates are for one label out of at least two, so evaluate without certified accuracy"
        )
    if kind == PIXELS:
        PixelRows(model, image_processor_of(processor))
    SmoothedClassifier(model, model.config.num_labels, config)


def _check_alike(groups: Sequence[Group], labels: list[int], processes: Processes) -> None:
    """Raises in every process where one of them has other examples than the first."""
    tensors = [torch.tensor(labels)]
    for group in groups:
        tensors += [
            torch.tensor(list(group.rows)),
            *group.rows.values(),
            *getattr(group.classifier, "extras", {}).values(),
        ]
    digest = WindowOfInputs(range(len(tensors)), tensors).digest()
    failure = None
    if processes.share(digest) != digest:
        failure = RuntimeError(
            "the processes have different probe sets, and would count together what belongs apart: give each of them "
            "the same batches"
        )
    processes.raise_together(failure)
