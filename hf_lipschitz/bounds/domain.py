"""What is known of a value in a graph, and of a whole graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dependent:
    """A tensor that depends on the chosen input x, or a tuple of such.

    `log_lipschitz` is log L where ‖v(x) - v(y)‖ ≤ L ‖x - y‖ in Frobenius norms of whole tensors; -inf is a constant.
    """

    log_lipschitz: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A node for which no finite constant is known: its name in the graph, its operator, and why."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.reason}"


@dataclass(frozen=True)
class LipschitzBound:
    r"""A **sound bound** of the Lipschitz constant of a graph, or inf with the nodes that are to blame.

    Args:
        log_value (`float`):
            Natural logarithm of the bound, of all outputs together: the root of the sum of their squares.
        blame (`tuple[Refusal]`):
            Nodes without a finite constant on the way to an output; empty where the bound is finite.
        per_node (`dict[str, float]`):
            For each node that depends on the input, the logarithm of the constant up to there.

    It bounds the function in exact arithmetic, at the given values of the other inputs and at the given shapes.
    """

    log_value: float
    blame: tuple[Refusal, ...] = ()
    per_node: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The bound itself; inf where it is above the largest float64."""
        try:
            return math.exp(self.log_value)
        except OverflowError:
            return math.inf

    def __str__(self) -> str:
        if not self.blame:
            return f"Lipschitz constant at most {self.value:.6g}"
        return "no finite Lipschitz constant is known:\n" + "\n".join(f"  {refusal}" for refusal in self.blame)


def scaled(log_lipschitz: float, gain: float) -> float:
    """log(gain · L). Zero times inf stays inf, for nothing is known of such a value; a gain of NaN is inf."""
    if log_lipschitz == math.inf or not math.isfinite(gain):
        return math.inf
    return log_lipschitz + math.log(gain) if gain > 0 else -math.inf


def log_sum(logs: list[float]) -> float:
    """log Σ exp, rounded up by the interpreter with everything else."""
    top = max(logs, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(log - top) for log in logs))


def log_root_sum_squares(logs: list[float]) -> float:
    """log √Σ exp², of values side by side in one tensor."""
    return log_sum([2 * log for log in logs]) / 2
