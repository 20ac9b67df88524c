from hf_lipschitz.training.arguments import LipschitzTrainingArguments
from hf_lipschitz.training.card import ModelCardCallback
from hf_lipschitz.training.trainer import LipschitzTrainer


__all__ = ["LipschitzTrainer", "LipschitzTrainingArguments", "ModelCardCallback"]
