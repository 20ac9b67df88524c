"""LipschitzTrainer: transformers' Trainer with regularizers, noise and a schedule of the constraint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_lipschitz.conversion import materialized
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training.activation_decay import HeadDecay
from hf_lipschitz.training.arguments import LipschitzTrainingArguments
from hf_lipschitz.training.augmentation import PIXELS, check_noise, gaussian_noise, pixel_scale
from hf_lipschitz.training.curvature import CURVATURES, check_curvature, task_curvature
from hf_lipschitz.training.head_calls import HeadCall
from hf_lipschitz.training.metrics import RunningMeans, finite_values, layer_metrics
from hf_lipschitz.training.randomness import Draws
from hf_lipschitz.training.schedule import LipschitzScheduleCallback, schedule_target
from hf_lipschitz.training.selection import curvature_layers


class LipschitzTrainer(Trainer):
    r"""
    [`~transformers.Trainer`] for any model, constrained by [`lipschitzify`] or plain. While training, the loss is the
    task loss plus λ·mean‖h‖² (`activation_decay`) plus `curvature_weight` times a curvature, on noisy inputs if
    `noise_sigma` is set. Evaluation and prediction run on the clean task alone, with plain effective weights: no norm
    is computed there.

    It logs next to `loss`, whatever of it is on: `task_loss`, `activation_decay` and `curvature`, as they enter the
    loss, weights included, averaged since the last log over the micro-batches that had them; `max_layer_norm`, a
    **bound** of the largest spectral norm of a constrained layer, and `lipschitz_constant`, the largest constant, at
    that moment.

    Every term but the curvatures `"hutchinson"` and `"sam"` is a mean over examples: gradient accumulation and data
    parallelism give the gradient of one large batch. Those two are defined for each micro-batch. The raw weights of
    constrained layers get no weight decay; their scale is not a property of the function.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`, *optional*), data_collator, train_dataset, ...:
            As for [`~transformers.Trainer`].
        args ([`LipschitzTrainingArguments`], *optional*):
            Defaults to `LipschitzTrainingArguments(output_dir="tmp_trainer")`.

    Raises:
        TypeError: `args` are plain `TrainingArguments`.
        ValueError: the model has no head, block, processor or constrained layer for what is asked, or the launch is
            neither a single device nor distributed data parallel.
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
        super().__init__(model, args, *positional, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._check_launch()
        self._head_decay = HeadDecay(args.activation_decay_kind, args.head_module)
        self._check_model()
        self._means = RunningMeans()
        self._draws = Draws(args.seed, args.process_index)
        if args.lipschitz_schedule != "none":
            target = schedule_target(self.model, args.lipschitz_target)
            self.add_callback(
                LipschitzScheduleCallback(target, args.lipschitz_schedule_ratio, args.lipschitz_schedule)
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mean task loss of the micro-batch plus, while training, the penalties."""
        task_loss = super().compute_loss
        if not model.training:
            return task_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_labels(inputs)
        self._draws.advance(self.state.global_step)
        core = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self._noise(core, inputs) as inputs:
            with self._captured_head(core) as calls:
                loss, outputs = task_loss(model, dict(inputs), return_outputs=True)
            self._means.add(finite_values({"task_loss": loss}, self.state.global_step))
            penalties: dict[str, Tensor] = {}
            if self.args.activation_decay > 0:
                decay = self._head_decay.penalty(core, calls, loss, outputs, inputs)
                penalties["activation_decay"] = self.args.activation_decay * decay
            if self._has_curvature():
                penalties["curvature"] = self.args.curvature_weight * task_curvature(
                    core,
                    self._curvature_layers(core),
                    lambda batch: task_loss(core, dict(batch), return_outputs=True),
                    inputs,
                    self._draws.generator("curvature", loss.device),
                    self.args.curvature,
                    self.args.curvature_radius,
                    self._curvature_unit(core),
                    self.args.head_module,
                )
        if penalties:
            self._means.add(finite_values(penalties, self.state.global_step))
        loss = sum(penalties.values(), loss)
        if self.compute_loss_func is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Trainers without it leave accumulation to compute_loss_func, which sees one micro-batch here.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        dtype = self._evaluation_dtype()
        if dtype is not None and not self.is_in_train:
            self.model.to(dtype=dtype, device=self.args.device)
        with materialized(self.model):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._means.take(), **layer_metrics(self.model)}
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        prefixes = tuple(
            f"{layer.name}.parametrizations.{layer.tensor_name}.".removeprefix(".")
            for layer in constrained_layers(model)
        )
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(prefixes)]

    def _captured_head(self, core: nn.Module) -> AbstractContextManager[list[HeadCall]]:
        return self._head_decay.captured(core) if self.args.activation_decay > 0 else nullcontext([])

    @contextmanager
    def _noise(self, core: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.args.noise_sigma == 0:
            yield inputs
            return
        generator = self._draws.generator("noise", self.args.device)
        with gaussian_noise(core, inputs, self.args.noise_sigma, self.processing_class, generator) as noisy:
            yield noisy

    def _has_curvature(self) -> bool:
        return self.args.curvature_weight > 0 and self.state.global_step % self.args.curvature_every == 0

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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("LipschitzTrainer needs whole weights on each device: launch without FSDP and DeepSpeed")
        if self.args.n_gpu > 1:
            raise ValueError("LipschitzTrainer runs one process a device: launch with torchrun or accelerate launch")
        if self.args.torch_compile and (self.args.activation_decay > 0 or self.args.noise_sigma > 0):
            raise ValueError(
                "activation_decay and noise_sigma use hooks, which compiled models skip: torch_compile=False"
            )

    def _check_model(self) -> None:
        core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.activation_decay > 0:
            self._head_decay.check(core)
        if self.args.curvature_weight > 0:
            check_curvature(core, self.args.curvature)
            self._curvature_layers(core)
            self._curvature_unit(core)
        if self.args.noise_sigma > 0:
            check_noise(core, self.processing_class)

    def _check_labels(self, inputs: dict[str, Any]) -> None:
        if self.label_names and not self.can_return_loss and not any(name in inputs for name in self.label_names):
            raise ValueError(
                f"the batch has no {' or '.join(self.label_names)}, only {', '.join(inputs)}: give train_dataset a "
                "column 'labels', or set label_names"
            )
