"""The data of scripts/train.py: reading them, and which part is for what."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from train_arguments import DataArguments

from hf_lipschitz.demo.data import SPLIT_SEED, LabelledData, mnist, tweets


DEMO = {"tweets": tweets, "mnist": mnist}
FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read(data: DataArguments, cache_dir: str | None = None) -> DatasetDict:
    """The splits of a data set under its own names, or of files under `train`, `validation` and `test`.

    Raises:
        ValueError: files of several or unknown formats.
        RuntimeError: sound files cannot be read here.
    """
    try:
        return _read(data, cache_dir)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ImportError):
            raise RuntimeError(f"{error.__cause__} Or give a column of float arrays.") from error
        raise


def _read(data: DataArguments, cache_dir: str | None) -> DatasetDict:
    name = data.dataset_name
    if name is None:
        return _files(data, cache_dir)
    if name in DEMO:
        return _demo(DEMO[name]())
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        found = load_from_disk(name)
    else:
        found = load_dataset(name, data.dataset_config_name, cache_dir=cache_dir)
    return found if isinstance(found, DatasetDict) else DatasetDict({data.train_split_name: found})


def train_split(splits: DatasetDict, data: DataArguments) -> Dataset:
    """What to train on.

    Raises:
        ValueError: there is none.
    """
    return _split(splits, data.train_split_name, "train on", "set train_file or train_split_name")


def test_split(splits: DatasetDict, data: DataArguments) -> Dataset:
    """What to predict.

    Raises:
        ValueError: there is none.
    """
    return _split(splits, data.test_split_name, "predict", "set test_file or test_split_name")


def eval_split(splits: DatasetDict, data: DataArguments) -> Dataset:
    """What to evaluate on.

    Raises:
        ValueError: there is none, and no share of the training data is held out.
    """
    fix = "set validation_file or eval_split_name, or validation_split=0.2 to hold out a share of the training data"
    return _split(splits, data.eval_split_name, "evaluate on", fix)


def hold_out(splits: DatasetDict, data: DataArguments, label_column: str) -> DatasetDict:
    """With `validation_split`, and without a split to evaluate on, that share of each class of the training data
    becomes it: always the same examples, so that a model is never evaluated on what it was trained on."""
    if data.validation_split is None or data.eval_split_name in splits:
        return splits
    train = train_split(splits, data)
    rows = Dataset.from_dict({"row": list(range(len(train))), "class": list(map(str, train[label_column]))})
    parts = rows.class_encode_column("class").train_test_split(
        test_size=data.validation_split, seed=SPLIT_SEED, stratify_by_column="class"
    )
    kept, held_out = (train.select(parts[name]["row"]) for name in ("train", "test"))
    return DatasetDict({**splits, data.train_split_name: kept, data.eval_split_name: held_out})


def drawn(split: Dataset, count: int | None) -> Dataset:
    """At most `count` examples, drawn at random, as folders of images are sorted by class; always the same ones."""
    if count is None or count >= len(split):
        return split
    return split.shuffle(seed=SPLIT_SEED).select(range(count))


def _split(splits: DatasetDict, name: str, purpose: str, fix: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"the data have no {name} split to {purpose}, only {', '.join(splits)}: {fix}")
    return splits[name]


def _files(data: DataArguments, cache_dir: str | None) -> DatasetDict:
    files = {
        data.train_split_name: data.train_file,
        data.eval_split_name: data.validation_file,
        data.test_split_name: data.test_file,
    }
    files = {name: file for name, file in files.items() if file is not None}
    endings = {Path(file).suffix for file in files.values()}
    if len(endings) > 1:
        raise ValueError(f"the files end in {', '.join(sorted(endings))}: bring them into one format")
    ending = endings.pop()
    if ending not in FORMATS:
        raise ValueError(f"{next(iter(files.values()))} is none of {', '.join(FORMATS)}: convert it to one of them")
    options = {"sep": "\t"} if ending == ".tsv" else {}
    return load_dataset(FORMATS[ending], data_files=files, cache_dir=cache_dir, **options)


def _demo(data: LabelledData) -> DatasetDict:
    columns = {"input": data.modality, "labels": "label"}
    return DatasetDict(
        train=data.train.rename_columns(columns).with_format(None),
        validation=data.test.rename_columns(columns).with_format(None),
    )
