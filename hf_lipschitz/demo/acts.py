"""One act of the demo: lipschitzify, train, save, reload, certify, report."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from hf_lipschitz.certification import SmoothingConfig
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import lipschitzify, materialized
from hf_lipschitz.dataset_certification import certify_dataset
from hf_lipschitz.demo.data import LabelledData
from hf_lipschitz.demo.models import image_model, text_model
from hf_lipschitz.integrations.base_classifiers import PixelClassifier
from hf_lipschitz.model_card import write_model_card
from hf_lipschitz.pipelines import CertifiedClassificationPipeline
from hf_lipschitz.plots import certified_accuracy_curve
from hf_lipschitz.report import inspect
from hf_lipschitz.summary import CertificationSummary, summarize
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments


MAX_TOKENS = 128


@dataclass(frozen=True)
class Act:
    """What an act does: the data, the model, how it is constrained, trained and certified."""

    data: LabelledData
    model_name: str | None
    base_model: str | None
    smoothing: SmoothingConfig
    certify: int
    radii: tuple[float, ...]
    constraint: LipschitzConfig
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`"text"` or `"image"`, also the name of the folder."""
        return self.data.modality


def text_act(data: LabelledData, model_name: str | None = None, **overrides: Any) -> Act:
    """MiniLM on tweets: noise on the word embeddings, n = 400."""
    return Act(
        data=data,
        model_name=model_name,
        base_model=model_name or "sentence-transformers/all-MiniLM-L6-v2",
        smoothing=SmoothingConfig(sigma=0.1, n0=100, n=400, alpha=1e-3, batch_size=100),
        certify=32,
        radii=(0.0, 0.05, 0.1, 0.15, 0.2),
        constraint=LipschitzConfig(layer_lipschitz=None),
        training={
            "num_train_epochs": 3,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-4,
            "noise_sigma": 0.1,
            "activation_decay": 1e-3,
            "curvature_weight": 1e-3,
            "curvature_every": 10,
            "lipschitz_schedule": "linear",
            "lipschitz_target": 4.0,
            **overrides,
        },
    )


def vision_act(data: LabelledData, model_name: str | None = None, **overrides: Any) -> Act:
    """A small ResNet on MNIST: noise on the pixels, n = 10 000."""
    return Act(
        data=data,
        model_name=model_name,
        base_model=model_name,
        smoothing=SmoothingConfig(sigma=0.5, n0=100, n=10_000, alpha=1e-3, batch_size=1000),
        certify=100,
        radii=(0.0, 0.5, 1.0, 1.5, 2.0),
        constraint=LipschitzConfig(layer_lipschitz=None),
        training={
            "num_train_epochs": 3,
            "per_device_train_batch_size": 64,
            "learning_rate": 3e-3,
            "noise_sigma": 0.5,
            "activation_decay": 1e-4,
            "curvature_weight": 1e-4,
            "curvature_every": 10,
            "lipschitz_schedule": "linear",
            "lipschitz_target": 2.0,
            **overrides,
        },
    )


def run_act(act: Act, output: Path, console: Console, *, command: str, seed: int = 0) -> CertificationSummary:
    """Runs an act and leaves the model, `results.jsonl`, `summary.json`, the curve and the card in `output`."""
    set_seed(seed)
    data, smoothing = act.data, act.smoothing
    directory = output / act.name
    directory.mkdir(parents=True, exist_ok=True)
    clock = _Clock(console)
    model, processor = (image_model if data.modality == "image" else text_model)(data, act.model_name)
    console.rule(f"{act.name}: {type(model).__name__} on {data.name}")
    console.print(
        f"{len(data.train)} examples to train on, {len(data.test)} held out, {act.certify} of them certified with "
        f"n = {smoothing.n:,} noisy copies each, sigma = {smoothing.sigma:g}, alpha = {smoothing.alpha:g}"
    )

    lipschitzify(model, act.constraint)
    train, test = (prepared(part, processor, model) for part in (data.train, data.test))
    trainer = trainer_of(act, model, processor, train, test, directory / "checkpoints", seed)
    with clock("train"):
        trainer.train()
    with clock("evaluate"):
        clean_accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(directory))
    processor.save_pretrained(directory)

    auto = AutoModelForImageClassification if data.modality == "image" else AutoModelForSequenceClassification
    reloaded = auto.from_pretrained(directory).to(model.device)
    console.print(f"saved and reloaded: {_compare(model.eval(), reloaded, test, processor)}")
    report = inspect(reloaded)
    console.print(report)

    certifier = CertifiedClassificationPipeline(
        model=reloaded,
        task="certified-classification",
        smoothing=smoothing,
        device=reloaded.device,
        **{"image_processor" if data.modality == "image" else "tokenizer": processor},
    )
    chosen = data.test.select(range(min(act.certify, len(data.test))))
    inputs, labels = list(chosen["input"]), [int(label) for label in chosen["labels"]]
    with clock("certify"):
        results = directory / "results.jsonl"
        results.unlink(missing_ok=True)
        certificates = certify_dataset(certifier, inputs, labels, results, details={"data": data.name})

    summary = summarize(certificates, labels, act.radii)
    console.print(f"clean accuracy of the base classifier on {len(data.test)} held-out examples: {clean_accuracy:.1%}")
    console.print(summary)
    title = f"{type(model).__name__} on {data.name}"
    certified_accuracy_curve(
        certificates,
        labels,
        directory / "certified_accuracy.png",
        clean_accuracy=clean_accuracy,
        clean_count=len(data.test),
        title=title,
    )
    figures = {"clean_accuracy": clean_accuracy, "certification": summary.to_dict(), "seconds": clock.seconds}
    (directory / "summary.json").write_text(json.dumps({**figures, "layers": report.to_dict()["layers"]}, indent=2))
    write_model_card(
        directory,
        model_name=f"{type(model).__name__} on {data.name}, certified",
        model_class=type(model).__name__,
        base_model=act.base_model,
        dataset_name=data.name,
        modality=data.modality,
        report=report,
        summary=summary,
        clean_accuracy=clean_accuracy,
        clean_count=len(data.test),
        n0=smoothing.n0,
        seed=smoothing.seed,
        training={"seed": seed, "training examples": len(data.train), **act.training},
        command=command,
        license="apache-2.0" if act.model_name is None else None,
    )
    console.print("time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items()))
    console.print(
        f"written to {directory}: {', '.join(sorted(path.name for path in directory.iterdir() if path.is_file()))}"
    )
    return summary


class _Clock:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def prepared(part: Dataset, processor: Any, model: PreTrainedModel) -> Dataset:
    # A fingerprint of its own keeps the result out of the cache: processor and model are no part of it.
    options = {"batched": True, "remove_columns": "input", "new_fingerprint": uuid.uuid4().hex}
    if model.main_input_name == "pixel_values":
        normalise = PixelClassifier(model, processor)

        def pixels(batch: dict[str, Any]) -> dict[str, Any]:
            encoded = torch.stack([normalise.encode(image) for image in batch["input"]]).to(normalise.mean.device)
            return {"pixel_values": ((encoded - normalise.mean) / normalise.std).cpu().numpy()}

        return part.map(pixels, **options).with_format("torch")
    limit = min(MAX_TOKENS, processor.model_max_length)
    return part.map(lambda batch: processor(batch["input"], truncation=True, max_length=limit), **options)


def trainer_of(
    act: Act, model: PreTrainedModel, processor: Any, train: Dataset, test: Dataset, directory: Path, seed: int
) -> LipschitzTrainer:
    arguments = LipschitzTrainingArguments(
        output_dir=str(directory),
        per_device_eval_batch_size=100,
        logging_steps=20,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=seed,
        **act.training,
    )
    return LipschitzTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        data_collator=DataCollatorWithPadding(processor) if act.data.modality == "text" else default_data_collator,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )


def _compare(model: PreTrainedModel, reloaded: PreTrainedModel, test: Dataset, processor: Any) -> str:
    rows = [test[i] for i in range(min(16, len(test)))]
    is_text = model.main_input_name == "input_ids"
    batch = (DataCollatorWithPadding(processor) if is_text else default_data_collator)(rows)
    batch = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), materialized(model), materialized(reloaded):
        gap = (model(**batch).logits - reloaded(**batch).logits).abs().max().item()
    return "logits bit-equal" if gap == 0 else f"logits differ by at most {gap:.2g}"
