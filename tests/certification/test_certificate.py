from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.certification.certificate import ABSTAIN, Certificate, certified_accuracy


def certificate(prediction: int = 1, radius: float = 0.1 + 0.2, **changes: object) -> Certificate:
    values = {
        "norm": "l2",
        "unit": "input",
        "p_lower": 0.7,
        "p_upper": 1 / 3,
        "alpha": 1e-3,
        "n": 10_000,
        "method": "two_class",
        "stop_reason": "fixed_n",
        "sigma": 0.25,
        "seed": -3,
        "index": 17,
        **changes,
    }
    return Certificate(prediction=prediction, radius=radius, **values)


ABSTENTION = certificate(ABSTAIN, 0.0)


@given(
    radius=st.floats(1e-300, 1e300),
    p_lower=st.floats(0, 1),
    p_upper=st.none() | st.floats(0, 1),
    seed=st.integers(),
    label=st.none() | st.text(),
)
def test_json_round_trip_is_exact(
    radius: float, p_lower: float, p_upper: float | None, seed: int, label: str | None
) -> None:
    original = certificate(3, radius, p_lower=p_lower, p_upper=p_upper, seed=seed, label=label, score_lipschitz=radius)
    restored = Certificate.from_dict(json.loads(json.dumps(original.to_dict())))
    assert restored == original
    assert restored.radius.hex() == original.radius.hex()


def test_from_dict_names_what_is_wrong() -> None:
    values = certificate().to_dict()
    with pytest.raises(ValueError, match="unknown keys \\['colour'\\]"):
        Certificate.from_dict({**values, "colour": 1})
    del values["sigma"], values["label"]
    with pytest.raises(ValueError, match="missing keys \\['sigma'\\]"):
        Certificate.from_dict(values)


def test_a_certificate_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        certificate().radius = 2.0


@pytest.mark.parametrize(
    ("prediction", "radius"),
    [
        (ABSTAIN, 0.1),
        (2, 0.0),
        (2, -0.1),
        (2, math.inf),
        (2, math.nan),
        (ABSTAIN, math.nan),
        (-2, 0.1),
    ],
)
def test_contradictions_are_refused(prediction: int, radius: float) -> None:
    with pytest.raises(ValueError, match="radius|ABSTAIN"):
        certificate(prediction, radius)


def test_certified_accuracy_by_hand() -> None:
    certificates = [certificate(1, 0.5), certificate(1, 0.5), certificate(0, 1.0), ABSTENTION]
    labels = [1, 0, 0, 1]
    assert certified_accuracy(certificates, labels, [0.0, 0.49, 0.5, 0.99, 1.0, math.inf]) == [
        0.5,
        0.5,
        0.25,
        0.25,
        0.0,
        0.0,
    ]
    shares = certified_accuracy(certificates, torch.tensor(labels), torch.tensor([0.0]))
    assert shares == [0.5]
    assert type(shares[0]) is float


def test_abstention_is_wrong_whatever_the_label() -> None:
    assert certified_accuracy([ABSTENTION, ABSTENTION], [ABSTAIN, 0], [0.0]) == [0.0]


def test_certified_accuracy_refuses_what_makes_no_curve() -> None:
    with pytest.raises(ValueError, match="at least one"):
        certified_accuracy([], [], [0.0])
    with pytest.raises(ValueError, match="one label each"):
        certified_accuracy([certificate()], [1, 2], [0.0])
    for radius in (-0.1, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            certified_accuracy([certificate()], [1], [radius])
    with pytest.raises(ValueError, match="norm or unit"):
        certified_accuracy([certificate(), replace(certificate(), unit="pixel / 255")], [1, 1], [0.0])
