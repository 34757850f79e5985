from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from curate.dedup.groups import (
    MAX_CLUSTER_SHARE,
    equal_value_edges,
    label_clusters,
    unique_pairs,
    walk,
)

Array = np.ndarray[Any, Any]
Neighbours = list[dict[int, float]]


def random_edges(rng: np.random.Generator, count: int, edges: int) -> tuple[Array, Array, Array]:
    """Draw unique edges with cosines of one decimal, so that ties are common."""
    drawn = rng.integers(0, count, (2, edges))
    cosines = (rng.integers(1, 10, edges) / 10).astype(np.float32)
    return unique_pairs(drawn[0], drawn[1], cosines)


def neighbours_of(count: int, left: Array, right: Array, cosines: Array) -> Neighbours:
    around: Neighbours = [{} for _ in range(count)]
    for a, b, cosine in zip(left.tolist(), right.tolist(), cosines.tolist(), strict=True):
        around[a][b] = around[b][a] = cosine
    return around


def components(around: Neighbours) -> Iterator[set[int]]:
    """Flood fill: slow and plain."""
    seen: set[int] = set()
    for start in range(len(around)):
        if start in seen:
            continue
        reached, todo = {start}, [start]
        while todo:
            for other in around[todo.pop()]:
                if other not in reached:
                    reached.add(other)
                    todo.append(other)
        seen |= reached
        yield reached


def slow_walk(
    preference: list[int], eligible: list[bool], around: Neighbours, group: list[int]
) -> dict[int, tuple[int, float, bool]]:
    """Say which kept row every dropped row duplicates, in the words of the design."""
    kept: list[int] = []
    dropped: dict[int, tuple[int, float, bool]] = {}
    for row in preference:
        if not eligible[row]:
            continue
        twins = [one for one in kept if group[row] >= 0 and group[one] == group[row]]
        reached = [one for one in kept if one in around[row]]
        if twins:
            dropped[row] = (twins[0], 1.0, True)
        elif reached:
            # The nearest; of equally near ones the most preferred, which was kept first.
            nearest = max(reached, key=lambda one: around[row][one])
            dropped[row] = (nearest, around[row][nearest], False)
        else:
            kept.append(row)
    return dropped


def test_unique_pairs_keeps_each_pair_once_with_its_best_cosine() -> None:
    left = np.array([3, 1, 2, 1, 5, 5, 0])
    right = np.array([1, 3, 2, 0, 4, 4, 1])
    cosines = np.array([0.7, 0.9, 1.0, 0.5, 0.6, 0.6, 0.4], np.float32)
    low, high, best = unique_pairs(left, right, cosines)
    assert low.tolist() == [0, 1, 4]
    assert high.tolist() == [1, 3, 5]
    np.testing.assert_array_equal(best, np.array([0.5, 0.9, 0.6], np.float32))


@pytest.mark.parametrize("edges", [0, 1, 400])
def test_unique_pairs_against_a_dictionary(edges: int) -> None:
    rng = np.random.default_rng(edges)
    left, right = rng.integers(0, 20, (2, edges))
    cosines = rng.random(edges).astype(np.float32)
    best: dict[tuple[int, int], float] = {}
    for a, b, cosine in zip(left.tolist(), right.tolist(), cosines.tolist(), strict=True):
        if a != b:
            pair = (min(a, b), max(a, b))
            best[pair] = max(best.get(pair, -1), cosine)
    low, high, found = unique_pairs(left, right, cosines)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == sorted(best)
    assert found.tolist() == [best[pair] for pair in sorted(best)]


def test_equal_value_edges_join_to_the_first_valid_row() -> None:
    values = np.array(["b", "a", "b", "c", "a", "b", ""])
    valid = np.array([False, True, True, True, True, True, False])
    first, other = equal_value_edges(values, valid)
    assert sorted(zip(first.tolist(), other.tolist(), strict=True)) == [(1, 4), (2, 5)]
    nothing = equal_value_edges(values, np.zeros(7, bool))
    assert [len(ends) for ends in nothing] == [0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_labels_are_the_lowest_of_each_component(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 300
    left, right, cosines = random_edges(rng, count, 120)
    order = rng.permutation(count)
    labels = label_clusters(count, left, right, order)
    for members in components(neighbours_of(count, left, right, cosines)):
        lowest = min(members, key=lambda row: order[row])
        assert {int(labels[row]) for row in members} == {lowest}


def test_labels_without_edges_or_samples() -> None:
    none = np.zeros(0, np.int64)
    assert label_clusters(3, none, none, np.arange(3)).tolist() == [0, 1, 2]
    assert label_clusters(0, none, none, none).tolist() == []


def test_a_chain_above_the_limit_is_cut_into_stars() -> None:
    count = 400  # the share is then 4 samples, and groups up to 50 are never cut
    chain = np.arange(120)
    pair = np.array([200, 201])
    left = np.r_[chain[:-1], np.full(49, 300), pair[0]]
    right = np.r_[chain[1:], np.arange(301, 350), pair[1]]
    order = np.arange(count)[::-1].copy()
    labels = label_clusters(count, left, right, order)
    around = neighbours_of(count, left, right, np.ones(len(left), np.float32))
    sizes = np.bincount(labels)
    assert sizes[labels[chain]].max() == 3  # a link of a chain and its two neighbours
    assert sizes[labels[300]] == 50  # exactly the limit: left whole
    assert sizes[labels[200]] == 2
    for label in set(labels[chain].tolist()):
        members = np.flatnonzero(labels == label).tolist()
        # A star: one member reaches all others; its label is the lowest-ranked of them.
        assert any(all(o == c or o in around[c] for o in members) for c in members)
        assert label == min(members, key=lambda row: order[row])


def test_oversized_is_a_share_of_large_sets() -> None:
    count = 20_000
    size = int(MAX_CLUSTER_SHARE * count)
    order = np.arange(count)
    for extra, expected in ((0, size), (1, 3)):
        chain = np.arange(size + extra)
        labels = label_clusters(count, chain[:-1], chain[1:], order)
        assert np.bincount(labels).max() == expected


@pytest.mark.parametrize("size", [40, 90])
def test_labels_do_not_depend_on_the_order_of_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    count = 200
    left, right, _ = random_edges(rng, size, 2 * size)
    order = rng.permutation(count)
    labels = label_clusters(count, left, right, order)
    place = rng.permutation(count)  # row i moves to place[i]
    moved_order = np.empty(count, np.int64)
    moved_order[place] = order
    shuffled = rng.permutation(len(left))
    moved = label_clusters(count, place[right][shuffled], place[left][shuffled], moved_order)
    np.testing.assert_array_equal(moved[place], place[labels])


@pytest.mark.parametrize("seed", range(8))
def test_walk_against_the_slow_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 80
    left, right, cosines = random_edges(rng, count, 40 + 30 * seed)
    eligible = rng.random(count) > 0.2
    group = np.where(rng.random(count) < 0.4, rng.integers(0, 12, count), -1)
    preference = rng.permutation(count)
    representative, cosine, exact = walk(preference, eligible, left, right, cosines, group)
    around = neighbours_of(count, left, right, cosines)
    dropped = slow_walk(preference.tolist(), eligible.tolist(), around, group.tolist())

    assert set(np.flatnonzero(representative >= 0).tolist()) == set(dropped)
    for row, expected in dropped.items():
        assert (int(representative[row]), float(cosine[row]), bool(exact[row])) == expected
    assert np.isnan(cosine[representative < 0]).all()
    assert not exact[representative < 0].any()

    kept = eligible & (representative < 0)
    assert not (kept[left] & kept[right]).any()
    assert kept[representative[representative >= 0]].all()
    kept_groups = group[kept & (group >= 0)]
    assert len(set(kept_groups.tolist())) == len(kept_groups)


@pytest.mark.parametrize("seed", range(4))
def test_walk_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 120
    left, right, cosines = random_edges(rng, count, 300)
    eligible = rng.random(count) > 0.1
    group = np.where(rng.random(count) < 0.3, rng.integers(0, 20, count), -1)
    preference = rng.permutation(count)
    before = walk(preference, eligible, left, right, cosines, group)
    place = rng.permutation(count)
    back = np.argsort(place)
    moved = unique_pairs(place[left], place[right], cosines)
    after = walk(place[preference], eligible[back], *moved, group[back])
    expected = np.where(before[0] >= 0, place[before[0]], -1)
    np.testing.assert_array_equal(after[0][place], expected)
    np.testing.assert_array_equal(after[1][place], before[1])
    np.testing.assert_array_equal(after[2][place], before[2])


def test_the_good_twin_of_an_ineligible_sample_survives() -> None:
    none = np.zeros(0, np.int64)
    representative, _, _ = walk(
        np.array([0, 1, 2]),
        np.array([False, True, True]),
        np.array([0]),
        np.array([1]),
        np.array([0.99], np.float32),
        np.array([7, -1, 7]),
    )
    assert representative.tolist() == [-1, -1, -1]
    empty = walk(none, np.zeros(0, bool), none, none, np.zeros(0, np.float32), none)
    assert [len(part) for part in empty] == [0, 0, 0]


def test_rows_without_bytes_are_no_twins() -> None:
    none = np.zeros(0, np.int64)
    representative, _, exact = walk(
        np.array([2, 1, 0]), np.ones(3, bool), none, none, np.zeros(0, np.float32), np.full(3, -1)
    )
    assert representative.tolist() == [-1, -1, -1]
    assert not exact.any()
