"""Full-precision matrix products, whatever the caller's speed settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Turns autocast, TF32 and bfloat16 matrix products off inside the block, and puts the settings back after it.

    A spectral norm computed with reduced-precision products may be several per cent too small, so it bounds nothing.

    Args:
        device_type (`str`):
            `tensor.device.type` of the tensors multiplied inside the block.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def float32_below(value: float) -> float:
    """The largest float32 number that is at most `value`."""
    # On the CPU, for modules are made on the meta device as well.
    rounded = torch.tensor(value, dtype=torch.float32, device="cpu")
    return (torch.nextafter(rounded, torch.zeros_like(rounded)) if rounded.item() > value else rounded).item()


def subnormal_unit(dtype: torch.dtype) -> float:
    """By how much at most an entry below the normal numbers of `dtype` is rounded, whatever its size."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
