"""The terms of the trainer's loss, each by hand, and together."""

import pytest
import torch
from test_trainer import TRAINER, arguments, largest_difference, trainer_for, training_loss, weights_after
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, ViTImageProcessor

from hf_lipschitz import lipschitzify
from hf_lipschitz.training import LipschitzTrainer
from hf_lipschitz.training.example_draws import ExampleDraws
from hf_lipschitz.training.head import find_head
from hf_lipschitz.training.margin_losses import multi_margin, offset_cross_entropy
from hf_lipschitz.training.noisy_inputs import noisy_inputs
from hf_lipschitz.training.norm_penalty import norm_penalty, penalised_norms
from hf_lipschitz.training.smoothing_losses import consistency, macer, smoothed_cross_entropy


PROCESSOR = ViTImageProcessor(image_std=[0.5, 0.2, 0.1])
# Every term that is a mean over examples, or of the weights.
MEANS = {
    "noise_sigma": 0.1, "noise_copies": 2, "smoothing": "consistency", "attack_radius": 0.1, "attack_steps": 2,
    "activation_decay": 0.5, "curvature": "trace", "curvature_weight": 0.1, "norm_penalty": 0.1,
    "norm_penalty_target": 0.1,
}  # fmt: skip


def noisy_logits(model, batch, copies, **attack):
    """Of the first micro-batch of a trainer with seed 42, the default."""
    draws = ExampleDraws(42)
    draws.advance(0, len(batch["labels"]))
    with noisy_inputs(model, batch, draws, PROCESSOR, sigma=0.1, copies=copies, **attack) as inputs:
        return model(**inputs).logits.unflatten(0, (copies, -1))


@pytest.mark.parametrize("build", [bert, vit])
def test_smoothing_terms_are_those_of_the_noisy_copies(build, tmp_path):
    model = build(initializer_range=0.6)
    batch = Examples(model).batch()
    labels = batch["labels"]
    common = {"processing_class": PROCESSOR, "noise_sigma": 0.1, "noise_copies": 3}
    logits = noisy_logits(model, batch, 3)
    mean = cross_entropy(logits.flatten(0, 1), labels.repeat(3))
    torch.testing.assert_close(training_loss(trainer_for(model, tmp_path, **common)), mean)
    weights = {"consistency_weight": 3.0, "entropy_weight": 0.2}
    loss = training_loss(trainer_for(model, tmp_path, smoothing="consistency", **weights, **common))
    torch.testing.assert_close(loss, mean + consistency(logits, kl_weight=3.0, entropy_weight=0.2))
    weights = {"macer_weight": 2.0, "macer_gamma": 7.0, "macer_beta": 9.0}
    loss = training_loss(trainer_for(model, tmp_path, smoothing="macer", **weights, **common))
    hinge = macer(logits, labels, sigma=0.1, gamma=7.0, beta=9.0)
    assert hinge > 0
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits, labels) + 2 * hinge)
    attack = {"attack_radius": 0.2, "attack_steps": 3}
    attacked = noisy_logits(model, batch, 3, **attack)
    loss = training_loss(trainer_for(model, tmp_path, **attack, **common))
    torch.testing.assert_close(loss, cross_entropy(attacked.flatten(0, 1), labels.repeat(3)))
    assert loss > mean


@pytest.mark.parametrize(
    ("values", "by_hand"),
    [
        ({"loss": "offset_cross_entropy"}, offset_cross_entropy),
        (
            {"loss": "offset_cross_entropy", "loss_offset": 0.5, "loss_temperature": 2.0},
            lambda z, y: offset_cross_entropy(z, y, offset=0.5, temperature=2.0),
        ),
        ({"loss": "multi_margin", "loss_margin": 1.5}, lambda z, y: multi_margin(z, y, margin=1.5)),
    ],
)
def test_losses_with_a_margin_are_trained_and_evaluated(values, by_hand, tmp_path):
    model = bert()
    trainer = trainer_for(model, tmp_path, activation_decay=0.5, **values)
    batch = trainer.train_dataset.batch()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    h = model.bert(**inputs).pooler_output
    expected = by_hand(model(**inputs).logits, batch["labels"])
    torch.testing.assert_close(training_loss(trainer), expected + 0.5 * h.square().sum(1).mean())
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    whole = weights_after(bert(), tmp_path, **values)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert largest_difference(whole, weights_after(bert(), tmp_path, **parts, **values)) <= 1e-6


def test_two_losses_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func and loss='multi_margin' are two losses"):
        trainer_for(bert(), tmp_path, loss="multi_margin", compute_loss_func=lambda *_, **__: 0.0)


def test_norm_penalty_adds_the_excess_and_logs_the_largest_norm(tmp_path):
    model = bert(initializer_range=0.6)
    values = {"norm_penalty": 0.5, "norm_penalty_target": 0.4, "norm_penalty_power": 1}
    expected = training_loss(trainer_for(model, tmp_path)) + 0.5 * norm_penalty(penalised_norms(model), 0.4, power=1)
    torch.testing.assert_close(training_loss(trainer_for(model, tmp_path, **values)), expected)
    largest = max(
        torch.linalg.matrix_norm(m.weight.double(), 2).item()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear)
    )
    trainer = trainer_for(model, tmp_path, norm_penalty_every=2, max_steps=3, **values)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "norm_penalty" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert largest <= logged[0]["max_penalised_norm"] <= largest * 1.01
    assert logged[1]["max_penalised_norm"] < largest


def test_decay_of_named_modules_takes_the_place_of_the_head(tmp_path):
    model = bert()
    values = {"activation_decay": 0.25, "activation_decay_modules": ["pooler.dense", "layer.1.output.dense"]}
    seen = []
    for module in (model.bert.pooler.dense, model.bert.encoder.layer[1].output.dense):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = Examples(model).batch()
    loss = model(**batch).loss
    of_tokens, pooled = sorted(seen, key=lambda x: -x.ndim)
    mean = of_tokens.square().sum(-1)[batch["attention_mask"] == 1].mean()
    expected = loss + 0.25 * (pooled.square().sum(-1).mean() + mean)
    torch.testing.assert_close(training_loss(trainer_for(model, tmp_path, **values)), expected)
    with pytest.raises(ValueError, match="has no module 'nowhere'"):
        trainer_for(model, tmp_path, activation_decay=1.0, activation_decay_modules=["nowhere"])


@pytest.mark.parametrize("build", [bert, gpt2, vit])
def test_with_every_mean_on_accumulated_micro_batches_are_one_batch(build, tmp_path):
    def after(model, **values):
        trainer = trainer_for(model, tmp_path, Examples(model, 32), processing_class=PROCESSOR, **MEANS, **values)
        trainer.train()
        logs = {name: trainer.state.log_history[0][name] for name in ("task_loss", "consistency", "norm_penalty")}
        return dict(model.named_parameters()), logs

    def model():
        return build(initializer_range=0.3)

    whole, logs = after(model(), per_device_train_batch_size=32)
    parts, their_logs = after(model(), per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert largest_difference(whole, parts) <= 1e-6
    assert their_logs == pytest.approx(logs, rel=1e-5)
    without = weights_after(model(), tmp_path, per_device_train_batch_size=32, dataset=Examples(model(), 32))
    assert largest_difference(whole, without) > 1e-3


@pytest.mark.parametrize("build", [bert, resnet])
def test_with_everything_on_evaluation_is_that_of_the_trainer(build, tmp_path):
    model = build()
    trainer = trainer_for(model, tmp_path, processing_class=PROCESSOR, **MEANS)
    held_out = Examples(model, 12, seed=9)
    args = TrainingArguments(**{k: v for k, v in arguments(tmp_path).to_dict().items() if k in TRAINER})
    plain = Trainer(model, args).evaluate(held_out)["eval_loss"]
    assert trainer.evaluate(held_out)["eval_loss"] == plain


def test_a_second_run_repeats_the_first(tmp_path):
    """The noise of a step is that of the step also where an earlier run of the same trainer ended there."""
    values = {"noise_sigma": 0.5, "curvature_weight": 1.0, "max_steps": 2}
    model = bert()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, **values)
    losses = []
    for _ in range(2):
        model.load_state_dict(start)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_resumed_run_is_exact_with_every_mean_on(tmp_path):
    def run(directory, **values):
        model = lipschitzify(bert(), layer_lipschitz=None, exclude_modules=["classifier"])
        schedule = {"lipschitz_schedule": "cosine", "lipschitz_target": 0.2, "normalize_head": True}
        own = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **MEANS, **schedule}
        return model, trainer_for(model, directory, Examples(model, 32), **{**own, **values})

    model, trainer = run(tmp_path / "whole")
    trainer.train()
    other, resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_rows_of_the_head_have_norm_one(tmp_path):
    def build():
        return lipschitzify(vit(), layer_lipschitz=1.0, exclude_modules=["classifier"])

    model = build()
    trainer = trainer_for(model, tmp_path, normalize_head=True, loss="offset_cross_entropy", max_steps=3)
    trainer.train()
    head = find_head(model)[1]
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3), rtol=1e-5, atol=0)
    assert "lipschitz_constant" in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["lipschitz_constant"] == 1.0
    made_anew = LipschitzTrainer(
        None, arguments(tmp_path, normalize_head=True), model_init=build, train_dataset=Examples(model)
    )
    made_anew.train()
    torch.testing.assert_close(find_head(made_anew.model)[1].weight.norm(dim=1), torch.ones(3), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"exclude_modules=\['classifier'\]"):
        trainer_for(lipschitzify(vit(), layer_lipschitz=1.0), tmp_path, normalize_head=True)


def test_log10_norm_product_is_that_of_the_singular_values(tmp_path):
    model = lipschitzify(bert(initializer_range=0.6), layer_lipschitz=0.5)
    trainer = trainer_for(model, tmp_path, learning_rate=0.0)
    trainer.train()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    exact = sum(torch.linalg.matrix_norm(m.weight.double(), 2).log10() for m in layers).item()
    assert exact <= trainer.state.log_history[0]["log10_norm_product"] <= exact + len(layers) * 0.001
