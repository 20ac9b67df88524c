"""LipschitzTrainer: transformers' Trainer with regularizers, noise and a schedule of the constraint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_lipschitz.conversion import materialized
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training.activation_decay import HeadDecay
from hf_lipschitz.training.argument_checks import given_loss_parameters
from hf_lipschitz.training.arguments import LipschitzTrainingArguments
from hf_lipschitz.training.augmentation import PIXELS, check_noise, pixel_scale
from hf_lipschitz.training.card import ModelCardCallback
from hf_lipschitz.training.curvature import CURVATURES, check_curvature, task_curvature
from hf_lipschitz.training.example_draws import ExampleDraws
from hf_lipschitz.training.head_calls import HeadCall
from hf_lipschitz.training.margin_losses import loss_function
from hf_lipschitz.training.metrics import RunningMeans, finite_values, layer_metrics
from hf_lipschitz.training.module_decay import ModuleCall, captured_inputs, decayed_modules, module_decay
from hf_lipschitz.training.noisy_inputs import noisy_inputs
from hf_lipschitz.training.norm_penalty import norm_penalty, penalised_norms
from hf_lipschitz.training.outputs import logits_of
from hf_lipschitz.training.probe import certified_accuracy_metrics, check_probe, probe_batches, probe_certificates
from hf_lipschitz.training.randomness import Draws, RestartCallback
from hf_lipschitz.training.schedule import LipschitzScheduleCallback, schedule_target
from hf_lipschitz.training.selection import curvature_layers
from hf_lipschitz.training.sharding import check_sharding, raw_state_dict
from hf_lipschitz.training.smoothing_losses import consistency, macer, smoothed_cross_entropy
from hf_lipschitz.training.unit_rows import normalize_head


class LipschitzTrainer(Trainer):
    r"""
    [`~transformers.Trainer`] for any model, constrained by [`lipschitzify`] or plain. While training, the loss is the
    task loss (the model's own, or one with a margin) plus the terms that [`LipschitzTrainingArguments`] turn on: the
    decay of activations, a curvature, terms of the smoothed classifier, the excess of norms; on noisy inputs, several
    copies or adversarial ones if that is asked. Evaluation and prediction run on the clean task alone, with plain
    effective weights: no norm is computed there.

    It logs next to `loss`, whatever of it is on: `task_loss`, `activation_decay`, `curvature`, `consistency`, `macer`
    and `norm_penalty`, as they enter the loss, weights included, averaged since the last log over the micro-batches
    that had them; `max_penalised_norm`, a **bound** of the largest norm that the penalty is about, averaged likewise;
    `max_layer_norm`, a **bound** of the largest spectral norm of a constrained layer, `lipschitz_constant`, the
    largest constant, and `log10_norm_product`, the logarithm of the product of the bounds, at that moment. The product
    bounds a chain of these layers, and not the model, which has other parts: that is [`lipschitz_bound`]. An
    evaluation with `certified_radii` adds `eval_certified_accuracy@r`, of the smoothed classifier on a few examples.

    Every term but the curvatures `"hutchinson"`, `"gauss_newton"` and `"sam"` is a mean over examples, or of the
    weights alone, and noise is keyed by the example: gradient accumulation and data parallelism give the gradient of
    one large batch. Those three are defined for each micro-batch; `"gauss_newton"` is a mean in expectation. The raw
    weights of constrained layers get no weight decay; their scale is not a property of the function.

    Under FSDP2 (`fsdp=True`) raw weights, gradients and the state of the optimizer are sharded. Each process also
    keeps a whole copy of each raw weight under a Gram constraint, from which its norm is bounded, and, while
    evaluating, of the effective ones.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`, *optional*), data_collator, train_dataset, ...:
            As for [`~transformers.Trainer`].
        args ([`LipschitzTrainingArguments`], *optional*):
            Defaults to `LipschitzTrainingArguments(output_dir="tmp_trainer")`.

    Raises:
        TypeError: `args` are plain `TrainingArguments`.
        ValueError: the model has no head, block, processor or constrained layer for what is asked, or the launch is
            neither a single device nor distributed data parallel nor FSDP2, or is FSDP2 with a curvature or
            with `certified_radii`.
        RuntimeError: while training, a term of the loss is NaN or inf.

    Example::

        model = lipschitzify(AutoModelForSequenceClassification.from_pretrained(path), layer_lipschitz=None)
        args = LipschitzTrainingArguments("out", lipschitz_schedule="linear", lipschitz_target=1.0)
        LipschitzTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train()
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: LipschitzTrainingArguments | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        args = LipschitzTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, LipschitzTrainingArguments):
            raise TypeError(f"LipschitzTrainer takes LipschitzTrainingArguments, got {type(args).__name__}")
        if args.normalize_head and model is not None:
            normalize_head(model, args.head_module)
        super().__init__(model, args, *positional, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._check_launch()
        self._set_loss()
        self._head_decay = HeadDecay(args.activation_decay_kind, args.head_module)
        self._check_model()
        self._means = RunningMeans()
        self._draws = Draws(args.seed, args.process_index)
        self._example_draws = ExampleDraws(args.seed, args.process_index, args.world_size)
        self.add_callback(RestartCallback(self._draws, self._example_draws))
        if args.lipschitz_schedule != "none":
            target = schedule_target(self.model, args.lipschitz_target)
            self.add_callback(
                LipschitzScheduleCallback(target, args.lipschitz_schedule_ratio, args.lipschitz_schedule)
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if self.args.normalize_head:
            normalize_head(model, self.args.head_module)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mean task loss of the micro-batch plus, while training, the penalties."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_labels(inputs)
        step = self.state.global_step
        self._draws.advance(step)
        core = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self._noise(core, inputs) as batch:
            with self._captured_head(core) as head_calls, self._captured_modules(core) as module_calls:
                loss, outputs = self._task(model, batch)
            self._means.add(finite_values({"task_loss": loss}, step))
            penalties = self._smoothing_terms(outputs, batch)
            if self.args.activation_decay > 0:
                if self.args.activation_decay_modules is None:
                    decay = self._head_decay.penalty(core, head_calls, loss, outputs, batch)
                else:
                    decay = module_decay(core, module_calls, batch.get("attention_mask"))
                penalties["activation_decay"] = self.args.activation_decay * decay
            if self._is_due(self.args.curvature_weight, self.args.curvature_every):
                penalties["curvature"] = self.args.curvature_weight * task_curvature(
                    core,
                    self._curvature_layers(core),
                    lambda inputs: self._task(core, inputs),
                    batch,
                    self._draws.generator("curvature", loss.device, is_shared=CURVATURES[self.args.curvature].is_mean),
                    self.args.curvature,
                    self.args.curvature_radius,
                    self._curvature_unit(core),
                    self.args.head_module,
                )
        if self._is_due(self.args.norm_penalty, self.args.norm_penalty_every):
            norms = penalised_norms(core)
            excess = norm_penalty(norms, self.args.norm_penalty_target, power=self.args.norm_penalty_power)
            penalties["norm_penalty"] = self.args.norm_penalty * excess
            self._means.add({"max_penalised_norm": norms.detach().max().item()})
        if penalties:
            self._means.add(finite_values(penalties, step))
        loss = sum(penalties.values(), loss)
        if self.compute_loss_func is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Trainers without it leave accumulation to compute_loss_func, which sees one micro-batch here.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        dtype = self._evaluation_dtype()
        if dtype is not None and not self.is_in_train:
            self.model.to(dtype=dtype, device=self.args.device)
        with materialized(self.model):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self.args.certified_radii is not None and description == "Evaluation":
                metrics = self._certified_accuracy(dataloader)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: Any = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: str | list[str] | None = None,
        dataset_args: Any = None,
    ) -> None:
        """Writes the card of [`ModelCardCallback`] into `output_dir`; base model and task are read off the model."""
        if not self.is_world_process_zero():
            return
        names = [dataset] if isinstance(dataset, str) else dataset
        of_data = {"dataset_name": ", ".join(names)} if names else {}
        card = ModelCardCallback(model_name, license=license, language=language, **of_data).card(
            self.args, self.state, self.model, self.state.global_step
        )
        extra = [tags] if isinstance(tags, str) else tags or []
        card.data.tags = list(dict.fromkeys([*card.data.tags, *extra]))
        card.save(Path(self.args.output_dir) / "README.md")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._means.take(), **layer_metrics(self.model)}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        is_full = self.is_fsdp_enabled and "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        with raw_state_dict(self.model) if is_full else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._refresh_anew()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._refresh_anew()

    def _refresh_anew(self) -> None:
        """In every process, as only the first one may have made a state dict, and torch makes an empty step where it
        saves or loads the optimizer of a sharded model: a resumed run is then the uninterrupted one bit by bit."""
        for layer in constrained_layers(self.model):
            layer.parametrization.refresh(anew=True)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        prefixes = tuple(
            f"{layer.name}.parametrizations.{layer.tensor_name}.".removeprefix(".")
            for layer in constrained_layers(model)
        )
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(prefixes)]

    def _task(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The mean task loss and the outputs of a forward on the noisy copies of a micro-batch."""
        loss, outputs = super().compute_loss(model, dict(batch), return_outputs=True)
        if self.args.smoothing == "macer":
            logits = self._copies(outputs)
            loss = smoothed_cross_entropy(logits, batch["labels"][: logits.shape[1]])
        return loss, outputs

    def _smoothing_terms(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        args = self.args
        if args.smoothing == "consistency":
            weights = {"kl_weight": args.consistency_weight, "entropy_weight": args.entropy_weight}
            return {"consistency": consistency(self._copies(outputs), **weights)}
        if args.smoothing == "macer":
            logits = self._copies(outputs)
            parameters = {"sigma": args.noise_sigma, "gamma": args.macer_gamma, "beta": args.macer_beta}
            return {"macer": args.macer_weight * macer(logits, batch["labels"][: logits.shape[1]], **parameters)}
        return {}

    def _copies(self, outputs: Any) -> Tensor:
        """The logits, of shape `(m, B, K)`."""
        model_had_labels = self.compute_loss_func is None and self.label_smoother is None
        return logits_of(outputs, has_loss=model_had_labels).unflatten(0, (self.args.noise_copies, -1))

    def _certified_accuracy(self, dataloader: DataLoader) -> dict[str, float]:
        args = self.args
        batches = probe_batches(dataloader.dataset, dataloader.collate_fn, args.certified_examples)
        certificates, labels = probe_certificates(
            self.model, batches, self.processing_class, args.probe_config, self.accelerator
        )
        return certified_accuracy_metrics(certificates, labels, args.certified_radii)

    def _captured_head(self, core: nn.Module) -> AbstractContextManager[list[HeadCall]]:
        is_of_head = self.args.activation_decay > 0 and self.args.activation_decay_modules is None
        return self._head_decay.captured(core) if is_of_head else nullcontext([])

    def _captured_modules(self, core: nn.Module) -> AbstractContextManager[dict[str, list[ModuleCall]]]:
        names = self.args.activation_decay_modules
        return nullcontext({}) if names is None else captured_inputs(core, names)

    def _noise(self, core: nn.Module, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        args = self.args
        if args.noise_sigma == 0:
            return nullcontext(inputs)
        self._example_draws.advance(self.state.global_step, len(inputs[core.main_input_name]))
        return noisy_inputs(
            core,
            inputs,
            self._example_draws,
            self.processing_class,
            sigma=args.noise_sigma,
            copies=args.noise_copies,
            attack_radius=args.attack_radius,
            attack_steps=args.attack_steps,
        )

    def _is_due(self, weight: float, every: int) -> bool:
        return weight > 0 and self.state.global_step % every == 0

    def _set_loss(self) -> None:
        if self.args.loss == "cross_entropy":
            return
        if self.compute_loss_func is not None:
            raise ValueError(f"compute_loss_func and loss={self.args.loss!r} are two losses: give one")
        self.compute_loss_func = loss_function(self.args.loss, **given_loss_parameters(self.args))

    def _curvature_layers(self, core: nn.Module) -> list[nn.Module] | None:
        if self.args.curvature_modules == ["all"] or not CURVATURES[self.args.curvature].is_of_weights:
            return None
        return list(curvature_layers(core, self.args.curvature_modules, self.args.head_module).values())

    def _curvature_unit(self, core: nn.Module) -> Tensor | float:
        """How far pixel values move when the unit of the radius moves by one: pixels in [0, 1] if that is known."""
        is_of_pixels = not CURVATURES[self.args.curvature].is_of_weights and core.main_input_name == PIXELS
        return pixel_scale(self.processing_class) if is_of_pixels and self.processing_class is not None else 1.0

    def _evaluation_dtype(self) -> torch.dtype | None:
        if self.args.fp16_full_eval:
            return torch.float16
        return torch.bfloat16 if self.args.bf16_full_eval else None

    def _check_launch(self) -> None:
        check_sharding(self)
        if self.args.n_gpu > 1:
            raise ValueError("LipschitzTrainer runs one process a device: launch with torchrun or accelerate launch")
        hooked = [name for name in ("activation_decay", "noise_sigma") if getattr(self.args, name) > 0]
        if self.args.torch_compile and hooked:
            raise ValueError(f"{' and '.join(hooked)} use hooks, which compiled models skip: torch_compile=False")

    def _check_model(self) -> None:
        core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.activation_decay > 0:
            if self.args.activation_decay_modules is None:
                self._head_decay.check(core)
            else:
                decayed_modules(core, self.args.activation_decay_modules)
        if self.args.curvature_weight > 0:
            check_curvature(core, self.args.curvature)
            self._curvature_layers(core)
            self._curvature_unit(core)
        if self.args.norm_penalty > 0:
            penalised_norms(core)
        if self.args.noise_sigma > 0:
            check_noise(core, self.processing_class)
        if self.args.probe_config is not None:
            check_probe(core, self.processing_class, self.args.probe_config)

    def _check_labels(self, inputs: dict[str, Any]) -> None:
        if self.label_names and not self.can_return_loss and not any(name in inputs for name in self.label_names):
            raise ValueError(
                f"the batch has no {' or '.join(self.label_names)}, only {', '.join(inputs)}: give train_dataset a "
                "column 'labels', or set label_names"
            )
