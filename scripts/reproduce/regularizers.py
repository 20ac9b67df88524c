"""The regularisers that are compared: each is one number, in the training arguments or in the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertPreTrainedModel, PreTrainedModel, ResNetForImageClassification


PLAIN = "plain"
TITLES = {
    PLAIN: "none",
    "weight_decay": "weight decay",
    "dropout": "dropout",
    "sam": "SAM, radius",
    "activation_decay": "activation decay",
    "curvature": "curvature ‖Hv‖²",
}


def training_arguments(method: str, value: float | None, curvature_every: int) -> dict[str, Any]:
    """What `method` adds to the arguments of `LipschitzTrainer`.

    Raises:
        ValueError: there is no such method.
    """
    match method:
        case "plain" | "dropout":
            return {}
        case "weight_decay":
            return {"weight_decay": value}
        case "sam":
            every_weight = {"curvature_modules": ["all"]}
            return {"curvature": "sam", "curvature_weight": 1.0, "curvature_radius": value, **every_weight}
        case "activation_decay":
            return {"activation_decay": value}
        case "curvature":
            return {"curvature": "hutchinson", "curvature_weight": value, "curvature_every": curvature_every}
    raise ValueError(f"unknown method {method!r}; known: {', '.join(TITLES)}")


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """For BERT p is `hidden_dropout_prob` and `classifier_dropout`, and the dropout of attention stays as it is; a
    ResNet, which has none, gets a dropout of p before the classifier.

    Raises:
        TypeError: another model.
    """
    if isinstance(model, ResNetForImageClassification):
        model.classifier.insert(len(model.classifier) - 1, nn.Dropout(p))
    elif isinstance(model, BertPreTrainedModel):
        model.config.hidden_dropout_prob = model.config.classifier_dropout = p
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and not name.endswith("attention.self.dropout"):
                module.p = p
    else:
        raise TypeError(f"dropout is for BERT and ResNet here, got {type(model).__name__}; leave it out of --methods")
