"""scripts/train.py on tiny models of each kind, from data to saved model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from scipy.io import wavfile
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    EvalPrediction,
    PerceiverConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SamConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from hf_lipschitz.model_config import config_of
from tests.conftest import WORDS
from tests.families.audio import wav2vec2


SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from train import main  # noqa: E402
from train_arguments import DataArguments, ModelArguments  # noqa: E402
from train_columns import class_names, class_order, input_columns, label_ids  # noqa: E402
from train_encoding import audio_encoder, collator, image_encoder, resampled  # noqa: E402
from train_metrics import compute_metrics  # noqa: E402
from train_models import task_of  # noqa: E402
from train_splits import hold_out  # noqa: E402


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]
QUIET += ["--log_level", "error", "--per_device_train_batch_size", "8", "--learning_rate", "0.01"]
RATE = 800


def run(model: Path, output: Path, *argv: object) -> dict[str, float]:
    return main(list(map(str, ["--model_name_or_path", model, "--output_dir", output, *QUIET, *argv])))


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach() for name, module in model.named_modules() if hasattr(module, "out_features")}


def largest_norm(model: PreTrainedModel) -> float:
    return max(np.linalg.norm(weight.double().numpy(), 2) for weight in weights(model).values())


def accuracy_on_texts(directory: Path, data: Path) -> float:
    """One text at a time, without the script's code."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pairs = [line.rsplit(",", 1) for line in data.read_text().splitlines()[1:]]
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text, _ in pairs]
    return float(np.mean([model.config.id2label[k] == label for k, (_, label) in zip(found, pairs, strict=True)]))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def text_file(text_data: Path) -> Path:
    return text_data / "train.csv"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With norms above 1, as pretrained models have."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 16, "vocab_size": len(WORDS), "initializer_range": 0.5}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(path / "vocab.txt"), model_max_length=40).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(bert: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A text model held to 1 a layer."""
    output = tmp_path_factory.mktemp("trained")
    files = ["--train_file", text_file, "--validation_file", text_file]
    steps = ["--max_steps", 30, "--do_train", "--do_eval", "--logging_steps", 10]
    return output, run(bert, output, *files, *steps, "--layer_lipschitz", 1, "--noise_sigma", 0.01)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class, of dark and of bright images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name, level in (("dark", 40), ("bright", 200)):
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = (level + generator.integers(-30, 30, (9, 11, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, initializer_range=0.3)).save_pretrained(
        path
    )
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    config = wav2vec2().config
    config.mask_time_prob = 0.0
    Wav2Vec2ForSequenceClassification(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(path)
    return path


def sounds(rate: int = RATE) -> dict[str, list]:
    """Tones and silence with a little noise, of different lengths."""
    generator = np.random.default_rng(0)
    waves, labels = [], []
    for index in range(16):
        time = np.arange(rate // 2 + 10 * index) / rate
        tone = np.sin(2 * np.pi * 50 * time) if index % 2 else np.zeros_like(time)
        waves.append((tone + 0.01 * generator.standard_normal(len(time))).tolist())
        labels.append("tone" if index % 2 else "noise")
    return {"audio": waves, "label": labels}


def test_text_model_is_constrained_trained_and_saved(trained: tuple[Path, dict], text_file: Path) -> None:
    output, metrics = trained
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert config_of(model).layer_lipschitz == 1
    assert 0.99 < largest_norm(model) <= 1 + 1e-6
    assert metrics["eval_accuracy"] == accuracy_on_texts(output, text_file) > 0.7
    assert metrics["train_samples"] == metrics["eval_samples"] == 40
    assert json.loads((output / "eval_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]
    assert str(output.parent) not in (output / "README.md").read_text()
    assert {"train_results.json", "all_results.json", "trainer_state.json", "README.md"} <= set(os.listdir(output))


def test_trained_model_is_evaluated_and_predicts(trained: tuple[Path, dict], text_file: Path, tmp_path: Path) -> None:
    directory, metrics = trained
    texts = ["a good film", "the bad one", "bad film"]
    (tmp_path / "test.csv").write_text("\n".join(["text", *texts]))
    files = ["--validation_file", text_file, "--test_file", tmp_path / "test.csv"]
    again = run(directory, tmp_path, *files, "--do_eval", "--do_predict")
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert "train_samples" not in again
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        classes = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    expected = ["index\tprediction", *(f"{i}\t{model.config.id2label[k]}" for i, k in enumerate(classes))]
    assert (tmp_path / "predict_results.txt").read_text().splitlines() == expected


def test_without_a_constraint_the_model_is_plain(bert: Path, text_file: Path, tmp_path: Path) -> None:
    run(bert, tmp_path, "--train_file", text_file, "--do_train", "--max_steps", 1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert config_of(model) is None
    assert largest_norm(model) > 1.5


def test_a_constrained_checkpoint_stays_constrained(
    trained: tuple[Path, dict], text_file: Path, tmp_path: Path
) -> None:
    run(trained[0], tmp_path, "--train_file", text_file, "--do_train", "--max_steps", 2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = AutoModelForSequenceClassification.from_pretrained(trained[0])
    assert 0.99 < largest_norm(model) <= 1 + 1e-6
    assert not torch.equal(model.classifier.weight, before.classifier.weight)


def test_replaced_parts_are_calibrated_to_the_same_function(bert: Path, text_file: Path, tmp_path: Path) -> None:
    files = ["--train_file", text_file, "--validation_file", text_file]
    steps = ["--do_train", "--do_eval", "--max_steps", 1, "--learning_rate", 0]
    plain = run(bert, tmp_path / "plain", *files, *steps)
    replaced = ["--layer_lipschitz", "present", "--replace", "weights", "norms", "attention"]
    same = run(bert, tmp_path / "replaced", *files, *steps, *replaced)
    assert same["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "replaced")
    assert {"norms", "attention"} <= set(config_of(model).replaced)


def test_resumed_run_ends_where_the_whole_one_does(bert: Path, text_file: Path, tmp_path: Path) -> None:
    schedule = ["--layer_lipschitz", "none", "--lipschitz_schedule", "linear", "--lipschitz_target", 1]
    saving = ["--save_strategy", "steps", "--save_steps", 3, "--max_steps", 6, "--do_train"]
    argv = ["--train_file", text_file, *saving, *schedule]
    run(bert, tmp_path, *argv)
    whole = weights(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    for checkpoint in (tmp_path / "checkpoint-3", "last"):
        (tmp_path / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / "checkpoint-6")
        run(bert, tmp_path, *argv, "--resume_from_checkpoint", checkpoint)
        resumed = weights(AutoModelForSequenceClassification.from_pretrained(tmp_path))
        assert whole.keys() == resumed.keys()
        assert max((whole[name] - resumed[name]).abs().max().item() for name in whole) <= 1e-6
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapters_stay_in_the_ball(bert: Path, text_file: Path, tmp_path: Path, targets: str | None) -> None:
    files = ["--train_file", text_file, "--validation_file", text_file]
    lora = ["--lora_r", 2, "--merge_adapter", *(["--lora_target_modules", targets] if targets else [])]
    steps = ["--do_train", "--do_eval", "--max_steps", 40, "--learning_rate", 0.05]
    metrics = run(bert, tmp_path, *files, *steps, "--layer_lipschitz", 1, *lora)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 4)
    assert "classifier" in adapter["modules_to_save"]
    assert not (tmp_path / "model.safetensors").exists()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert 0.99 < largest_norm(merged) <= 1 + 1e-6
    assert accuracy_on_texts(tmp_path / "merged", text_file) == metrics["eval_accuracy"] > 0.5


def test_adapters_of_an_image_model(image_model: Path, images: Path, tmp_path: Path) -> None:
    lora = ["--lora_r", 2, "--lora_target_modules", "fc1", "q_proj"]
    metrics = run(
        image_model, tmp_path, "--dataset_name", images, "--layer_lipschitz", "present", *lora, "--do_train",
        "--do_eval", "--max_steps", 15,
    )  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert metrics["eval_accuracy"] > 0.5


def test_image_folder(image_model: Path, images: Path, tmp_path: Path) -> None:
    regular = ["--noise_sigma", 0.1, "--activation_decay", 1e-3, "--layer_lipschitz", 2]
    steps = ["--do_train", "--do_eval", "--max_steps", 20]
    metrics = run(image_model, tmp_path, "--dataset_name", images, *steps, *regular)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "bright", 1: "dark"}
    right = []
    for file in sorted((images / "validation").rglob("*.png")):
        with torch.no_grad():
            logits = model(**processor(Image.open(file), return_tensors="pt")).logits
        right.append(model.config.id2label[logits.argmax().item()] == file.parent.name)
    assert metrics["eval_accuracy"] == np.mean(right) > 0.9


def test_digits_of_one_channel(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 14, "width": 14}, image_mean=[0.1307], image_std=[0.3081])
    processor.save_pretrained(tmp_path / "model")
    few = ["--max_train_samples", 48, "--max_eval_samples", 20, "--max_steps", 2]
    metrics = run(tmp_path / "model", tmp_path, "--dataset_name", "mnist", *few, "--do_train", "--do_eval")
    assert (metrics["train_samples"], metrics["eval_samples"]) == (48, 20)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {k: str(k) for k in range(10)}


def test_arrays_of_sound(audio_model: Path, tmp_path: Path) -> None:
    rows = sounds()
    Dataset.from_dict(rows).to_json(tmp_path / "sounds.json")
    files = ["--train_file", tmp_path / "sounds.json", "--validation_file", tmp_path / "sounds.json"]
    steps = ["--do_train", "--do_eval", "--max_steps", 8]
    metrics = run(
        audio_model, tmp_path, *files, *steps, "--layer_lipschitz", "present", "--per_device_eval_batch_size", 1
    )
    model = AutoModelForAudioClassification.from_pretrained(tmp_path).eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "noise", 1: "tone"}
    right = []
    for wave, label in zip(rows["audio"], rows["label"], strict=True):
        with torch.no_grad():
            logits = model(**extractor(wave, sampling_rate=RATE, return_tensors="pt")).logits
        right.append(model.config.id2label[logits.argmax().item()] == label)
    assert metrics["eval_accuracy"] == np.mean(right)


def test_sound_with_a_rate_of_its_own(audio_model: Path, tmp_path: Path) -> None:
    rows = sounds(rate=2 * RATE)
    rows["audio"] = [{"array": wave, "sampling_rate": 2 * RATE} for wave in rows["audio"]]
    Dataset.from_dict(rows).to_parquet(tmp_path / "sounds.parquet")
    files = ["--train_file", tmp_path / "sounds.parquet", "--validation_split", 0.25]
    metrics = run(audio_model, tmp_path, *files, "--do_train", "--do_eval", "--max_steps", 1)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (12, 4)


def test_resampling_keeps_a_tone() -> None:
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 50 * np.arange(rate) / rate).astype(np.float32)

    found = resampled(tone(1200), 1200, RATE)
    assert found.dtype == np.float32
    assert np.abs(found - tone(RATE))[50:-50].max() < 0.01


def test_spectrograms_make_a_batch() -> None:
    extractor = ASTFeatureExtractor(sampling_rate=16_000, num_mel_bins=16, max_length=40)
    encode = audio_encoder("audio", extractor, 16_000, max_seconds=0.5)
    long = np.random.default_rng(0).standard_normal(16_000)
    rows = [{k: v[0] for k, v in encode({"audio": [wave]}).items()} for wave in (long, long[:8_000], long[:3_000])]
    batch = collator("audio", extractor)([{**row, "labels": 1} for row in rows])
    assert batch["input_values"].shape == (3, 40, 16)
    assert batch["labels"].tolist() == [1, 1, 1]
    assert torch.equal(batch["input_values"][0], batch["input_values"][1])
    assert not torch.equal(batch["input_values"][0], batch["input_values"][2])


def test_arrays_of_pixels_are_images() -> None:
    processor = ViTImageProcessorPil(do_resize=False, do_normalize=False)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 5))
    found = image_encoder("image", processor, ViTConfig(num_channels=1))({"image": pixels.tolist()})["pixel_values"]
    torch.testing.assert_close(found, torch.from_numpy(pixels / 255).float()[:, None])
    assert image_encoder("image", processor, ViTConfig())({"image": pixels.tolist()})["pixel_values"].shape[1] == 3


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 5, 60), generator.integers(0, 4, 60)
    found = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))


def test_held_out_share_has_every_class_and_is_the_same_again() -> None:
    train = Dataset.from_dict({"text": [str(i) for i in range(40)], "label": ["a"] * 30 + ["b"] * 10})
    data = DataArguments(dataset_name="data", validation_split=0.2)
    splits = hold_out(DatasetDict(train=train), data, "label")
    assert sorted(splits["validation"]["label"]) == ["a"] * 6 + ["b"] * 2
    assert sorted([*splits["train"]["text"], *splits["validation"]["text"]], key=int) == train["text"][:]
    again = hold_out(DatasetDict(train=train), data, "label")
    assert again["validation"]["text"][:] == splits["validation"]["text"][:]
    assert hold_out(splits, data, "label") is splits


def test_classes_and_their_numbers() -> None:
    split = Dataset.from_dict({"number": [10, 2, 2, 0], "word": ["no", "yes", "no", "yes"], "named": [1, 0, 1, 1]})
    split = split.cast_column("named", ClassLabel(names=["yes", "no"]))
    assert class_names(split, "number") == ("0", "2", "10")
    assert label_ids(split, "number", ("0", "2", "10")) == {0: 0, 2: 1, 10: 2}
    assert class_names(split, "named") == ("yes", "no")
    assert label_ids(split, "named", ("no", "yes")) == {1: 0, 0: 1}
    assert label_ids(split, "named", ("LABEL_0", "LABEL_1")) == {1: 1, 0: 0}
    assert label_ids(split, "number", [f"LABEL_{k}" for k in range(11)]) == {0: 0, 2: 2, 10: 10}
    assert class_order(BertConfig(id2label={0: "yes", 1: "no"}), ("no", "yes")) == ("yes", "no")
    assert class_order(BertConfig(), ("no", "yes")) == ("no", "yes")
    with pytest.raises(ValueError, match="holds no, and the classes are maybe, yes"):
        label_ids(split, "word", ("maybe", "yes"))


def test_known_columns() -> None:
    pairs = Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "text": ["c"], "number": [1]})
    assert input_columns(pairs, "text", DataArguments("data")) == ("premise", "hypothesis")
    assert input_columns(pairs, "text", DataArguments("data", text_column="text")) == ("text",)
    asked = DataArguments("data", text_column="text", text_pair_column="premise")
    assert input_columns(pairs, "text", asked) == ("text", "premise")
    with pytest.raises(ValueError, match="column number is of type .*, not text"):
        input_columns(pairs, "text", DataArguments("data", text_column="number"))
    with pytest.raises(ValueError, match="no image column among premise, hypothesis, text, number: set image_column"):
        input_columns(pairs, "image", DataArguments("data"))


def test_task_is_that_of_the_configuration() -> None:
    assert task_of(BertConfig(), None).name == "text"
    assert task_of(ViTConfig(), None).name == "image"
    assert task_of(ASTConfig(), None).name == "audio"
    assert task_of(Wav2Vec2Config(), None).name == "audio"
    assert task_of(PerceiverConfig(architectures=["PerceiverForSequenceClassification"]), None).name == "text"
    with pytest.raises(ValueError, match="text and image for perceiver: set task"):
        task_of(PerceiverConfig(), None)
    with pytest.raises(ValueError, match="no text, image or audio for sam"):
        task_of(SamConfig(), None)
    with pytest.raises(ValueError, match="a bert classifies text"):
        task_of(BertConfig(), "image")


def test_constraint_of_the_arguments() -> None:
    assert ModelArguments("m").constraint() is None
    assert ModelArguments("m", layer_lipschitz="present").constraint().layer_lipschitz is None
    args = ModelArguments("m", layer_lipschitz="2.5", method="sll", exclude_modules=["classifier"], replace=["all"])
    constraint = args.constraint()
    assert (constraint.layer_lipschitz, constraint.method, constraint.exclude_modules) == (2.5, "sll", ("classifier",))
    assert "residuals" in constraint.replace


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_file", "FILE"], "nothing to do: set do_train"),
        (["--do_train"], "give the data once"),
        (["--do_train", "--validation_file", "FILE"], "no train split to train on, only validation: set train_file"),
        (["--do_train", "--do_eval", "--train_file", "FILE"], "no validation split to evaluate on, only train: .*0.2"),
        (["--do_train", "--train_file", "FILE", "--label_column", "class"], "no column class, only text, label"),
        (["--do_train", "--train_file", "FILE", "--text_column", "words"], "no column words, only text, label"),
        (["--do_train", "--train_file", "data.xlsx"], "data.xlsx is none of .csv"),
        (["--do_train", "--train_file", "FILE", "--layer_lipschitz", "small"], "a number or one of none, present"),
        (["--do_train", "--train_file", "FILE", "--method", "sll"], "method without a constraint: set"),
        (["--do_train", "--train_file", "FILE", "--lora_r", "2"], "lora_r without a constraint"),
        (["--do_train", "--train_file", "FILE", "--lora_alpha", "2"], "need adapters: set lora_r"),
        (["--do_train", "--train_file", "FILE", "--task", "image"], "a bert classifies text"),
        (["--do_eval", "--validation_file", "FILE"], "holds neg, pos, and the classes are"),
    ],
)  # fmt: skip
def test_errors_name_the_fix(argv: list[str], message: str, bert: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(bert, tmp_path, *(str(text_file) if value == "FILE" else value for value in argv))


def test_unknown_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path, "--dataset_name", "tweets", "--do_train", "--task", "video")
    assert "choose from text, image, audio" in capsys.readouterr().err.replace("'", "")


def test_missing_labels_and_floats_are_refused(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "gap.csv").write_text("text,label\na,pos\nb,\nc,neg")
    with pytest.raises(ValueError, match="column label lacks the label of an example"):
        run(bert, tmp_path, "--do_train", "--train_file", tmp_path / "gap.csv")
    (tmp_path / "float.csv").write_text("text,label\na,0.5\nb,1.5")
    with pytest.raises(ValueError, match="classes are strings or integers"):
        run(bert, tmp_path, "--do_train", "--train_file", tmp_path / "float.csv")


def test_sound_files_ask_for_torchcodec(audio_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("low", "high"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        wavfile.write(tmp_path / "data" / "train" / name / "0.wav", RATE, np.zeros(RATE, dtype=np.int16))
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    with pytest.raises(RuntimeError, match="install 'torchcodec'. Or give a column of float arrays"):
        run(audio_model, tmp_path / "out", "--dataset_name", tmp_path / "data", "--do_train")
    table = pa.table({"audio": [{"bytes": b"", "path": "0.wav"}] * 2, "label": ["low", "high"]})
    stored = Dataset(table).cast_column("audio", datasets.Audio())
    DatasetDict(train=stored).save_to_disk(tmp_path / "stored")
    with pytest.raises(RuntimeError, match="column audio holds sound files"):
        run(audio_model, tmp_path / "out", "--dataset_name", tmp_path / "stored", "--do_train")


def test_arguments_in_a_file_and_a_data_set_on_disk(bert: Path, text_file: Path, tmp_path: Path) -> None:
    rows = [line.rsplit(",", 1) for line in text_file.read_text().splitlines()[1:]]
    data = Dataset.from_dict({"review": [text for text, _ in rows], "label": [label for _, label in rows]})
    DatasetDict(train=data, validation=data).save_to_disk(tmp_path / "data")
    arguments = {
        "model_name_or_path": str(bert), "output_dir": str(tmp_path / "out"), "do_train": True, "max_steps": 1,
        "dataset_name": str(tmp_path / "data"), "layer_lipschitz": "1", "use_cpu": True, "disable_tqdm": True,
        "log_level": "error", "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    assert main([str(tmp_path / "arguments.json")])["train_samples"] == 40


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(bert: Path, text_file: Path, tmp_path: Path) -> None:
    argv = ["--train_file", text_file, "--validation_file", text_file, "--do_train", "--do_eval", "--max_steps", 4]
    argv += ["--layer_lipschitz", "present", "--replace", "weights", "norms", "--optim", "sgd"]
    alone = run(bert, tmp_path / "alone", *argv)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    asked = ["--model_name_or_path", bert, "--output_dir", tmp_path / "two", *QUIET, *argv]
    asked[asked.index("--per_device_train_batch_size") + 1] = "4"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(SCRIPTS / "train.py"), *map(str, asked)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("alone", "two")]
    first, second = map(weights, models)
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= 1e-5
