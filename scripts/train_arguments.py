"""What scripts/train.py takes besides the training arguments: the model, how it is constrained, and the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_lipschitz import LipschitzConfig


TASK_NAMES = ("text", "image", "audio")
PRESENT_NORM = ("none", "present")
# Options of LipschitzConfig that are passed on where they are given.
CONSTRAINT_OPTIONS = (
    "method",
    "mode",
    "replace",
    "target_modules",
    "exclude_modules",
    "norm",
    "activation",
    "residual_budget",
    "sll_blocks",
    "refresh_every",
)


@dataclass
class ModelArguments:
    """The checkpoint, its constraint and its adapters.

    Raises:
        ValueError: `layer_lipschitz` is no number, or an option is given that means nothing without another one.
    """

    model_name_or_path: str = field(
        metadata={"help": "Hub id or local folder, or 'minilm' for the encoder that the demo installs."}
    )
    task: str | None = field(
        default=None,
        metadata={"help": "What is classified; default: what the model's configuration says.", "choices": TASK_NAMES},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model of the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the model may run."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where models and data of the hub are kept."})

    layer_lipschitz: str | None = field(
        default=None,
        metadata={
            "help": "Constant of each layer, or 'present' for the norm that each has; default: not constrained, "
            "unless the checkpoint is."
        },
    )
    method: str | None = field(default=None, metadata={"help": "gram, rescaling, aol, sll or cpl; default: gram."})
    mode: str | None = field(
        default=None, metadata={"help": "cap: layers under the constant stay as they are; exact: none does."}
    )
    replace: list[str] | None = field(
        default=None,
        metadata={"help": "weights and any of norms, attention, activations, residuals; or all. Default: weights."},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to constrain, by name or its ending; default: all."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Layers to leave alone."})
    norm: str | None = field(default=None, metadata={"help": "What norms become: floor or centred."})
    activation: str | None = field(default=None, metadata={"help": "What activations become: bounded or maxmin."})
    residual_budget: float | None = field(
        default=None, metadata={"help": "Sum of the constants of all residual branches, for layers of constant 1."}
    )
    sll_blocks: bool | None = field(
        default=None, metadata={"help": "Whether residual feed-forward pairs become 1-Lipschitz blocks (sll, cpl)."}
    )
    refresh_every: int | None = field(default=None, metadata={"help": "Optimizer steps from one norm to the next."})
    calibration_batches: int = field(
        default=8,
        metadata={"help": "Evaluation batches of training data that set the constants of norms and attention."},
    )

    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters; default: every weight is trained."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Of LoRA; default: twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Of LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers with adapters, or all-linear; default: those that PEFT knows for the model."},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Whether the whole adapted model is saved too, in output_dir/merged."}
    )

    def __post_init__(self) -> None:
        self.constraint()
        if self.lora_r is None and (self.lora_target_modules or self.lora_alpha is not None or self.merge_adapter):
            raise ValueError("lora_alpha, lora_target_modules and merge_adapter need adapters: set lora_r")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {self.calibration_batches}")

    def constraint(self) -> LipschitzConfig | None:
        """What `lipschitzify` is to do, or `None` for nothing."""
        given = {name: getattr(self, name) for name in CONSTRAINT_OPTIONS if getattr(self, name) is not None}
        if self.layer_lipschitz is None:
            if given:
                raise ValueError(
                    f"{', '.join(given)} without a constraint: set layer_lipschitz to a number, or to 'present' for "
                    "the norm that each layer has"
                )
            return None
        for name in ("target_modules", "exclude_modules"):
            if name in given:
                given[name] = module_names(given[name])
        return LipschitzConfig(layer_lipschitz=self._constant(), **given)

    def _constant(self) -> float | None:
        if self.layer_lipschitz.lower() in PRESENT_NORM:
            return None
        try:
            return float(self.layer_lipschitz)
        except ValueError as error:
            raise ValueError(
                f"layer_lipschitz must be a number or one of {', '.join(PRESENT_NORM)}, got {self.layer_lipschitz!r}"
            ) from error


@dataclass
class DataArguments:
    """Where the data are, and what of them.

    Raises:
        ValueError: there are none, or twice, or a number is out of range.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, or 'tweets' or 'mnist' of the demo."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Of a data set with several."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to predict; needs no labels."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    test_split_name: str = field(default="test", metadata={"help": "Split to predict."})
    validation_split: float | None = field(
        default=None, metadata={"help": "Share of the training data to hold out where there is no such split."}
    )

    text_column: str | None = field(default=None, metadata={"help": "Default: text, sentence, review, ..."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Second text of each example; default: of known pairs of names."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: image, img, ..."})
    audio_column: str | None = field(default=None, metadata={"help": "Default: audio, speech, ..."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label, labels, class, ..."})

    max_train_samples: int | None = field(default=None, metadata={"help": "Fewer examples, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, of evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Only the first ones are predicted."})

    max_seq_length: int = field(default=128, metadata={"help": "Tokens after which texts are cut."})
    max_length_seconds: float = field(default=20.0, metadata={"help": "Seconds after which sound is cut."})
    sampling_rate: int | None = field(
        default=None, metadata={"help": "Of columns of float arrays, in Hz; default: that of the model."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Whether texts are tokenized again."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        files = [self.train_file, self.validation_file, self.test_file]
        if (self.dataset_name is None) == (not any(files)):
            raise ValueError("give the data once: dataset_name, or files by train_file, validation_file and test_file")
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise ValueError(f"validation_split is a share in (0, 1), got {self.validation_split}")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "max_seq_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_length_seconds", "sampling_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def module_names(names: list[str]) -> list[str] | str:
    """As PEFT and `LipschitzConfig` take them: `"all-linear"` is a word of theirs, not a name."""
    return "all-linear" if names == ["all-linear"] else names
