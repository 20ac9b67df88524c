"""LipschitzTrainingArguments: transformers' training arguments and what this library adds to the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_lipschitz.certification import SmoothingConfig
from hf_lipschitz.training.activation_decay import ACTIVATION_DECAYS
from hf_lipschitz.training.argument_checks import SMOOTHINGS, check_arguments
from hf_lipschitz.training.curvature import CURVATURES
from hf_lipschitz.training.margin_losses import LOSSES
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
        activation_decay_modules (`list[str]`, *optional*):
            Names, or endings of names, of modules: the penalty is then on what enters them, instead of the last layer,
            summed over them. A plain regularizer, and no bound.
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
        loss (`str`, *optional*, defaults to `"cross_entropy"`):
            The task loss: `"cross_entropy"` is the model's own, `"offset_cross_entropy"` and `"multi_margin"` ask for
            a margin, for deterministic certificates ([`offset_cross_entropy`], [`multi_margin`]). Evaluation has the
            same.
        loss_offset (`float`, *optional*), loss_temperature (`float`, *optional*):
            Of `"offset_cross_entropy"`, in the unit of the logits; 3√2/2 and 0.25 by default.
        loss_margin (`float`, *optional*):
            Of `"multi_margin"`; 0.7 by default.
        normalize_head (`bool`, *optional*, defaults to `False`):
            Gives the rows of the last layer norm one, see [`normalize_head`]. Where the body is constrained too,
            `lipschitzify(model, exclude_modules=[<the last layer>])` comes first.
        noise_sigma (`float`, *optional*, defaults to 0.0):
            Standard deviation of Gaussian noise on the inputs while training, in the unit of certification: pixels in
            [0, 1] before normalisation, or word embeddings as they leave the embedding layer. It is keyed by (seed,
            step, example), so that it does not depend on micro-batches or processes.
        noise_copies (`int`, *optional*, defaults to 1):
            Noisy copies of each example in a forward, whose losses are averaged. Takes as many times the memory.
        smoothing (`str`, *optional*, defaults to `"none"`):
            A loss of the smoothed classifier, from the copies. `"consistency"` adds how far they disagree
            ([`consistency`], needs two). `"macer"` takes the cross-entropy of their mean softmax for the task loss,
            and adds a hinge on an estimate of the certified radius ([`macer`]).
        consistency_weight (`float`, *optional*, defaults to 10.0), entropy_weight (`float`, *optional*, defaults to
        0.5):
            The λ and η of consistency.
        macer_weight (`float`, *optional*, defaults to 12.0), macer_gamma (`float`, *optional*, defaults to 8.0),
        macer_beta (`float`, *optional*, defaults to 16.0):
            Weight of the hinge, the γ at which it ends, and the inverse temperature.
        attack_radius (`float`, *optional*, defaults to 0.0):
            Trains on adversarial examples of the smoothed classifier within that ℓ2 distance, in the unit of
            `noise_sigma` ([`smooth_adversary`], SmoothAdv); 0 is none.
        attack_steps (`int`, *optional*, defaults to 4):
            Gradient steps of the attack, each a forward and backward of the noisy copies.
        norm_penalty (`float`, *optional*, defaults to 0.0):
            Weight of the excess of layers' norms over a target, \\(\sum_l \max(0, b(W_l) - c)^p\\): a soft
            alternative to constraints, which bounds nothing ([`penalised_norms`], [`norm_penalty`]).
        norm_penalty_target (`float`, *optional*, defaults to 1.0), norm_penalty_power (`int`, *optional*, defaults to
        2):
            c, and p, 1 or 2.
        norm_penalty_every (`int`, *optional*, defaults to 1):
            The penalty is added at every that many optimizer steps, with the same weight.
        lipschitz_schedule (`str`, *optional*, defaults to `"none"`):
            `"linear"` moves the constant of each layer in equal steps from the norm of its weight to
            `lipschitz_target`, `"cosine"` along half a cosine.
        lipschitz_target (`float`, *optional*):
            The constant of each layer at the end of the schedule; by default the `layer_lipschitz` of the model's
            [`LipschitzConfig`].
        lipschitz_schedule_ratio (`float`, *optional*, defaults to 0.5):
            Share of the training steps, in (0, 1], after which the target is reached.
        certified_radii (`list[float]`, *optional*):
            Each evaluation certifies a few of its examples by randomised smoothing and reports
            `eval_certified_accuracy@r` for these ℓ2 radii r, the share with the right class and a radius above r, for
            `metric_for_best_model` too. Off by default.
        certified_examples (`int`, *optional*, defaults to 50):
            How many examples, evenly spaced in the evaluation dataset.
        certified_sigma (`float`, *optional*):
            Standard deviation of the noise; `noise_sigma` by default.
        certified_n (`int`, *optional*, defaults to 1000), certified_alpha (`float`, *optional*, defaults to 0.001):
            At most so many samples an example, and the error probability of each certificate.
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
    activation_decay_modules: list[str] | None = field(
        default=None, metadata={"help": "Name endings of the modules that activation_decay is about; default: head."}
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
    loss: str = field(default="cross_entropy", metadata={"help": "Task loss.", "choices": list(LOSSES)})
    loss_offset: float | None = field(
        default=None, metadata={"help": "Offset of offset_cross_entropy, in logits; default: 3/2 of the root of 2."}
    )
    loss_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of offset_cross_entropy; default: 0.25."}
    )
    loss_margin: float | None = field(default=None, metadata={"help": "Margin of multi_margin; default: 0.7."})
    normalize_head: bool = field(default=False, metadata={"help": "Give the rows of the last layer norm one."})
    noise_sigma: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of training noise on pixels in [0, 1] or on word embeddings."},
    )
    noise_copies: int = field(default=1, metadata={"help": "Noisy copies of each example in a forward."})
    smoothing: str = field(
        default="none", metadata={"help": "Loss of the smoothed classifier.", "choices": list(SMOOTHINGS)}
    )
    consistency_weight: float = field(default=10.0, metadata={"help": "Weight of the copies' disagreement."})
    entropy_weight: float = field(default=0.5, metadata={"help": "Weight of the entropy of their mean."})
    macer_weight: float = field(default=12.0, metadata={"help": "Weight of MACER's hinge."})
    macer_gamma: float = field(default=8.0, metadata={"help": "Where MACER's hinge ends."})
    macer_beta: float = field(default=16.0, metadata={"help": "Inverse temperature of MACER's scores."})
    attack_radius: float = field(
        default=0.0, metadata={"help": "Radius of SmoothAdv's attack, in the unit of noise_sigma; 0 is none."}
    )
    attack_steps: int = field(default=4, metadata={"help": "Gradient steps of the attack."})
    norm_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the excess of layers' norms over norm_penalty_target."}
    )
    norm_penalty_target: float = field(default=1.0, metadata={"help": "Norm up to which a layer is free."})
    norm_penalty_power: int = field(default=2, metadata={"help": "Power of the excess.", "choices": [1, 2]})
    norm_penalty_every: int = field(default=1, metadata={"help": "Optimizer steps from one norm penalty to the next."})
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
    certified_radii: list[float] | None = field(
        default=None, metadata={"help": "Radii of eval_certified_accuracy@r, on a few evaluation examples."}
    )
    certified_examples: int = field(default=50, metadata={"help": "Examples that an evaluation certifies."})
    certified_sigma: float | None = field(
        default=None, metadata={"help": "Standard deviation of their noise; default: noise_sigma."}
    )
    certified_n: int = field(default=1000, metadata={"help": "Samples of an example, at most."})
    certified_alpha: float = field(default=1e-3, metadata={"help": "Error probability of a certificate."})
    head_module: str | None = field(
        default=None, metadata={"help": "Name of the classifier's last layer; found by itself in most models."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self)

    @property
    def probe_config(self) -> SmoothingConfig | None:
        """How an evaluation certifies examples; `None` where it does not."""
        if self.certified_radii is None:
            return None
        return SmoothingConfig(
            sigma=self.noise_sigma if self.certified_sigma is None else self.certified_sigma,
            n=self.certified_n,
            alpha=self.certified_alpha,
            radii=tuple(self.certified_radii),
            batch_size=self.per_device_eval_batch_size,
            seed=self.seed,
        )
