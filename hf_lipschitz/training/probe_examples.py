"""Examples as a data collator makes them, taken back to the unit in which they are certified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.certification import Certificate, Processes, SmoothedClassifier, SmoothingConfig, windows_of
from hf_lipschitz.integrations.base_classifiers import EMBEDDING_UNIT, OVERSHOOT, PixelClassifier
from hf_lipschitz.training.augmentation import PIXELS, TOKENS


MASK, LABELS = "attention_mask", "labels"


def groups_and_labels(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], processor: Any
) -> tuple[list[Group], list[int]]:
    """The examples of collated batches, by the base classifier that takes them, and their labels.

    Raises:
        ValueError: there is none, a label is not one class index, or a batch holds what noisy copies cannot carry.
    """
    labels: list[int] = []
    groups: dict[Any, Group] = {}
    for batch in batches:
        _check_inputs(model, batch)
        for row in range(len(batch[model.main_input_name])):
            x, extras = (batch[PIXELS][row], {}) if model.main_input_name == PIXELS else _own_tokens(model, batch, row)
            key = tuple((name, tuple(extra.tolist())) for name, extra in sorted(extras.items()))
            if key not in groups:
                is_image = model.main_input_name == PIXELS
                groups[key] = Group(
                    PixelRows(model, image_processor_of(processor)) if is_image else TokenRows(model, extras)
                )
            groups[key].rows[len(labels) + row] = x
        labels += _class_indices(batch, model.config.num_labels)
    if not labels:
        raise ValueError("certified accuracy needs at least one example: the evaluation dataset is empty")
    return list(groups.values()), labels


def image_processor_of(processor: Any) -> Any:
    """The image processor, which may be part of a processor."""
    return getattr(processor, "image_processor", processor)


def _check_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    kind = model.main_input_name
    if kind not in batch:
        raise ValueError(f"certified accuracy needs {kind} in the batch, which has {', '.join(batch)}")
    x = batch[kind]
    if kind == PIXELS and x.ndim != 4:
        raise ValueError(f"certified accuracy needs pixel_values of shape (B, C, H, W), got {tuple(x.shape)}")
    for name, value in batch.items():
        is_of_tokens = kind == TOKENS and isinstance(value, Tensor) and value.shape == x.shape
        if name not in (kind, LABELS) and not is_of_tokens:
            raise ValueError(
                f"the batch has {name!r} beside {kind}, which noisy copies cannot carry: leave it out of the "
                "evaluation dataset, or evaluate without certified accuracy"
            )


def _own_tokens(model: nn.Module, batch: Mapping[str, Any], row: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens of a text without its padding, and what else there is for each of them."""
    ids = batch[TOKENS][row]
    pad = getattr(model.config, "pad_token_id", None)
    if MASK not in batch and pad is not None and (ids == pad).any():
        raise ValueError("the texts are padded and the batch has no attention_mask: return it from the collator")
    kept = batch[MASK][row].nonzero()[:, 0] if MASK in batch else torch.arange(len(ids), device=ids.device)
    if not len(kept) or len(kept) != kept[-1] - kept[0] + 1:
        raise ValueError("an attention_mask must leave one run of tokens, with padding before or after it alone")
    others = {name: x[row][kept] for name, x in batch.items() if name not in (TOKENS, MASK, LABELS)}
    return ids[kept], others


def _class_indices(batch: Mapping[str, Any], num_labels: int) -> list[int]:
    labels = batch.get(LABELS)
    if labels is None:
        raise ValueError(
            f"certified accuracy needs labels in the batch, which has {', '.join(batch)}: give the evaluation dataset "
            "a column 'labels'"
        )
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        kind = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        raise ValueError(f"certified accuracy needs one class index an example, got labels as {kind}")
    indices = [int(label) for label in labels]
    if not all(0 <= index < num_labels for index in indices):
        raise ValueError(f"labels must be class indices from 0 to {num_labels - 1}, got {sorted(set(indices))}")
    return indices


@dataclass(frozen=True)
class Group:
    """Examples that one base classifier takes, by their place in the probe set."""

    classifier: PixelRows | TokenRows
    rows: dict[int, Tensor] = field(default_factory=dict)

    def check(self, rank: int, size: int) -> None:
        for place in list(self.rows)[rank::size]:
            self.classifier.check_row(self.rows[place], place)

    def certificates(self, num_labels: int, config: SmoothingConfig, processes: Processes) -> dict[int, Certificate]:
        smoothed = SmoothedClassifier(self.classifier, num_labels, config, unit=self.classifier.unit)
        places, found = list(self.rows), {}
        for window in windows_of(lambda i: self.classifier.encode_row(self.rows[places[i]]), len(places)):
            indices = [places[i] for i in window.places]
            for i, certificate in smoothed.certify_together(window.xs, indices, processes=processes):
                found[indices[i]] = certificate
        return found


class PixelRows(PixelClassifier):
    """Takes the rows of `pixel_values` back to pixels in [0, 1]."""

    def encode_row(self, row: Tensor) -> Tensor:
        return row.to(self.mean) * self.std + self.mean

    def check_row(self, row: Tensor, place: int) -> None:
        least, largest = (float(x) for x in self.encode_row(row).aminmax())
        if least < -OVERSHOOT or largest > 1 + OVERSHOOT:
            raise ValueError(
                f"without the normalisation of {type(self.image_processor).__name__} the pixels of example {place} "
                f"go from {least:.3g} to {largest:.3g}, outside [0, 1]: pass the image processor that made them"
            )


class TokenRows(nn.Module):
    """Logits from word embeddings of unpadded texts that have the same `extras`, a tensor of shape (tokens,) each."""

    unit = EMBEDDING_UNIT

    def __init__(self, model: nn.Module, extras: dict[str, Tensor]) -> None:
        super().__init__()
        self.train(model.training)
        self.model = model
        self.extras = {name: x.to(model.device) for name, x in extras.items()}

    def encode_row(self, row: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(row.to(self.model.device)[None])[0].float()

    def check_row(self, row: Tensor, place: int) -> None:
        ids, name = row.to(self.model.device)[None], type(self.model).__name__
        try:
            expected = self.model(input_ids=ids, **self._beside(ids)).logits
            logits = self(self.encode_row(row)[None])
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                f"{name} does not classify from inputs_embeds ({error}): it cannot be certified"
            ) from error
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"{name} gives example {place} other logits from inputs_embeds than from input_ids: noise on its "
                "embeddings would certify another function, so it is refused"
            )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.model(inputs_embeds=embeddings.to(self.model.dtype), **self._beside(embeddings)).logits

    def _beside(self, x: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        return {MASK: mask, **{name: extra.expand(len(x), -1) for name, extra in self.extras.items()}}
