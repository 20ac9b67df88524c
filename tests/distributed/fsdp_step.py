"""Three optimizer steps of a constrained model, sharded by FSDP2 over the processes there are, or not at all."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_lipschitz import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from tests.processes import leave


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 3)
    )
    return lipschitzify(model, layer_lipschitz=0.5, refresh_every=2)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def steps(model: nn.Module, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """The raw and the effective weights at the end, and the largest effective norm that was ever read."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    worst = torch.zeros((), dtype=torch.float64)
    for step in range(3):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        shard = x.chunk(processes)[rank]
        optimizer.zero_grad()
        loss = -model(shard).square().sum(-1).mean()
        # A weight that is read outside the forward of its layer, with another gradient in each process.
        loss = loss + shard.square().mean() * model[2].weight.square().sum()
        loss.backward()
        optimizer.step()
        for layer in constrained_layers(model):
            worst = torch.maximum(worst, torch.linalg.matrix_norm(layer.effective_weight.double(), 2))
    found = {f"effective.{layer.name}": layer.effective_weight for layer in constrained_layers(model)}
    raw = {f"raw.{layer.name}": whole(layer.parametrization.original) for layer in constrained_layers(model)}
    return {**found, **raw, "worst": worst}


def main(directory: str) -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))
    model = build()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = steps(model, rank, processes)
    found["sharded"] = torch.tensor(all(isinstance(p, DTensor) for p in model.parameters()))
    state = model.state_dict()
    # Saving refreshes the references, two steps after the last time.
    found["saved"], found["after saving"] = whole(state["2.weight"]), whole(model[2].weight)
    torch.save(found, os.path.join(directory, f"rank{rank}.pt"))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
