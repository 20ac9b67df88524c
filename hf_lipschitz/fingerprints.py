"""What tells the weights of two models apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from hf_lipschitz.conversion import materialized


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and values of a model's effective weights and buffers."""
    digest = hashlib.sha256()
    with materialized(model) as plain:
        for name, tensor in sorted(plain.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
