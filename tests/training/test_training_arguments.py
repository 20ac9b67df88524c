import math

import pytest
from transformers import HfArgumentParser

from hf_lipschitz.training import LipschitzTrainingArguments


def test_everything_is_off_by_default(tmp_path):
    args = LipschitzTrainingArguments(str(tmp_path))
    assert (args.activation_decay, args.curvature_weight, args.noise_sigma, args.lipschitz_schedule) == (
        0,
        0,
        0,
        "none",
    )


def test_command_line(tmp_path):
    line = (
        f"--output_dir {tmp_path} --activation_decay 0.1 --curvature_weight 0.2 --curvature hutchinson "
        "--curvature_every 3 --curvature_modules layer.1 classifier --noise_sigma 0.25 --lipschitz_schedule linear "
        "--lipschitz_target 1.5 --lipschitz_schedule_ratio 0.75 --head_module classifier --learning_rate 0.01"
    )
    (args,) = HfArgumentParser(LipschitzTrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.activation_decay == 0.1
    assert args.curvature_weight == 0.2
    assert args.curvature_every == 3
    assert args.curvature_modules == ["layer.1", "classifier"]
    assert args.noise_sigma == 0.25
    assert args.lipschitz_schedule == "linear"
    assert args.lipschitz_target == 1.5
    assert args.lipschitz_schedule_ratio == 0.75
    assert args.head_module == "classifier"
    assert args.learning_rate == 0.01


def test_help_prints(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(LipschitzTrainingArguments).parse_args_into_dataclasses(["--help"])
    assert "--activation_decay" in capsys.readouterr().out


def test_dictionary_round_trip(tmp_path):
    args = LipschitzTrainingArguments(str(tmp_path), activation_decay=0.5, curvature_modules=["classifier"])
    (again,) = HfArgumentParser(LipschitzTrainingArguments).parse_dict(args.to_dict(), allow_extra_keys=True)
    assert again.activation_decay == 0.5
    assert again.curvature_modules == ["classifier"]


@pytest.mark.parametrize(("values", "message"), [
    ({"activation_decay": -1.0}, "activation_decay must be finite and >= 0.*0 turns it off"),
    ({"activation_decay": math.nan}, "activation_decay must be finite"),
    ({"activation_decay_kind": "l1"}, "unknown activation_decay_kind 'l1'; known: squared_norm, hessian_trace"),
    ({"curvature_weight": math.inf}, "curvature_weight must be finite"),
    ({"noise_sigma": -0.1}, "noise_sigma must be finite"),
    ({"curvature": "ridge"}, "unknown curvature 'ridge'; known: hutchinson, trace, gauss_newton, cure, sam"),
    ({"curvature": "sam", "curvature_radius": 0.0}, "curvature_radius must be positive and finite"),
    ({"curvature_radius": 0.1}, "'hutchinson' has no radius, only 'cure' and 'sam' have"),
    ({"curvature_every": 0}, "curvature_every must be at least 1"),
    ({"curvature_modules": []}, "curvature_modules is empty"),
    ({"lipschitz_schedule": "cubic"}, "unknown lipschitz_schedule 'cubic'; known: none, linear, cosine"),
    ({"lipschitz_schedule_ratio": 0.0}, "lipschitz_schedule_ratio must be in"),
    ({"lipschitz_schedule_ratio": 1.1}, "lipschitz_schedule_ratio must be in"),
    ({"lipschitz_schedule_ratio": math.nan}, "lipschitz_schedule_ratio must be in"),
    ({"lipschitz_schedule": "linear", "lipschitz_target": -1.0}, "lipschitz_target must be positive"),
    ({"lipschitz_target": 1.0}, "lipschitz_target needs a schedule"),
    ({"certified_sigma": 0.1}, "certified_sigma needs certified_radii"),
    ({"certified_radii": []}, "certified_radii is empty"),
    ({"certified_radii": [0.5]}, "certified_radii needs noise: set certified_sigma > 0"),
    ({"certified_radii": [0.5], "certified_sigma": -1.0}, "sigma"),
    ({"certified_radii": [0.5, 0.5], "noise_sigma": 1.0}, "different names"),
    ({"certified_radii": [-0.5], "noise_sigma": 1.0}, "radii"),
    ({"certified_radii": [0.5], "noise_sigma": 1.0, "certified_alpha": 1.0}, "alpha"),
    ({"certified_examples": 0}, "certified_examples must be at least 1"),
    ({"loss": "hinge"}, "unknown loss 'hinge'; known: cross_entropy, offset_cross_entropy, multi_margin"),
    ({"loss_offset": 1.0}, "loss_offset is of 'offset_cross_entropy', and loss is 'cross_entropy'"),
    ({"loss": "multi_margin", "loss_temperature": 1.0}, "loss_temperature is of 'offset_cross_entropy'"),
    ({"loss": "multi_margin", "loss_margin": 0.0}, "margin must be finite and > 0"),
    ({"loss": "multi_margin", "label_smoothing_factor": 0.1}, "label_smoothing_factor is of the cross-entropy"),
    ({"noise_copies": 2}, "noise_copies=2 needs noise: set noise_sigma > 0, or noise_copies=1"),
    ({"noise_copies": 0}, "noise_copies must be at least 1"),
    ({"smoothing": "macer"}, "smoothing='macer' needs noise"),
    ({"smoothing": "mixup"}, "unknown smoothing 'mixup'; known: none, consistency, macer"),
    ({"smoothing": "consistency", "noise_sigma": 0.1}, "set noise_copies to at least 2"),
    ({"smoothing": "macer", "noise_sigma": 0.1, "loss": "multi_margin"}, "set loss='cross_entropy'"),
    ({"macer_gamma": 14.0}, "macer_gamma must be below 14"),
    ({"macer_beta": 0.0}, "macer_beta must be finite and > 0"),
    ({"consistency_weight": -1.0}, "consistency_weight must be finite and > 0, got -1.0; smoothing='none' turns"),
    ({"entropy_weight": math.nan}, "entropy_weight must be finite and >= 0"),
    ({"attack_radius": 0.5}, "attack_radius=0.5 needs noise"),
    ({"attack_radius": -0.5}, "attack_radius must be finite and >= 0, got -0.5; 0 turns it off"),
    ({"attack_steps": 0}, "attack_steps must be at least 1"),
    ({"norm_penalty": math.inf}, "norm_penalty must be finite"),
    ({"norm_penalty_power": 3}, "norm_penalty_power must be 1 or 2"),
    ({"norm_penalty_target": -1.0}, "norm_penalty_target must be finite and >= 0"),
    ({"activation_decay_modules": ["pooler"]}, "activation_decay_modules needs activation_decay > 0"),
    ({"activation_decay_modules": [], "activation_decay": 1.0}, "activation_decay_modules is empty"),
    ({"activation_decay_modules": ["pooler"], "activation_decay": 1.0, "activation_decay_kind": "hessian_trace"},
     "is about the last layer"),
])  # fmt: skip
def test_errors_name_the_fix(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        LipschitzTrainingArguments(str(tmp_path), **values)
