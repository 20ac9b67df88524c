"""Mean and standard deviation over seeds, one line a regulariser, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from regularized_runs import Figures, Setting
from regularizers import TITLES
from rich.table import Table


COLUMNS = ("regulariser", "value", "seeds", "accuracy", "loss", "λ_max", "trace", "mean ‖h‖²", "training, s")
Runs = Sequence[tuple[Setting, Figures]]


def lines(runs_of: Mapping[str, Runs]) -> list[tuple[str, ...]]:
    """What stands below `COLUMNS`, from the runs of each method over the seeds."""
    found = []
    for method, runs in runs_of.items():
        value = runs[0][0].value
        figures = [figures for _, figures in runs]
        found.append(
            (
                TITLES[method],
                "" if value is None else f"{value:g}",
                str(len(runs)),
                over_seeds([100 * f.accuracy for f in figures], ".1f", ".1f") + " %",
                over_seeds([f.loss for f in figures]),
                over_seeds([f.largest_eigenvalue for f in figures]),
                over_seeds([f.trace for f in figures]),
                over_seeds([f.mean_square_norm for f in figures]),
                f"{mean(f.seconds for f in figures):.0f}",
            )
        )
    return found


def over_seeds(values: Sequence[float], of_mean: str = ".3g", of_deviation: str = ".1g") -> str:
    """The mean, and the sample standard deviation where there is more than one value."""
    if len(values) == 1:
        return format(values[0], of_mean)
    return f"{mean(values):{of_mean}} ± {stdev(values):{of_deviation}}"


def table_of(found: Sequence[tuple[str, ...]], title: str) -> Table:
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for line in found:
        table.add_row(*line)
    return table


def markdown_of(found: Sequence[tuple[str, ...]]) -> str:
    rule = ("---",) * len(COLUMNS)
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, rule, *found))
