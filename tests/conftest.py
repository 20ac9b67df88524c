from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import BertTokenizer

import hf_lipschitz  # noqa: F401  registers the hooks before any test
from tests.families import bert


# Tiny models: a second thread costs more than it brings, and `make test` runs a worker a core.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "one", "a", "the"]


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text_model")
    bert().save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(path / "vocab.txt"), model_max_length=40).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text_data")
    rows = [("a good film", "pos"), ("the bad one", "neg"), ("good one", "pos"), ("bad film", "neg")] * 10
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (path / "train.csv").write_text("\n".join(lines))
    return path
