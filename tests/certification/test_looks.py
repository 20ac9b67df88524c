from __future__ import annotations

import math

import pytest

from hf_lipschitz.certification.looks import check_looks, default_looks, spend


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (10_000, (100, 200, 400, 800, 1600, 3000, 6000, 10_000)),
        (10_001, (100, 200, 400, 800, 1600, 3000, 6000, 10_000, 10_001)),
        (50, (50,)),
        (100_000, (100, 200, 400, 800, 1600, 3000, 6000, 10_000, 20_000, 30_000, 40_000, 60_000, 80_000, 100_000)),
        (1_000_000, (100, 200, 400, 800, 1600, 3000, 6000, 10_000, 20_000, 30_000, 40_000, 60_000, 80_000, 100_000,
                     200_000, 400_000, 800_000, 1_000_000)),
    ],
)  # fmt: skip
def test_looks_go_up_to_n(n: int, expected: tuple[int, ...]) -> None:
    assert default_looks(n) == expected
    check_looks(expected, n)


@pytest.mark.parametrize("n", [100, 3000, 10_000, 100_000])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_errors_add_up_to_alpha(n: int, alpha: float) -> None:
    looks = spend(default_looks(n), alpha, is_anytime=False)
    assert math.fsum(look.alpha for look in looks) == pytest.approx(alpha, rel=1e-12)
    assert looks[-1].alpha >= alpha / 2
    assert {look.alpha for look in spend(default_looks(n), alpha, is_anytime=True)} == {alpha}


@pytest.mark.parametrize("looks", [(), (200, 100), (100, 100, 1000), (50, 1000), (0, 1000), (100, 900)])
def test_other_looks_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="looks must"):
        check_looks(looks, 1000)
