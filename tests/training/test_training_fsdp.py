from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_training import CASES, train
from tiny_models import bert
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import AutoModelForSequenceClassification

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.sharding import check_sharding
from tests.processes import on_two_processes


SCRIPT = Path(__file__).with_name("sharded_training.py")
STATE_DICT_TYPES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    """What two real processes have after training."""
    return on_two_processes(SCRIPT, directory)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("case", [*CASES, "layers", "loaded"])
def test_sharded_training_is_that_of_one_process(case: str, found: list[dict[str, Any]], tmp_path: Path) -> None:
    """Where blocks, or single layers, are sharded by accelerate, or the model by transformers while it is loaded."""
    alone = train(case if case in CASES else "text", tmp_path)
    assert alone["logs"][0]["activation_decay"] > 0.01
    for results in found:
        theirs = results[case]
        assert theirs["is_sharded"]
        assert difference(theirs["weights"], alone["weights"]) <= 1e-6
        assert theirs["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
        for name in ("task_loss", "activation_decay", "max_layer_norm", "lipschitz_constant"):
            assert theirs["logs"][0][name] == pytest.approx(alone["logs"][0][name], rel=1e-5)


def test_layers_stay_within_their_constants(found: list[dict[str, Any]]) -> None:
    for results in found:
        runs = [results[case] for case in (*CASES, "layers", "loaded")]
        runs += [results[kind][run] for kind in STATE_DICT_TYPES for run in ("whole", "second")]
        assert all(0.99 < run["worst"] <= 1 + 1e-7 for run in runs)


@pytest.mark.parametrize("kind", [*STATE_DICT_TYPES, "replicated"])
def test_resumed_run_is_the_uninterrupted_one(kind: str, found: list[dict[str, Any]]) -> None:
    for results in found:
        whole, second = results[kind]["whole"], results[kind]["second"]
        assert difference(whole["weights"], second["weights"]) == 0
        assert whole["eval_loss"] == second["eval_loss"]
        constants = [entry["lipschitz_constant"] for entry in whole["logs"]]
        assert constants[0] > constants[-1] == 0.3
        assert constants == [entry["lipschitz_constant"] for entry in second["logs"]]


def test_full_checkpoint_is_that_of_a_whole_model(directory: Path, found: list[dict[str, Any]]) -> None:
    checkpoint = directory / "FULL_STATE_DICT" / "whole" / "checkpoint-4"
    weights = found[0]["FULL_STATE_DICT"]["whole"]["weights"]
    assert load_file(checkpoint / "model.safetensors").keys() == weights.keys()
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert model.config.quantization_config.layer_lipschitz == 0.3
    assert difference(model.state_dict(), weights) == 0
    # What torch loads into the sharded model: without the effective weights, which are no parameters there.
    raw = torch.load(checkpoint / "pytorch_model_fsdp.bin")
    assert raw.keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())} & weights.keys()


def test_model_that_was_loaded_sharded_is_saved_whole(directory: Path, found: list[dict[str, Any]]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directory / "loaded" / "checkpoint-1")
    assert difference(model.state_dict(), found[0]["loaded"]["weights"]) == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("on the CPU", "accelerate shards models on accelerators only"),
        ("curvature", "set curvature_weight=0"),
        ("cast", "leave bf16_full_eval and fp16_full_eval unset"),
        ("efficient loading", "cpu_ram_efficient_loading distributes parameters only"),
        ("by hand", "the model is sharded already"),
        ("constrained afterwards", "lipschitzify the model before fully_shard"),
    ],
)
def test_what_cannot_work_is_refused_before_training(case: str, message: str, found: list[dict[str, Any]]) -> None:
    assert all(message in results["refusals"].get(case, "") for results in found)


def launch(**values: Any) -> SimpleNamespace:
    """A trainer as far as its launch goes."""
    plugin = {"fsdp_version": 2, "cpu_offload": OffloadPolicy(), "cpu_ram_efficient_loading": False}
    config = {"tp_size": 1, "pp_size": 1, "ep_size": 1, "fsdp_cpu_offload": False}
    plugin, config = ({k: values.get(k, v) for k, v in known.items()} for known in (plugin, config))
    model = lipschitzify(bert())
    model.config.distributed_config = SimpleNamespace(**config)
    return SimpleNamespace(
        is_deepspeed_enabled=values.get("is_deepspeed_enabled", False),
        is_fsdp_enabled=values.get("is_fsdp_enabled", False),
        is_distributed_loading_by_transformers=values.get("is_loaded_sharded", False),
        args=SimpleNamespace(
            fsdp=True,
            curvature_weight=0.0,
            certified_radii=values.get("certified_radii"),
            bf16_full_eval=False,
            fp16_full_eval=False,
        ),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))),
        model=model,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_deepspeed_enabled": True}, "does not work with DeepSpeed"),
        ({"is_fsdp_enabled": True, "fsdp_version": 1}, "not with version 1"),
        ({"is_fsdp_enabled": True, "cpu_offload": CPUOffloadPolicy()}, "cpu_offload keeps shards on the CPU"),
        ({"is_fsdp_enabled": True, "certified_radii": [0.5]}, "certify the saved model"),
        ({"is_fsdp_enabled": True, "is_loaded_sharded": True, "tp_size": 2}, "not with tp_size"),
        ({"is_fsdp_enabled": True, "is_loaded_sharded": True, "fsdp_cpu_offload": True}, "fsdp_cpu_offload keeps"),
    ],
)
def test_launch_is_refused(values: dict[str, Any], message: str) -> None:
    check_sharding(launch(is_fsdp_enabled=True, is_loaded_sharded=True))
    with pytest.raises(ValueError, match=message):
        check_sharding(launch(**values))
