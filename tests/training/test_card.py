import json
import logging
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from probe_trainer import PROBE, RADII, Pictures
from tiny_models import bert, vit
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lipschitz import lipschitzify
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.card import MARKER, ModelCardCallback, hub_id_of, obstacle_to_a_card, task_of
from hf_lipschitz.training.card_tables import changed_arguments, constraint_facts, evaluations


def trainer_for(directory, model=None, kind=LipschitzTrainer, card=None, **values):
    torch.manual_seed(0)
    if model is None:
        model = lipschitzify(bert(initializer_range=0.5), layer_lipschitz=2.0)
    defaults = {
        "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch",
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True,
        "activation_decay": 0.25, "noise_sigma": 0.1, **PROBE,
    }  # fmt: skip
    args = LipschitzTrainingArguments(str(directory), **{**defaults, **values})
    callbacks = [ModelCardCallback(dataset_name="tiny: a | b") if card is None else card]
    dataset = Pictures(model)
    return kind(model, args, train_dataset=dataset, eval_dataset=dataset, callbacks=callbacks)


def table(card, title):
    """The cells of the rows of the first table under a title."""
    part = card.text.split(f"# {title}\n")[1].split("\n#")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not set(line) <= set("|-: ")]


def evaluated(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}


TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("cards") / "my-model")
    trainer.train()
    return trainer


def cards(trainer):
    directory = trainer.args.output_dir
    folders = {step: f"{directory}/checkpoint-{step}" for step in (2, 4, 6)}
    return {step: ModelCard.load(f"{folder}/README.md") for step, folder in folders.items()} | {
        "end": ModelCard.load(f"{directory}/README.md")
    }


@pytest.mark.parametrize("folder", [2, 4, 6, "end"])
def test_the_metadata_are_the_metrics_of_these_weights(folder, run):
    card, step = cards(run)[folder], 6 if folder == "end" else folder
    entry = evaluated(run)[step]
    expected = {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(TIMES)
    }
    assert len(expected) == 1 + len(RADII)
    found = {result.metric_name.split(" ")[0]: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == expected
    assert {result.task_type for result in found.values()} == {"text-classification"} == {card.data.pipeline_tag}
    assert {result.dataset_name for result in found.values()} == {"tiny: a | b"}
    assert found["certified_accuracy@0.05"].metric_type == "certified_accuracy"
    assert "input embeddings" in found["certified_accuracy@0.05"].metric_name
    assert {name: float(value) for name, value in table(card, "Evaluation")[1:]} == expected


def test_the_metadata_round_trip_as_yaml(run):
    card = cards(run)["end"]
    text = str(card)
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    values = yaml.safe_load(block)
    assert values["model-index"][0]["name"] == "my-model"
    assert len(values["model-index"][0]["results"][0]["metrics"]) == 1 + len(RADII)
    assert ModelCard(text).data.to_dict() == card.data.to_dict() == values
    assert "base_model" not in values
    assert {"hf_lipschitz", "generated_from_trainer", "certified-robustness"} <= set(values["tags"])
    assert "huggingface.co" not in text


def test_the_history_is_the_log_up_to_the_save(run):
    losses = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    for folder, card in cards(run).items():
        columns, *rows = table(card, "History")
        steps = [step for step in (2, 4, 6) if folder == "end" or step <= folder]
        assert [int(row[0]) for row in rows] == steps
        for step, row in zip(steps, rows, strict=True):
            found = dict(zip(columns, row, strict=True))
            entry = evaluated(run)[step]
            assert float(found["epoch"]) == pytest.approx(entry["epoch"], rel=1e-4)
            assert float(found["training loss"]) == pytest.approx(losses[step], rel=1e-4)
            for name in ("loss", *(f"certified_accuracy@{radius:g}" for radius in RADII)):
                assert float(found[name]) == pytest.approx(entry[f"eval_{name}"], rel=1e-4)


def test_the_arguments_are_those_that_were_given(run):
    found = {
        name.strip("`"): json.loads(value.strip("`"))
        for name, value in table(cards(run)["end"], "Training arguments")[1:]
    }
    assert found == {
        "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch",
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True, "activation_decay": 0.25,
        "noise_sigma": 0.1, **PROBE,
    }  # fmt: skip
    assert "LipschitzTrainingArguments" in cards(run)["end"].text


def test_secrets_and_paths_are_no_arguments(tmp_path):
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, hub_token="secret", run_name="mine", lr_scheduler_type="cosine"
    )
    assert changed_arguments(args) == {"use_cpu": "true", "lr_scheduler_type": '"cosine"'}
    assert changed_arguments(TrainingArguments(str(tmp_path))) == {}


def test_the_constraint_is_that_of_the_model(run):
    found = dict(table(cards(run)["end"], "Constraint"))
    norms = [
        torch.linalg.matrix_norm(module.weight.detach().double(), 2).item()
        for name, module in run.model.named_modules()
        if hasattr(module, "parametrizations")
    ]
    logged = [entry for entry in run.state.log_history if "max_layer_norm" in entry][-1]
    assert int(found["constrained layers"]) == len(norms) == 14
    assert float(found["largest constant of a layer"]) == logged["lipschitz_constant"] == 2.0
    assert max(norms) <= float(found["largest norm of a layer, at most"]) <= 2.001
    assert found["`layer_lipschitz`"] == "`2.0`"
    assert constraint_facts(bert()) == {}


def test_the_bound_of_the_norm_is_not_rounded_down():
    model = lipschitzify(bert(initializer_range=0.5), layer_lipschitz=None)
    norms = [
        torch.linalg.matrix_norm(module.weight.detach().double(), 2).item()
        for module in model.modules()
        if hasattr(module, "parametrizations")
    ]
    shown = float(constraint_facts(model)["largest norm of a layer, at most"])
    assert max(norms) <= shown <= 1.01 * max(norms)


def test_the_best_checkpoint_gets_its_own_metrics(tmp_path):
    trainer = trainer_for(
        tmp_path / "out", load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    trainer.train()
    by_loss = {step: entry["eval_loss"] for step, entry in evaluated(trainer).items()}
    best = max(by_loss, key=by_loss.get)
    assert best != 6
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["loss"] == by_loss[best]
    assert f"after {best} optimizer steps" in card.text


def test_weights_that_were_not_evaluated_have_no_metrics(tmp_path):
    trainer = trainer_for(
        tmp_path / "out", max_steps=5, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "checkpoint-3" / "README.md")
    assert card.data.eval_results is None
    assert "not evaluated" in card.text
    assert [row[0] for row in table(card, "History")[1:]] == ["2"]
    values = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
    assert values["tags"] == ["hf_lipschitz", "generated_from_trainer"]


def test_cards_leave_training_as_it_was(tmp_path):
    def weights(callback):
        trainer = trainer_for(
            tmp_path / str(callback), lipschitzify(bert(), layer_lipschitz=0.5, refresh_every=3), card=callback
        )
        trainer.train()
        return trainer.model.state_dict()

    class Nothing(ModelCardCallback):
        def _write(self, *args):
            pass

    written, plain = weights(ModelCardCallback()), weights(Nothing())
    assert all(torch.equal(written[name], plain[name]) for name in plain)


def test_a_card_of_somebody_else_is_left_alone(tmp_path, caplog):
    own = "---\nlicense: mit\n---\n# Mine\n"
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(own)
    with caplog.at_level(logging.WARNING, logger="hf_lipschitz.training.card"):
        trainer_for(tmp_path).train()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert (folder / "README.md").read_text() == own
    assert MARKER in (tmp_path / "checkpoint-6" / "README.md").read_text()
    warned = [record for record in caplog.records if record.name == "hf_lipschitz.training.card"]
    assert len(warned) == 1
    assert "checkpoint-2" in warned[0].getMessage()


def test_a_card_of_the_callback_is_replaced(tmp_path):
    trainer_for(tmp_path).train()
    first = (tmp_path / "README.md").read_text()
    assert obstacle_to_a_card(tmp_path) is None
    trainer_for(tmp_path, num_train_epochs=1).train()
    second = (tmp_path / "README.md").read_text()
    assert "after 6 optimizer steps" in first
    assert "after 2 optimizer steps" in second
    (tmp_path / "README.md").write_text(second.replace(MARKER, ""))
    assert "not written by" in obstacle_to_a_card(tmp_path)
    assert "no folder" in obstacle_to_a_card(tmp_path / "nowhere")


def test_only_the_main_process_writes(tmp_path):
    callback, args = ModelCardCallback(), TrainingArguments(str(tmp_path), use_cpu=True)
    (tmp_path / "checkpoint-0").mkdir()
    for is_main in (False, True):
        state = TrainerState(is_world_process_zero=is_main)
        callback.on_save(args, state, TrainerControl(), model=bert())
        callback.on_train_end(args, state, TrainerControl(), model=bert())
        assert (tmp_path / "README.md").exists() == is_main
        assert (tmp_path / "checkpoint-0" / "README.md").exists() == is_main


def test_models_from_folders_are_not_linked(tmp_path):
    model = bert()
    assert hub_id_of(model) is None
    for name in (str(tmp_path), "/gone/away/model", "./out", "out/checkpoint-12", "a/b/c"):
        model.config._name_or_path = name
        assert hub_id_of(model) is None
    for name in ("distilbert-base-uncased", "google/vit-base-patch16-224"):
        model.config._name_or_path = name
        assert hub_id_of(model) == name
        args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState()
        card = ModelCardCallback(license="mit", language="en", model_name="x").card(args, state, model, 0)
        assert (card.data.base_model, card.data.license, card.data.language) == (name, "mit", "en")
        assert f"https://huggingface.co/{name}" in card.text


def test_tasks_are_those_of_the_hub():
    assert task_of(vit()) == "image-classification"
    assert task_of(bert()) == "text-classification"
    assert task_of(get_peft_model(bert(), LoraConfig(target_modules=["query"]))) == "text-classification"
    assert task_of(nn.Linear(2, 2)) is None


def test_evaluations_of_several_datasets_are_put_together():
    log = [
        {"loss": 2.0, "step": 5, "epoch": 0.5},
        {"eval_a_loss": 1.0, "eval_a_runtime": 3.0, "step": 5, "epoch": 0.5},
        {"eval_b_loss": 4.0, "eval_b_report": {"f1": 1}, "eval_b_score": float("nan"), "step": 5, "epoch": 0.5},
        {"eval_a_loss": 0.5, "step": 9, "epoch": 0.9},
    ]
    found = evaluations(log)
    assert found[5].metrics == {"a_loss": 1.0, "b_loss": 4.0}
    assert (found[9].metrics, found[9].training_loss, found[9].epoch) == ({"a_loss": 0.5}, 2.0, 0.9)


def test_a_plain_trainer_without_evaluation_gets_a_card(tmp_path):
    model = vit()
    trainer = trainer_for(
        tmp_path / "out",
        model,
        LipschitzTrainer,
        eval_strategy="no",
        num_train_epochs=1,
        noise_sigma=0.0,
        certified_radii=None,
        certified_sigma=None,
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "## Constraint" not in card.text
    assert "### History" not in card.text


def test_the_card_of_the_hub_is_the_same_card(tmp_path):
    trainer = trainer_for(tmp_path / "out", num_train_epochs=1)
    trainer.train()
    trainer.create_model_card(language="en", license="mit", tags="mine", model_name="named", dataset=["a", "b"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.language, card.data.license, card.data.model_name) == ("en", "mit", "named")
    assert {"hf_lipschitz", "mine"} <= set(card.data.tags)
    assert "On a, b, after" in card.text
