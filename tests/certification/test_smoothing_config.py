from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from hf_lipschitz.configuration import SmoothingConfig


def test_defaults_and_exact_json_round_trip() -> None:
    config = SmoothingConfig(sigma=1)
    assert config == SmoothingConfig(1.0, 100, 10_000, 1e-3, 500, 0, "two_class", "softmax", 1.0)
    assert type(config.sigma) is float
    other = SmoothingConfig(0.1 + 0.2, seed=-(2**70), certificate="lvm", simplex_map="sparsemax", temperature=1 / 3)
    for one in (config, other):
        assert SmoothingConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SmoothingConfig(1.0).sigma = 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in ("sigma", "temperature") for value in (0.0, -1.0, math.nan, math.inf)]
    + [("sigma", 1e-60), ("sigma", 1e60)]
    + [("alpha", value) for value in (0.0, -0.1, 0.51, 1.0, math.nan)]
    + [(name, value) for name in ("n0", "n", "batch_size") for value in (0, -1)],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        SmoothingConfig(**{"sigma": 1.0, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in ("n0", "n", "batch_size", "seed") for value in (10.0, "10", True, None)]
    + [(name, value) for name in ("sigma", "alpha", "temperature") for value in ("0.1", None, True)],
)
def test_wrong_types_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field} must"):
        SmoothingConfig(**{"sigma": 1.0, field: value})


def test_alpha_above_one_half_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="alpha > 0.5 is refused"):
        SmoothingConfig(1.0, alpha=0.7)


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("certificate", "known: two_class, one_class, lvm"),
        ("simplex_map", "known: softmax, sparsemax"),
    ],
)
@pytest.mark.parametrize("value", ["nonsense", "class_partition", "", None, ["lvm"]])
def test_unknown_names_are_refused_with_the_known_ones(field: str, known: str, value: object) -> None:
    with pytest.raises(ValueError, match=known):
        SmoothingConfig(**{"sigma": 1.0, field: value})


def test_from_dict_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no field radii, sigmas; it has sigma"):
        SmoothingConfig.from_dict({"sigma": 1.0, "sigmas": 2.0, "radii": []})
    with pytest.raises(ValueError, match="needs sigma"):
        SmoothingConfig.from_dict({})
