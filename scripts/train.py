"""Fine-tunes a classifier of texts, images or sound with LipschitzTrainer, from data to saved model.

    python scripts/train.py --model_name_or_path minilm --dataset_name tweets --output_dir out --do_train --do_eval \
        --layer_lipschitz present --lipschitz_schedule linear --lipschitz_target 4
    torchrun --nproc_per_node 2 scripts/train.py ...
    accelerate launch --multi_gpu --num_processes 2 scripts/train.py ...
    python scripts/train.py arguments.json

It takes the arguments of [`LipschitzTrainingArguments`] and those of `train_arguments.py`; `--help` lists all. The
model is any that transformers has a sequence, image or audio classifier for. Without `--layer_lipschitz` it stays as
it is, plain or constrained. The classes are those of the data while it is trained, and those of the model otherwise.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import PeftModel
from torch.utils.data import DataLoader
from train_arguments import DataArguments, ModelArguments
from train_columns import class_names, class_order, input_columns, label_column, label_ids
from train_encoding import collator, encoded
from train_metrics import compute_metrics, predicted_classes
from train_models import Task, constrain, load_config, load_model, load_processor, task_of, with_adapters
from train_splits import drawn, eval_split, hold_out, read, test_split, train_split
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, set_seed

from hf_lipschitz import LipschitzTrainer, LipschitzTrainingArguments, ModelCardCallback


logger = logging.getLogger(__name__)

LAST_CHECKPOINT = ("true", "last")


class Examples:
    """The splits as the model takes them, and its classes."""

    def __init__(self, splits: DatasetDict, task: Task, config: PreTrainedConfig, data: DataArguments) -> None:
        self.splits, self.task, self.config, self.data = splits, task, config, data
        self.classes = tuple(config.id2label[index] for index in range(config.num_labels))

    def take_classes_of_training(self) -> None:
        train = train_split(self.splits, self.data)
        self.classes = class_order(self.config, class_names(train, label_column(train, self.data)))

    def hold_out(self) -> None:
        train = self.splits.get(self.data.train_split_name)
        if train is not None and self.data.validation_split is not None:
            self.splits = hold_out(self.splits, self.data, label_column(train, self.data))

    def train(self, processor: Any) -> Dataset:
        return self._encoded(drawn(train_split(self.splits, self.data), self.data.max_train_samples), processor)

    def evaluation(self, processor: Any) -> Dataset:
        return self._encoded(drawn(eval_split(self.splits, self.data), self.data.max_eval_samples), processor)

    def prediction(self, processor: Any) -> Dataset:
        split = test_split(self.splits, self.data)
        count = min(len(split), self.data.max_predict_samples or len(split))
        return self._encoded(split.select(range(count)), processor, has_labels=False)

    def _encoded(self, split: Dataset, processor: Any, has_labels: bool = True) -> Dataset:
        columns = input_columns(split, self.task.name, self.data)
        labels = None
        if has_labels:
            column = label_column(split, self.data)
            labels = (column, label_ids(split, column, self.classes))
        return encoded(split, self.task.name, columns, labels, processor, self.config, self.data)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs what the arguments ask for, and returns the metrics that it also writes."""
    model_args, data_args, args = parsed(sys.argv[1:] if argv is None else argv)
    set_up_logging(args)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: set do_train, do_eval or do_predict")
    set_seed(args.seed)

    config = load_config(model_args)
    task = task_of(config, model_args.task)
    # Images and sound are encoded when a batch is read, from columns that no forward takes.
    args.remove_unused_columns = args.remove_unused_columns and task.name == "text"
    with args.main_process_first(desc="reading the data"):
        examples = Examples(read(data_args, model_args.cache_dir), task, config, data_args)
    if args.do_train:
        examples.take_classes_of_training()
    examples.hold_out()
    processor = load_processor(model_args, task)
    with args.main_process_first(desc="preparing the data"):
        train = examples.train(processor) if args.do_train else None
        evaluation = examples.evaluation(processor) if args.do_eval else None
        prediction = examples.prediction(processor) if args.do_predict else None

    model = load_model(model_args, task, examples.classes, processor)
    collate = collator(task.name, processor)
    constraint = model_args.constraint()
    if constraint is not None:
        count = model_args.calibration_batches
        batches = None if train is None else first_batches(train, args.per_device_eval_batch_size, collate, count)
        constrain(model.to(args.device), constraint, batches)
    if model_args.lora_r is not None:
        model = with_adapters(model, model_args, task)

    trainer = LipschitzTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=predicted_classes,
        callbacks=[card_of(data_args)],
    )
    metrics: dict[str, float] = {}
    if train is not None:
        metrics |= run_training(trainer, len(train))
    if evaluation is not None:
        metrics |= run_evaluation(trainer, len(evaluation))
    if prediction is not None:
        run_prediction(trainer, prediction, examples.classes)
    if train is not None:
        describe(trainer, data_args)
        # Last, as it takes the adapters out of the model.
        if model_args.merge_adapter and trainer.is_world_process_zero():
            save_merged(trainer.accelerator.unwrap_model(trainer.model), processor, Path(args.output_dir) / "merged")
    return metrics


def parsed(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, LipschitzTrainingArguments]:
    """From a command line, or from the one JSON or YAML file that it names."""
    parser = HfArgumentParser((ModelArguments, DataArguments, LipschitzTrainingArguments))
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)


def set_up_logging(args: LipschitzTrainingArguments) -> None:
    level = args.get_process_log_level()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def first_batches(split: Dataset, batch_size: int, collate: Any, count: int) -> Iterable[Any]:
    """The same ones in every process, so that what they calibrate is the same."""
    return islice(DataLoader(split, batch_size=batch_size, collate_fn=collate), count)


def run_training(trainer: LipschitzTrainer, count: int) -> dict[str, float]:
    asked = trainer.args.resume_from_checkpoint
    is_last = isinstance(asked, str) and asked.lower() in LAST_CHECKPOINT
    result = trainer.train(resume_from_checkpoint=True if is_last else asked)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": count}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def run_evaluation(trainer: LipschitzTrainer, count: int) -> dict[str, float]:
    metrics = {**trainer.evaluate(), "eval_samples": count}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def run_prediction(trainer: LipschitzTrainer, split: Dataset, classes: Sequence[str]) -> None:
    """Writes `predict_results.txt`: a row number and the name of a class in each line."""
    predictions = trainer.predict(split, metric_key_prefix="predict").predictions
    if trainer.is_world_process_zero():
        lines = ["index\tprediction", *(f"{row}\t{classes[k]}" for row, k in enumerate(predictions))]
        (Path(trainer.args.output_dir) / "predict_results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe(trainer: LipschitzTrainer, data_args: DataArguments) -> None:
    """The model card, on the hub with `push_to_hub`."""
    name = data_args.dataset_name
    card: dict[str, Any] = {"tags": ["lipschitz"]} | ({} if name is None or Path(name).exists() else {"dataset": name})
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def card_of(data_args: DataArguments) -> ModelCardCallback:
    """Writes a card into each checkpoint."""
    name = data_args.dataset_name
    return ModelCardCallback() if name is None or Path(name).exists() else ModelCardCallback(dataset_name=name)


def save_merged(model: PeftModel, processor: Any, directory: Path) -> None:
    """The whole model with its adapters in the weights; it loads as any lipschitzified one."""
    merged: PreTrainedModel = model.merge_and_unload()
    merged.save_pretrained(directory)
    processor.save_pretrained(directory)


if __name__ == "__main__":
    main()
    # Left to the end of the interpreter, threads of gloo may abort it.
    PartialState().destroy_process_group()
