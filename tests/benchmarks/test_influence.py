"""Influence is what training on one adds to another that is left out."""

import numpy as np

from benchmarks.influence import measure_influence
from curate.memorization.folds import draw_halves


def test_influence_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    count, proxies = 60, 32
    masks = draw_halves([str(row) for row in range(count)], proxies, 0)
    others = (np.arange(count)[:, None] + [1, 2]) % count
    # The fit of each depends on whether the one before it was trained on, by a size of its own, and
    # far more on whether it was itself, which must not count.
    helps = rng.uniform(-1, 1, count)
    values = 5.0 * masks + np.roll(helps[:, None] * masks, 1, axis=0)
    values += rng.normal(0, 0.1, values.shape)
    nearest = measure_influence(values, masks, others[:, :1])
    np.testing.assert_allclose(nearest, helps, atol=0.25)
    both = measure_influence(values, masks, others)
    assert np.corrcoef(both, helps)[0, 1] > 0.7
    assert np.abs(measure_influence(values, masks, (others + 30) % count)).mean() < 0.5


def test_influence_of_pairs_that_are_never_apart_is_unknown() -> None:
    masks = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]], bool)
    values = np.array([[9.0, 0.25, 9.0, 0.75], [0] * 4, [0] * 4])
    found = measure_influence(values, masks, np.array([[1], [0], [0]]))
    assert np.isnan(found[:2]).all()
    assert found[2] == 0.5
