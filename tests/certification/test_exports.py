from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
from scipy import stats

from hf_lipschitz.certification import ABSTAIN, Certificate
from hf_lipschitz.certification.exports import columns_of, ecdf, write_csv


def certificate(index: int, prediction: int, radius: float) -> Certificate:
    return Certificate(
        prediction=prediction, radius=radius, norm="l2", unit="x", p_lower=0.1 + 0.2, p_upper=None, alpha=1e-3, n=10,
        method="one_class", stop_reason="fixed_n", sigma=0.1, seed=0, index=index, label=f"class {prediction}",
    )  # fmt: skip


CERTIFICATES = [certificate(2, 1, 0.1), certificate(0, ABSTAIN, 0.0), certificate(1, 0, 1 / 3)]
LABELS = [0, 1, 1]


def test_columns_hold_every_field_and_go_into_a_dataset() -> None:
    columns = columns_of(CERTIFICATES, LABELS)
    names = {field.name for field in fields(Certificate)} - {"label"} | {"predicted_label", "true", "is_right"}
    assert set(columns) == names
    table = datasets.Dataset.from_dict(columns)
    assert table["radius"][:] == [c.radius for c in CERTIFICATES]
    assert table["true"][:] == [1, 0, 1]
    assert table["is_right"][:] == [True, False, False]
    assert "true" not in columns_of(CERTIFICATES)


def test_csv_gives_back_the_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "c.csv", CERTIFICATES, LABELS)
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["radius"]) for row in rows] == [c.radius for c in CERTIFICATES]
    assert [float(row["p_lower"]) for row in rows] == [0.1 + 0.2] * 3
    assert [row["predicted_label"] for row in rows] == ["class 1", "class -1", "class 0"]


def test_an_index_without_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match="without a label"):
        columns_of(CERTIFICATES, [0, 1])


def test_the_distribution_function_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).integers(0, 20, 200) / 20
    points, shares = ecdf(values)
    expected = stats.ecdf(values).cdf
    np.testing.assert_allclose(points, expected.quantiles)
    np.testing.assert_allclose(shares, expected.probabilities)
    for wrong in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="at least one value"):
            ecdf(wrong)
