import json
import logging
import math
from pathlib import Path

import pytest
import torch
from tiny_models import Examples, bert, resnet, vit
from torch import nn
from transformers import TrainerCallback

from hf_lipschitz import LipschitzConfig, lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.schedule import SCHEDULES, LipschitzScheduleCallback


class Recorder(TrainerCallback):
    """At the beginning and after each step: the constants, and the norms of effective weights by a float64 SVD."""

    def __init__(self):
        self.constants, self.norms, self.configured = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def record(self, model):
        self.constants.append(
            {layer.name: layer.parametrization.lipschitz.item() for layer in constrained_layers(model)}
        )
        self.norms.append({layer.name: exact_norm(layer) for layer in constrained_layers(model)})
        self.configured.append(model.config.quantization_config.layer_lipschitz)


def constants_of(model):
    return {layer.name: layer.parametrization.lipschitz.item() for layer in constrained_layers(model)}


def exact_norm(layer):
    weight = layer.effective_weight.double()
    if weight.ndim == 2:
        return torch.linalg.matrix_norm(weight, 2).item()
    assert tuple(layer.module.stride) == tuple(layer.module.kernel_size)
    return torch.linalg.matrix_norm(weight.flatten(1), 2).item()


def trainer_for(model, tmp_path, *, callbacks=(), **values):
    torch.manual_seed(0)
    defaults = {
        "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lipschitz_schedule": "linear",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = LipschitzTrainingArguments(str(tmp_path), **{**defaults, **values})
    trainer = LipschitzTrainer(model, args, train_dataset=Examples(model, 16))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize("mode", ["cap", "exact"])
@pytest.mark.parametrize("build", [bert, vit])
def test_norms_stay_under_the_constants_at_every_step(build, mode, tmp_path):
    model = build(initializer_range=0.6)
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)
    starts = {n: torch.linalg.matrix_norm(m.weight.flatten(1).double(), 2).item() for n, m in layers_of(model)}
    assert min(starts.values()) < 0.75 < max(starts.values())
    lipschitzify(model, layer_lipschitz=None, mode=mode)
    recorder = Recorder()
    trainer = trainer_for(model, tmp_path, callbacks=[recorder], max_steps=40, lipschitz_target=0.75)
    assert trainer.args.optim == "adamw_torch_fused"
    trainer.train()
    assert len(recorder.constants) == 41
    for constants, norms in zip(recorder.constants, recorder.norms, strict=True):
        for name, constant in constants.items():
            assert norms[name] <= constant * (1 + 1e-6)
    for name, constant in recorder.constants[0].items():
        start = max(starts[name], 0.75) if mode == "cap" else starts[name]
        assert start * (1 - 1e-6) <= constant <= start * (1 + 2e-3)
    for step, constants in enumerate(recorder.constants):
        for name, constant in constants.items():
            start = recorder.constants[0][name]
            expected = 0.75 if step >= 20 else start + (0.75 - start) * step / 20
            assert constant == pytest.approx(expected, rel=1e-12)
    assert set(recorder.constants[20].values()) == {0.75}
    assert set(recorder.constants[40].values()) == {0.75}
    if mode == "exact":
        assert min(recorder.norms[40].values()) >= 0.75 * (1 - 2e-3)
    assert recorder.configured == [None] * 20 + [0.75] * 21
    assert model.config.quantization_config.mode == mode


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_all_the_way_and_never_back(name):
    shares = [SCHEDULES[name](step / 100) for step in range(101)]
    assert shares[0] == 0
    assert shares[50] == pytest.approx(0.5, rel=1e-12)
    assert shares[100] == pytest.approx(1, rel=1e-12)
    assert all(before < after for before, after in zip(shares, shares[1:], strict=False))


def test_cosine_schedule_is_slow_at_both_ends(tmp_path):
    model = lipschitzify(bert(initializer_range=0.6), layer_lipschitz=None)
    recorder = Recorder()
    values = {"lipschitz_schedule": "cosine", "lipschitz_target": 0.5, "max_steps": 12}
    trainer_for(model, tmp_path, callbacks=[recorder], lipschitz_schedule_ratio=0.75, **values).train()
    for step, constants in enumerate(recorder.constants):
        for name, constant in constants.items():
            start = recorder.constants[0][name]
            way = (1 - math.cos(math.pi * min(step / 9, 1))) / 2
            assert constant == pytest.approx(start + way * (0.5 - start), rel=1e-12)
            assert recorder.norms[step][name] <= constant * (1 + 1e-6)
    assert set(recorder.constants[9].values()) == {0.5}
    callback = LipschitzScheduleCallback(1.0, 1.0, "cosine")
    assert callback.constant(3.0, 1.0, 1, 10) == pytest.approx(3 - 2 * math.sin(math.pi / 20) ** 2, rel=1e-12)
    assert callback.constant(3.0, 1.0, 5, 10) == pytest.approx(2.0, rel=1e-12)


def layers_of(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("configured", [None, 0.3])
@pytest.mark.parametrize("mode", ["cap", "exact"])
def test_training_starts_from_the_function_of_the_plain_model(configured, mode, tmp_path, caplog):
    model = bert(initializer_range=0.6).eval()
    batch = Examples(model).batch()
    logits = model(**batch).logits
    lipschitzify(model, layer_lipschitz=configured, mode=mode)

    class Compare(TrainerCallback):
        difference = None

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            Compare.difference = (model.eval()(**batch).logits - logits).abs().max().item()

    trainer = trainer_for(model, tmp_path, lipschitz_target=0.3, max_steps=1)
    trainer.add_callback(Compare)
    with caplog.at_level(logging.WARNING, "hf_lipschitz"):
        caplog.clear()
        trainer.train()
    assert Compare.difference == 0.0
    assert ("raw weights" in caplog.text) == (configured is not None)


def test_target_is_what_the_configuration_asks_for(tmp_path):
    model = lipschitzify(bert(), LipschitzConfig(layer_lipschitz=0.125))
    trainer_for(model, tmp_path, lipschitz_schedule_ratio=1.0).train()
    assert set(constants_of(model).values()) == {0.125}
    assert model.config.quantization_config.layer_lipschitz == 0.125


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, restore_callbacks):
    values = {
        "lipschitz_target": 0.5, "max_steps": 12, "lipschitz_schedule_ratio": 0.75, "save_strategy": "steps",
        "save_steps": 5, "activation_decay": 0.1, "curvature_weight": 0.01, "noise_sigma": 0.1, "weight_decay": 0.1,
        "restore_callback_states_from_checkpoint": restore_callbacks,
    }  # fmt: skip

    def run(resume=None):
        model = lipschitzify(
            bert(initializer_range=0.6, hidden_dropout_prob=0.2), layer_lipschitz=None, refresh_every=1
        )
        recorder = Recorder()
        trainer = trainer_for(model, tmp_path / "run", callbacks=[] if restore_callbacks else [recorder], **values)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict(), recorder

    whole, record = run()
    checkpoint = tmp_path / "run" / "checkpoint-5"
    resumed, rest = run(str(checkpoint))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert rest.constants == record.constants[5:]

    restored = type(bert()).from_pretrained(checkpoint)
    constants = constants_of(restored)
    if not restore_callbacks:
        assert constants == record.constants[5]
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    starts = saved["LipschitzScheduleCallback"]["attributes"]["starts"]
    callback = LipschitzScheduleCallback(0.5, 0.75)
    assert constants == {
        n.removesuffix(".weight"): callback.constant(s, callback.target, 5, 12) for n, s in starts.items()
    }
    assert min(constants.values()) > 0.5
    assert restored.config.quantization_config.layer_lipschitz is None
    final = type(bert()).from_pretrained(tmp_path / "run" / "checkpoint-12")
    assert set(constants_of(final).values()) == {0.5}
    assert final.config.quantization_config.layer_lipschitz == 0.5


def test_checkpoint_without_a_schedule_cannot_resume_one(tmp_path):
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = lipschitzify(bert(), layer_lipschitz=0.5)
    trainer_for(model, tmp_path, lipschitz_schedule="none", **values).train()
    trainer = trainer_for(model, tmp_path, **values)
    with pytest.raises(ValueError, match="not trained with a lipschitz_schedule.*without resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(Path(tmp_path) / "checkpoint-2"))


def test_a_run_that_stops_early_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    model = lipschitzify(bert(initializer_range=0.6), layer_lipschitz=None)
    trainer = trainer_for(model, tmp_path, callbacks=[Stop()], lipschitz_target=0.5)
    with caplog.at_level(logging.WARNING, "hf_lipschitz"):
        trainer.train()
    assert "not at lipschitz_target=0.5" in caplog.text
    assert model.config.quantization_config.layer_lipschitz is None


def test_schedule_without_layers_or_target_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="call lipschitzify"):
        trainer_for(bert(), tmp_path, lipschitz_target=1.0)
    with pytest.raises(ValueError, match="set lipschitz_target"):
        trainer_for(lipschitzify(resnet(), layer_lipschitz=None), tmp_path)
