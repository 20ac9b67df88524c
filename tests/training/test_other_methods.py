"""The trainer with every method, with blocks and with replaced parts: bounds, schedule, shares and resuming."""

import pytest
import torch
from test_schedule import Recorder, constants_of, trainer_for
from tiny_models import Examples, bert

from hf_lipschitz import calibrate, lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers


OPTIONS = {
    "rescaling": {"method": "rescaling"},
    "aol": {"method": "aol"},
    "sll": {"method": "sll"},
    "cpl": {"method": "cpl"},
    "sll blocks": {"method": "sll", "sll_blocks": True},
    "cpl blocks": {"method": "cpl", "sll_blocks": True},
    "replaced": {"replace": "all", "residual_budget": 2.0},
}


def constrained(name):
    model = lipschitzify(bert(initializer_range=0.6), layer_lipschitz=None, **OPTIONS[name])
    if name == "replaced":
        calibrate(model, [Examples(model).batch()])
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_constants_reach_the_target_and_norms_stay_under_them(name, tmp_path):
    model, recorder = constrained(name), Recorder()
    trainer = trainer_for(model, tmp_path, lipschitz_target=0.5, callbacks=[recorder], lipschitz_schedule_ratio=0.8)
    trainer.train()
    for constants, norms in zip(recorder.constants, recorder.norms, strict=True):
        assert all(norms[layer] <= constant * (1 + 1e-6) for layer, constant in constants.items())
    shares = {layer.name: getattr(layer.module, "lipschitz_share", 1.0) for layer in constrained_layers(model)}
    assert constants_of(model) == pytest.approx({layer: 0.5 * share for layer, share in shares.items()}, rel=1e-12)
    # Two branches a layer share a budget of 2, and two layers.
    assert set(shares.values()) == ({1.0, 0.5} if name == "replaced" else {1.0})
    assert model.config.quantization_config.layer_lipschitz == 0.5
    assert torch.isfinite(torch.tensor(trainer.evaluate(Examples(model))["eval_loss"]))


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    values = {"lipschitz_target": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}

    def run(resume=None):
        model = constrained(name)
        trainer_for(model, tmp_path / "run", **values).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run()
    resumed = run(str(tmp_path / "run" / "checkpoint-3"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_weights_of_the_channels_get_no_decay(tmp_path):
    model = constrained("sll")
    trainer = trainer_for(model, tmp_path, lipschitz_target=0.5)
    decayed = trainer.get_decay_parameter_names(model)
    assert not [name for name in decayed if "parametrizations" in name]
    assert [name for name in decayed if name.endswith("embeddings.weight")]
