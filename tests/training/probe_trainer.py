"""A trainer that probes at each evaluation, and what two processes write of it."""

import os
import sys

import torch
from tiny_models import Examples, bert, vit
from transformers import ViTImageProcessor

from hf_lipschitz import lipschitzify
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.probe import certified_accuracy_metrics, probe_batches, probe_certificates
from tests.processes import leave


CASES = {"image": vit, "text": bert}
RADII = [0.0, 0.05, 0.1]


# Six examples an evaluation.
PROBE = {
    "certified_radii": RADII, "certified_examples": 6, "certified_sigma": 0.2, "certified_n": 300,
    "certified_alpha": 0.01,
}  # fmt: skip


def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


class Pictures(Examples):
    """As `Examples`, with images whose pixels are in [0, 1] before normalisation."""

    def __init__(self, model, count=8, seed=0):
        super().__init__(model, count, seed)
        if "pixel_values" in self.columns:
            self.columns["pixel_values"] = self.columns["pixel_values"].clamp(-1, 1)


def trainer_for(case, directory, **values):
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1} if values.pop("dropout", False) else {}
    model = lipschitzify(CASES[case](initializer_range=0.5, **dropout), layer_lipschitz=2.0)
    args = LipschitzTrainingArguments(
        os.path.join(directory, case),
        **{
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_eval_batch_size": 2,
            **PROBE,
            **values,
        },
    )
    dataset = Pictures(model)
    of_images = processor() if case == "image" else None
    return LipschitzTrainer(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=of_images,
    )


def evaluate(case, directory):
    """The metrics of an evaluation, and the certificates that they are of."""
    trainer = trainer_for(case, directory)
    metrics = trainer.evaluate()
    certified = {name: value for name, value in metrics.items() if "certified_accuracy" in name}
    batches = probe_batches(trainer.eval_dataset, trainer.data_collator, 6)
    certificates, labels = probe_certificates(
        trainer.model, batches, trainer.processing_class, trainer.args.probe_config, trainer.accelerator
    )
    by_hand = certified_accuracy_metrics(certificates, labels, RADII)
    assert certified == {f"eval_{name}": value for name, value in by_hand.items()}
    return certified, [certificate.to_dict() for certificate in certificates]


def different_sets(directory):
    """The message where each process gives examples of its own."""
    trainer = trainer_for("text", directory)
    examples = [trainer.eval_dataset[trainer.accelerator.process_index]]
    batches = probe_batches(examples, trainer.data_collator, 1)
    try:
        probe_certificates(trainer.model, batches, None, trainer.args.probe_config, trainer.accelerator)
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    results = {case: evaluate(case, sys.argv[1]) for case in CASES}
    results["different"] = different_sets(sys.argv[1])
    torch.save(results, os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
    leave()
