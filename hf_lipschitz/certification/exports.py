"""Certificates as tables: columns, CSV, and the distribution of what was bounded."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lipschitz.certification.certificate import Certificate


def columns_of(certificates: Sequence[Certificate], labels: Sequence[int] | None = None) -> dict[str, list[Any]]:
    """
    One list a field of [`Certificate`], and with `labels` the true class and whether the prediction is right: what
    `datasets.Dataset.from_dict` and `pandas.DataFrame` take.

    Args:
        certificates (`Sequence[Certificate]`):
            In any order.
        labels (`Sequence[int]`, *optional*):
            True class of each index: `labels[certificate.index]`.

    Raises:
        `ValueError`: an index has no label.
    """
    columns: dict[str, list[Any]] = {
        field.name: [getattr(certificate, field.name) for certificate in certificates]
        for field in fields(Certificate)
        if field.name != "label"
    }
    columns["predicted_label"] = [certificate.label for certificate in certificates]
    if labels is not None:
        if any(not 0 <= certificate.index < len(labels) for certificate in certificates):
            raise ValueError(f"a certificate has an index without a label; there are {len(labels)} labels.")
        columns["true"] = [int(labels[certificate.index]) for certificate in certificates]
        columns["is_right"] = [a == b for a, b in zip(columns["prediction"], columns["true"], strict=True)]
    return columns


def write_csv(
    path: str | os.PathLike[str], certificates: Sequence[Certificate], labels: Sequence[int] | None = None
) -> None:
    """Writes [`columns_of`] with a header; floats in full, so that reading them back gives the same numbers."""
    columns = columns_of(certificates, labels)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def ecdf(values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Empirical distribution function, as of the `p_lower` of many certificates.

    Args:
        values (`Sequence[float]`):
            At least one, none NaN.

    Returns:
        `points`, `shares`: arrays of the different values, increasing, and of the share of values at most each.

    Raises:
        `ValueError`: there are no values, or NaN among them.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or np.isnan(found).any():
        raise ValueError("ecdf needs at least one value, and no NaN.")
    points, counts = np.unique(found, return_counts=True)
    return points, np.cumsum(counts) / len(found)
