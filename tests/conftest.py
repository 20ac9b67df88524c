from __future__ import annotations

import pytest
import torch
from hypothesis import settings

import hf_lipschitz  # noqa: F401  registers the hooks before any test


# Tiny models: a second thread costs more than it brings, and `make test` runs a worker a core.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
