from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from hf_lipschitz.bounds import LipschitzBound
from hf_lipschitz.certification import SmoothingConfig


def test_defaults_and_exact_json_round_trip() -> None:
    config = SmoothingConfig(sigma=1)
    assert config == SmoothingConfig(1.0, 100, 10_000, 1e-3, 100, 0, "two_class", "softmax", 1.0)
    assert type(config.sigma) is float
    other = SmoothingConfig(0.1 + 0.2, seed=-(2**70), certificate="lvm", simplex_map="sparsemax", temperature=1 / 3)
    sequential = SmoothingConfig(
        0.5, radii=[0, 0.25], gain=0.1, n=1000, looks=[300, 1000], noise="exact", num_splits=4
    )
    bound = LipschitzBound(-0.5, wrt="x", shape=(1, 3, 8, 8))
    lipschitz = SmoothingConfig(0.5, certificate="lipschitz", score_lipschitz=bound, mean_bound="subgaussian")
    for one in (config, other, sequential, lipschitz):
        again = SmoothingConfig.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again.to_dict() == one.to_dict()
        assert again == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": [0.5, 0.25]}, "radii must increase"),
        ({"radii": []}, "radii must increase"),
        ({"radii": [-1.0]}, "radii must increase"),
        ({"radii": [math.nan]}, "radii must increase"),
        ({"gain": 0.0}, "gain must be positive"),
        ({"gain": math.inf}, "gain must be positive"),
        ({"looks": [100, 10_000]}, "need a reason to stop"),
        ({"looks": [150, 10_000], "gain": 0.1}, "multiples of 100"),
        ({"looks": [100, 5000], "gain": 0.1}, "end with n"),
        ({"num_splits": 3}, "num_splits must divide"),
        ({"mean_bound": "subgaussian", "certificate": "lvm"}, "needs certificate='lipschitz'"),
        ({"noise": "gauss"}, "known: gaussian, laplace, uniform, exact"),
        ({"mean_bound": "cantelli"}, "known: betting, bernstein, hoeffding, subgaussian"),
    ],
)
def test_what_contradicts_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothingConfig(**{"sigma": 1.0, **changes})


@pytest.mark.parametrize("changes", [{"radii": 0.5}, {"radii": "0.5"}, {"looks": 100, "gain": 0.1}, {"gain": "much"}])
def test_sequences_and_numbers_have_their_types(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="must be"):
        SmoothingConfig(**{"sigma": 1.0, **changes})


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 100), (7, 100), (64, 100), (100, 100), (101, 200), (500, 500)])
def test_batches_are_of_whole_blocks(batch_size: int, rows: int) -> None:
    assert SmoothingConfig(1.0, batch_size=batch_size).rows == rows


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
        ("certificate", "known: two_class, one_class, class_partition, lvm, lipschitz"),
        ("simplex_map", "known: softmax, sparsemax"),
    ],
)
@pytest.mark.parametrize("value", ["nonsense", "", None, ["lvm"]])
def test_unknown_names_are_refused_with_the_known_ones(field: str, known: str, value: object) -> None:
    with pytest.raises(ValueError, match=known):
        SmoothingConfig(**{"sigma": 1.0, field: value})


def test_from_dict_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no field sigmas; it has sigma"):
        SmoothingConfig.from_dict({"sigma": 1.0, "sigmas": 2.0})
    with pytest.raises(ValueError, match="needs sigma"):
        SmoothingConfig.from_dict({})
