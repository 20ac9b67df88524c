"""Training with FSDP2 over the processes there are, or whole in each of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_models import Examples, bert, vit
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_lipschitz import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from tests.processes import leave


WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CASES = {"text": (bert, "BertLayer"), "image": (vit, "ViTLayer")}
# With these, each constrained layer is a group of its own.
LAYERS = ("ParametrizedLinear",)
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.05}


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """accelerate shards on accelerators only; inside the block it does so on the CPU, with the same code."""
    AcceleratorState._reset_state()
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    try:
        with mock.patch.object(AcceleratorState, "__init__", init):
            yield
    finally:
        AcceleratorState._reset_state()
        # accelerate sets it for the processes that it may start.
        os.environ.pop("ACCELERATE_USE_FSDP", None)


class Worst(TrainerCallback):
    """The largest quotient of a layer's norm and its constant after any step."""

    def __init__(self) -> None:
        self.quotient = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for layer in constrained_layers(model):
            norm = torch.linalg.matrix_norm(layer.effective_weight.double().flatten(1), 2)
            self.quotient = max(self.quotient, (norm / layer.parametrization.lipschitz).item())


def arguments(directory: Path, **values: Any) -> LipschitzTrainingArguments:
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 8 // WORLD,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "activation_decay": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return LipschitzTrainingArguments(str(directory), **{**defaults, **values})


def train(
    case: str,
    directory: Path,
    *,
    wrapped: tuple[str, ...] = (),
    is_replicated: bool = False,
    resume: str | None = None,
    **values: Any,
) -> dict[str, Any]:
    build, block = CASES[case]
    model = lipschitzify(build(initializer_range=0.3), layer_lipschitz=0.5)
    if WORLD > 1 and not is_replicated:
        config = {"transformer_layer_cls_to_wrap": wrapped or (block,), **values.pop("fsdp_config", {})}
        with sharding_on_cpu():
            return results(model, arguments(directory, fsdp=True, fsdp_config=config, **values), resume)
    return results(model, arguments(directory, **values), resume)


def results(model: nn.Module, args: LipschitzTrainingArguments, resume: str | None = None) -> dict[str, Any]:
    worst = Worst()
    trainer = LipschitzTrainer(
        model, args, train_dataset=Examples(model), eval_dataset=Examples(model, seed=1), callbacks=[worst]
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": whole_state(trainer.model),
        "worst": worst.quotient,
        "is_sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
    }


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def resumed(directory: Path, **values: Any) -> dict[str, Any]:
    """A whole run, and the second half of it again, from its checkpoint."""
    values = {
        **ADAMW,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lipschitz_schedule": "cosine",
        "lipschitz_target": 0.3,
        **values,
    }
    whole = train("text", directory / "whole", **values)
    second = train("text", directory / "second", resume=str(directory / "whole" / "checkpoint-2"), **values)
    return {"whole": whole, "second": second}


def loaded_sharded(directory: Path) -> dict[str, Any]:
    """Of a model that transformers shards while it is loaded, without accelerate."""
    AcceleratorState._reset_state()
    if dist.get_rank() == 0:
        lipschitzify(bert(initializer_range=0.3), layer_lipschitz=0.5).save_pretrained(directory / "saved")
    dist.barrier()
    config = DistributedConfig(fsdp_size=WORLD)
    model = AutoModelForSequenceClassification.from_pretrained(directory / "saved", distributed_config=config)
    return results(model, arguments(directory / "loaded", save_strategy="steps", save_steps=1, save_only_model=True))


def refusals(directory: Path) -> dict[str, str]:
    found = {}
    calls = {
        "on the CPU": lambda: results(bert(), arguments(directory, fsdp=True)),
        "curvature": lambda: train("text", directory, curvature_weight=0.1, curvature="cure"),
        "cast": lambda: train("text", directory, bf16_full_eval=True),
        "efficient loading": lambda: train("text", directory, fsdp_config={"cpu_ram_efficient_loading": True}),
        "by hand": lambda: results(sharded_by_hand(bert()), arguments(directory)),
        "constrained afterwards": lambda: lipschitzify(sharded_by_hand(bert())),
    }
    for name, call in calls.items():
        AcceleratorState._reset_state()
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


def sharded_by_hand(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def main(directory: Path) -> None:
    found = {case: train(case, directory) for case in CASES}
    found["layers"] = train("text", directory, wrapped=LAYERS)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        found[kind] = resumed(directory / kind, fsdp_config={"state_dict_type": kind})
    found["replicated"] = resumed(directory / "replicated", is_replicated=True)
    found["loaded"] = loaded_sharded(directory)
    found["refusals"] = refusals(directory)
    torch.save(found, directory / f"rank{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
