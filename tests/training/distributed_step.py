"""One optimizer step on the same eight examples, however many processes share them."""

import os
import sys

import torch
from tiny_models import Examples, bert, gpt2, vit
from transformers import ViTImageProcessor

from hf_lipschitz import lipschitzify
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from tests.processes import leave


PROCESSOR = ViTImageProcessor(image_std=[0.5, 0.2, 0.1])
MODELS = {"image": vit, "text": gpt2, "encoder": bert}
# What is a mean over examples, or of the weights alone.
MEANS = {
    "noise_sigma": 0.1, "noise_copies": 2, "attack_radius": 0.1, "attack_steps": 2, "curvature_weight": 0.1,
    "norm_penalty": 0.1, "norm_penalty_target": 0.1,
}  # fmt: skip
CASES = {
    "image": {"model": "image"},
    "text": {"model": "text"},
    "consistency": {"model": "image", "smoothing": "consistency", "curvature": "trace", **MEANS},
    "consistency of text": {"model": "text", "smoothing": "consistency", "curvature": "cure", **MEANS},
    "macer": {"model": "encoder", "smoothing": "macer", "curvature": "trace", **MEANS},
    "margin": {
        "model": "image",
        "loss": "offset_cross_entropy",
        "normalize_head": True,
        **MEANS,
        "curvature": "trace",
    },
    "named modules": {"model": "encoder", "activation_decay_modules": ["pooler.dense"]},
}
CURVATURE = {"model": "text", "curvature_weight": 0.1}


def step(directory, model, **values):
    """The weights after the step, and what was logged."""
    model = MODELS[model](initializer_range=0.3)
    lipschitzify(model, layer_lipschitz=0.5, exclude_modules=["classifier"] if "normalize_head" in values else None)
    args = LipschitzTrainingArguments(
        directory,
        max_steps=1,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        activation_decay=0.5,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **values,
    )
    trainer = LipschitzTrainer(model, args, train_dataset=Examples(model), processing_class=PROCESSOR)
    trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, trainer.state.log_history[0]


if __name__ == "__main__":
    results = {case: step(sys.argv[1], **values) for case, values in CASES.items()}
    results["curvature"] = step(sys.argv[1], **CURVATURE)
    torch.save(results, os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
    leave()
