"""inspect: what is constrained, by how much, and what is not."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from hf_lipschitz.blocks import block_layers, describe_blocks
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.conversion import layer_obstacles
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.holders import weight_layouts
from hf_lipschitz.model_config import config_of
from hf_lipschitz.nn.activations import Bounded, GroupSort, SlopeCorrected
from hf_lipschitz.nn.attachment import ConstrainedLayer, constrained_layers
from hf_lipschitz.nn.attention import BallRadii
from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm
from hf_lipschitz.replacements import BLOCKS, SEPARATOR


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
    (r"Rotary", "rotates queries and keys, which keeps their norms"),
    (r"Embedding", "looks up tokens or positions; certify from the embeddings on"),
    (r"GELU|SiLU|Swish|Mish", "slope above 1 (at most 1.13), not limited"),
    (r"Tanh|ReLU|LeakyReLU|Sigmoid|Softplus|Hardtanh", "slope at most 1, but not part of any layer's bound"),
    (r"Pool", "not part of any layer's bound"),
    (r"ConvTranspose|Bilinear|Linear|Conv", "weight not constrained"),
)
TIGHT_RTOL = 1e-7
FLOOR_NORMS = (FloorStdLayerNorm, FloorStdRMSNorm, FloorStdGroupNorm)
COVERED = (*FLOOR_NORMS, CentredNorm, Bounded, GroupSort, SlopeCorrected, BallRadii)
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
    is_in_block: bool = False


@dataclass(frozen=True)
class Replacement:
    """A part that was replaced: what it became, and a sound bound of its constant where it has one by itself."""

    name: str
    kind: str
    lipschitz: float | None
    note: str


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
            The linear maps with bounds of their norms: `norm_before` of the raw weight, `norm_after` of the effective
            one, `lipschitz` the constant, `None` where the layer is not constrained. Of several matrices in one
            tensor it is the largest norm. Layers `is_in_block` need no constant: their block is 1-Lipschitz.
        replacements (`tuple[Replacement]`):
            Norms, attention, activations, feed-forward pairs and residual branches that were replaced.
        uncovered (`tuple[UncoveredModule]`):
            Everything else that computes something.
    """

    model: str
    config: LipschitzConfig | None
    layers: tuple[LayerReport, ...]
    uncovered: tuple[UncoveredModule, ...]
    replacements: tuple[Replacement, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "model": self.model,
            "config": None if self.config is None else self.config.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "replacements": [dataclasses.asdict(part) for part in self.replacements],
            "uncovered": [dataclasses.asdict(module) for module in self.uncovered],
            "is_model_bound": False,
        }

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=118, color_system=None).print(self)
        return buffer.getvalue().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _layer_table(self)
        if self.replacements:
            yield _replacement_table(self)
        yield _uncovered_table(self)
        yield Text(WARNING, style="bold")


def inspect(model: nn.Module, *, rtol: float = 1e-3) -> LipschitzReport:
    """Bounds the spectral norm of each linear map, and lists what was replaced and what no bound covers.

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
    constrained: dict[str, list[ConstrainedLayer]] = defaultdict(list)
    for layer in constrained_layers(model):
        constrained[layer.name].append(layer)
    config = config_of(model)
    in_blocks = block_layers(model, () if config is None else config.replaced.get(BLOCKS, ()))
    obstacles = layer_obstacles(model)
    modules = dict(model.named_modules())
    layers: list[LayerReport] = []
    for name, module in modules.items():
        if name in constrained:
            layers += [_constrained_row(layer, rtol) for layer in constrained[name]]
        elif name in obstacles and obstacles[name] is None:
            is_in_block = name in in_blocks
            layers += [_free_row(name, module, *item, is_in_block, rtol) for item in weight_layouts(module).items()]
    replacements = _replacements(model, config)
    return LipschitzReport(
        model=type(model).__name__,
        config=config,
        layers=tuple(layers),
        uncovered=tuple(_uncovered(modules, set(constrained), obstacles, in_blocks)),
        replacements=tuple(replacements),
    )


def _constrained_row(layer: ConstrainedLayer, rtol: float) -> LayerReport:
    constraint = layer.parametrization
    raw, effective = constraint.original.detach(), layer.effective_weight
    before = _norm(raw, constraint.layout, rtol, layer.full_name)
    after = before if torch.equal(raw, effective) else _norm(effective, constraint.layout, rtol, layer.full_name)
    constant = constraint.lipschitz.item()
    if after > constant:
        after = _norm(effective, constraint.layout, TIGHT_RTOL, layer.full_name)
    name = _row_name(layer.name, layer.tensor_name)
    return LayerReport(name, _plain_name(layer.module), tuple(raw.shape), constant, before, after)


def _free_row(
    name: str, module: nn.Module, tensor_name: str, layout: WeightLayout, is_in_block: bool, rtol: float
) -> LayerReport:
    weight = getattr(module, tensor_name).detach()
    norm = _norm(weight, layout, rtol, name)
    row_name, shape = _row_name(name, tensor_name), tuple(weight.shape)
    return LayerReport(row_name, _plain_name(module), shape, None, norm, norm, is_in_block)


def _row_name(name: str, tensor_name: str) -> str:
    """Of a module with one weight its own, otherwise that of the tensor."""
    return name if tensor_name == "weight" else f"{name}.{tensor_name}".removeprefix(".")


def _replacements(model: nn.Module, config: LipschitzConfig | None) -> list[Replacement]:
    found = []
    replaced = {} if config is None else config.replaced
    blocks = replaced.get(BLOCKS, ())
    for name, note in zip(blocks, describe_blocks(model, blocks), strict=True):
        found.append(Replacement(name, _plain_name(model.get_submodule(name)), 1.0, note))
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, FLOOR_NORMS):
            found.append(Replacement(name, kind, module.lipschitz(), f"divisor at least {module.s_min.item():.4g}"))
        elif isinstance(module, CentredNorm):
            found.append(Replacement(name, kind, module.lipschitz(), "no division"))
        elif isinstance(module, (Bounded, GroupSort)):
            found.append(Replacement(name, kind, 1.0, "slopes within [-1, 1]"))
        elif isinstance(module, BallRadii):
            radii = f"queries {module.query:.4g}, keys {module.key:.4g}, values {module.value:.4g}"
            note = f"radii: {radii}" if module.is_finite else "radii are infinite: run calibrate"
            found.append(Replacement(name.rpartition(".")[0], kind, None, note))
    for entry in replaced.get("norms", ()):
        name, separator, layer = entry.partition(SEPARATOR)
        if separator:
            found.append(Replacement(name, "BatchNorm", None, f"folded into {layer}"))
    counts = Counter(replaced.get("residuals", ()))
    for name, calls in counts.items():
        share = config.residual_budget / counts.total()
        note = f"branch ends here{f', {calls} times' if calls > 1 else ''}: constants times {share:.4g}"
        found.append(Replacement(name, "residual branch", None, note))
    return found


def _norm(weight: Tensor, layout: WeightLayout, rtol: float, name: str) -> float:
    try:
        return layout.norm_bound(weight, rtol, certified=True).item()
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name}: {error}") from error


def _uncovered(
    modules: dict[str, nn.Module],
    constrained: set[str],
    obstacles: dict[str, str | None],
    in_blocks: tuple[str, ...],
) -> list[UncoveredModule]:
    found = []
    covered = {name for name, module in modules.items() if isinstance(module, COVERED)}
    for name, module in modules.items():
        kind = _plain_name(module)
        is_inside = any(name == other or name.startswith(f"{other}.") for other in covered)
        if is_inside or ".parametrizations" in f".{name}" or isinstance(module, HARMLESS) or name in in_blocks:
            continue
        if _is_attention(module):
            balls = [child for child in module.children() if isinstance(child, BallRadii)]
            own = _own_parameters(module)
            if not balls or not balls[0].is_finite:
                also = f"; parameters of its own: {own}" if own else ""
                found.append(UncoveredModule(name, kind, UNBOUNDED_ATTENTION + also))
            elif own:
                found.append(UncoveredModule(name, kind, f"parameters of its own: {own}"))
        elif name in constrained:
            continue
        elif name in obstacles:
            found.append(UncoveredModule(name, kind, obstacles[name] or "not constrained"))
        elif next(module.children(), None) is None:
            found.append(UncoveredModule(name, kind, _reason(kind)))
        elif _own_parameters(module):
            found.append(UncoveredModule(name, kind, f"parameters of its own: {_own_parameters(module)}"))
    return found


def _own_parameters(module: nn.Module) -> str:
    """Names of those that belong to no layer and are no bias."""
    own = [key for key, p in module.named_parameters(recurse=False) if not (p.dim() == 1 and "bias" in key)]
    return ", ".join(own)


def _is_attention(module: nn.Module) -> bool:
    """Whether it computes attention itself, rather than a module inside it."""
    inner = [child for child in module.modules() if child is not module]
    return "Attention" in _plain_name(module) and not any("Attention" in type(child).__name__ for child in inner)


def _reason(kind: str) -> str:
    return next(
        (reason for pattern, reason in REASONS if re.search(pattern, kind)), "no bound for this kind of module"
    )


def _plain_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized") or type(module).__name__


def _layer_table(report: LipschitzReport) -> Table:
    constrained = sum(layer.lipschitz is not None for layer in report.layers)
    in_blocks = sum(layer.is_in_block for layer in report.layers)
    others = f", {in_blocks} in blocks" if in_blocks else ""
    title = f"{report.model}: {constrained} of {len(report.layers)} weight layers constrained, one by one{others}"
    table = Table(title=title)
    table.add_column("layer", overflow="fold")
    table.add_column("type", no_wrap=True)
    for heading in ("weight", "norm before", "norm after", "constant"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        free = "in a block" if layer.is_in_block else "not constrained"
        constant = free if layer.lipschitz is None else rounded_up(layer.lipschitz)
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


def _replacement_table(report: LipschitzReport) -> Table:
    table = Table(title="Replaced")
    table.add_column("module", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("constant", justify="right", no_wrap=True)
    table.add_column("what it is")
    groups: dict[tuple[str, str, str], list[Replacement]] = defaultdict(list)
    for part in report.replacements:
        note = part.note if part.lipschitz is None else ""
        groups[_pattern(part.name), part.kind, note].append(part)
    for (pattern, kind, _), parts in groups.items():
        worst = max(parts, key=lambda part: part.lipschitz or 0.0)
        name = parts[0].name if len(parts) == 1 else pattern
        constant = "" if worst.lipschitz is None else rounded_up(worst.lipschitz)
        table.add_row(name or "(the model)", kind, str(len(parts)), constant, worst.note)
    return table


def _uncovered_table(report: LipschitzReport) -> Table:
    table = Table(title="NOT covered by any bound above")
    table.add_column("module", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("why")
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for module in report.uncovered:
        groups[_pattern(module.name), module.kind, module.reason].append(module.name)
    for (pattern, kind, reason), names in groups.items():
        table.add_row((names[0] if len(names) == 1 else pattern) or "(the model)", kind, str(len(names)), reason)
    table.add_row("between modules", "functional", "", "residual sums, softmax, reshapes: not seen here")
    return table


def _pattern(name: str) -> str:
    """The name with a star for each number, the same for all layers of a stack."""
    return re.sub(r"\b\d+\b", "*", name)


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
