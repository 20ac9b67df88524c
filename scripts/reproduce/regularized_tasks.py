"""What the regularisers are compared on: data, models, and the settings that are the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_lipschitz.demo.acts import Act, text_act, vision_act
from hf_lipschitz.demo.data import LabelledData, mnist, tweets
from hf_lipschitz.demo.models import image_model, text_model


@dataclass(frozen=True)
class Task:
    """A model and its data; the grids are the values that each method is tuned over."""

    title: str
    load: Callable[[], LabelledData]
    make: Callable[[LabelledData, str | None], tuple[PreTrainedModel, Any]]
    act: Callable[[LabelledData], Act]
    train_examples: int
    epochs: float
    label_noise: float
    training: dict[str, Any]
    grids: dict[str, list[float]]


TASKS = {
    "tweets": Task(
        title="MiniLM on tweets",
        load=tweets,
        make=text_model,
        act=text_act,
        train_examples=600,
        epochs=3,
        label_noise=0.0,
        training={"per_device_train_batch_size": 16, "learning_rate": 2e-4, "warmup_steps": 0.1},
        grids={
            "weight_decay": [0.1, 1.0, 10.0],
            "dropout": [0.2, 0.3, 0.5],
            "sam": [0.02, 0.05, 0.1],
            "activation_decay": [1e-4, 1e-3, 1e-2],
            "curvature": [1e-4, 1e-3, 1e-2],
        },
    ),
    "mnist": Task(
        title="a small ResNet on MNIST",
        load=mnist,
        make=image_model,
        act=vision_act,
        train_examples=4500,
        epochs=10,
        label_noise=0.2,
        training={"per_device_train_batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 0.1},
        grids={
            "weight_decay": [0.1, 1.0, 10.0],
            "dropout": [0.2, 0.3, 0.5],
            "sam": [0.005, 0.02, 0.05],
            "activation_decay": [1e-3, 1e-2, 1e-1],
            "curvature": [1e-3, 1e-2, 1e-1],
        },
    ),
}
