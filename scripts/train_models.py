"""The model of scripts/train.py: its task, its classes, its constraint and its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from train_arguments import ModelArguments, module_names
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_lipschitz import LipschitzConfig, calibrate, lipschitz_lora_config, lipschitzify
from hf_lipschitz.demo.models import minilm_path
from hf_lipschitz.nn.attachment import constrained_layers


@dataclass(frozen=True)
class Task:
    """The auto classes of a kind of input."""

    name: str
    auto_model: Any
    auto_processor: Any

    def takes(self, config: PreTrainedConfig) -> bool:
        return type(config) in self.auto_model._model_mapping

    def is_architecture(self, config: PreTrainedConfig) -> bool:
        classes = self.auto_model._model_mapping[type(config)]
        classes = classes if isinstance(classes, tuple) else (classes,)
        return any(found.__name__ in (config.architectures or ()) for found in classes)


TASKS = {
    task.name: task
    for task in (
        Task("text", AutoModelForSequenceClassification, AutoTokenizer),
        Task("image", AutoModelForImageClassification, AutoImageProcessor),
        Task("audio", AutoModelForAudioClassification, AutoFeatureExtractor),
    )
}


def checkpoint(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """Path or hub id, and what every `from_pretrained` is told."""
    path = minilm_path() if args.model_name_or_path == "minilm" else args.model_name_or_path
    own = {"revision": args.model_revision, "cache_dir": args.cache_dir, "trust_remote_code": args.trust_remote_code}
    return path, own


def load_config(args: ModelArguments) -> PreTrainedConfig:
    path, options = checkpoint(args)
    return AutoConfig.from_pretrained(path, **options)


def task_of(config: PreTrainedConfig, asked: str | None) -> Task:
    """What the model classifies: what is asked for, or what transformers has a classifier of this kind for.

    Raises:
        ValueError: none, another one, or several.
    """
    fitting = [task for task in TASKS.values() if task.takes(config)]
    if asked is not None:
        if fitting and TASKS[asked] not in fitting:
            raise ValueError(
                f"task={asked!r}, and a {config.model_type} classifies {' or '.join(task.name for task in fitting)}: "
                "choose another model or task"
            )
        return TASKS[asked]
    fitting = [task for task in fitting if task.is_architecture(config)] or fitting
    if len(fitting) != 1:
        found = " and ".join(task.name for task in fitting) or "no text, image or audio"
        raise ValueError(
            f"transformers has classifiers of {found} for {config.model_type}: "
            + ("set task" if fitting else "choose another model, or set task for a model with code of its own")
        )
    return fitting[0]


def load_processor(args: ModelArguments, task: Task) -> Any:
    """Tokenizer, image processor or feature extractor."""
    path, options = checkpoint(args)
    processor = task.auto_processor.from_pretrained(path, **options)
    if task.name == "text" and processor.pad_token is None:
        if processor.eos_token is None:
            raise ValueError(f"the tokenizer of {path} has no token to pad with: give it a pad_token and save it")
        processor.pad_token = processor.eos_token
    return processor


def load_model(args: ModelArguments, task: Task, classes: Sequence[str], processor: Any) -> PreTrainedModel:
    """The classifier, with a new head where the checkpoint has none of these classes."""
    path, options = checkpoint(args)
    names = dict(enumerate(classes))
    config = AutoConfig.from_pretrained(
        path,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="single_label_classification",
        **options,
    )
    if task.name == "text" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = processor.pad_token_id
    return task.auto_model.from_pretrained(path, config=config, ignore_mismatched_sizes=True, **options)


def constrain(model: PreTrainedModel, config: LipschitzConfig, batches: Iterable[Any] | None) -> None:
    """Lipschitzifies the model, and calibrates what it replaced on `batches` of training data.

    Raises:
        ValueError: there is something to calibrate and nothing to do it on.
    """
    is_calibrated = {"norms", "attention"} & set(config.replace)
    if is_calibrated and batches is None:
        raise ValueError("the constants of replaced norms and attention come from training data: set do_train")
    is_new = next(constrained_layers(model), None) is None
    lipschitzify(model, config)
    if is_calibrated and is_new and {"norms", "attention"} & set(model.config.quantization_config.replaced):
        calibrate(model, batches)


def with_adapters(model: PreTrainedModel, args: ModelArguments, task: Task) -> PeftModel:
    """LoRA inside the balls of the layers. The parts in front of which the pretrained model ends are trained whole.

    Raises:
        ValueError: no layer is constrained.
    """
    if next(constrained_layers(model), None) is None:
        raise ValueError(
            "lora_r without a constraint: set layer_lipschitz to a number, or to 'present' for the norm that each "
            "layer has"
        )
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=None if args.lora_target_modules is None else module_names(args.lora_target_modules),
        modules_to_save=_head_parts(model) or None,
        task_type="SEQ_CLS" if task.name == "text" else None,
    )
    return get_peft_model(model, lipschitz_lora_config(config))


def _head_parts(model: PreTrainedModel) -> list[str]:
    base = model.base_model
    return [name for name, part in model.named_children() if part is not base and _has_parameters(part)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
