from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.certification.statistics import (
    bet_from_moments,
    betting,
    betting_lower,
    betting_upper,
    hoeffding_lower,
    pilot_bet,
)
from tests.certification.statistics.error_rates import (
    HARD,
    LOOKS,
    MANY_LOOKS,
    Discrete,
    beta,
    exact_pmf,
    is_refuted,
    two_points,
)


both_alphas = pytest.mark.parametrize("alpha", [1e-3, 0.05])
alphas = st.floats(1e-12, 0.5)
bets = st.floats(0, 1000)
samples = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def exact_capital(values: list[float | Fraction], counts: list[int], m: Fraction, bet: float, cap: float) -> Fraction:
    fraction = min(Fraction(bet), Fraction(cap) / m)
    capital = Fraction(1)
    for value, count in zip(values, counts, strict=True):
        capital *= (1 + fraction * (Fraction(value) - m)) ** count
    return capital


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    times=st.lists(st.integers(1, 12), min_size=5, max_size=5),
    alpha=alphas,
    bet=bets,
    cap=st.sampled_from([0.3, 0.5, 0.9, 0.99]),
)
def test_the_bound_is_the_largest_rejected_mean_in_exact_arithmetic(
    values: list[float], times: list[int], alpha: float, bet: float, cap: float
) -> None:
    counts = times[: len(values)]
    bound = betting_lower(values, alpha, bet, counts=counts, cap=cap)
    if bound > 0:
        assert exact_capital(values, counts, Fraction(bound), bet, cap) >= 1 / Fraction(alpha)
    above = Fraction(bound) * (1 + Fraction(1, 10**9)) + Fraction(1, 10**9)
    assert exact_capital(values, counts, above, bet, cap) < 1 / Fraction(alpha)
    rest, gap = (
        [1 - Fraction(value) for value in values],
        1 - Fraction(betting_upper(values, alpha, bet, counts=counts, cap=cap)),
    )
    if gap > 0:
        assert exact_capital(rest, counts, gap, bet, cap) >= 1 / Fraction(alpha)
    above = gap * (1 + Fraction(1, 10**9)) + Fraction(1, 10**9)
    assert exact_capital(rest, counts, above, bet, cap) < 1 / Fraction(alpha)


@pytest.mark.parametrize("bet", [0.1, 1.0, 2.5, 40.0, 1e4])
@both_alphas
def test_the_bound_against_all_means_of_a_grid(bet: float, alpha: float) -> None:
    generator, grid = np.random.default_rng(0), np.linspace(1e-5, 1, 20_000)
    fractions = np.minimum(bet, 0.99 / grid)
    for draws in (generator.random(200), generator.beta(8, 0.2, 200), generator.integers(0, 2, 200) * 1.0):
        rejected = grid[np.log1p(fractions * (draws[:, None] - grid)).sum(axis=0) >= -math.log(alpha)]
        largest = rejected.max() if rejected.size else 0.0
        assert 0 <= betting_lower(draws, alpha, bet) - largest <= grid[1] - grid[0]
        assert betting_upper(1 - draws, alpha, bet) == pytest.approx(1 - betting_lower(draws, alpha, bet), abs=1e-13)


def test_upper_bounds_are_rounded_up() -> None:
    draws = np.random.default_rng(0).integers(0, 2**20, (50, 40)) / 2**20
    for row in draws:
        lower, upper = betting_lower(row, 0.05, 1.0), betting_upper(1 - row, 0.05, 1.0)
        assert 0 <= Fraction(upper) + Fraction(lower) - 1 <= Fraction(1, 2**51)


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_exact_error_on_bernoulli_variables(n: int, alpha: float) -> None:
    successes = np.arange(n + 1)
    counts = np.stack([n - successes, successes], axis=1)
    for bet in (0.3, 1.0, 5.0, 1e6):
        lower = betting_lower([0, 1], alpha, bet, counts=counts)
        upper = betting_upper([0, 1], alpha, bet, counts=counts[:, ::-1])
        assert upper == pytest.approx(1 - lower, abs=1e-12)
        for hardest in lower[lower > 0] * (1 - 1e-12):
            pmf = exact_pmf(n, Fraction(hardest))
            assert sum(mass for mass, bound in zip(pmf, lower, strict=True) if bound > hardest) <= Fraction(alpha)


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5])
def test_one_success_reaches_alpha(alpha: float) -> None:
    bound = betting_lower([1.0], alpha, 1e9)
    error = bound
    assert 0.98 * alpha <= error <= alpha


def pilot_bets(distribution: Discrete, alpha: float, n: int, *, upper: bool) -> np.ndarray:
    values = 1 - distribution.values if upper else distribution.values
    return pilot_bet(values, distribution.histograms(50, seed=1), alpha, n)


@both_alphas
@pytest.mark.parametrize("n", [30, 400])
@pytest.mark.parametrize("name", HARD)
def test_errors_are_no_more_than_alpha(name: str, n: int, alpha: float) -> None:
    distribution: Discrete = HARD[name]
    counts = distribution.histograms(n)
    lower_bets, upper_bets = (pilot_bets(distribution, alpha, n, upper=upper) for upper in (False, True))
    lower = betting_lower(distribution.values, alpha, lower_bets, counts=counts)
    upper = betting_upper(distribution.values, alpha, upper_bets, counts=counts)
    assert not is_refuted(lower > distribution.mean, alpha)
    assert not is_refuted(upper < distribution.mean, alpha)


@both_alphas
@pytest.mark.parametrize("name", ["bernoulli .02", "bernoulli .5", "rarely high", "rarely low"])
def test_the_running_maximum_is_a_bound(name: str, alpha: float) -> None:
    distribution = HARD[name]
    counts = distribution.paths(LOOKS[::3])
    for bet in (0.02, 0.3, 8.0):
        lower = betting_lower(distribution.values, alpha, bet, counts=counts)
        assert not is_refuted(lower.max(axis=1) > distribution.mean, alpha)


@both_alphas
def test_the_running_maximum_of_a_bet_tuned_on_the_same_samples_is_refuted(alpha: float) -> None:
    distribution, tried = HARD["bernoulli .5"], np.geomspace(0.006, 2, 9)
    counts = distribution.paths(MANY_LOOKS, runs=4000)
    best = [betting_lower(distribution.values, alpha, bet, counts=counts).max(axis=1) for bet in tried]
    assert not any(is_refuted(lower > distribution.mean, alpha) for lower in best)
    assert is_refuted(np.max(best, axis=0) > distribution.mean, alpha)


@both_alphas
def test_without_truncation_the_bound_is_refuted(alpha: float) -> None:
    grid, bet, n = np.linspace(0.015, 0.995, 99), 5.0, 30
    distribution = HARD["bernoulli .5"]
    counts = distribution.histograms(n, runs=4000)
    factors = 1 + bet * (distribution.values[:, None] - grid)
    signs = np.where((factors[0] < 0) & (counts[:, :1] % 2 == 1), -1, 1)
    rejected = (signs > 0) & (counts @ np.log(np.abs(factors)) >= -math.log(alpha))
    untruncated = np.where(rejected, grid, 0).max(axis=1)
    assert is_refuted(untruncated > distribution.mean, alpha)
    assert not is_refuted(betting_lower([0, 1], alpha, bet, counts=counts) > distribution.mean, alpha)


def test_a_higher_threshold_is_what_alpha_asks_for() -> None:
    """Half of the threshold is refuted, on the variables for which Ville's inequality is nearly an equality."""
    alpha = 0.05
    distribution = two_points(0, 1, 1.8 * alpha)
    counts = distribution.histograms(1)
    assert is_refuted(betting_lower([0, 1], 2 * alpha, 1e6, counts=counts) > distribution.mean, alpha)
    assert not is_refuted(betting_lower([0, 1], alpha, 1e6, counts=counts) > distribution.mean, alpha)


@given(draws=samples, other=samples, alpha=alphas, bet=bets)
def test_bounds_are_monotone(draws: list[float], other: list[float], alpha: float, bet: float) -> None:
    draws, raised = np.array(draws), np.array(draws)
    raised[: len(other)] = np.maximum(raised[: len(other)], other[: len(raised)])
    slack = 1e-12
    lower, upper = betting_lower(draws, alpha, bet), betting_upper(draws, alpha, bet)
    assert 0 <= lower <= draws.mean() * (1 + slack)
    assert draws.mean() * (1 - slack) <= upper <= 1
    assert lower <= betting_lower(raised, alpha, bet) * (1 + slack)
    assert upper <= betting_upper(raised, alpha, bet) + slack
    assert betting_lower(draws, alpha / 3, bet) <= lower * (1 + slack)
    assert betting_upper(draws, alpha / 3, bet) >= upper - slack


def test_complements_are_rounded_down() -> None:
    values = np.concatenate([np.random.default_rng(0).random(300), np.geomspace(1e-30, 1, 300), [0.0]])
    for value, rest in zip(values, betting._complement(values), strict=True):
        assert 0 <= 1 - Fraction(value) - Fraction(rest) <= Fraction(1, 2**53)


def test_few_evaluations_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated, evaluate = [], betting._excess_and_slope

    def counting(*args: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        evaluated.append(len(args[1]))
        return evaluate(*args)

    monkeypatch.setattr(betting, "_excess_and_slope", counting)
    for distribution in HARD.values():
        for bet in (0.02, 0.3, 8.0):
            evaluated.clear()
            betting_lower(distribution.values, 0.01, bet, counts=distribution.histograms(1000, runs=100))
            assert len(evaluated) < 40
            assert sum(evaluated) < 15 * 100


def test_counts_are_repeats() -> None:
    values, counts = np.array([0.1, 0.5, 0.95]), np.array([3, 0, 40])
    repeated = np.repeat(values, counts)
    for bet in (0.5, 2.0, 30.0):
        assert betting_lower(values, 0.01, bet, counts=counts) == pytest.approx(
            betting_lower(repeated, 0.01, bet), rel=1e-12
        )
        assert betting_upper(values, 0.01, bet, counts=counts) == pytest.approx(
            betting_upper(repeated, 0.01, bet), rel=1e-12
        )


def test_counts_alphas_and_bets_broadcast() -> None:
    generator = np.random.default_rng(0)
    values, counts = generator.random(6), generator.integers(1, 20, (3, 1, 6))
    alpha, bet = np.array([0.01, 0.1]), np.array([[0.3], [2.0], [100.0]])
    together = betting_lower(values, alpha, bet, counts=counts)
    assert together.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        alone = betting_lower(values, float(alpha[j]), float(bet[i, 0]), counts=counts[i, 0])
        assert together[i, j] == pytest.approx(alone, rel=1e-12)
    assert betting_upper(values, 0.1, bet[:, 0]).shape == (3,)
    assert type(betting_lower(values, 0.1, 1.0)) is float
    assert betting_lower(values, 0.1, 1.0, counts=np.ones((0, 6))).shape == (0,)


def test_rows_beyond_one_block_are_solved_alike() -> None:
    generator = np.random.default_rng(0)
    values = generator.random(64)
    counts = generator.integers(0, 3, (betting.BLOCK_SIZE // 64 + 100, 64))
    together = betting_lower(values, 0.01, 1.0, counts=counts)
    for row in (0, betting.BLOCK_SIZE // 64 - 1, betting.BLOCK_SIZE // 64, len(counts) - 1):
        assert together[row] == pytest.approx(betting_lower(values, 0.01, 1.0, counts=counts[row]), rel=1e-12)


def test_ends() -> None:
    assert betting_lower(np.zeros(50), 0.01, 3.0) == 0.0
    assert betting_upper(np.ones(50), 0.01, 3.0) == 1.0
    assert betting_lower(np.ones(50), 0.01, 0.0) == 0.0
    assert betting_lower([1.0], 0.4, 0.1) == 0.0
    assert betting_lower(np.ones(10**5), 0.01, 1e9) == pytest.approx(1, abs=1e-4)
    assert betting_lower(np.ones(10**5), 0.01, 1e9) < 1
    assert 0 < betting_upper(np.zeros(10**5), 0.01, 1e9) < 1e-4


def test_a_root_at_the_kink_is_found() -> None:
    """ln W is concave below m = c/λ₀ and convex above, where Newton's method alone goes round in circles."""
    values, counts = np.array([0.0, 0.94, 0.985]), np.array([100, 198, 304])
    bound = betting_lower(values, 0.111, 1.9492, counts=counts)
    grid = np.linspace(0.3, 0.7, 40_001)
    logs = np.log1p(np.minimum(1.9492, 0.99 / grid) * (values[:, None] - grid))
    assert bound == pytest.approx(grid[counts @ logs >= -math.log(0.111)].max(), abs=2e-5)


@pytest.mark.parametrize("name", HARD)
def test_betting_is_narrower_than_hoeffding(name: str) -> None:
    distribution, n, alpha = HARD[name], 2000, 1e-3
    counts = distribution.histograms(n, runs=50)
    bets = pilot_bets(distribution, alpha, n, upper=False)[:50]
    width = distribution.mean - betting_lower(distribution.values, alpha, bets, counts=counts).mean()
    assert width < 1.02 * (distribution.mean - hoeffding_lower(counts @ distribution.values, n, alpha).mean())


@pytest.mark.parametrize("n", [200, 10_000])
def test_the_pilot_bet_is_nearly_the_best(n: int) -> None:
    alpha, ratios = 1e-3, []
    for distribution in (*HARD.values(), beta(180, 20), beta(99, 1), two_points(0, 1, 0.99)):
        counts, pilots = distribution.histograms(n, runs=60), distribution.histograms(100, runs=60, seed=1)

        def width(bets: np.ndarray, counts=counts, distribution=distribution) -> np.ndarray:
            lower = betting_lower(distribution.values, alpha, bets, counts=counts)
            return distribution.mean - lower.mean(axis=-1)

        best = width(np.geomspace(0.01, 100, 40)[:, None]).min()
        mean = pilots @ distribution.values / 100
        squares = pilots @ np.square(distribution.values) - 100 * mean**2
        textbook = np.sqrt(2 * math.log(1 / alpha) / (n * (1 / 4 + squares) / 101))
        ratios.append([width(pilot_bet(distribution.values, pilots, alpha, n)) / best, width(textbook) / best])
    average, of_textbook = np.exp(np.log(ratios).mean(axis=0))
    assert np.max(ratios, axis=0)[0] < 2
    assert average < 1.15
    assert average < of_textbook


def test_the_pilot_bet_is_that_of_the_formula() -> None:
    pilot, alpha, n = np.random.default_rng(0).random(100), 0.01, 10_000
    variance = (1 / 20 + np.square(pilot - pilot.mean()).sum()) / 101
    bet = pilot_bet(pilot, None, alpha, n)
    assert bet == pytest.approx(math.sqrt(2 * math.log(1 / alpha) / (n * variance)), rel=1e-9)
    assert type(bet) is float
    by_moments = bet_from_moments(pilot.sum(), np.square(pilot).sum(), 100, alpha, [n, 4 * n])
    assert by_moments == pytest.approx([bet, bet / 2], rel=1e-9)
    certain = np.full(100, 0.9)
    assert pilot_bet(certain, None, alpha, n) == pytest.approx(0.7 / 0.9)
    assert pilot_bet(certain, None, alpha, 100) == pytest.approx(1 / 0.9)


@given(
    pilot=st.lists(st.floats(0, 1), max_size=20),
    times=st.integers(0, 10**6),
    alpha=st.floats(1e-300, 0.5),
    n=st.integers(1, 10**9),
)
def test_any_pilot_gives_a_usable_bet(pilot: list[float], times: int, alpha: float, n: int) -> None:
    values = np.array(pilot)
    for counts in (None, np.full(len(pilot), times)):
        bet = pilot_bet(values, counts, alpha, n)
        assert 0 < bet < math.inf
        assert 0 <= betting_lower([0.5, 1.0], alpha, bet) < 1


def test_bad_arguments_are_refused() -> None:
    for bound in (betting_lower, betting_upper):
        for alpha in (0.0, 0.6, math.nan, [0.1, 2.0]):
            with pytest.raises(ValueError, match="alpha must be"):
                bound([0.5], alpha, 1.0)
        for bet in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="bet must be"):
                bound([0.5], 0.1, bet)
        for cap in (0.0, 1.0, math.nan):
            with pytest.raises(ValueError, match="cap must be"):
                bound([0.5], 0.1, 1.0, cap=cap)
        for values in ([-0.1], [1.1], [math.nan], [[0.5]]):
            with pytest.raises(ValueError, match="values must be"):
                bound(values, 0.1, 1.0)
        for counts in ([1, -1], [1, math.nan], [1, math.inf], [1, 1, 1], [0, 0], 3):
            with pytest.raises(ValueError, match="counts"):
                bound([0.5, 0.6], 0.1, 1.0, counts=counts)
        with pytest.raises(ValueError, match="at least 1"):
            bound([], 0.1, 1.0)


def test_bad_pilots_are_refused() -> None:
    for pilot, counts in [([1.5], None), ([math.nan], None), ([0.5], [-1])]:
        with pytest.raises(ValueError, match="must be"):
            pilot_bet(pilot, counts, 0.1, 100)
    for alpha, n in [(0.0, 100), (0.1, 0), (0.1, 1.5), (math.nan, 100)]:
        with pytest.raises(ValueError, match="must be"):
            pilot_bet([0.5], None, alpha, n)
    for sums in [(11.0, 5.0, 10), (5.0, 6.0, 10), (-1.0, 0.0, 10), (math.nan, 1.0, 10), (0.0, 0.0, -1)]:
        with pytest.raises(ValueError, match=r"samples in \[0, 1\]"):
            bet_from_moments(*sums, 0.1, 100)
