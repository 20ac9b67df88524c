"""What is wrong with the values of LipschitzTrainingArguments, before anything is trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_lipschitz.training.activation_decay import ACTIVATION_DECAYS
from hf_lipschitz.training.curvature import curvature_radius
from hf_lipschitz.training.margin_losses import LOSSES, loss_function, loss_parameters
from hf_lipschitz.training.schedule import SCHEDULES
from hf_lipschitz.training.smoothing_losses import LARGEST_GAMMA


if TYPE_CHECKING:
    from hf_lipschitz.training.arguments import LipschitzTrainingArguments

SMOOTHINGS = ("none", "consistency", "macer")
WEIGHTS = ("activation_decay", "curvature_weight", "noise_sigma", "attack_radius", "norm_penalty")
NON_NEGATIVE = (*WEIGHTS, "norm_penalty_target", "entropy_weight")
POSITIVE = ("consistency_weight", "macer_weight", "macer_gamma", "macer_beta")
COUNTS = ("curvature_every", "norm_penalty_every", "noise_copies", "attack_steps", "certified_examples", "certified_n")


def check_arguments(args: LipschitzTrainingArguments) -> None:
    """
    Raises:
        ValueError: a value is out of range or unknown, or two contradict each other; the message names the fix.
    """
    _check_ranges(args)
    _check_activation_decay(args)
    _check_curvature(args)
    _check_loss(args)
    _check_smoothing(args)
    _check_schedule(args)
    _check_probe(args)


def given_loss_parameters(args: LipschitzTrainingArguments) -> dict[str, float]:
    """Those of the loss that were given, by the names that the loss has for them."""
    given = {"offset": args.loss_offset, "temperature": args.loss_temperature, "margin": args.loss_margin}
    return {name: value for name, value in given.items() if value is not None}


def _check_ranges(args: LipschitzTrainingArguments) -> None:
    for name in NON_NEGATIVE:
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            off = "; 0 turns it off" if name in WEIGHTS else ""
            raise ValueError(f"{name} must be finite and >= 0, got {value}{off}")
    for name in POSITIVE:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}; smoothing='none' turns it off")
    for name in COUNTS:
        value = getattr(args, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, known in (
        ("activation_decay_kind", ACTIVATION_DECAYS),
        ("loss", LOSSES),
        ("smoothing", SMOOTHINGS),
        ("lipschitz_schedule", ("none", *SCHEDULES)),
    ):
        value = getattr(args, name)
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    if args.norm_penalty_power not in (1, 2):
        raise ValueError(f"norm_penalty_power must be 1 or 2, got {args.norm_penalty_power}")


def _check_activation_decay(args: LipschitzTrainingArguments) -> None:
    if args.activation_decay_modules is None:
        return
    if not args.activation_decay_modules:
        raise ValueError("activation_decay_modules is empty: name modules, or leave it None for the last layer")
    if args.activation_decay == 0:
        raise ValueError("activation_decay_modules needs activation_decay > 0")
    if args.activation_decay_kind != "squared_norm":
        raise ValueError(
            f"activation_decay_kind={args.activation_decay_kind!r} is about the last layer: leave "
            "activation_decay_modules None, or take 'squared_norm'"
        )


def _check_curvature(args: LipschitzTrainingArguments) -> None:
    curvature_radius(args.curvature, args.curvature_radius)
    if args.curvature_modules is not None and not args.curvature_modules:
        raise ValueError("curvature_modules is empty: name modules, or leave it None for the last block and the head")


def _check_loss(args: LipschitzTrainingArguments) -> None:
    given, known = given_loss_parameters(args), loss_parameters(args.loss)
    for name in given:
        if name not in known:
            having = " and ".join(repr(loss) for loss in LOSSES if name in loss_parameters(loss))
            raise ValueError(f"loss_{name} is of {having}, and loss is {args.loss!r}: leave loss_{name} None")
    loss_function(args.loss, **given)
    if args.loss != "cross_entropy" and args.label_smoothing_factor > 0:
        raise ValueError(f"label_smoothing_factor is of the cross-entropy: set it to 0 with loss={args.loss!r}")


def _check_smoothing(args: LipschitzTrainingArguments) -> None:
    if args.noise_sigma == 0:
        for name, off in (("noise_copies", 1), ("smoothing", "none"), ("attack_radius", 0)):
            if getattr(args, name) != off:
                raise ValueError(f"{name}={getattr(args, name)!r} needs noise: set noise_sigma > 0, or {name}={off!r}")
    if args.smoothing == "consistency" and args.noise_copies < 2:
        raise ValueError("smoothing='consistency' compares noisy copies: set noise_copies to at least 2")
    if args.macer_gamma >= LARGEST_GAMMA:
        raise ValueError(f"macer_gamma must be below {LARGEST_GAMMA:g}, which no scores reach, got {args.macer_gamma}")
    if args.smoothing == "macer" and (args.loss != "cross_entropy" or args.label_smoothing_factor > 0):
        raise ValueError(
            "smoothing='macer' brings the cross-entropy of the smoothed classifier: set loss='cross_entropy' and "
            "label_smoothing_factor=0"
        )


def _check_schedule(args: LipschitzTrainingArguments) -> None:
    if not 0 < args.lipschitz_schedule_ratio <= 1:
        raise ValueError(
            f"lipschitz_schedule_ratio must be in (0, 1], got {args.lipschitz_schedule_ratio}: it is a share of the "
            "training steps"
        )
    if args.lipschitz_target is None:
        return
    if not 0 < args.lipschitz_target < math.inf:
        raise ValueError(f"lipschitz_target must be positive and finite, got {args.lipschitz_target}")
    if args.lipschitz_schedule == "none":
        raise ValueError(
            "lipschitz_target needs a schedule: set lipschitz_schedule='linear', or lipschitzify the model with "
            f"layer_lipschitz={args.lipschitz_target} and no schedule"
        )


def _check_probe(args: LipschitzTrainingArguments) -> None:
    if args.certified_radii is None:
        if args.certified_sigma is not None:
            raise ValueError("certified_sigma needs certified_radii, such as [0.25, 0.5]")
        return
    if not args.certified_radii:
        raise ValueError(
            "certified_radii is empty: name radii, or leave it None for an evaluation without certificates"
        )
    if args.noise_sigma == 0 and args.certified_sigma is None:
        raise ValueError("certified_radii needs noise: set certified_sigma > 0, or noise_sigma > 0 to train on it too")
    names = [f"{radius:g}" for radius in args.certified_radii]
    if len(set(names)) < len(names):
        raise ValueError(f"certified_radii need different names to six digits, got {args.certified_radii}")
    _ = args.probe_config
