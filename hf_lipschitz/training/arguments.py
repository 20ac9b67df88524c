"""LipschitzTrainingArguments: transformers' training arguments and what this library adds to the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_lipschitz.training.activation_decay import ACTIVATION_DECAYS
from hf_lipschitz.training.curvature import CURVATURES, curvature_radius
from hf_lipschitz.training.schedule import SCHEDULES


@dataclass
class LipschitzTrainingArguments(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] with the regularizers of [`LipschitzTrainer`]. Everything is off by default.

    Args:
        activation_decay (`float`, *optional*, defaults to 0.0):
            The weight λ of the penalty \\(\lambda \, \mathrm{mean}_i \|h_i\|^2\\) on the activations h entering the
            last layer. With Gaussian noise \\(N(0, \varsigma^2)\\) on the weights of that layer, \\(CE \le E[CE] \le
            CE + \frac{\varsigma^2}{2}(1 - \frac1K)\|h\|^2\\) for K classes: λ = ς²/2 trains an upper bound of the
            smoothed loss.
        activation_decay_kind (`str`, *optional*, defaults to `"squared_norm"`):
            `"squared_norm"` is the penalty above, over the examples, or over the tokens whose label is not -100.
            `"hessian_trace"` weights ‖h‖² by 1 - ‖p‖², p the softmax of the logits, held fixed: the trace of the
            Hessian of CE in the weights of the last layer, an estimate to second order and not a bound.
        curvature_weight (`float`, *optional*, defaults to 0.0):
            Weight of the curvature penalty.
        curvature (`str`, *optional*, defaults to `"hutchinson"`):
            Which penalty. With H the Hessian of the mean task loss of a micro-batch and v a Rademacher vector,
            `"hutchinson"` is ‖Hv‖², an unbiased estimate of ‖H‖_F², and `"trace"` is vᵀHv, one of tr H, which may be
            negative. `"gauss_newton"` is one of the trace of the Gauss-Newton matrix of the cross-entropy, never
            negative. `"cure"` is the mean square of the change of the gradient with respect to the inputs, a distance
            away and divided by it. `"sam"` is the loss a distance uphill in the weights, less the loss: with weight 1
            the gradient is that of SAM.
        curvature_radius (`float`, *optional*):
            That distance: 1.5 by default for `"cure"`, in pixels of [0, 1] before normalisation (or pixel values,
            without a `processing_class`) or word embeddings, and 0.05 for `"sam"`.
        curvature_every (`int`, *optional*, defaults to 1):
            The penalty is added at every that many optimizer steps, with the same weight.
        curvature_modules (`list[str]`, *optional*):
            Names, or endings of names, of the modules whose Linear and convolution weights H is taken over, or
            `["all"]` for every trained weight. By default the last block and the classifier's last layer. `"cure"` is
            not about weights.
        noise_sigma (`float`, *optional*, defaults to 0.0):
            Standard deviation of Gaussian noise on the inputs while training, in the unit of certification: pixels in
            [0, 1] before normalisation, or word embeddings as they leave the embedding layer.
        lipschitz_schedule (`str`, *optional*, defaults to `"none"`):
            `"linear"` moves the constant of each layer in equal steps from the norm of its weight to
            `lipschitz_target`.
        lipschitz_target (`float`, *optional*):
            The constant of each layer at the end of the schedule; by default the `layer_lipschitz` of the model's
            [`LipschitzConfig`].
        lipschitz_schedule_ratio (`float`, *optional*, defaults to 0.5):
            Share of the training steps, in (0, 1], after which the target is reached.
        head_module (`str`, *optional*):
            Name of the classifier's last layer, where it is not found by itself.

    Raises:
        `ValueError`: a value is out of range or unknown; the message names the fix.
    """

    activation_decay: float = field(
        default=0.0, metadata={"help": "Weight of the mean square norm of the activations entering the last layer."}
    )
    activation_decay_kind: str = field(
        default="squared_norm",
        metadata={"help": "What activation_decay weighs.", "choices": list(ACTIVATION_DECAYS)},
    )
    curvature_weight: float = field(default=0.0, metadata={"help": "Weight of the curvature penalty."})
    curvature: str = field(default="hutchinson", metadata={"help": "Curvature penalty.", "choices": list(CURVATURES)})
    curvature_radius: float | None = field(
        default=None, metadata={"help": "Step of cure in the inputs, or of sam in the weights; default: of the kind."}
    )
    curvature_every: int = field(
        default=1, metadata={"help": "Optimizer steps from one curvature penalty to the next."}
    )
    curvature_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Name endings of the modules whose curvature counts; default: last block and head."},
    )
    noise_sigma: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of training noise on pixels in [0, 1] or on word embeddings."},
    )
    lipschitz_schedule: str = field(
        default="none",
        metadata={"help": "How the layers' constants reach lipschitz_target.", "choices": ["none", *SCHEDULES]},
    )
    lipschitz_target: float | None = field(
        default=None,
        metadata={"help": "Constant of each layer after the schedule; default: layer_lipschitz of the model."},
    )
    lipschitz_schedule_ratio: float = field(
        default=0.5, metadata={"help": "Share of the training steps that the schedule takes."}
    )
    head_module: str | None = field(
        default=None, metadata={"help": "Name of the classifier's last layer; found by itself in most models."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("activation_decay", "curvature_weight", "noise_sigma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}; 0 turns it off")
        if self.activation_decay_kind not in ACTIVATION_DECAYS:
            raise ValueError(
                f"unknown activation_decay_kind {self.activation_decay_kind!r}; known: {', '.join(ACTIVATION_DECAYS)}"
            )
        curvature_radius(self.curvature, self.curvature_radius)
        if self.curvature_every < 1:
            raise ValueError(
                f"curvature_every must be at least 1, got {self.curvature_every}; curvature_weight=0 turns it off"
            )
        if self.curvature_modules is not None and not self.curvature_modules:
            raise ValueError(
                "curvature_modules is empty: name modules, or leave it None for the last block and the head"
            )
        if self.lipschitz_schedule not in ("none", *SCHEDULES):
            raise ValueError(
                f"unknown lipschitz_schedule {self.lipschitz_schedule!r}; known: {', '.join(('none', *SCHEDULES))}"
            )
        if not 0 < self.lipschitz_schedule_ratio <= 1:
            raise ValueError(
                f"lipschitz_schedule_ratio must be in (0, 1], got {self.lipschitz_schedule_ratio}: it is a share of "
                "the training steps"
            )
        if self.lipschitz_target is not None:
            if not 0 < self.lipschitz_target < math.inf:
                raise ValueError(f"lipschitz_target must be positive and finite, got {self.lipschitz_target}")
            if self.lipschitz_schedule == "none":
                raise ValueError(
                    "lipschitz_target needs a schedule: set lipschitz_schedule='linear', or lipschitzify the model "
                    f"with layer_lipschitz={self.lipschitz_target} and no schedule"
                )
