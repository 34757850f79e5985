import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from curate.stages.report_map import project


def test_like_vectors_are_neighbours_on_the_map() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 20)
    vectors = rng.normal(size=(6, 16))[group] + 0.2 * rng.normal(size=(120, 16))
    places, trust = project(vectors.astype(np.float16))
    assert trust is not None
    assert trust > 0.9
    assert places.min() == 0
    assert places.max() == 1
    away = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(away, np.inf)
    assert (group[away.argmin(axis=1)] == group).all()


def test_lengths_do_not_count() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 8))
    lengths = 2.0 ** rng.integers(-3, 4, (40, 1))
    assert np.array_equal(project(vectors)[0], project(vectors * lengths)[0])


def test_threads_do_not_move_a_dot() -> None:
    vectors = np.random.default_rng(2).normal(size=(120, 32)).astype(np.float32)
    with threadpool_limits(1):
        alone = project(vectors)
    with threadpool_limits(2):
        together = project(vectors)
    assert np.array_equal(alone[0], together[0])
    assert alone[1] == together[1]


@pytest.mark.parametrize("count", [3, 4, 12])
def test_few_vectors(count: int) -> None:
    places, _ = project(np.eye(count, 4) + np.arange(count)[:, None])
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_vectors_lie_in_the_middle(value: float) -> None:
    places, trust = project(np.full((20, 3), value))
    assert (places == 0.5).all()
    assert trust is None
