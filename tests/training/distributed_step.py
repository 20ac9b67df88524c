"""One optimizer step on the same eight examples, however many processes share them."""

import os
import sys

import torch
from tiny_models import Examples, gpt2, vit

from hf_lipschitz import lipschitzify
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments


CASES = {"image": vit, "text": gpt2}


def step(case, directory, **values):
    """The weights after the step, and what was logged."""
    model = lipschitzify(CASES[case](initializer_range=0.3), layer_lipschitz=0.5)
    args = LipschitzTrainingArguments(
        os.path.join(directory, case),
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
    trainer = LipschitzTrainer(model, args, train_dataset=Examples(model))
    trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, trainer.state.log_history[0]


if __name__ == "__main__":
    results = {case: step(case, sys.argv[1]) for case in CASES}
    results["curvature"] = step("text", sys.argv[1], curvature_weight=0.1)
    torch.save(results, os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
