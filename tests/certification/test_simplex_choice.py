from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_lipschitz.certification import SmoothedClassifier, SmoothingConfig
from hf_lipschitz.certification.simplex_choice import calibrate_simplex_map
from tests.certification.exact import Lines, place


SOFT_TWO = Lines((1.0, -1.0), (0.0, 0.0))
CONFIG = SmoothingConfig(0.5, n=1000, certificate="lvm")
INPUTS = [place(u) for u in (0.3, 0.8, -0.5, 1.2)]


def mean_radius(config: SmoothingConfig) -> float:
    smoothed = SmoothedClassifier(SOFT_TWO, 2, config)
    return float(np.mean([smoothed.certify(x, index=index).radius for index, x in enumerate(INPUTS)]))


def test_the_best_of_all_candidates_is_chosen() -> None:
    chosen = calibrate_simplex_map(SOFT_TWO, INPUTS, 2, CONFIG, temperatures=(0.01, 1.0, 30.0))
    assert replace(chosen, simplex_map=CONFIG.simplex_map, temperature=CONFIG.temperature) == CONFIG
    radii = {
        (name, temperature): mean_radius(replace(CONFIG, simplex_map=name, temperature=temperature, seed=1))
        for name in ("softmax", "sparsemax")
        for temperature in (0.01, 1.0, 30.0)
    }
    assert max(radii, key=radii.get) == (chosen.simplex_map, chosen.temperature)
    assert len({round(radius, 6) for radius in radii.values()}) > 3


def test_wrong_predictions_count_as_nothing() -> None:
    """Where every radius is of a wrong class, all candidates are alike, and the first one stands."""
    chosen = calibrate_simplex_map(SOFT_TWO, INPUTS, 2, CONFIG, labels=[1, 1, 0, 1], temperatures=(5.0, 0.1))
    assert (chosen.simplex_map, chosen.temperature) == ("softmax", 5.0)
    chosen = calibrate_simplex_map(SOFT_TWO, INPUTS, 2, CONFIG, labels=[0, 0, 1, 0], temperatures=(5.0, 0.1))
    assert chosen.temperature == 0.1


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match="reads votes"):
        calibrate_simplex_map(SOFT_TWO, INPUTS, 2, replace(CONFIG, certificate="two_class"))
    with pytest.raises(ValueError, match="needs inputs"):
        calibrate_simplex_map(SOFT_TWO, [], 2, CONFIG)
    with pytest.raises(ValueError, match="as many labels"):
        calibrate_simplex_map(SOFT_TWO, INPUTS, 2, CONFIG, labels=[0])
