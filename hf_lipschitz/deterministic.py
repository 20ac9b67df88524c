"""Deterministic certificates: the margin of the logits over the Lipschitz constants of their differences."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.bounds import BoundedGraph
from hf_lipschitz.bounds.export import own
from hf_lipschitz.bounds.interpreter import Walk
from hf_lipschitz.bounds.logs import exponential
from hf_lipschitz.certification import ABSTAIN, Certificate
from hf_lipschitz.conversion import materialized
from hf_lipschitz.integrations.base_classifiers import EMBEDDING_UNIT, PIXEL_UNIT
from hf_lipschitz.integrations.preprocessing import PIXELS
from hf_lipschitz.model_bounds import EMBEDDINGS, function_of, graph_of


DETERMINISTIC = "deterministic"
# Halvings of the logarithm of the radius of the ball on which a local bound is taken.
_HALVINGS = 8
# Covers the float64 norm of a difference of two rows.
_ROUNDING = 1 + 1e-9
_UNITS = {PIXELS: PIXEL_UNIT, EMBEDDINGS: EMBEDDING_UNIT}


def certify_deterministic(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    wrt: str | None = None,
    image_processor: Any = None,
    local: bool = False,
) -> list[Certificate]:
    r"""Certifies the model itself, without noise and without a probability: one certificate a row.

    With A the predicted class, \(r = \min_{j \ne A} (z_A - z_j) / L_{Aj}\), L_{Aj} a **sound bound** of the constant
    of z_A - z_j: \(\|w_A - w_j\|\) times that of the features where the logits come from a linear head with rows w,
    and at most √2 times that of all logits. No input in the open ball of radius r around the row has another
    prediction; a tie has radius 0. It holds for the function in exact arithmetic: logits are those of the model in its
    dtype.

    Args:
        model (`torch.nn.Module`):
            A classifier in evaluation mode with logits of shape `(B, K)`.
        inputs (`Mapping[str, Any]` or `Sequence[Any]`):
            A batch of B inputs of `forward`, as in [`lipschitz_bound`]. The bound is for the batch as a whole, so that
            rows may depend on each other.
        wrt (`str`, *optional*), image_processor (`BaseImageProcessor`, *optional*):
            As in [`lipschitz_bound`].
        local (`bool`, *optional*, defaults to `False`):
            Whether to take local bounds on balls around each row, certified by itself: larger radii, at some walks of
            the graph a row. The radius is at most that of the ball. Rows must not depend on each other, and each input
            with as many entries along its first axis as there are rows must belong to them, as masks do.

    Returns:
        `list[Certificate]`: with `alpha=0`, `n=0`, `sigma=0`; `score_lipschitz` is the constant of all logits. The
        radius is in the unit of the input.

    Raises:
        TypeError, ValueError: as [`lipschitz_bound`]; the logits are no `(B, K)` with K ≥ 2, or not finite; the model
            has no finite constant, with the operators to blame; with `local`, the logits of a row by itself are others
            than in the batch.
    """
    output = "logits" if hasattr(getattr(model, "config", None), "num_labels") else None
    function, named, wrt = function_of(model, inputs, wrt, output, image_processor)
    unit = _UNITS.get(wrt, wrt)
    with materialized(model), torch.no_grad():
        logits = checked_logits(function(**own(named)), len(named[wrt]))
        if local:
            rows = [_row(named, wrt, row) for row in range(len(logits))]
            _check_rows(function, named, wrt, rows)
            graphs = [graph_of(function, row, wrt) for row in rows[:1]]
            return [
                _on_balls(_graph_for(graphs, function, row, wrt), row[wrt], z, unit, index)
                for index, (row, z) in enumerate(zip(rows, logits, strict=True))
            ]
        walk = finite_walk(graph_of(function, named, wrt))
        logs = pairwise_logs(walk, logits.shape[1])
        return [certificate_of(z, logs, walk.log_value, unit, index) for index, z in enumerate(logits)]


class DeterministicClassifier:
    """A classifier of one input at a time, with its bounds by the shape of the input.

    Args:
        base_classifier (`torch.nn.Module`):
            From a batch of inputs to logits `(B, K)`, in evaluation mode, on plain weights that do not change.
        unit (`str`):
            Of the radius.
    """

    def __init__(self, base_classifier: nn.Module, unit: str) -> None:
        self.base_classifier, self.unit = base_classifier, unit
        (self._argument,) = inspect.signature(base_classifier.forward).parameters
        self._bounds: dict[tuple[int, ...], tuple[Tensor, float]] = {}

    @torch.no_grad()
    def certify(self, x: Tensor, index: int = 0) -> Certificate:
        """See [`certify_deterministic`]; `x` has no batch axis.

        Raises:
            ValueError, RuntimeError: the model is in training mode, has no finite constant, or the logits are not
                finite.
        """
        x = x.to(next(self.base_classifier.parameters()).device)
        logits = checked_logits(self.base_classifier(x[None]), 1)[0]
        if tuple(x.shape) not in self._bounds:
            walk = finite_walk(graph_of(self.base_classifier, {self._argument: x[None]}, self._argument))
            self._bounds[tuple(x.shape)] = pairwise_logs(walk, len(logits)), walk.log_value
        logs, log_value = self._bounds[tuple(x.shape)]
        return certificate_of(logits, logs, log_value, self.unit, index)


def certificate_of(logits: Tensor, logs: Tensor, log_value: float, unit: str, index: int) -> Certificate:
    """The certificate of one row of logits from the logarithms of the constants of their differences."""
    return _certificate(logits, _log_radius(logits, logs), log_value, unit, index)


def finite_walk(graph: BoundedGraph) -> Walk:
    """A global walk.

    Raises:
        ValueError: no finite constant is known; the message names the operators.
    """
    bound = graph.bound()
    if bound.log_value == math.inf:
        raise ValueError(
            f"no finite Lipschitz constant is known of the model, so that nothing can be certified: {bound.blame[0]}. "
            "print(lipschitz_bound(...)) lists what is to blame"
        )
    return graph.walk()


def pairwise_logs(walk: Walk, num_classes: int) -> Tensor:
    """log L of the differences of two logits, of shape (K, K), from the last layer where it is a linear one."""
    if not walk.outputs:
        return torch.full((num_classes, num_classes), -math.inf, dtype=torch.float64)
    (output,) = walk.outputs
    logs = torch.full((num_classes, num_classes), walk.log_value + 0.5 * math.log(2), dtype=torch.float64)
    head = output.weighted
    if head is not None and head.geometry is None and head.weight.shape[0] == num_classes:
        rows = head.weight.detach().double()
        distances = torch.linalg.vector_norm(rows[:, None] - rows[None], dim=-1) * _ROUNDING
        logs = torch.minimum(logs, head.log_lipschitz + distances.log())
    return logs


def checked_logits(logits: Any, count: int) -> Tensor:
    """Raises a ValueError where they are no finite tensor of shape (B, K) with K ≥ 2."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a classifier returns logits of shape ({count}, K) with K >= 2, got {shape}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits hold NaN or inf: check the inputs")
    return logits.detach().to("cpu", torch.float64)


def _log_radius(logits: Tensor, logs: Tensor) -> float:
    """log of min_j (z_A - z_j) / L_Aj; -inf for a tie."""
    best = int(logits.argmax())
    margins = logits[best] - logits
    others = torch.arange(len(logits)) != best
    # A difference that does not depend on the input never changes its sign.
    ratios = torch.where(margins > 0, margins.log() - logs[best], -math.inf)
    return ratios[others].min().item()


def _certificate(logits: Tensor, log_radius: float, log_value: float, unit: str, index: int) -> Certificate:
    # A constant difference has no radius at all; that of the format is finite.
    radius = min(exponential(log_radius) / _ROUNDING, torch.finfo(torch.float64).max)
    return Certificate(
        prediction=int(logits.argmax()) if radius > 0 else ABSTAIN,
        radius=radius,
        norm="l2",
        unit=unit,
        p_lower=None,
        p_upper=None,
        alpha=0.0,
        n=0,
        method=DETERMINISTIC,
        stop_reason="closed_form",
        sigma=0.0,
        seed=0,
        index=index,
        score_lipschitz=exponential(log_value),
    )


def _on_balls(graph: BoundedGraph, center: Tensor, logits: Tensor, unit: str, index: int) -> Certificate:
    """The largest r found with r ≤ the radius that the bound on the ball of radius r gives."""
    walk = graph.walk()
    best = _log_radius(logits, pairwise_logs(walk, len(logits)))
    log_value = walk.log_value

    def at(log_ball: float) -> tuple[float, float]:
        local = graph.walk(center=center, radius=math.exp(log_ball))
        return _log_radius(logits, pairwise_logs(local, len(logits))), local.log_value

    scale = math.log(max(torch.linalg.vector_norm(center).item(), 1e-6))
    if not math.isfinite(_log_radius(logits, torch.zeros_like(pairwise_logs(walk, len(logits))))):
        return _certificate(logits, best, log_value, unit, index)
    high, _ = at(scale - 20.0)
    low, high = max(best, scale - 20.0), min(high, scale + 20.0)
    for _ in range(_HALVINGS):
        if high <= low:
            break
        middle = (low + high) / 2
        found, local_value = at(middle)
        if min(found, middle) > best:
            best, log_value = min(found, middle), local_value
        low, high = (middle, high) if found > middle else (low, middle)
    return _certificate(logits, best, log_value, unit, index)


def _check_rows(function: nn.Module, inputs: dict[str, Any], wrt: str, rows: list[dict[str, Any]]) -> None:
    """Whether rows are what [`_row`] takes them for: at the inputs, and at others beside them."""
    if len(rows) < 2:
        return
    generator = torch.Generator().manual_seed(0)
    x = inputs[wrt]
    for reach in (0.0, 0.1, 1.0):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        moved = x + reach * x.abs().mean().clamp(min=1e-6) * noise
        together = checked_logits(function(**own({**inputs, wrt: moved})), len(rows))
        for number, row in enumerate(rows):
            alone = checked_logits(function(**own({**row, wrt: moved[number : number + 1]})), 1)[0]
            if not torch.allclose(alone, together[number], rtol=1e-3, atol=1e-3 * float(together.abs().max())):
                raise ValueError(
                    f"row {number} by itself has other logits than in the batch: rows depend on each other, or an "
                    f"input of {len(rows)} entries belongs to all of them. Certify one row at a time"
                )


def _row(inputs: dict[str, Any], wrt: str, row: int) -> dict[str, Any]:
    """One row of each tensor that has as many as the input."""
    count = len(inputs[wrt])
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
        for name, value in inputs.items()
    }


def _graph_for(graphs: list[BoundedGraph], function: nn.Module, row: dict[str, Any], wrt: str) -> BoundedGraph:
    """The graph of another row is that of the first one if all else is the same."""
    others = {name: value for name, value in row.items() if name != wrt}
    for graph in graphs:
        if graph.fits(row[wrt], others):
            return graph
    graphs.append(graph_of(function, row, wrt))
    return graphs[-1]
