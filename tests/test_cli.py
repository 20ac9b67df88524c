from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSequenceClassification, BertTokenizer, ViTImageProcessor
from typer.testing import CliRunner, Result

from hf_lipschitz.certification import read_results
from hf_lipschitz.cli import app
from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import vit


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_model")
    vit().save_pretrained(path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_data")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    data = Dataset.from_dict({"img": [Image.fromarray(p) for p in pixels], "label": [i % 2 for i in range(40)]})
    data = data.cast_column("label", ClassLabel(names=["cat", "dog"]))
    DatasetDict(data.train_test_split(test_size=10, seed=0)).save_to_disk(path)
    return path


@pytest.mark.parametrize("modality", ["text", "image"])
def test_demo_on_a_model_and_data_of_ones_own(
    modality: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = (request.getfixturevalue(f"{modality}_{part}") for part in ("model", "data"))
    done = run("demo", "--model", model, "--dataset", data, "--output", tmp_path, "--max-steps", 3, "--certify", 2)
    assert done.exit_code == 0, done.output
    for phrase in ("saved and reloaded: logits bit-equal", "NOT covered", "Certified accuracy on 2 held-out inputs"):
        assert phrase in done.output
    folder = tmp_path / modality
    found = read_results(folder / "results.jsonl")
    assert len(found.certificates) == len(found.config["labels"]) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["certification"]["count"] == 2
    assert Image.open(folder / "certified_accuracy.png").size == (1200, 760)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == f"{modality}-classification"
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "certified_accuracy"}
    for phrase in ("They are no bound for the model", "![Certified accuracy", "sigma=", str(data)):
        assert phrase in card.text
    shown = run("report", folder / "results.jsonl", "--curve", tmp_path / "curve.png")
    assert "Certified accuracy on 2" in shown.output
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_certify_inspect_and_merge(text_model: Path, text_data: Path, tmp_path: Path) -> None:
    constrained = tmp_path / "constrained"
    model = AutoModelForSequenceClassification.from_pretrained(text_model)
    lipschitzify(model, layer_lipschitz=0.1).save_pretrained(constrained)
    BertTokenizer.from_pretrained(text_model).save_pretrained(constrained)
    results = tmp_path / "results.jsonl"
    options = ["--sigma", "0.1", "--n", "100", "--limit", "3", "--output", results]
    done = run("certify", constrained, text_data, *options)
    assert done.exit_code == 0, done.output
    assert len(read_results(results).certificates) == 3
    table = run("inspect", constrained).output
    assert "14 of 14 weight layers constrained" in table
    merged = run("merge", constrained, tmp_path / "plain")
    assert merged.exit_code == 0, merged.output
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert list(constrained_layers(plain)) == []
    assert BertTokenizer.from_pretrained(tmp_path / "plain").vocab_size == 11


def test_bound_prints_both_ends(text_model: Path, image_model: Path, tmp_path: Path) -> None:
    result = run("bound", text_model, "--text", "a good film", "--steps", 1, "--starts", 1)
    assert result.exit_code == 0, result.output
    assert "with respect to inputs_embeds" in result.output
    assert "replace=('weights', 'norms')" in result.output
    assert "a ratio of" in result.output
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "black.png")
    result = run("bound", image_model, "--image", tmp_path / "black.png", "--radius", 0.01, "--steps", 0)
    assert result.exit_code == 0, result.output
    assert "with respect to pixels on the ball of radius 0.01" in result.output
    assert "upsample" in result.output
    assert "attack" not in result.output
    result = run("bound", image_model, "--radius", 0.01, "--steps", 1, "--starts", 1)
    assert "with respect to pixel_values" in result.output, result.output
    both = run("bound", text_model, "--text", "a", "--image", "b.png")
    assert both.exit_code == 1
    assert "not both" in both.stderr


def test_errors_are_one_line_and_name_the_fix(text_model: Path, text_data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((text_model / "config.json").read_text())
    (tmp_path / "unlabelled").mkdir()
    (tmp_path / "unlabelled" / "train.csv").write_text("text,score\na,1\nb,2\n")
    cases = [
        (["inspect", empty], "no file named"),
        (["merge", text_model, tmp_path / "out"], "nothing to merge"),
        (["certify", text_model, text_data, "--sigma", "-1", "--output", tmp_path / "r"], "sigma must be positive"),
        (["certify", text_model, tmp_path / "unlabelled", "--sigma", "1"], "needs a label"),
        (["report", tmp_path / "missing.jsonl"], "No such file"),
        (["demo", "--model", text_model, "--dataset", tmp_path / "nowhere", "--output", tmp_path], "nowhere"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.exit_code == 1, done.output
        last = done.output.strip().splitlines()[-1]
        assert last.startswith("error:")
        assert message in last
        assert "Traceback" not in done.output
