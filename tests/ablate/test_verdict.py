"""Which setting is recommended, on outcomes whose truth is planted."""

import numpy as np
import pytest

from curate.ablate.verdict import compare, is_loser, recommend

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


def test_the_error_holds_what_varies_with_pairs_and_with_seeds() -> None:
    rng = np.random.default_rng(0)
    trials = []
    for _ in range(400):
        by_pair, by_seed = rng.normal(size=300), rng.normal(size=4) * 0.1
        zero = {seed: np.zeros(300) for seed in range(4)}
        one = {s: by_pair + by_seed[s] + rng.normal(size=300) for s in range(4)}
        trials.append(compare(one, zero))
    spread = np.std([trial.mean for trial in trials])
    assert np.mean([trial.stderr for trial in trials]) == pytest.approx(spread, rel=0.15)


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
