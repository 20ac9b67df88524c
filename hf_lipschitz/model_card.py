"""The model card of a certified model, rendered from figures that a run has written."""

from __future__ import annotations

import os
import platform
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_lipschitz.report import LipschitzReport, rounded_up
from hf_lipschitz.summary import CertificationSummary


PACKAGES = ("hf_lipschitz", "torch", "transformers", "accelerate", "datasets")

THREAT_MODELS = {
    "input embeddings": (
        "The noise is added to the output of the word embeddings, over all tokens at once. **A radius in embedding "
        "space is no statement about meaning**: replacing one word usually moves an embedding by more than the radii "
        "above."
    ),
    "pixels in [0, 1]": (
        "The noise is added to the pixels, scaled to [0, 1] and at the size that the model sees, before normalisation."
    ),
}


def write_model_card(
    directory: str | os.PathLike[str],
    *,
    model_name: str,
    model_class: str,
    base_model: str | None,
    dataset_name: str,
    modality: str,
    report: LipschitzReport,
    summary: CertificationSummary,
    clean_accuracy: float,
    clean_count: int,
    n0: int,
    seed: int,
    training: dict[str, Any],
    command: str,
    license: str | None = None,
) -> Path:
    """Renders `README.md` into `directory`, beside `certified_accuracy.png`.

    Args:
        directory (`str` or `os.PathLike`):
            Of the saved model.
        model_name, model_class, base_model, dataset_name, modality (`"text"` or `"image"`), license:
            What the card says of the model and the data.
        report (`LipschitzReport`):
            Of the trained model.
        summary (`CertificationSummary`):
            Of its certificates.
        clean_accuracy (`float`), clean_count (`int`):
            Accuracy of the base classifier without noise, and on how many inputs.
        n0 (`int`), seed (`int`):
            Of the smoothing.
        training (`dict`):
            Name and value of each line of the training table.
        command (`str`):
            What reproduces the figures.

    Returns:
        `Path`: of the card.
    """
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=f"{modality}-classification",
        base_model=base_model,
        tags=["hf_lipschitz", "certified-robustness", "randomized-smoothing", "lipschitz"],
        model_name=model_name,
        eval_results=_eval_results(modality, dataset_name, summary, clean_accuracy),
    )
    constants = {layer.lipschitz for layer in report.layers if layer.lipschitz is not None}
    template = resources.files("hf_lipschitz") / "templates" / "model_card.md"
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        model_name=model_name,
        model_id=f"./{Path(directory).name}",
        model_class=model_class,
        base_model=base_model,
        dataset_name=dataset_name,
        smoothing_name="randomized-smoothing",
        constrained=sum(layer.lipschitz is not None for layer in report.layers),
        constant=f"{max(constants):.4g}" if constants else "their constants",
        layers=report.layers,
        rounded_up=rounded_up,
        uncovered=sorted({module.kind for module in report.uncovered}),
        summary=summary,
        clean_accuracy=clean_accuracy,
        clean_count=clean_count,
        n0=n0,
        seed=seed,
        threat_model=THREAT_MODELS.get(summary.unit, ""),
        example='"what a lovely morning"' if modality == "text" else '"image.png"',
        auto_class="SequenceClassification" if modality == "text" else "ImageClassification",
        training=training,
        command=command,
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    )
    path = Path(directory) / "README.md"
    card.save(path)
    return path


def _eval_results(
    modality: str, dataset_name: str, summary: CertificationSummary, clean_accuracy: float
) -> list[EvalResult]:
    def result(metric: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=f"{modality}-classification",
            dataset_type="custom",
            dataset_name=dataset_name,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )

    certified = [
        result("certified_accuracy", f"certified accuracy at radius {row.radius:g} ({summary.unit})", row.accuracy)
        for row in summary.rows
    ]
    return [result("accuracy", "accuracy without noise", clean_accuracy), *certified]
