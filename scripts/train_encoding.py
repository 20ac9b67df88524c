"""Examples as a model takes them: texts are tokenized once, images and sound are encoded when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from datasets.features import Audio
from PIL import Image
from scipy.signal import resample_poly
from train_arguments import DataArguments
from transformers import DataCollatorWithPadding, PreTrainedConfig, default_data_collator


Batch = dict[str, Any]
Encoder = Callable[[Batch], Batch]


def encoded(
    split: Dataset,
    task: str,
    columns: tuple[str, ...],
    labels: tuple[str, Mapping[Any, int]] | None,
    processor: Any,
    config: PreTrainedConfig,
    data: DataArguments,
) -> Dataset:
    """The split with the model's inputs and, unless there are none, `labels`: a column and the numbers of its values.

    Raises:
        ValueError: the values of a column are not what the task takes.
        RuntimeError: sound files cannot be decoded here.
    """
    kept = [*columns] if labels is None else [*columns, labels[0]]
    split = split.select_columns(list(dict.fromkeys(kept)))
    if task == "text":
        encode = _with_labels(text_encoder(columns, processor, data.max_seq_length), labels)
        return split.map(
            encode,
            batched=True,
            remove_columns=split.column_names,
            num_proc=data.preprocessing_num_workers,
            load_from_cache_file=not data.overwrite_cache,
            desc="tokenizing",
        )
    (column,) = columns
    if task == "image":
        return split.with_transform(_with_labels(image_encoder(column, processor, config), labels))
    rate = processor.sampling_rate
    if isinstance(split.features[column], Audio):
        if not datasets.config.TORCHCODEC_AVAILABLE:
            raise RuntimeError(
                f"column {column} holds sound files, and datasets decodes them with torchcodec: please install "
                "'torchcodec'. Or give a column of float arrays."
            )
        split = split.cast_column(column, Audio(sampling_rate=rate, num_channels=1))
    encode = audio_encoder(column, processor, data.sampling_rate or rate, data.max_length_seconds)
    return split.with_transform(_with_labels(encode, labels))


def collator(task: str, processor: Any) -> Callable[[list[Batch]], Batch]:
    """Makes batches: texts and sound are padded to the longest."""
    return default_data_collator if task == "image" else DataCollatorWithPadding(processor)


def text_encoder(columns: tuple[str, ...], tokenizer: Any, max_length: int) -> Encoder:
    max_length = min(max_length, tokenizer.model_max_length)

    def encode(batch: Batch) -> Batch:
        for column in columns:
            if None in batch[column]:
                raise ValueError(f"column {column} has no text in an example: drop the examples without one")
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    return encode


def image_encoder(column: str, processor: Any, config: PreTrainedConfig) -> Encoder:
    """Of PIL images, or of arrays of numbers in 0, ..., 255 of shape (H, W) or (H, W, 3)."""
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def image(value: Any) -> Image.Image:
        value = value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value, dtype=np.uint8))
        return value.convert(mode)

    def encode(batch: Batch) -> Batch:
        return dict(processor([image(value) for value in batch[column]], return_tensors="pt"))

    return encode


def audio_encoder(column: str, extractor: Any, array_rate: int, max_seconds: float) -> Encoder:
    """Of decoded sound, mappings with `array` and `sampling_rate`, or arrays of samples at `array_rate` Hz."""
    rate = extractor.sampling_rate

    def wave(value: Any) -> np.ndarray:
        is_plain = isinstance(value, (list, np.ndarray))
        samples = np.asarray(value if is_plain else value["array"], dtype=np.float32)
        if samples.ndim != 1 or not len(samples):
            raise ValueError(f"column {column} must hold arrays of samples of one channel, got shape {samples.shape}")
        samples = resampled(samples, array_rate if is_plain else int(value["sampling_rate"]), rate)
        return samples[: round(max_seconds * rate)]

    def encode(batch: Batch) -> Batch:
        return dict(extractor([wave(value) for value in batch[column]], sampling_rate=rate))

    return encode


def resampled(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Samples at another rate, by polyphase filtering."""
    if from_rate == to_rate:
        return samples
    common = gcd(from_rate, to_rate)
    return resample_poly(samples, to_rate // common, from_rate // common).astype(np.float32)


def _with_labels(encode: Encoder, labels: tuple[str, Mapping[Any, int]] | None) -> Encoder:
    if labels is None:
        return encode
    column, numbers = labels

    def encode_with_labels(batch: Batch) -> Batch:
        return {**encode(batch), "labels": [numbers[value] for value in batch[column]]}

    return encode_with_labels
