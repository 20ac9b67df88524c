"""The certified-accuracy curve."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest

from hf_lipschitz.certification import Certificate, certified_accuracy


def certified_accuracy_curve(
    certificates: Sequence[Certificate],
    labels: Sequence[int],
    path: str | os.PathLike[str],
    *,
    clean_accuracy: float | None = None,
    clean_count: int | None = None,
    title: str | None = None,
) -> None:
    """Draws certified accuracy against radius as a step function, with a 95 % Clopper-Pearson band over the inputs.

    Args:
        certificates (`Sequence[Certificate]`):
            One an input, all in one norm and unit.
        labels (`Sequence[int]`):
            True classes. An abstention counts as wrong.
        path (`str` or `os.PathLike`):
            Of the image; the ending chooses the format.
        clean_accuracy (`float`, *optional*):
            Of the base classifier on its own, drawn as a line.
        clean_count (`int`, *optional*):
            On how many inputs, for the legend.
        title (`str`, *optional*):
            Of the figure.

    Raises:
        ValueError: there are no certificates, or not as many labels.
    """
    right = [c.radius for c, y in zip(certificates, labels, strict=True) if c.prediction == y]
    longest = max((c.radius for c in certificates), default=0.0)
    edges = np.unique([0.0, *right, longest * 1.05 or 1.0])
    share = np.array(certified_accuracy(certificates, labels, edges[:-1]))
    count = len(certificates)
    bands = [binomtest(round(p * count), count).proportion_ci(0.95, method="exact") for p in share]

    figure = Figure(figsize=(6.0, 3.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = [band.low for band in bands], [band.high for band in bands]
    axes.stairs(high, edges, baseline=low, fill=True, color="C0", alpha=0.15, label=f"95 % interval, {count} inputs")
    axes.stairs(share, edges, baseline=None, color="C0", linewidth=2, label=_legend(certificates[0]))
    if clean_accuracy is not None:
        inputs = "" if clean_count is None else f", {clean_count} inputs"
        label = f"base classifier, clean accuracy{inputs}"
        axes.axhline(clean_accuracy, color="0.35", linestyle="--", linewidth=1, label=label)
    axes.set(
        xlim=(0, edges[-1]), ylim=(0, 1.02), xlabel=f"ℓ₂ radius ({certificates[0].unit})", ylabel="certified accuracy"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


def _legend(certificate: Certificate) -> str:
    name = certificate.method.replace("_", "-")
    return f"certified, {name}, σ = {certificate.sigma:g}, n = {certificate.n:,}, α = {certificate.alpha:g}"
