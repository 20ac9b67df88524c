"""inspect: what is constrained, by how much, and what is not."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import layer_obstacles
from hf_lipschitz.functional.weights import weight_norm_bound
from hf_lipschitz.methods import geometry_of
from hf_lipschitz.nn.attachment import ConstrainedLayer, constrained_layers


WARNING = (
    "Each row bounds ONE layer by itself. This is NOT a bound for the model and certifies nothing about its "
    "predictions: the modules listed as not covered, and what happens between modules (residual sums, attention "
    "products, functional calls), have no bound here."
)

UNBOUNDED_ATTENTION = "dot-product attention has no global Lipschitz constant"
REASONS: tuple[tuple[str, str], ...] = (
    (r"BatchNorm", "gain |weight|/sqrt(running_var + eps), not limited"),
    (r"RMSNorm", "gain up to max|weight|/sqrt(eps)"),
    (r"LayerNorm|GroupNorm|InstanceNorm|Norm$|Norm\dd$", "gain up to max|weight|/sqrt(eps), 10^6 at eps = 1e-12"),
    (r"Embedding", "looks up tokens or positions; certify from the embeddings on"),
    (r"GELU|SiLU|Swish|Mish", "slope above 1 (at most 1.13), not limited"),
    (r"Tanh|ReLU|LeakyReLU|Sigmoid|Softplus|Hardtanh", "slope at most 1, but not part of any layer's bound"),
    (r"Pool", "not part of any layer's bound"),
    (r"ConvTranspose|Bilinear|Linear|Conv", "weight not constrained"),
)
TIGHT_RTOL = 1e-7
HARMLESS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten)


@dataclass(frozen=True)
class LayerReport:
    """One Linear or convolution: sound upper bounds, in float64, of its spectral norm."""

    name: str
    kind: str
    shape: tuple[int, ...]
    lipschitz: float | None
    norm_before: float
    norm_after: float


@dataclass(frozen=True)
class UncoveredModule:
    """A module that no per-layer bound covers, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class LipschitzReport:
    """What [`inspect`] found. `str()` is a table; rich prints it in colour.

    Args:
        model (`str`):
            Class of the model.
        config (`LipschitzConfig`, *optional*):
            `None` where nothing is constrained.
        layers (`tuple[LayerReport]`):
            The Linear and convolution layers with bounds of their norms: `norm_before` of the raw weight, `norm_after`
            of the effective one, `lipschitz` the constant, `None` where the layer is not constrained.
        uncovered (`tuple[UncoveredModule]`):
            Everything else that computes something.
    """

    model: str
    config: LipschitzConfig | None
    layers: tuple[LayerReport, ...]
    uncovered: tuple[UncoveredModule, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "model": self.model,
            "config": None if self.config is None else self.config.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "uncovered": [dataclasses.asdict(module) for module in self.uncovered],
            "is_model_bound": False,
        }

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=118, color_system=None).print(self)
        return buffer.getvalue().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _layer_table(self)
        yield _uncovered_table(self)
        yield Text(WARNING, style="bold")


def inspect(model: nn.Module, *, rtol: float = 1e-3) -> LipschitzReport:
    """Bounds the spectral norm of each Linear, convolution and Conv1D layer, and lists what no layer's bound covers.

    Args:
        model (`torch.nn.Module`):
            Any model, constrained or not.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Relative width of the brackets.

    Returns:
        [`LipschitzReport`]: its norms are **sound bounds** of single layers, computed in float64. It says nothing of
        the whole model.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: a weight holds NaN or inf.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inspect takes a torch.nn.Module, got {type(model).__name__}")
    constrained = {layer.name: layer for layer in constrained_layers(model)}
    obstacles = layer_obstacles(model)
    modules = dict(model.named_modules())
    free = [name for name, reason in obstacles.items() if reason is None]
    layers = [
        _constrained_row(constrained[name], rtol) if name in constrained else _free_row(name, modules[name], rtol)
        for name in modules
        if name in constrained or name in free
    ]
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return LipschitzReport(
        model=type(model).__name__,
        config=config if isinstance(config, LipschitzConfig) else None,
        layers=tuple(layers),
        uncovered=tuple(_uncovered(modules, set(constrained), obstacles)),
    )


def _constrained_row(layer: ConstrainedLayer, rtol: float) -> LayerReport:
    parametrization = layer.parametrization
    raw, effective = parametrization.original.detach(), layer.effective_weight
    before = _norm(raw, parametrization.geometry, rtol, layer.name)
    after = before if torch.equal(raw, effective) else _norm(effective, parametrization.geometry, rtol, layer.name)
    constant = parametrization.lipschitz.item()
    if after > constant:
        after = _norm(effective, parametrization.geometry, TIGHT_RTOL, layer.name)
    return LayerReport(layer.name, _plain_name(layer.module), tuple(raw.shape), constant, before, after)


def _free_row(name: str, module: nn.Module, rtol: float) -> LayerReport:
    norm = _norm(module.weight.detach(), geometry_of(module), rtol, name)
    return LayerReport(name, _plain_name(module), tuple(module.weight.shape), None, norm, norm)


def _norm(weight: Tensor, geometry: Any, rtol: float, name: str) -> float:
    try:
        return weight_norm_bound(weight, geometry, rtol, certified=True).item()
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name}: {error}") from error


def _uncovered(
    modules: dict[str, nn.Module], constrained: set[str], obstacles: dict[str, str | None]
) -> list[UncoveredModule]:
    found = []
    for name, module in modules.items():
        kind = _plain_name(module)
        if name in constrained or ".parametrizations" in f".{name}" or isinstance(module, HARMLESS):
            continue
        if name in obstacles:
            found.append(UncoveredModule(name, kind, obstacles[name] or "not constrained"))
        elif "Attention" in kind and not any(
            "Attention" in type(child).__name__ for child in module.modules() if child is not module
        ):
            found.append(UncoveredModule(name, kind, UNBOUNDED_ATTENTION))
        elif next(module.children(), None) is None:
            found.append(UncoveredModule(name, kind, _reason(kind)))
        elif any(True for _ in module.parameters(recurse=False)):
            own = ", ".join(key for key, _ in module.named_parameters(recurse=False))
            found.append(UncoveredModule(name, kind, f"parameters of its own: {own}"))
    return found


def _reason(kind: str) -> str:
    return next(
        (reason for pattern, reason in REASONS if re.search(pattern, kind)), "no bound for this kind of module"
    )


def _plain_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized") or type(module).__name__


def _layer_table(report: LipschitzReport) -> Table:
    constrained = sum(layer.lipschitz is not None for layer in report.layers)
    table = Table(title=f"{report.model}: {constrained} of {len(report.layers)} weight layers constrained, one by one")
    table.add_column("layer", overflow="fold")
    table.add_column("type", no_wrap=True)
    for heading in ("weight", "norm before", "norm after", "constant"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        constant = "not constrained" if layer.lipschitz is None else rounded_up(layer.lipschitz)
        moved = layer.norm_after != layer.norm_before
        table.add_row(
            layer.name or "(the model)",
            layer.kind,
            "×".join(map(str, layer.shape)),
            rounded_up(layer.norm_before),
            Text(rounded_up(layer.norm_after), style="green" if moved else ""),
            constant,
        )
    return table


def _uncovered_table(report: LipschitzReport) -> Table:
    table = Table(title="NOT covered by any bound above")
    table.add_column("module", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("why")
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for module in report.uncovered:
        groups[re.sub(r"\b\d+\b", "*", module.name), module.kind, module.reason].append(module.name)
    for (pattern, kind, reason), names in groups.items():
        table.add_row((names[0] if len(names) == 1 else pattern) or "(the model)", kind, str(len(names)), reason)
    table.add_row("between modules", "functional", "", "residual sums, softmax, reshapes: not seen here")
    return table


def rounded_up(value: float) -> str:
    """Four significant digits, never below the value: what is printed is a bound as well."""
    if value == 0:
        return "0"
    digits = _digits(value)
    shown = round(value, digits)
    if shown < value:
        shown = round(shown + 10.0**-digits, digits)
    return f"{shown:.{max(_digits(shown), 0)}f}" if 1e-4 <= value < 1e6 else f"{shown:.3e}"


def _digits(value: float) -> int:
    return 3 - int(f"{value:e}".rpartition("e")[2])
