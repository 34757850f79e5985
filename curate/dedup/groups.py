"""Edges to groups, and the walk that decides which of them stay."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = [
    "MAX_CLUSTER_SHARE",
    "Spots",
    "Walk",
    "equal_value_edges",
    "label_clusters",
    "label_components",
    "nearest_pairs",
    "unique_pairs",
    "walk",
]

Array = np.ndarray[Any, Any]

#: A connected component above this share of the data is chained, not one picture: it is cut.
MAX_CLUSTER_SHARE = 0.01
#: In small sets a share means nothing: groups up to this size are never cut.
_MIN_CUT_SIZE = 50
#: Members of a spot that are compared at once.
_BLOCK = 16384


def unique_pairs(left: Array, right: Array, cosines: Array) -> tuple[Array, Array, Array]:
    """Order every pair as (smaller, larger) and keep each once, sorted.

    Parameters
    ----------
    left, right : (E,) int64
    cosines : (E,) float32
    """
    low, high = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((-cosines, high, low))
    low, high, cosines = low[order], high[order], cosines[order]
    first = np.r_[True, (np.diff(low) != 0) | (np.diff(high) != 0)][: len(low)]
    proper = first & (low != high)
    return low[proper], high[proper], cosines[proper]


def nearest_pairs(
    left: Array, right: Array, cosines: Array, most: int
) -> tuple[Array, Array, Array]:
    """Keep of each left row's pairs those of the highest cosine; of equal ones the lower right row.

    Parameters
    ----------
    left, right : (E,) int64
    cosines : (E,) float32
    most : int
        Pairs of a left row that are kept.
    """
    order = np.lexsort((right, -cosines, left))
    left, right, cosines = left[order], right[order], cosines[order]
    first = np.flatnonzero(np.r_[True, np.diff(left) != 0][: len(left)])
    place = np.arange(len(left)) - np.repeat(first, np.diff(np.r_[first, len(left)]))
    near = place < most
    return left[near], right[near], cosines[near]


def equal_value_edges(values: Array, valid: Array) -> tuple[Array, Array]:
    """Join rows of equal value to the first of them.

    Parameters
    ----------
    values : (N,) any sortable dtype
    valid : (N,) bool
        Rows that count.

    Returns
    -------
    first, other : (E,) int64
    """
    rows = np.flatnonzero(valid)
    _, group, inverse = np.unique(values[rows], return_index=True, return_inverse=True)
    first = rows[group[inverse]]
    return first[first != rows], rows[first != rows]


def label_components(count: int, left: Array, right: Array, order: Array) -> Array:
    """Label connected components by their lowest-ranked row.

    Parameters
    ----------
    count : int
        Number of samples N.
    left, right : (E,) int64
        Edges.
    order : (N,) int64
        Rank of each sample.

    Returns
    -------
    (N,) int64
    """
    return _lowest_of(_components(count, left, right), order)


def label_clusters(nodes: Array, left: Array, right: Array, order: Array) -> Array:
    """Label connected components; oversized ones are cut into stars.

    Parameters
    ----------
    nodes : (N,) int64
        The row that stands for each sample's equals; they stay together.
    left, right : (E,) int64
        Edges between rows that stand for others.
    order : (N,) int64
        Rank of each sample (by uid): decides labels and the centres of stars, so that neither
        depends on the order of rows.

    Returns
    -------
    (N,) int64
        Row of the lowest-ranked sample of each sample's cluster.
    """
    count = len(nodes)
    component = _components(count, left, right)
    sizes = np.bincount(component[nodes], minlength=count)
    limit = max(_MIN_CUT_SIZE, int(MAX_CLUSTER_SHARE * count))
    if sizes.max(initial=0) <= limit:
        return _lowest_of(component[nodes], order)
    chained = (sizes[component] > limit) & (nodes == np.arange(count))
    neighbours = coo_matrix(
        (np.ones(2 * len(left), np.int8), (np.r_[left, right], np.r_[right, left])),
        shape=(count, count),
    ).tocsr()
    free = chained.copy()
    by_degree = np.lexsort((order, -np.diff(neighbours.indptr)))
    for star, centre in enumerate(by_degree[chained[by_degree]], start=len(sizes)):
        if free[centre]:
            around = neighbours.indices[neighbours.indptr[centre] : neighbours.indptr[centre + 1]]
            taken = np.append(around[free[around]], centre)
            component[taken] = star
            free[taken] = False
    return _lowest_of(component[nodes], order)


def _components(count: int, left: Array, right: Array) -> Array:
    """Number the connected components: (N,) int32."""
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    numbers: Array = connected_components(graph, directed=False)[1]
    return numbers


def _lowest_of(component: Array, order: Array) -> Array:
    """Row of the lowest-ranked member of each row's component."""
    by_rank = np.argsort(order, kind="stable")
    _, first, inverse = np.unique(component[by_rank], return_index=True, return_inverse=True)
    labels = np.empty(len(order), np.int64)
    labels[by_rank] = by_rank[first][inverse]
    return labels


class Spots(NamedTuple):
    """Sets of samples whose pairs are not written down but compared when needed (`dedup.cells`).

    Parameters
    ----------
    rows : (S,) int64
        Members of all spots, one spot after another; the first of each is its centre. A sample may
        be in several. Pairs join each to the centre, some by way of others.
    starts : (T + 1,) int64
        Where each spot starts.
    vectors : (S, D) float16
    min_cosine : float
        From which two members of a spot are a pair.
    """

    rows: Array
    starts: Array
    vectors: Array
    min_cosine: float

    def stars(self) -> tuple[Array, Array]:
        """Join every centre to its members, as their pairs do: (E,) int64 twice."""
        centres = np.repeat(self.rows[self.starts[:-1]], np.diff(self.starts))
        proper = centres != self.rows
        return centres[proper], self.rows[proper]

    def contain(self, left: Array, right: Array) -> Array:
        """Tell which pairs of rows share a spot: (E,) bool."""
        number = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.argsort(self.rows, kind="stable")
        rows, number = self.rows[order], number[order]
        count = int(max(rows.max(initial=0), right.max(initial=0))) + 1
        known = np.sort(number * count + rows)
        both = np.zeros(len(left), bool)
        first, last = (np.searchsorted(rows, left, side) for side in ("left", "right"))
        for step in range(int((last - first).max(initial=0))):
            pair = np.flatnonzero(first + step < last)
            wanted = number[first[pair] + step] * count + right[pair]
            place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
            both[pair] |= known[place] == wanted
        return both


class Walk(NamedTuple):
    """What `walk` decided.

    Parameters
    ----------
    kept : (N,) bool
    representative : (N,) int64
        Row of the kept sample that an eligible row duplicates; -1 where it duplicates none.
    cosine : (N,) float32
        To the representative; 1 for equals, NaN where there is none.
    exact : (N,) bool
        Whether the duplicate is of equal bytes.
    """

    kept: Array
    representative: Array
    cosine: Array
    exact: Array


def walk(
    preference: Array,
    eligible: Array,
    left: Array,
    right: Array,
    cosines: Array,
    nodes: Array,
    exact_group: Array,
    kinds: Array | None = None,
    quota: int = 0,
    spots: Spots | None = None,
) -> Walk:
    """Keep samples in order of preference unless they reach one already kept.

    Parameters
    ----------
    preference : (N,) int64
        Rows, most preferred first.
    eligible : (N,) bool
        Rows that passed all other rules.
    left, right : (E,) int64
        Semantic edges between rows that stand for others.
    cosines : (E,) float32
    nodes : (N,) int64
        The row that stands for each sample's equals.
    exact_group : (N,) int64
        Rows of equal bytes share a number >= 0; -1 where there are no bytes.
    kinds : (N,) int64, optional
        At most `quota` samples of equal kind are kept; of those below 0 all. What comes too late is
        neither kept nor a duplicate, and keeps nothing else away.
    quota : int
    spots : Spots, optional
        Further edges, between rows that stand for others.

    Returns
    -------
    Walk
    """
    count = len(eligible)
    ends = np.r_[left, right]
    graph = coo_matrix(
        (np.r_[cosines, cosines], (ends, np.r_[right, left])), shape=(count, count)
    ).tocsr()
    linked = np.diff(graph.indptr) > 0
    members = _SpotMembers(spots, count)
    limited = np.zeros(count, bool) if kinds is None else kinds >= 0
    representative = np.full(count, -1, np.int64)
    cosine = np.full(count, np.nan, np.float32)
    places = Counter[int]()
    # By the row that stands for equals: which of them is kept, and the nearest kept one.
    kept = np.full(count, -1, np.int64)
    reached = np.full(count, -1, np.int64)
    nearness = np.full(count, -np.inf, np.float32)

    def mark(near: Array, values: Array, row: int) -> None:
        # Of equally near ones the most preferred stays, which came first.
        closer = values > nearness[near]
        reached[near[closer]], nearness[near[closer]] = row, values[closer]

    order = preference[eligible[preference]]
    # Most samples reach nothing but their equals: of these the first stays.
    meets = linked | members.some
    meets[nodes[limited]] = True
    alone = order[~meets[nodes[order]]]
    own, first = np.unique(nodes[alone], return_index=True)
    kept[own] = alone[first]
    others = np.delete(alone, first)
    representative[others], cosine[others] = kept[nodes[others]], 1.0
    for row in order[meets[nodes[order]]]:
        node = nodes[row]
        if kept[node] >= 0:
            representative[row], cosine[row] = kept[node], 1.0
            continue
        if reached[node] >= 0:
            representative[row], cosine[row] = reached[node], nearness[node]
            continue
        if kinds is not None and limited[row]:
            places[int(kinds[row])] += 1
            if places[int(kinds[row])] > quota:
                continue
        kept[node] = row
        if linked[node]:
            span = slice(graph.indptr[node], graph.indptr[node + 1])
            mark(graph.indices[span], graph.data[span], row)
        for near, values in members.around(node):
            mark(near, values, row)
    exact = (representative >= 0) & (exact_group >= 0)
    exact &= exact_group == exact_group[representative]
    stays = np.zeros(count, bool)
    stays[kept[kept >= 0]] = True
    return Walk(stays, representative, cosine, exact)


class _SpotMembers:
    """Finds what is near a row in each of its spots."""

    def __init__(self, spots: Spots | None, count: int) -> None:
        self._spots = spots
        rows = spots.rows if spots is not None else np.zeros(0, np.int64)
        self._order = np.argsort(rows, kind="stable")
        self._bounds = np.searchsorted(rows[self._order], np.arange(count + 1))
        self.some = np.diff(self._bounds) > 0
        # For whom a row was compared last: spots of confirmed pairs overlap, by dozens.
        self._asked = np.full(count, -1, np.int64)

    def around(self, row: int) -> Iterator[tuple[Array, Array]]:
        """Yield rows and their cosines to `row`, each row once, spot by spot."""
        spots = self._spots
        if spots is None or not self.some[row]:
            return
        for place in self._order[self._bounds[row] : self._bounds[row + 1]]:
            spot = int(np.searchsorted(spots.starts, place, side="right")) - 1
            begin, end = spots.starts[spot : spot + 2].tolist()
            span: slice | Array = slice(begin, end)
            fresh = self._asked[spots.rows[span]] != row
            if not fresh.all():
                span = begin + np.flatnonzero(fresh)
            rows = spots.rows[span]
            if len(rows) == 0:
                continue
            self._asked[rows] = row
            cosines = _cosines(spots.vectors[span], spots.vectors[place])
            near = (cosines >= np.float32(spots.min_cosine)) & (rows != row)
            yield rows[near], cosines[near]


def _cosines(vectors: Array, one: Array) -> Array:
    """Cosines of (S, D) vectors to one of them, as `neighbors.exact_cosines` has them."""
    from curate.dedup.neighbors import exact_cosines

    parts = [
        exact_cosines(part, one[None])
        for part in (vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK))
    ]
    return np.concatenate(parts)
