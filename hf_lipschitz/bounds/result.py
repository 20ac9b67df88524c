"""The bound of a whole model, where it comes from, and how it prints."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hf_lipschitz.bounds.logs import exponential


# Rows of the printed table; a factor below the least one is not worth a row.
_ROWS, _LEAST_FACTOR = 15, 1.005
_WIDTH = 118


@dataclass(frozen=True)
class Cost:
    """What one node of the graph contributes.

    Args:
        node (`str`):
            Its name in the graph.
        operator (`str`):
            As `aten.linear.default`.
        module (`str`):
            Name of the module in which it is, as in `named_modules`; empty for the model itself.
        log_factor (`float`):
            Natural logarithm of the factor by which its constant is above the largest of its arguments; inf for a node
            without a finite constant.
        reason (`str`):
            Why there is none.
        advice (`str`):
            What would make it smaller; empty where nothing here does.
    """

    node: str
    operator: str
    module: str
    log_factor: float
    reason: str = ""
    advice: str = ""

    def __str__(self) -> str:
        where = f", in {self.module}" if self.module else ""
        what = self.reason or f"times {_number(self.log_factor)}"
        return f"{self.node} ({self.operator}){where}: {what}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class LipschitzBound:
    r"""A **sound bound** of a Lipschitz constant, or inf with the nodes that are to blame; `print` shows a table.

    \(\|f(x) - f(y)\| \le L\,\|x - y\|\) in Frobenius norms of whole tensors, for the function in exact arithmetic, at
    the given values of the other inputs and the given shapes.

    Args:
        log_value (`float`):
            log L.
        blame (`tuple[Cost]`):
            Where it is inf, the nodes without a finite constant. Otherwise the nodes along the chain of largest
            constants, the most costly first; their factors multiply to L.
        per_node (`dict[str, float]`):
            For each node that depends on the input, the logarithm of the constant up to there.
        wrt (`str`):
            The input.
        radius (`float`, *optional*):
            Of the ball of inputs on which it holds; `None` for all inputs.
        is_sound (`bool`):
            Whether it is proved, as every bound of this library is.
        shape (`tuple[int]`, *optional*):
            Of the input for which it holds.
    """

    log_value: float
    blame: tuple[Cost, ...] = ()
    per_node: dict[str, float] = field(default_factory=dict, repr=False)
    wrt: str = ""
    radius: float | None = None
    is_sound: bool = True
    shape: tuple[int, ...] | None = None

    @property
    def value(self) -> float:
        """L; inf where it is above the largest float64, whose logarithm `log_value` still has."""
        return exponential(self.log_value)

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH, color_system=None).print(self)
        return buffer.getvalue().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.headline(), style="bold")
        if self.log_value == math.inf:
            yield _refusals(self.blame)
        elif self.blame:
            yield _by_kind(self.blame)
            yield _by_node(self.blame)

    def headline(self) -> str:
        """The bound in one line."""
        where = "" if self.radius is None else f" on the ball of radius {self.radius:g}"
        wrt = f" with respect to {self.wrt}" if self.wrt else ""
        if self.log_value == math.inf:
            return f"no finite Lipschitz constant is known{wrt}{where}"
        return f"Lipschitz constant at most {_number(self.log_value)}{wrt}{where}"


def _refusals(costs: tuple[Cost, ...]) -> Table:
    table = Table(title="Where no constant is known")
    for column in ("module", "operator", "why", "what to do"):
        table.add_column(column, overflow="fold")
    for cost in costs[:_ROWS]:
        table.add_row(cost.module or "(model)", cost.operator, cost.reason, cost.advice)
    if len(costs) > _ROWS:
        table.add_row(f"{len(costs) - _ROWS} others", "", "", "")
    return table


def _by_kind(costs: tuple[Cost, ...]) -> Table:
    table = Table(title="What it is made of: factors along the chain of largest constants")
    for column, justify in (("operator", "left"), ("nodes", "right"), ("factor", "right"), ("what to do", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    kinds: dict[str, list[Cost]] = {}
    for cost in costs:
        kinds.setdefault(cost.operator, []).append(cost)
    totals = {kind: math.fsum(cost.log_factor for cost in group) for kind, group in kinds.items()}
    for kind in sorted(totals, key=lambda kind: -totals[kind]):
        if abs(totals[kind]) > math.log(_LEAST_FACTOR):
            advice = kinds[kind][0].advice if totals[kind] > 0 else ""
            table.add_row(kind, str(len(kinds[kind])), _number(totals[kind]), advice)
    return table


def _by_node(costs: tuple[Cost, ...]) -> Table:
    table = Table(title="The most costly nodes")
    for column, justify in (("module", "left"), ("operator", "left"), ("factor", "right")):
        table.add_column(column, justify=justify, overflow="fold")
    shown = [cost for cost in costs[:_ROWS] if cost.log_factor > math.log(_LEAST_FACTOR)]
    for cost in shown:
        table.add_row(cost.module or "(model)", cost.operator, _number(cost.log_factor))
    if len(costs) > len(shown):
        rest = math.fsum(cost.log_factor for cost in costs[len(shown) :])
        table.add_row(f"{len(costs) - len(shown)} others", "", _number(rest))
    return table


def _number(log: float) -> str:
    """exp(log) with three digits, however large."""
    if log == -math.inf:
        return "0"
    if abs(log) < 13:
        return f"{math.exp(log):.4g}"
    exponent = math.floor(log / math.log(10))
    mantissa = math.exp(log - exponent * math.log(10))
    return f"{mantissa:.2f}e{exponent:+d}" if exponent < 300 else f"10^{log / math.log(10):.1f}"
