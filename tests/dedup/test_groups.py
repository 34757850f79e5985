from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from curate.dedup.groups import (
    MAX_CLUSTER_SHARE,
    equal_value_edges,
    label_clusters,
    label_components,
    unique_pairs,
    walk,
)

Array = np.ndarray[Any, Any]
Neighbours = list[dict[int, float]]

_NO_EDGES = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


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


def draw_equals(rng: np.random.Generator, count: int, share: float) -> tuple[Array, Array]:
    """Give some rows equals: their groups, -1 for none, and the row that stands for each."""
    group = np.where(rng.random(count) < share, rng.integers(0, 12, count), -1)
    nodes = np.arange(count)
    for number in range(12):
        members = np.flatnonzero(group == number)
        if len(members):
            nodes[members] = rng.choice(members)
    return group, nodes


def spread(nodes: Array, left: Array, right: Array, cosines: Array) -> tuple[Array, Array, Array]:
    """All pairs that edges between rows that stand for others stand for."""
    pairs = [
        (one, other, cosine)
        for a, b, cosine in zip(left, right, cosines, strict=True)
        for one in np.flatnonzero(nodes == a)
        for other in np.flatnonzero(nodes == b)
    ]
    ends = np.array([pair[:2] for pair in pairs], np.int64).reshape(-1, 2)
    return unique_pairs(ends[:, 0], ends[:, 1], np.array([p[2] for p in pairs], np.float32))


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
    labels = label_clusters(np.arange(count), left, right, order)
    for members in components(neighbours_of(count, left, right, cosines)):
        lowest = min(members, key=lambda row: order[row])
        assert {int(labels[row]) for row in members} == {lowest}


@pytest.mark.parametrize("seed", range(4))
def test_equals_share_a_cluster(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 300
    _, nodes = draw_equals(rng, count, 0.1)
    left, right, cosines = random_edges(rng, count, 30)
    left, right, cosines = unique_pairs(nodes[left], nodes[right], cosines)
    order = rng.permutation(count)
    own = np.flatnonzero(nodes != np.arange(count))
    both = np.r_[left, own], np.r_[right, nodes[own]]
    expected = label_components(count, *both, order)
    np.testing.assert_array_equal(label_clusters(nodes, left, right, order), expected)
    around = neighbours_of(count, *both, np.ones(len(both[0])))
    for members in components(around):
        lowest = min(members, key=lambda row: order[row])
        assert {int(expected[row]) for row in members} == {lowest}


@pytest.mark.parametrize("seed", range(4))
def test_equals_stay_together_in_cut_components(seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, nodes = draw_equals(rng, 300, 0.4)
    left, right, cosines = random_edges(rng, 300, 100)
    left, right, _ = unique_pairs(nodes[left], nodes[right], cosines)
    order = rng.permutation(300)
    labels = label_clusters(nodes, left, right, order)
    whole = label_components(300, np.r_[left, nodes], np.r_[right, np.arange(300)], order)
    assert len(set(labels.tolist())) > len(set(whole.tolist()))
    np.testing.assert_array_equal(labels, labels[nodes])


def test_equals_are_never_cut_apart() -> None:
    count = 400
    nodes = np.arange(count)
    nodes[60:160] = 59  # the last of a chain, a hundred times more
    order = np.arange(count)
    labels = label_clusters(nodes, np.arange(59), np.arange(1, 60), order)
    assert len(set(labels[59:160].tolist())) == 1
    assert np.bincount(labels[:59]).max() <= 3


def test_labels_without_edges_or_samples() -> None:
    none = np.zeros(0, np.int64)
    assert label_clusters(np.arange(3), none, none, np.arange(3)).tolist() == [0, 1, 2]
    assert label_clusters(none, none, none, none).tolist() == []


def test_a_chain_above_the_limit_is_cut_into_stars() -> None:
    count = 400  # the share is then 4 samples, and groups up to 50 are never cut
    chain = np.arange(120)
    pair = np.array([200, 201])
    left = np.r_[chain[:-1], np.full(49, 300), pair[0]]
    right = np.r_[chain[1:], np.arange(301, 350), pair[1]]
    order = np.arange(count)[::-1].copy()
    labels = label_clusters(np.arange(count), left, right, order)
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
        labels = label_clusters(np.arange(count), chain[:-1], chain[1:], order)
        assert np.bincount(labels).max() == expected


@pytest.mark.parametrize("size", [40, 90])
def test_labels_do_not_depend_on_the_order_of_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    count = 200
    left, right, _ = random_edges(rng, size, 2 * size)
    order = rng.permutation(count)
    labels = label_clusters(np.arange(count), left, right, order)
    place = rng.permutation(count)  # row i moves to place[i]
    moved_order = np.empty(count, np.int64)
    moved_order[place] = order
    shuffled = rng.permutation(len(left))
    moved = label_clusters(
        np.arange(count), place[right][shuffled], place[left][shuffled], moved_order
    )
    np.testing.assert_array_equal(moved[place], place[labels])


@pytest.mark.parametrize("seed", range(8))
def test_walk_against_the_slow_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 80
    left, right, cosines = random_edges(rng, count, 40 + 30 * seed)
    eligible = rng.random(count) > 0.2
    group, nodes = draw_equals(rng, count, 0.4)
    left, right, cosines = unique_pairs(nodes[left], nodes[right], cosines)
    preference = rng.permutation(count)
    stays, representative, cosine, exact = walk(
        preference, eligible, left, right, cosines, nodes, group
    )
    left, right, cosines = spread(nodes, left, right, cosines)
    around = neighbours_of(count, left, right, cosines)
    dropped = slow_walk(preference.tolist(), eligible.tolist(), around, group.tolist())

    assert set(np.flatnonzero(representative >= 0).tolist()) == set(dropped)
    for row, expected in dropped.items():
        assert (int(representative[row]), float(cosine[row]), bool(exact[row])) == expected
    assert np.isnan(cosine[representative < 0]).all()
    assert not exact[representative < 0].any()

    kept = eligible & (representative < 0)
    np.testing.assert_array_equal(stays, kept)
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
    group, nodes = draw_equals(rng, count, 0.3)
    left, right, cosines = unique_pairs(nodes[left], nodes[right], cosines)
    preference = rng.permutation(count)
    before = walk(preference, eligible, left, right, cosines, nodes, group)
    place = rng.permutation(count)
    back = np.argsort(place)
    moved = unique_pairs(place[left], place[right], cosines)
    after = walk(place[preference], eligible[back], *moved, place[nodes[back]], group[back])
    expected = np.where(before.representative >= 0, place[before.representative], -1)
    np.testing.assert_array_equal(after.representative[place], expected)
    for name in ("kept", "cosine", "exact"):
        np.testing.assert_array_equal(getattr(after, name)[place], getattr(before, name))


def test_the_good_twin_of_an_ineligible_sample_survives() -> None:
    none = np.zeros(0, np.int64)
    _, representative, _, _ = walk(
        np.array([0, 1, 2]),
        np.array([False, True, True]),
        np.array([0]),
        np.array([1]),
        np.array([0.99], np.float32),
        np.array([0, 1, 0]),
        np.array([7, -1, 7]),
    )
    # What is like the one is like its equal.
    assert representative.tolist() == [-1, -1, 1]
    alone = walk(
        np.array([0, 1]), np.array([False, True]), *_NO_EDGES, np.zeros(2, int), np.array([7, 7])
    )
    assert alone.representative.tolist() == [-1, -1]
    empty = walk(none, np.zeros(0, bool), *_NO_EDGES, none, none)
    assert [len(part) for part in empty] == [0, 0, 0, 0]


def test_rows_without_bytes_are_no_twins() -> None:
    _, representative, _, exact = walk(
        np.array([2, 1, 0]), np.ones(3, bool), *_NO_EDGES, np.arange(3), np.full(3, -1)
    )
    assert representative.tolist() == [-1, -1, -1]
    assert not exact.any()


def test_equals_without_bytes_are_copies_of_cosine_one() -> None:
    _, representative, cosine, exact = walk(
        np.array([2, 1, 0]), np.ones(3, bool), *_NO_EDGES, np.zeros(3, int), np.array([4, -1, 4])
    )
    assert representative.tolist() == [2, 2, -1]
    assert cosine[:2].tolist() == [1, 1]
    assert exact.tolist() == [True, False, False]


@pytest.mark.parametrize("quota", [1, 3])
def test_of_a_kind_only_so_many_are_kept(quota: int) -> None:
    rng = np.random.default_rng(quota)
    count = 120
    left, right, cosines = random_edges(rng, count, 60)
    nodes, none = np.arange(count), np.full(count, -1)
    kinds = np.where(rng.random(count) < 0.8, rng.integers(0, 8, count), -1)
    preference, eligible = rng.permutation(count), rng.random(count) > 0.1
    found = walk(preference, eligible, left, right, cosines, nodes, none, kinds, quota)
    around = neighbours_of(count, left, right, cosines)
    kept: list[int] = []
    for row in preference.tolist():
        if not eligible[row] or any(one in around[row] for one in kept):
            continue
        if kinds[row] < 0 or sum(kinds[one] == kinds[row] for one in kept) < quota:
            kept.append(row)
    assert np.flatnonzero(found.kept).tolist() == sorted(kept)
    assert np.bincount(kinds[found.kept & (kinds >= 0)]).max() == quota
    late = eligible & ~found.kept & (found.representative < 0)
    assert late.any()
    assert (kinds[late] >= 0).all()
    assert found.kept[found.representative[found.representative >= 0]].all()
