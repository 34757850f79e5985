from typing import Any

import numpy as np
import pytest

from curate.dedup.neighbors import (
    assign_cells,
    nearest,
    pairs_within,
    train_centroids,
    unit_rows,
)

Array = np.ndarray[Any, Any]


def clustered(rng: np.random.Generator, count: int, centres: int = 40) -> Array:
    """Draw unit vectors around the same centres each time, so that cosines of all sizes occur."""
    width = 32
    middle = np.random.default_rng(0).standard_normal((centres, width))
    noise = rng.standard_normal((count, width)) * rng.uniform(0.02, 1.0, (count, 1))
    return unit_rows(middle[rng.integers(0, centres, count)] + noise)


def test_unit_rows() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((20, 8)) * 7).astype(np.float16)
    vectors[3] = 0
    rows = unit_rows(vectors)
    assert rows.dtype == np.float32
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(np.delete(norms, 3), 1, atol=1e-6)
    assert norms[3] == 0
    assert unit_rows(np.zeros((0, 8), np.float16)).shape == (0, 8)


@pytest.mark.parametrize("min_cosine", [-0.2, 0.5, 0.9])
def test_pairs_within_against_brute_force(min_cosine: float) -> None:
    rng = np.random.default_rng(1)
    queries, base = clustered(rng, 150), clustered(rng, 400)
    cosines = queries.astype(np.float64) @ base.T.astype(np.float64)
    # No pair lies within rounding of the threshold, so that the sets must be equal.
    assert np.abs(cosines - min_cosine).min() > 1e-6
    left, right, found = pairs_within(queries, base, min_cosine)
    expected = set(zip(*(ends.tolist() for ends in np.nonzero(cosines >= min_cosine)), strict=True))
    assert len(expected) > 10
    assert len(left) == len(expected)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected
    np.testing.assert_allclose(found, cosines[left, right], atol=1e-5)
    assert (found.dtype, left.dtype, right.dtype) == (np.float32, np.int64, np.int64)


def test_pairs_within_spans_blocks_of_queries() -> None:
    rng = np.random.default_rng(2)
    base = unit_rows(rng.standard_normal((5, 16)))
    queries = base[rng.integers(0, 5, 9000)]
    left, right, _ = pairs_within(queries, base, 0.999)
    assert left.tolist() == list(range(9000))
    np.testing.assert_array_equal(base[right], queries)


@pytest.mark.parametrize("cosine", [0.5, 0.96, 1.0])
def test_the_threshold_itself_is_reached(cosine: float) -> None:
    # One coordinate decides, so that the product is the float32 threshold to the last bit.
    base = np.zeros((1, 4), np.float32)
    base[0, 0] = 1
    at = np.float32(cosine)
    queries = np.zeros((3, 4), np.float32)
    queries[:, 0] = [at, np.nextafter(at, np.float32(2)), np.nextafter(at, np.float32(-2))]
    left, right, found = pairs_within(queries, base, cosine)
    assert left.tolist() == [0, 1]
    assert right.tolist() == [0, 0]
    assert found[0] == at


def test_pairs_within_without_queries() -> None:
    found = pairs_within(np.zeros((0, 4), np.float32), np.eye(4, dtype=np.float32), 0.5)
    assert [len(part) for part in found] == [0, 0, 0]


def test_nearest_against_brute_force() -> None:
    rng = np.random.default_rng(3)
    queries, base = clustered(rng, 60), clustered(rng, 300)
    cosines, rows = nearest(queries, base, 7)
    truth = queries.astype(np.float64) @ base.T.astype(np.float64)
    order = np.argsort(-truth, axis=1)[:, :7]
    assert cosines.shape == rows.shape == (60, 7)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(cosines, np.take_along_axis(truth, order, axis=1), atol=1e-5)
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_centroids_are_unit_and_reproducible() -> None:
    rng = np.random.default_rng(4)
    sample = clustered(rng, 600, centres=6)
    centroids = train_centroids(sample, 6, seed=5)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(centroids, train_centroids(sample, 6, seed=5))
    # They describe the sample: far nearer than as many arbitrary samples are on average.
    assert (sample @ centroids.T).max(axis=1).mean() > (sample @ sample[:6].T).max(axis=1).mean()
    every = train_centroids(sample[:6], 6, seed=2**40)
    assert every.shape == (6, 32)


@pytest.mark.parametrize("probes", [1, 3, 9])
def test_assign_cells_against_brute_force(probes: int) -> None:
    rng = np.random.default_rng(5)
    vectors, centroids = clustered(rng, 100), unit_rows(rng.standard_normal((5, 32)))
    cells = assign_cells(vectors, centroids, probes)
    expected = np.argsort(-(vectors @ centroids.T), axis=1)[:, : min(probes, 5)]
    assert cells.dtype == np.int32
    np.testing.assert_array_equal(cells, expected)
