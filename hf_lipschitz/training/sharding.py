"""Which launches that shard a model (FSDP2) the trainer can work with, and what they save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.nn.weight_norm import plain_names
from hf_lipschitz.training.arguments import LipschitzTrainingArguments


if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

# What activation checkpointing of FSDP puts into the names of modules, and takes out of those in a state dict.
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."

OFFLOADED = "keeps shards on the CPU, and constraints gather them on the device after every step: leave it unset"


def check_sharding(trainer: Trainer) -> None:
    """Before training.

    Raises:
        ValueError: the launch shards weights in a way in which they cannot be constrained, would not shard them as it
            was asked to, or asks for something that needs whole weights in each process.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError("LipschitzTrainer does not work with DeepSpeed: shard by fsdp=True, or launch without it")
    if trainer.is_fsdp_enabled:
        _check_plugin(trainer.accelerator.state.fsdp_plugin, trainer.model)
    elif trainer.args.fsdp:
        raise ValueError(
            "fsdp is set, but accelerate shards models on accelerators only, and this launch would hold all weights "
            "in each process: leave fsdp unset, or load the lipschitzified model with "
            "from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))"
        )
    # Older Trainers do not know of models that are loaded sharded.
    is_loaded_sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if is_loaded_sharded:
        _check_distributed_config(trainer.model.config.distributed_config)
    is_sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    if is_sharded and not (trainer.is_fsdp_enabled or is_loaded_sharded):
        raise ValueError("the model is sharded already: give the trainer the whole model, with fsdp=True")
    if trainer.is_fsdp_enabled or is_sharded:
        _check_arguments(trainer.args)


@contextmanager
def raw_state_dict(model: nn.Module) -> Iterator[None]:
    """Inside the block the state dict of `model` holds raw weights only, and not the effective ones that a plain model
    reads: torch loads a full state dict into a sharded model only if all of its keys are parameters or buffers."""

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for layer in constrained_layers(module):
            name = layer.name.replace(CHECKPOINT_WRAPPER, "")
            for plain in plain_names(layer.tensor_name, layer.stage):
                state_dict.pop(f"{prefix}{name}.{plain}", None)

    handle = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _check_arguments(args: LipschitzTrainingArguments) -> None:
    if args.curvature_weight > 0:
        raise ValueError(
            "curvature penalties need whole weights in each process, since FSDP2 frees them between two derivatives: "
            "set curvature_weight=0, or launch without FSDP"
        )
    if args.certified_radii is not None:
        raise ValueError(
            "certified_radii takes as many forwards in a process as its examples need, and those of a sharded model "
            "are taken by all processes together: leave it unset, and certify the saved model"
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError(
            "sharded weights cannot be cast for evaluation: leave bf16_full_eval and fp16_full_eval unset; bf16=True "
            "evaluates in bfloat16 as well"
        )


def _check_plugin(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"LipschitzTrainer works with FSDP2, not with version {plugin.fsdp_version}, which flattens the weights: "
            'set fsdp_config={"version": 2}, or fsdp_version: 2 in the configuration of accelerate launch'
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(f"cpu_offload {OFFLOADED}")
    if plugin.cpu_ram_efficient_loading and next(constrained_layers(model), None) is not None:
        raise ValueError(
            "cpu_ram_efficient_loading distributes parameters only, and constrained layers have buffers as well: set "
            'fsdp_config={"cpu_ram_efficient_loading": False}, or fsdp_cpu_ram_efficient_loading: false in the '
            "configuration of accelerate launch"
        )


def _check_distributed_config(config: DistributedConfig) -> None:
    others = [name for name in ("tp_size", "pp_size", "ep_size") if (getattr(config, name, None) or 1) > 1]
    if others:
        raise ValueError(
            f"LipschitzTrainer works with fsdp_size and dp_replicate_size alone, not with {', '.join(others)}: a "
            "constraint is on the whole weight of a layer, not on the part of a device"
        )
    if config.fsdp_cpu_offload:
        raise ValueError(f"fsdp_cpu_offload {OFFLOADED}")
