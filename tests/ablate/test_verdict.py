"""Which setting is recommended, on outcomes whose truth is planted."""

import numpy as np
import pytest

from curate.ablate.verdict import compare, is_loser, pool_seeds, recommend

SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
NAMES = [f"{share:g}" for share in SHARES]


def outcomes(gains: list[float], seed: int, pairs: int = 1200, seeds: int = 3) -> dict:
    """Hits of trainings of which each gains what it is told, by pair, seed and luck."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=pairs)
    found: dict = {name: {} for name in NAMES}
    for name, gain in zip(NAMES, gains, strict=True):
        for number in range(seeds):
            luck = 0.25 * rng.normal(size=(2, pairs)) + 0.01 * rng.normal()
            found[name][number] = (ease + luck < -0.3 + 3 * gain).mean(0)
    return found


def test_a_planted_optimum_is_found() -> None:
    """Gains rise to a fifth and fall again, as where a fifth of the captions are wrong."""
    gains = [0.08 * min(s, 0.4 - s) / 0.2 if s <= 0.2 else 0.08 - 0.4 * (s - 0.2) for s in SHARES]
    chosen = [float(recommend(outcomes(gains, seed), NAMES).name) for seed in range(20)]
    near = [abs(share - 0.2) <= 0.0501 for share in chosen]
    assert sum(near) >= 18


def test_a_flat_curve_gives_the_loosest() -> None:
    found = [recommend(outcomes([0.0] * len(SHARES), seed), NAMES) for seed in range(40)]
    assert sum(one.name == "0" and not one.is_better for one in found) >= 36


def test_where_filtering_only_costs_the_loosest_is_best() -> None:
    found = recommend(outcomes([-0.2 * share for share in SHARES], 0), NAMES)
    assert (found.name, found.is_better) == ("0", False)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("by_seed", [0.0, 0.2])
def test_the_error_holds_what_varies_with_pairs_and_with_seeds(by_seed: float, apart: bool) -> None:
    rng = np.random.default_rng(0)
    trials = []
    for _ in range(1500):
        eased, luck = rng.normal(size=(4, 300)), by_seed * rng.normal(size=4)
        zero = {seed: np.zeros(300) for seed in range(4)}
        one = {s: eased[s * apart] + luck[s] + rng.normal(size=300) for s in range(4)}
        trials.append(compare(one, zero, apart=apart))
    expected = 1 / (1200 if apart else 300) + by_seed**2 / 4 + 1 / 1200
    # Of four means their spread is a rough measure, never taken for less than what pairs make.
    if apart and not by_seed:
        assert np.median([t.stderr**2 for t in trials]) == pytest.approx(expected, rel=0.1)
        return
    assert np.mean([trial.stderr**2 for trial in trials]) == pytest.approx(expected, rel=0.1)
    # Where seeds decide, four of them are all that is known.
    freedom = np.median([trial.freedom for trial in trials])
    assert (freedom > 30) if by_seed == 0 else (2.9 < freedom < 30)


def normal_outcomes(
    rng: np.random.Generator, gain: float, by_seed: float, apart: bool = False
) -> dict:
    """Three trainings of nine settings, of which one gains; seeds matter as much as pairs do."""
    pairs = 300
    found: dict = {}
    for name in NAMES:
        own = 0.15 * rng.normal(size=(3, pairs)) + gain * (name == "0.2")
        found[name] = {
            seed: own[seed * apart] + 0.2 * rng.normal(size=pairs) + by_seed * rng.normal()
            for seed in range(3)
        }
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("by_seed", [0.0, 0.01, 0.04])
def test_the_best_of_many_is_called_better_by_chance_as_seldom_as_told(
    by_seed: float, apart: bool
) -> None:
    """Nothing gains: five in a hundred are asked, and the draws' own error is two."""
    rng = np.random.default_rng(1)
    found = [recommend(normal_outcomes(rng, 0.0, by_seed, apart), NAMES, apart) for _ in range(300)]
    assert sum(one.is_better for one in found) <= 0.075 * len(found)
    assert all(one.comparisons == len(NAMES) - 1 for one in found)
    # What is told of the best of them holds all the same, although it was chosen for its luck.
    covered = [low <= 0 <= high for low, high in (one.rival_gain.interval(8) for one in found)]
    assert sum(covered) >= 0.93 * len(found)


def test_a_gain_is_found_if_it_is_what_is_needed() -> None:
    rng = np.random.default_rng(2)
    flat = [recommend(normal_outcomes(rng, 0.0, 0.01), NAMES) for _ in range(20)]
    needed = float(np.median([one.rival_gain.needed(one.comparisons) for one in flat]))
    half, whole = (
        [recommend(normal_outcomes(rng, times * needed, 0.01), NAMES) for _ in range(60)]
        for times in (1, 2)
    )
    assert 0.3 <= np.mean([one.is_better for one in half]) <= 0.8
    assert np.mean([one.is_better and one.name == "0.2" for one in whole]) >= 0.9


def test_pairs_of_their_own_for_every_seed_need_less_of_a_gain() -> None:
    rng = np.random.default_rng(5)
    needed = {
        apart: np.median([
            recommend(normal_outcomes(rng, 0.0, 0.0, apart), NAMES, apart).rival_gain.needed(8)
            for _ in range(60)
        ])
        for apart in (False, True)
    }  # fmt: skip
    # Variances: .15^2 + .2^2 / 3 of a pair that judges thrice, and a third of .15^2 + .2^2.
    assert needed[True] / needed[False] == pytest.approx(0.78, abs=0.1)


def test_what_pairs_make_of_the_means_of_seeds_is_told() -> None:
    rng = np.random.default_rng(6)
    found = [pool_seeds(normal_outcomes(rng, 0.0, 0.04, True).values(), True) for _ in range(60)]
    pairs = (0.15**2 + 0.2**2) / 300
    told = [noise for noise in found if noise is not None]
    assert np.mean([noise.by_pairs for noise in told]) == pytest.approx(pairs, rel=0.05)
    assert np.mean([noise.variance for noise in told]) == pytest.approx(pairs + 0.04**2, rel=0.15)
    uneven = {name: {0: np.arange(9.0), 1: np.ones(7) * place} for place, name in enumerate("ab")}
    both = compare(uneven["b"], uneven["a"], pool_seeds(uneven.values(), True), True)
    assert (both.mean, both.seeds) == (0.5, 2)


def test_what_settings_tell_of_seeds_is_taken_together() -> None:
    rng = np.random.default_rng(3)
    given = normal_outcomes(rng, 0.0, 0.04)
    noise = pool_seeds(given.values())
    assert noise is not None
    assert noise.freedom == (len(NAMES) - 1) * 2
    assert noise.variance == pytest.approx(0.04**2 + 0.04 / 300, rel=0.7)
    assert compare(given["0.2"], given["0"], noise=noise).freedom > 8
    assert compare(given["0.2"], given["0"]).freedom < 8
    given["0.4"].pop(2)  # given up early: tells nothing of the third seed
    fewer = pool_seeds(given.values())
    assert fewer is not None
    assert fewer.freedom == (len(NAMES) - 2) * 2
    assert pool_seeds([given["0"]]) is None
    assert pool_seeds([{0: np.zeros(9)}, {0: np.ones(9)}]) is None


def test_one_training_under_two_names_does_not_differ() -> None:
    given = normal_outcomes(np.random.default_rng(4), 0.0, 0.04)
    found = compare(given["0.2"], given["0.2"], noise=pool_seeds(given.values()))
    assert (found.mean, found.stderr, found.errors, found.p_value) == (0.0, 0.0, 0.0, 0.5)


def test_only_seeds_that_both_have_are_compared() -> None:
    one = {0: np.array([1.0, 0.0]), 1: np.array([1.0, 1.0])}
    other = {1: np.array([0.0, 1.0])}
    found = compare(one, other)
    assert (found.mean, found.seeds) == (0.5, 1)


def test_losers_are_given_up_and_the_loosest_never() -> None:
    scores = outcomes([0.0, 0, 0, 0, 0, 0.05, 0, -0.1, -0.2], 1, seeds=2)
    assert is_loser(scores, "0.4", "0")
    assert not is_loser(scores, "0.2", "0")
    assert not is_loser(scores, "0.4", "0.4")
    alone = {name: {0: values[0]} for name, values in scores.items()}
    assert not is_loser(alone, "0.4", "0")
    uneven = {name: {0: values[0], 1: values[1][:900]} for name, values in scores.items()}
    for given, apart in ((scores, False), (uneven, True)):
        lost = [name for name in NAMES if is_loser(given, name, "0", apart)]
        assert lost == [name for name in NAMES if name not in ("0", "0.2")]
