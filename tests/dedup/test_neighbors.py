from typing import Any

import numpy as np
import pytest
import torch

from curate.dedup import neighbors
from curate.dedup.neighbors import (
    Rows,
    assign_cells,
    exact_cosines,
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
    left, right, found = pairs_within(Rows.of(queries), Rows.of(base), min_cosine)
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
    left, right, _ = pairs_within(Rows.of(queries), Rows.of(base), 0.999)
    assert left.tolist() == list(range(9000))
    np.testing.assert_array_equal(base[right], queries)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_threshold_means_the_same_at_any_precision(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "_fastest_type", lambda: kind)
    rng = np.random.default_rng(7)
    vectors = clustered(rng, 300).astype(np.float16) * np.float16(3)
    rows = Rows.of(vectors)
    assert rows.screen.dtype == kind
    one, other = np.nonzero(~np.eye(300, dtype=bool))
    cosines = exact_cosines(vectors[one], vectors[other])
    double = vectors.astype(np.float64)
    double /= np.linalg.norm(double, axis=1)[:, None]
    np.testing.assert_allclose(cosines, (double[one] * double[other]).sum(1), atol=1e-6)
    for place in rng.integers(0, len(one), 50):
        # A pair's own cosine is reached, and the next number above it is not.
        at = cosines[place]
        for limit, reached in ((at, True), (np.nextafter(at, np.float32(2)), False)):
            left, right, found = pairs_within(rows, rows, float(limit))
            apart = left != right
            assert set(zip(left[apart], right[apart], strict=True)) == {
                (a, b) for a, b in zip(one[cosines >= limit], other[cosines >= limit], strict=True)
            }
            hit = (left == one[place]) & (right == other[place])
            assert hit.any() == reached
            assert not reached or found[hit] == at


def test_pairs_within_without_queries() -> None:
    none, some = Rows.of(np.zeros((0, 4), np.float32)), Rows.of(np.eye(4, dtype=np.float32))
    for one, other in ((none, some), (some, none)):
        assert [len(part) for part in pairs_within(one, other, 0.5)] == [0, 0, 0]


def test_only_the_nearest_of_each_query() -> None:
    rng = np.random.default_rng(8)
    queries, base = clustered(rng, 50), clustered(rng, 5000)
    left, right, found = pairs_within(Rows.of(queries), Rows.of(base), 0.3, most=7)
    cosines = queries @ base.T
    for query in range(50):
        mine = left == query
        best = np.sort(cosines[query][cosines[query] >= 0.3])[::-1][:7]
        np.testing.assert_allclose(np.sort(found[mine])[::-1], best, atol=1e-5)
        np.testing.assert_allclose(cosines[query, right[mine]], found[mine], atol=1e-5)


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


@pytest.mark.parametrize("most", [1, 3, 9])
def test_assign_cells_against_brute_force(most: int) -> None:
    rng = np.random.default_rng(5)
    vectors, centroids = clustered(rng, 100), unit_rows(rng.standard_normal((5, 32)))
    cells, detours = assign_cells(vectors, centroids, most)
    cosines = vectors @ centroids.T
    expected = np.argsort(-cosines, axis=1)[:, : min(most, 5)]
    assert (cells.dtype, detours.dtype) == (np.int32, np.float16)
    np.testing.assert_array_equal(cells.T, expected)
    ordered = np.take_along_axis(cosines, expected, 1)
    given_up = np.arange(ordered.shape[1]) * (ordered[:, :1] - ordered)
    np.testing.assert_allclose(detours.T, given_up, atol=2e-3)
    assert (np.diff(detours, axis=0) >= 0).all()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_cells_of_a_gpu_are_as_good_and_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = clustered(np.random.default_rng(3), 20_000)
    found = {}
    for device in ("cuda", "again", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device != "cpu")
        found[device] = train_centroids(sample, 200, seed=1)
    assert np.array_equal(found["cuda"], found["again"])
    assert (found["cuda"].dtype, found["cuda"].shape) == (np.float32, (200, 32))
    np.testing.assert_allclose(np.linalg.norm(found["cuda"], axis=1), 1, atol=1e-5)
    nearness = {name: (sample @ rows.T).max(1).mean() for name, rows in found.items()}
    assert nearness["cuda"] == pytest.approx(nearness["cpu"], abs=0.005)


@needs_gpu
def test_a_gpu_assigns_as_its_cpu_twin_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    vectors, centroids = clustered(rng, 20_000), unit_rows(rng.standard_normal((300, 32)))
    found = {}
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        found[device] = assign_cells(vectors, centroids, 8)
    cosines = vectors @ centroids.T
    by_gpu, by_cpu = (
        np.take_along_axis(cosines, found[device][0].T, 1) for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(by_gpu, by_cpu, atol=1e-5)
    np.testing.assert_allclose(found["cuda"][1], found["cpu"][1], atol=2e-3)


@needs_gpu
@pytest.mark.parametrize("min_cosine", [0.5, 0.95])
def test_a_gpu_finds_what_its_cpu_twin_finds(
    min_cosine: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(11)
    vectors = np.concatenate([clustered(rng, 3000), clustered(rng, 3000, centres=1)])
    vectors = vectors.astype(np.float16)
    found = {}
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        rows = Rows.of(vectors)
        assert rows.screen.device.type == device
        found[device] = pairs_within(rows, rows, min_cosine)
    check_twins(found["cuda"], found["cpu"], len(vectors), min_cosine)


@pytest.mark.parametrize("min_cosine", [0.5, 0.95])
def test_what_a_gpu_does_finds_the_same_on_a_cpu(min_cosine: float) -> None:
    rng = np.random.default_rng(11)
    # The second half is dense, and the last rows have no direction.
    parts = [clustered(rng, 3000), clustered(rng, 3000, centres=1), np.zeros((5, 32))]
    vectors = np.concatenate(parts).astype(np.float16)
    rows, exact = Rows.of(vectors), torch.from_numpy(unit_rows(vectors))
    there = Rows(vectors, exact.bfloat16(), exact)
    some = np.r_[5:900, 4000:4100]
    one, other = (pairs_within(own.take(some), own, min_cosine) for own in (there, rows))
    check_twins(one, other, len(vectors), min_cosine)


Pairs = tuple[Array, Array, Array]


def check_twins(one: Pairs, other: Pairs, count: int, min_cosine: float) -> None:
    """Only pairs within .001 of the threshold may be found by one of the two."""
    keys = [left * count + right for left, right, _ in (one, other)]
    both, *places = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    assert len(both) > 10_000
    np.testing.assert_allclose(one[2][places[0]], other[2][places[1]], atol=1e-5)
    for pairs, known in zip((one, other), places, strict=True):
        assert (np.delete(pairs[2], known) - min_cosine < 1e-3).all()
