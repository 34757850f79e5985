from typing import Any

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from curate.dedup import cells
from curate.dedup.cells import merge_cells, order_cells, search_cell
from curate.dedup.groups import Spots, walk
from curate.dedup.neighbors import Rows, exact_cosines, unit_rows

Array = np.ndarray[Any, Any]

WIDTH = 64


def dense(
    rng: np.random.Generator, count: int, cosine: float, centre: Array | None = None
) -> Array:
    """Draw vectors of about one cosine to each other."""
    centre = rng.standard_normal(WIDTH) if centre is None else centre
    noise = unit_rows(rng.standard_normal((count, WIDTH)))
    centre = centre / np.linalg.norm(centre)
    noise -= np.outer(noise @ centre, centre)
    return unit_rows(cosine**0.5 * centre + (1 - cosine) ** 0.5 * unit_rows(noise))


def mixture(seed: int, logos: int, others: int) -> Array:
    """Draw one picture thousands of times, loners, and pairs; as stored."""
    rng = np.random.default_rng(seed)
    loners = unit_rows(rng.standard_normal((others, WIDTH)))
    copies = unit_rows(loners[: others // 4] + 0.02 * rng.standard_normal((others // 4, WIDTH)))
    rows = np.concatenate([dense(rng, logos, 0.955), loners, copies])
    return rng.permutation(rows).astype(np.float16)


def all_pairs(vectors: Array, min_cosine: float, members: Array) -> set[tuple[int, int]]:
    rows = unit_rows(vectors)
    left, right = np.nonzero(np.triu(rows @ rows.T >= min_cosine, 1))
    known = np.isin(left, members) | np.isin(right, members)
    return set(zip(left[known].tolist(), right[known].tolist(), strict=True))


def pairs_of(vectors: Array, spots: list[Array], min_cosine: float) -> set[tuple[int, int]]:
    found = set()
    for spot in spots:
        near = np.triu(unit_rows(vectors[spot]) @ unit_rows(vectors[spot]).T >= min_cosine, 1)
        for one, other in zip(*np.nonzero(near), strict=True):
            found.add((int(min(spot[[one, other]])), int(max(spot[[one, other]]))))
    return found


@pytest.mark.parametrize(("logos", "others"), [(150, 500), (700, 100), (1500, 3000), (0, 900)])
@pytest.mark.parametrize("visitors", [0, 100])
def test_edges_and_spots_hold_every_pair(logos: int, others: int, visitors: int) -> None:
    vectors = mixture(logos, logos, others)
    members = np.arange(len(vectors) - visitors)
    found = search_cell(Rows.of(vectors), members, 0.95)
    written = {
        (min(a, b), max(a, b))
        for a, b in zip(found.left.tolist(), found.right.tolist(), strict=True)
    }
    truth = all_pairs(vectors, 0.95, members)
    assert written <= truth
    # Spots know more: pairs of two visitors.
    assert truth <= written | pairs_of(vectors, found.spots, 0.95)
    assert len(truth) > others / 8
    np.testing.assert_array_equal(
        found.cosines, exact_cosines(vectors[found.left], vectors[found.right])
    )
    stored = len(written) + sum(map(len, found.spots))
    assert stored <= 10 * len(vectors)
    for spot in found.spots:
        near = unit_rows(vectors[spot]) @ unit_rows(vectors[spot]).T >= 0.95
        assert near.mean() >= 0.25
        assert connected_components(near, directed=False)[0] == 1
    # Nearly all copies are in one spot, though each is near some of the others alone.
    assert len(found.spots) == (logos > 0)


def test_the_walk_sees_no_difference_between_edges_and_spots() -> None:
    vectors = mixture(3, 600, 400)
    count = len(vectors)
    found = search_cell(Rows.of(vectors), np.arange(count), 0.95)
    assert found.spots
    starts = np.cumsum([0, *map(len, found.spots)])
    rows = np.concatenate(found.spots)
    spots = Spots(rows, starts, vectors[rows], 0.95)
    rng = np.random.default_rng(0)
    preference, eligible = rng.permutation(count), rng.random(count) < 0.9
    plain = np.arange(count), np.full(count, -1)
    for min_cosine in (0.95, 0.956):
        left, right = np.array(sorted(all_pairs(vectors, 0.95, np.arange(count)))).T
        cosines = exact_cosines(vectors[left], vectors[right])
        near = cosines >= np.float32(min_cosine)
        explicit = walk(preference, eligible, left[near], right[near], cosines[near], *plain)
        near = found.cosines >= np.float32(min_cosine)
        edges = found.left[near], found.right[near], found.cosines[near]
        mixed = walk(
            preference, eligible, *edges, *plain, spots=spots._replace(min_cosine=min_cosine)
        )
        assert 0 < explicit.kept.sum() < eligible.sum()
        for one, other in zip(explicit, mixed, strict=True):
            np.testing.assert_array_equal(one, other)
    one, other = np.array(sorted(pairs_of(vectors, found.spots, 0.95))).T
    assert spots.contain(one, other).all()
    loners = np.setdiff1d(np.arange(count), rows)
    assert not spots.contain(loners[:-1], loners[1:]).any()


def test_pixels_are_asked_about_the_nearest_and_about_centres() -> None:
    rng = np.random.default_rng(4)
    series = dense(rng, 800, 0.97).astype(np.float16)
    asked: list[int] = []

    def none(left: Array, right: Array) -> Array:
        asked.append(len(left))
        return np.zeros(len(left), bool)

    # A series of different pictures is no spot, and not all of its pairs are candidates.
    found = search_cell(Rows.of(series), np.arange(800), 0.9, most=20, confirm=none)
    assert not found.spots
    assert 0 < sum(asked) <= 8 * 8
    pairs = np.unique(np.sort(np.stack([found.left, found.right]), 0), axis=1)
    assert 800 * 10 <= pairs.shape[1] <= 800 * 21

    def even(left: Array, right: Array) -> Array:
        return (left % 2 == 0) & (right % 2 == 0)

    found = search_cell(Rows.of(series), np.arange(800), 0.9, most=20, confirm=even)
    assert found.spots
    for spot in found.spots:
        assert (spot % 2 == 0).all()
    assert len(np.unique(np.concatenate(found.spots))) == 400


@pytest.mark.parametrize("most", [40, 300])
def test_more_copies_than_candidates_are_all_found_where_they_are_dense(most: int) -> None:
    vectors = mixture(9, 190, 40)
    members = np.arange(len(vectors))
    found = search_cell(
        Rows.of(vectors), members, 0.9, most, lambda one, two: np.ones(len(one), bool)
    )
    pairs = zip(found.left.tolist(), found.right.tolist(), strict=True)
    written = {(min(pair), max(pair)) for pair in pairs}
    assert written | pairs_of(vectors, found.spots, 0.9) == all_pairs(vectors, 0.9, members)
    assert bool(found.spots) == (most == 40)


def test_few_pairs_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, members = Rows.of(mixture(3, 600, 400)), np.arange(700)
    whole = search_cell(vectors, members, 0.95)
    monkeypatch.setattr(cells, "_MOST_PAIRS", 5000)
    parts = search_cell(vectors, members, 0.95)
    for one, other in zip(whole[:3], parts[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(whole.spots) == len(parts.spots) > 0


def test_cells_on_one_picture_are_merged() -> None:
    rng = np.random.default_rng(6)
    others = unit_rows(rng.standard_normal((300, WIDTH)))
    sample = np.concatenate([dense(rng, 200, 0.97), others]).astype(np.float32)
    parts = [sample[start:200:3].mean(0) for start in range(3)]
    centroids = unit_rows(np.concatenate([np.stack(parts), others[:20]]))
    merged = merge_cells(sample, centroids, 0.95)
    assert len(merged) == 21
    nearest = (merged @ sample[:200].mean(0)).argmax()
    assert (sample[:200] @ merged[nearest]).min() > 0.95
    kept = (merged @ centroids[3:].T).max(0)
    np.testing.assert_allclose(kept, 1, atol=1e-5)
    np.testing.assert_array_equal(merge_cells(sample, centroids, 0.995), centroids)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_near_cells_follow_each_other(count: int) -> None:
    rng = np.random.default_rng(5)
    middles = unit_rows(rng.standard_normal((4, 16)))
    group = rng.integers(0, 4, count)
    centroids = unit_rows(middles[group] + 0.05 * rng.standard_normal((count, 16)))
    order = order_cells(centroids)
    assert sorted(order.tolist()) == list(range(count))
    if count == 40:
        assert (np.diff(group[order]) != 0).sum() <= 8
    assert order_cells(np.ones((5, 3), np.float32)).tolist() == [0, 1, 2, 3, 4]
