"""Whether what a walk says of each node holds at other inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.bounds import BoundedGraph
from hf_lipschitz.bounds.interpreter import Walk
from hf_lipschitz.bounds.logs import exponential
from hf_lipschitz.bounds.values import Dependent


# Of float64, on values that went through a whole model.
TOLERANCE = 1e-7


def check_regions(graph: BoundedGraph, walk: Walk, points: list[Tensor], radius: float | None) -> int:
    """Compares each node's region with its value at each point; the number of regions that say something.

    The values are the centers of walks on tiny balls around the points, computed in float64.
    """
    count = 0
    for point in points:
        there = graph.walk(center=point, radius=1e-9)
        for name, claimed in walk.values.items():
            actual = there.values[name]
            pairs = zip(claimed, actual, strict=True) if isinstance(claimed, (list, tuple)) else [(claimed, actual)]
            for said, found in pairs:
                if found.region.center is not None:
                    count += _check(name, said, found.region.center.expand(found.shape), radius)
    return count


def _check(name: str, said: Dependent, value: Tensor, radius: float | None) -> int:
    region = said.region
    slack = TOLERANCE * (1 + value.abs())
    if region.lower is not None:
        assert bool((value >= region.lower - slack).all()), f"{name}: below its range"
    if region.upper is not None:
        assert bool((value <= region.upper + slack).all()), f"{name}: above its range"
    if region.norm is not None:
        norms = torch.linalg.vector_norm(value, dim=-1, keepdim=True) if value.dim() else value.abs()
        assert bool((norms <= region.norm * (1 + TOLERANCE) + TOLERANCE).all()), f"{name}: token norm"
    if region.center is not None:
        moved = value - region.center
        tokens = torch.linalg.vector_norm(moved, dim=-1, keepdim=True) if moved.dim() else moved.abs()
        if region.radius is not None:
            assert bool((tokens <= region.radius * (1 + TOLERANCE) + TOLERANCE).all()), f"{name}: token radius"
        reach = exponential(said.log_lipschitz) * radius
        assert torch.linalg.vector_norm(moved).item() <= reach * (1 + TOLERANCE) + TOLERANCE, f"{name}: Lipschitz"
    return int(region.is_known)
