import pytest
import torch
from curvature_cases import run
from peft import LoraConfig, get_peft_model
from tiny_heads import batch_for, bert_tokens, gpt2_next
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, ViTImageProcessor

from hf_lipschitz import lipschitzify, merge
from hf_lipschitz.nn import references
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.augmentation import pixel_scale
from hf_lipschitz.training.curvature import CURVATURES
from hf_lipschitz.training.metrics import RunningMeans, finite_values
from hf_lipschitz.training.randomness import Draws


BUILDERS = [bert, gpt2, vit, resnet]


def arguments(tmp_path, **values):
    defaults = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    return LipschitzTrainingArguments(str(tmp_path), **{**defaults, **values})


def trainer_for(model, tmp_path, dataset=None, **values):
    own = ("processing_class", "compute_loss_func", "eval_dataset")
    given = {name: values.pop(name) for name in own if name in values}
    return LipschitzTrainer(model, arguments(tmp_path, **values), train_dataset=dataset or Examples(model), **given)


def weights_after(model, tmp_path, **values):
    trainer_for(model, tmp_path, **values).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def training_loss(trainer):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, trainer.train_dataset.batch())


@pytest.mark.parametrize("build", BUILDERS)
def test_with_everything_off_it_is_the_trainer(build, tmp_path):
    model, plain = build(), build()
    mine = weights_after(model, tmp_path, max_steps=3)
    args = TrainingArguments(**{k: v for k, v in arguments(tmp_path, max_steps=3).to_dict().items() if k in TRAINER})
    Trainer(plain, args, train_dataset=Examples(plain)).train()
    assert largest_difference(mine, dict(plain.named_parameters())) <= 1e-7


TRAINER = {
    "output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "optim", "max_grad_norm",
    "lr_scheduler_type", "logging_steps", "save_strategy", "use_cpu", "disable_tqdm",
}  # fmt: skip


@pytest.mark.parametrize("build", [bert, gpt2, vit])
@pytest.mark.parametrize("constrained", [False, True])
def test_accumulated_micro_batches_are_one_batch(build, constrained, tmp_path):
    def model():
        return lipschitzify(build(), layer_lipschitz=0.5) if constrained else build()

    whole = weights_after(model(), tmp_path, activation_decay=0.5)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert largest_difference(whole, weights_after(model(), tmp_path, activation_decay=0.5, **parts)) <= 1e-6
    assert largest_difference(whole, weights_after(model(), tmp_path)) > 1e-4


def test_own_loss_function_accumulates_as_well(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is None
        return cross_entropy(outputs.logits, labels)

    whole = weights_after(bert(), tmp_path, activation_decay=0.5)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "compute_loss_func": loss}
    assert largest_difference(whole, weights_after(bert(), tmp_path, activation_decay=0.5, **parts)) <= 1e-6


def test_activation_decay_adds_its_weight_times_the_mean_square(tmp_path):
    model = bert()
    batch = Examples(model).batch()
    plain = training_loss(trainer_for(model, tmp_path))
    decayed = training_loss(trainer_for(model, tmp_path, activation_decay=0.25))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    h = model.bert(**inputs).pooler_output
    torch.testing.assert_close(decayed - plain, 0.25 * (h * h).sum() / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["squared_norm", "hessian_trace"])
@pytest.mark.parametrize("build", [bert_tokens, gpt2_next])
def test_activation_decay_of_tokens_is_over_those_that_count(build, kind, tmp_path):
    model = build().train()
    batch = batch_for(model)

    def loss(**values):
        return trainer_for(model, tmp_path, **values).compute_loss(model, batch)

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    h, logits = model.base_model(**inputs).last_hidden_state, model(**inputs).logits
    labels, shift = batch["labels"], 1 if build is gpt2_next else 0
    places = [(i, t) for i in range(len(labels)) for t in range(labels.shape[1] - shift) if labels[i, t + shift] >= 0]
    weights = [1.0 if kind == "squared_norm" else 1 - logits[place].softmax(-1).square().sum() for place in places]
    by_hand = sum(w * h[place].square().sum() for w, place in zip(weights, places, strict=True)) / len(places)
    decayed = loss(activation_decay=0.25, activation_decay_kind=kind)
    torch.testing.assert_close(decayed - loss(), 0.25 * by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "curvature"),
    [*((build, "hutchinson") for build in BUILDERS), *((vit, curvature) for curvature in list(CURVATURES)[1:])],
)
def test_training_on_the_curvature_penalty_lowers_the_curvature(build, curvature, tmp_path):
    def curvature_after(weight):
        model = build() if build is resnet else build(initializer_range=0.3)
        lipschitzify(model, layer_lipschitz=2.0)
        # Steps so small that the task alone does not fit the labels, which would lower the curvature as well.
        values = {"curvature": curvature, "learning_rate": 1e-3, "max_steps": 20}
        trainer_for(model, tmp_path, curvature_weight=weight, **values).train()
        batch = Examples(model).batch()
        return sum(run(model, batch, curvature, seed=seed).item() for seed in range(100)) / 100

    plain = curvature_after(0.0)
    assert curvature_after(10.0) < plain - 0.1 * abs(plain)


def test_curvature_of_the_trainer_is_that_of_its_batch_and_arguments(tmp_path):
    for curvature in CURVATURES:
        radius = 0.2 if CURVATURES[curvature].radius else None
        model = vit(initializer_range=0.3)
        processor = ViTImageProcessor(image_std=[0.5, 0.2, 0.1])
        values = {"curvature": curvature, "curvature_radius": radius, "processing_class": processor}
        trainer = trainer_for(model, tmp_path, curvature_weight=2.0, curvature_modules=["all"], **values)
        batch = trainer.train_dataset.batch()
        penalty = training_loss(trainer).item() - model(**batch).loss.item()
        trainer._draws = Draws(trainer.args.seed, 0)
        trainer._draws.advance(0)
        is_shared = CURVATURES[curvature].is_mean
        seed = trainer._draws.generator("curvature", torch.device("cpu"), is_shared=is_shared).initial_seed()
        unit = {"input_scale": pixel_scale(processor), "radius": radius}
        assert penalty == pytest.approx(2 * run(model, batch, curvature, seed, None, **unit).item(), rel=1e-4)


def test_smoothed_labels_keep_the_gauss_newton_matrix(tmp_path):
    logged = []
    for smoothing in (0.0, 0.1):
        values = {"curvature": "gauss_newton", "curvature_weight": 1.0, "label_smoothing_factor": smoothing}
        trainer = trainer_for(bert(initializer_range=0.3), tmp_path, **values)
        trainer.train()
        logged.append(trainer.state.log_history[0]["curvature"])
    assert logged[0] > 0
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_curvature_comes_every_so_many_optimizer_steps(tmp_path):
    values = {"curvature_weight": 1.0, "curvature_every": 3, "max_steps": 7, "per_device_train_batch_size": 2}
    trainer = trainer_for(bert(), tmp_path, gradient_accumulation_steps=2, **values)
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "curvature" in entry]
    assert logged == [1, 4, 7]


def test_metrics_are_those_that_are_on(tmp_path):
    model = lipschitzify(bert(initializer_range=0.6), layer_lipschitz=0.5)
    values = {"activation_decay": 0.5, "curvature_weight": 0.1, "max_steps": 4, "logging_steps": 2}
    trainer = trainer_for(model, tmp_path, **values)
    losses = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: losses.append(compute(*args, **kwargs)) or losses[-1]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry, pair in zip(entries, (losses[:2], losses[2:]), strict=True):
        parts = entry["task_loss"] + entry["activation_decay"] + entry["curvature"]
        assert parts == pytest.approx(sum(pair).item() / 2, rel=1e-5)
        assert parts == pytest.approx(entry["loss"], abs=1e-3)
        assert entry["lipschitz_constant"] == 0.5
        assert 0.4 < entry["max_layer_norm"] <= 0.5
    norms = [torch.linalg.matrix_norm(layer.effective_weight.double(), 2) for layer in constrained_layers(model)]
    assert max(norms) <= entries[-1]["max_layer_norm"] <= max(norms) * 1.002

    plain = trainer_for(bert(), tmp_path)
    plain.train()
    (entry,) = [entry for entry in plain.state.log_history if "loss" in entry]
    assert "task_loss" in entry
    assert not {"activation_decay", "curvature", "max_layer_norm", "lipschitz_constant"} & entry.keys()


def test_means_are_over_the_micro_batches_that_had_the_term():
    means = RunningMeans()
    for step in range(4):
        means.add({"task_loss": float(step), **({"curvature": 7.0} if step == 1 else {})})
    assert means.take() == {"task_loss": 1.5, "curvature": 7.0}
    assert means.take() == {}


def test_noise_is_on_while_training_only(tmp_path):
    for build, processor in ((bert, None), (vit, ViTImageProcessor())):
        trainer = trainer_for(build(), tmp_path, noise_sigma=0.5, processing_class=processor)
        batch = trainer.train_dataset.batch()
        clean = trainer.model.eval()(**batch).loss
        assert trainer.compute_loss(trainer.model, dict(batch)) == clean
        first = training_loss(trainer)
        assert first != clean
        assert training_loss(trainer) != first
        again = trainer_for(trainer.model, tmp_path, noise_sigma=0.5, processing_class=processor)
        assert training_loss(again) == first
        again = trainer_for(trainer.model, tmp_path, noise_sigma=0.5, processing_class=processor, seed=1)
        assert training_loss(again) != first


@pytest.mark.parametrize("build", [bert, resnet])
def test_evaluation_is_that_of_the_merged_model(build, tmp_path, monkeypatch):
    model = lipschitzify(build(), layer_lipschitz=0.3)
    values = {
        "noise_sigma": 0.1, "activation_decay": 1.0, "curvature_weight": 1.0, "max_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    trainer = trainer_for(model, tmp_path, processing_class=None if build is bert else ViTImageProcessor(), **values)
    trainer.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held_out = Examples(model, 12, seed=9)

    def no_norms(*args, **kwargs):
        raise AssertionError("a norm was computed")

    model_calls = []
    hook = model.register_forward_hook(lambda *_: model_calls.append(len(list(constrained_layers(model)))))
    with monkeypatch.context() as patch:
        patch.setattr(references, "norms_and_directions", no_norms)
        loss = trainer.evaluate(held_out)["eval_loss"]
        prediction = trainer.predict(held_out)
    assert set(model_calls) == {0}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(list(constrained_layers(model))) > 0
    hook.remove()

    plain = Trainer(merge(model), TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True))
    assert loss == plain.evaluate(held_out)["eval_loss"]
    assert (prediction.predictions == plain.predict(held_out).predictions).all()


def test_evaluation_during_training_leaves_training_as_it_is(tmp_path):
    def model():
        return lipschitzify(bert(), layer_lipschitz=0.5)

    with_evaluation = model()
    held_out = Examples(with_evaluation, 8, seed=2)
    values = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": held_out}
    trainer = trainer_for(with_evaluation, tmp_path, max_steps=4, **values)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4
    without = weights_after(model(), tmp_path, max_steps=4)
    assert largest_difference(without, dict(with_evaluation.named_parameters())) == 0.0


def test_half_precision_evaluation_casts_constrained_layers_too(tmp_path):
    model = lipschitzify(bert(), layer_lipschitz=0.5)
    trainer = trainer_for(model, tmp_path, bf16_full_eval=True)
    trainer.evaluate(Examples(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_raw_weights_get_no_weight_decay(tmp_path):
    model = lipschitzify(bert(), layer_lipschitz=0.5, exclude_modules=["classifier"])
    trainer = trainer_for(model, tmp_path, weight_decay=0.1)
    decayed = trainer.get_decay_parameter_names(model)
    assert not [name for name in decayed if "parametrizations" in name]
    assert "classifier.weight" in decayed
    assert "bert.embeddings.word_embeddings.weight" in decayed
    groups = trainer.create_optimizer().param_groups
    raw = {id(layer.parametrization.original) for layer in constrained_layers(model)}
    assert raw
    for group in groups:
        assert group["weight_decay"] == 0.0 or not raw & {id(p) for p in group["params"]}


def test_arguments_of_the_wrong_type_are_an_error(tmp_path):
    with pytest.raises(TypeError, match="LipschitzTrainingArguments"):
        LipschitzTrainer(bert(), TrainingArguments(str(tmp_path)))


def test_what_the_model_lacks_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="head_module="):
        trainer_for(vit(num_labels=0), tmp_path, activation_decay=1.0)
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        trainer_for(bert(), tmp_path, curvature_weight=1.0, curvature_modules=["nowhere"])
    with pytest.raises(ValueError, match="processing_class=image_processor"):
        trainer_for(vit(), tmp_path, noise_sigma=1.0)
    flash = bert()
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        trainer_for(flash, tmp_path, curvature_weight=1.0)
    trainer_for(flash, tmp_path, curvature_weight=1.0, curvature="sam")


def test_launches_that_are_not_covered_are_errors(tmp_path):
    trainer = trainer_for(bert(), tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        trainer._check_launch()
    trainer = trainer_for(bert(), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="launch with torchrun"):
        trainer._check_launch()
    with pytest.raises(ValueError, match="torch_compile=False"):
        trainer_for(bert(), tmp_path, torch_compile=True, activation_decay=1.0)


def test_adapters_on_a_constrained_model_train(tmp_path):
    model = lipschitzify(bert(), layer_lipschitz=0.5)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2))
    values = {"activation_decay": 0.5, "curvature_weight": 0.1, "max_steps": 2}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_for(model, tmp_path, **values)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_B" in name for name in moved)
    assert any("classifier" in name for name in moved)
    assert trainer.state.log_history[0]["curvature"] > 0
    assert trainer.state.log_history[0]["activation_decay"] > 0
    batch = Examples(model).batch()
    model.eval()
    expected = cross_entropy(model(**batch).logits, batch["labels"]).item()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    found = [id(layer.parametrization) for layer in constrained_layers(model)]
    assert len(set(found)) == len(found)


def test_batch_without_labels_is_an_error(tmp_path):
    model = bert()
    dataset = Examples(model)
    dataset.columns.pop("labels")
    with pytest.raises(ValueError, match="no labels, only input_ids.*column 'labels'"):
        trainer_for(model, tmp_path, dataset).train()


def test_wrong_head_is_an_error_at_the_first_step(tmp_path):
    with pytest.raises(RuntimeError, match="name the classifier's last layer by head_module"):
        trainer_for(bert(), tmp_path, activation_decay=1.0, head_module="bert.pooler.dense").train()
    with pytest.raises(RuntimeError, match="called 0 times"):
        trainer_for(unused_head(), tmp_path, activation_decay=1.0).train()


def unused_head():
    model = bert()
    model.spare = torch.nn.Linear(8, 3)
    return model


def test_terms_that_are_not_numbers_are_named(tmp_path):
    model = bert()
    model.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="task_loss is nan at step 0"):
        trainer_for(model, tmp_path, activation_decay=1.0).train()
    with pytest.raises(RuntimeError, match="curvature is inf at step 3: lower its weight"):
        finite_values({"activation_decay": torch.tensor(1.0), "curvature": torch.tensor(torch.inf)}, 3)
