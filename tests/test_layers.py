"""Imports point downwards only, and the engines know nothing of transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_lipschitz"
# From the bottom up. A module may import from its own layer and from those before it.
LAYERS = [
    ["version"],
    ["functional", "fields"],
    ["configuration"],
    ["nn", "bounds", "certification"],
    ["probes", "holders", "dataflow", "matching", "methods", "model_config"],
    [
        *("blocks", "replacements", "conversion", "calibration", "report", "fingerprints", "model_bounds"),
        *("deterministic", "pipelines", "integrations", "training"),
    ],
    ["dataset_certification", "summary", "plots", "model_card"],
    ["demo"],
    ["cli"],
]
FREE_OF_TRANSFORMERS = ("version", "functional", "fields", "configuration", "nn", "bounds", "certification")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def level(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        if name.startswith("hf_lipschitz."):
            assert level(name.split(".")[1]) <= level(own), f"{own} imports {name}"
    if own in FREE_OF_TRANSFORMERS:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"transformers", "accelerate", "peft", "datasets"}


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in FILES} == {name for layer in LAYERS for name in layer}
