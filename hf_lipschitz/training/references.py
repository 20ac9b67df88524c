"""Fresh norms at the start of training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lipschitz.nn.attachment import constrained_layers


class RefreshCallback(TrainerCallback):
    """Takes the norms of constrained layers anew once the model is where it is trained.

    Moving a model widens the bounds of its norms by a rounding unit. A resumed run moves it once more than the
    uninterrupted one, and the two would differ by that unit.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        for layer in constrained_layers(model):
            layer.parametrization.refresh()
