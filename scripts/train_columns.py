"""Columns and classes of labelled data: which column is what, and which number a label has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from datasets.features import Audio, ClassLabel, Image, Value
from train_arguments import DataArguments
from transformers import PreTrainedConfig

from hf_lipschitz.demo.data import IMAGE_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS


TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_PAIRS += (("question", "sentence"), ("text1", "text2"))
KNOWN = {"image": IMAGE_COLUMNS, "audio": ("audio", "speech", "file", "array", "input_values")}
FEATURES = {"image": Image, "audio": Audio}


def input_columns(split: Dataset, task: str, data: DataArguments) -> tuple[str, ...]:
    """The column of the task, or the two of pairs of texts: those asked for, or known names.

    Raises:
        ValueError: there is no such column; the message names those that there are.
    """
    asked = getattr(data, f"{task}_column")
    if task == "text":
        return _text_columns(split, asked, data.text_pair_column)
    if asked is not None:
        return (_checked(split, asked, f"{task}_column"),)
    known = [name for name in KNOWN[task] if name in split.column_names]
    known += [name for name, feature in split.features.items() if isinstance(feature, FEATURES[task])]
    if not known:
        raise ValueError(f"no {task} column among {', '.join(split.column_names)}: set {task}_column")
    return (known[0],)


def label_column(split: Dataset, data: DataArguments) -> str:
    """The column of the classes: the one asked for, or a known name.

    Raises:
        ValueError: there is no such column; the message names those that there are.
    """
    if data.label_column is not None:
        return _checked(split, data.label_column, "label_column")
    known = [name for name in LABEL_COLUMNS if name in split.column_names]
    known += [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if not known:
        raise ValueError(f"no label column among {', '.join(split.column_names)}: set label_column")
    return known[0]


def class_names(split: Dataset, column: str) -> tuple[str, ...]:
    """The classes of a column: those of its `ClassLabel`, or else what it holds, sorted.

    Raises:
        ValueError: it holds floats, lists or nothing, and so no classes.
    """
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    if not isinstance(feature, Value) or feature.dtype.startswith(("float", "double")):
        raise ValueError(
            f"column {column} is of type {feature}, and classes are strings or integers: choose another label_column, "
            "or fill in what is missing, which turns integers into floats"
        )
    return tuple(map(str, sorted(_values(split, column))))


def class_order(config: PreTrainedConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The classes to train, in the order that the model knows them in, if it knows exactly these."""
    known = tuple(config.id2label[index] for index in range(config.num_labels))
    return known if set(known) == set(names) else tuple(names)


def label_ids(split: Dataset, column: str, classes: Sequence[str]) -> dict[Any, int]:
    """From each value of the column to the number of its class.

    A model whose classes have no names but LABEL_0, LABEL_1, ... takes as many classes that the data number.

    Raises:
        ValueError: a value is none of the classes.
    """
    feature = split.features[column]
    values = _values(split, column)
    names = {value: feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values}
    if list(classes) == [f"LABEL_{index}" for index in range(len(classes))] and not set(names.values()) <= {*classes}:
        numbered = feature.names if isinstance(feature, ClassLabel) else [str(k) for k in range(len(classes))]
        classes = numbered if len(numbered) == len(classes) else classes
    unknown = sorted({name for name in names.values() if name not in classes})
    if unknown:
        raise ValueError(
            f"column {column} holds {', '.join(unknown[:5])}, and the classes are {', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}: train on data with all of them, or drop these examples"
        )
    return {value: list(classes).index(name) for value, name in names.items()}


def _text_columns(split: Dataset, first: str | None, second: str | None) -> tuple[str, ...]:
    if first is None and second is None:
        pairs = [pair for pair in TEXT_PAIRS if set(pair) <= set(split.column_names)]
        known = pairs + [(name,) for name in TEXT_COLUMNS if name in split.column_names]
        if not known:
            raise ValueError(f"no text column among {', '.join(split.column_names)}: set text_column")
        columns = known[0]
    elif first is None:
        raise ValueError("text_pair_column names the second text: set text_column for the first")
    else:
        columns = (_checked(split, first, "text_column"),)
        if second is not None:
            columns += (_checked(split, second, "text_pair_column"),)
    for column in columns:
        if getattr(split.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"column {column} is of type {split.features[column]}, not text: set text_column")
    return columns


def _checked(split: Dataset, name: str, argument: str) -> str:
    if name not in split.column_names:
        raise ValueError(f"there is no column {name}, only {', '.join(split.column_names)}: set {argument}")
    return name


def _values(split: Dataset, column: str) -> list[Any]:
    values = split.unique(column)
    if None in values or (isinstance(split.features[column], ClassLabel) and -1 in values):
        raise ValueError(f"column {column} lacks the label of an example: drop the examples without one")
    return values
