"""The figures of a certification run, as the console, the report and the model card print them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from scipy.stats import binomtest

from hf_lipschitz.certification import ABSTAIN, Certificate, certified_accuracy


@dataclass(frozen=True)
class RadiusRow:
    """Certified accuracy at one radius, with the 95 % Clopper-Pearson interval over the inputs."""

    radius: float
    certified: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class CertificationSummary:
    """What a list of certificates amounts to."""

    count: int
    unit: str
    norm: str
    method: str
    sigma: float
    n: int
    alpha: float
    abstained: int
    correct: int
    median_radius: float
    rows: tuple[RadiusRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title=f"Certified accuracy on {self.count} held-out inputs")
        table.add_column(f"{self.norm} radius >, {self.unit}", justify="right")
        table.add_column("certified accuracy", justify="right")
        table.add_column("95 % interval", justify="right")
        for row in self.rows:
            table.add_row(f"{row.radius:g}", f"{row.accuracy:.1%}", f"{row.low:.1%} to {row.high:.1%}")
        noise = f", sigma {self.sigma:g}, mean n {self.n:,}, alpha {self.alpha:g}" if self.n else ""
        table.caption = f"{self.method}{noise}; {self.abstained} abstentions, median radius {self.median_radius:.3g}"
        return table


def summarize(
    certificates: Sequence[Certificate], labels: Sequence[int], radii: Sequence[float] | None = None
) -> CertificationSummary:
    """Counts a list of certificates against the true classes; abstentions count as wrong.

    Args:
        certificates (`Sequence[Certificate]`):
            Not empty, one norm and unit.
        labels (`Sequence[int]`):
            As many.
        radii (`Sequence[float]`, *optional*):
            Where to state the accuracy; defaults to 0 and the quarters of the largest radius found.
    """
    largest = max(certificate.radius for certificate in certificates)
    radii = [0.0, *(largest * quarter / 4 for quarter in (1, 2, 3))] if radii is None else list(radii)
    count, first = len(certificates), certificates[0]
    rows = []
    for radius, accuracy in zip(radii, certified_accuracy(certificates, labels, radii), strict=True):
        certified = round(accuracy * count)
        interval = binomtest(certified, count).proportion_ci(0.95, method="exact")
        rows.append(RadiusRow(float(radius), certified, accuracy, float(interval.low), float(interval.high)))
    return CertificationSummary(
        count=count,
        unit=first.unit,
        norm=first.norm,
        method=first.method,
        sigma=first.sigma,
        n=round(statistics.mean(certificate.n for certificate in certificates)),
        alpha=first.alpha,
        abstained=sum(certificate.prediction == ABSTAIN for certificate in certificates),
        correct=sum(c.prediction == y for c, y in zip(certificates, labels, strict=True)),
        median_radius=statistics.median(certificate.radius for certificate in certificates),
        rows=tuple(rows),
    )
