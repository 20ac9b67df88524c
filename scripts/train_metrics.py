"""Accuracy and macro F1 of class predictions, as the Trainer asks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction


def predicted_classes(logits: Tensor | tuple[Tensor, ...], labels: Any = None) -> Tensor:
    """The class of the largest logit, so that an evaluation keeps one number an example."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float((predictions == labels).mean()), "macro_f1": macro_f1(predictions, labels)}


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    r"""\\(\frac{1}{K} \sum_k 2 TP_k / (2 TP_k + FP_k + FN_k)\\) over the K classes that occur in either array."""
    scores = []
    for k in np.union1d(predictions, labels):
        is_predicted, is_true = predictions == k, labels == k
        scores.append(2 * np.sum(is_predicted & is_true) / (is_predicted.sum() + is_true.sum()))
    return float(np.mean(scores))
