"""The task "control" of `certification.py`: how often certificates are false where the truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import certification_loops as loops
import numpy as np
import torch
from certification_arguments import Arguments
from certification_loops import ART, COHEN, Art, Cohen, Outcome, outcome_of
from rich.console import Console
from rich.table import Table
from scipy import integrate, stats
from torch import Tensor, nn

from hf_lipschitz import lipschitz_bound
from hf_lipschitz.certification import Certificate, clopper_pearson_lower
from hf_lipschitz.certification.looks import default_looks
from hf_lipschitz.certification.windows import WINDOW


@dataclass(frozen=True)
class Control:
    """
    What one method did at one distance: false certificates, and lower bounds above the exact mean, where the method
    tells its bound.
    """

    method: str
    distance: float
    runs: int
    false_certificates: int
    false_bounds: int | None
    mean_radius: float | None

    @property
    def false(self) -> int:
        return max(self.false_certificates, self.false_bounds or 0)


def control(args: Arguments, console: Console) -> dict[str, Any]:
    """The logits are ± x₀ / σ: the smoothed class changes at x₀ = 0, for votes and for scores, by symmetry."""
    plane = nn.Linear(args.dimension, 2, bias=False).requires_grad_(False).eval()
    plane.weight.zero_()[:, 0] = torch.tensor([1.0, -1.0]) / args.sigma
    smoothing = args.smoothing(plane.to(args.device), 2)
    found: list[Control] = []
    for multiple in args.distances:
        x = torch.zeros(args.dimension, device=args.device)
        x[0] = multiple * args.sigma
        distance = float(x[0])
        for name, fields in control_fields(args, plane, x).items():
            certificates = list(many_certificates(smoothing.smoothed(args.fixed_n, **fields), x, args.runs))
            exact = exact_mean(fields.get("simplex_map"), distance, args)
            bounds = sum(certificate.p_lower > exact for certificate in certificates)
            found.append(count_false(name, distance, [outcome_of(c) for c in certificates], bounds))
        others = {COHEN: Cohen(smoothing)}
        if loops.PyTorchRandomizedSmoothing is not None:
            others[ART] = Art(smoothing, x)
        for name, method in others.items():
            found.append(
                count_false(name, distance, [method.certify(x, args.fixed_n) for _ in range(args.runs)], None)
            )
        found.append(peeking(distance, args))
    console.print(table_of_controls(found, args))
    return {"rows": [asdict(c) | dict(zip(("low", "high"), limits(c.false, c.runs), strict=True)) for c in found]}


def control_fields(args: Arguments, plane: nn.Linear, x: Tensor) -> dict[str, dict[str, Any]]:
    """Our methods. The one radius is the distance, where a certificate that goes too far is a false one."""
    bound = lipschitz_bound(plane, (x[None],))
    radii = [0.25 * args.sigma * k for k in range(10)] if args.radii is None else args.radii
    votes, scores = {"certificate": "two_class"}, args.scores("softmax")
    lipschitz = {**args.scores("sparsemax"), "certificate": "lipschitz", "score_lipschitz": bound}
    return {
        **{f"{name}, fixed n": fields for name, fields in args.ours_fixed().items()},
        "lipschitz, sparsemax, fixed n": lipschitz,
        "two_class, until the distance is decided": {**votes, "radii": (float(x[0]),)},
        "two_class, until the curve is decided": {**votes, "radii": tuple(radii)},
        "two_class, until it gains little": {**votes, "gain": 0.02 * args.sigma},
        "lvm, softmax, until the curve is decided": {**scores, "radii": tuple(radii)},
        "lipschitz, sparsemax, until the curve is decided": {**lipschitz, "radii": tuple(radii)},
    }


def many_certificates(certifier: Any, x: Tensor, runs: int) -> Iterator[Certificate]:
    """Each run has an index of its own, and with it its own noise."""
    for first in range(0, runs, WINDOW):
        indices = list(range(first, min(first + WINDOW, runs)))
        yield from (certificate for _, certificate in certifier.certify_together([x] * len(indices), indices))


def exact_mean(simplex_map: str | None, distance: float, args: Arguments) -> float:
    """Of the votes, or of the scores by this map, for the true class under noise."""
    if simplex_map is None:
        return float(stats.norm.cdf(distance / args.sigma))
    score = {"softmax": lambda t: 1 / (1 + np.exp(-2 * t)), "sparsemax": lambda t: np.clip(t + 0.5, 0.0, 1.0)}[
        simplex_map
    ]
    center, spread = distance / args.sigma / args.temperature, 1 / args.temperature
    kinks = [z for z in ((-0.5 - center) / spread, (0.5 - center) / spread) if abs(z) < 10]
    density = stats.norm.pdf
    return integrate.quad(lambda z: score(center + spread * z) * density(z), -10, 10, points=kinks, limit=200)[0]


def count_false(method: str, distance: float, outcomes: Sequence[Outcome], bounds: int | None) -> Control:
    wrong = sum(o.radius > 0 and (o.prediction != 0 or o.radius > distance) for o in outcomes)
    return Control(method, distance, len(outcomes), wrong, bounds, mean(o.radius for o in outcomes))


def peeking(distance: float, args: Arguments) -> Control:
    """Not a method of anyone here: the bound for one fixed n, at all of alpha, at every look; the best counts."""
    looks = np.array(default_looks(args.fixed_n))
    p = float(stats.norm.cdf(distance / args.sigma))
    generator = np.random.default_rng(args.seed)
    votes = generator.binomial(np.diff(looks, prepend=0), p, size=(args.runs, len(looks))).cumsum(axis=1)
    wrong = int((clopper_pearson_lower(votes, looks, args.alpha) > p).any(axis=1).sum())
    return Control("[unsound] a fixed-n bound at every look", distance, args.runs, wrong, wrong, None)


def limits(false: int, runs: int) -> tuple[float, float]:
    """One-sided exact 95 % limits of a rate, each for itself."""
    low = float(stats.beta.ppf(0.05, false, runs - false + 1)) if false else 0.0
    high = float(stats.beta.ppf(0.95, false + 1, runs - false)) if false < runs else 1.0
    return low, high


def table_of_controls(found: list[Control], args: Arguments) -> Table:
    title = f"{args.runs} runs each, n at most {args.fixed_n:,}, alpha {args.alpha:g}, sigma {args.sigma:g}"
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for column in (
        "distance",
        "mean radius",
        "false certificates",
        "false bounds",
        "lower limit",
        "upper limit",
        "alpha",
    ):
        table.add_column(column, justify="right")
    table.add_column("")
    for c in found:
        low, high = limits(c.false, c.runs)
        table.add_row(
            c.method.replace("[", "\\["),
            f"{c.distance:g}",
            "-" if c.mean_radius is None else f"{c.mean_radius:.3f}",
            f"{c.false_certificates / c.runs:.2%}",
            "-" if c.false_bounds is None else f"{c.false_bounds / c.runs:.2%}",
            f"{low:.2%}",
            f"{high:.2%}",
            f"{args.alpha:.2%}",
            "above alpha" if low > args.alpha else "",
        )
    return table
