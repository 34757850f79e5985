"""Edges to groups, and the walk that decides which of them stay."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = [
    "MAX_CLUSTER_SHARE",
    "Walk",
    "equal_value_edges",
    "label_clusters",
    "label_components",
    "unique_pairs",
    "walk",
]

Array = np.ndarray[Any, Any]

#: A connected component above this share of the data is chained, not one picture: it is cut.
MAX_CLUSTER_SHARE = 0.01
#: In small sets a share means nothing: groups up to this size are never cut.
_MIN_CUT_SIZE = 50


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
    rank = np.empty(count, np.int64)
    rank[preference] = np.arange(count)
    representative = np.full(count, -1, np.int64)
    cosine = np.full(count, np.nan, np.float32)
    places = Counter[int]()
    # By the row that stands for equals: which of them is kept.
    kept = np.full(count, -1, np.int64)
    for row in preference[eligible[preference]]:
        node = nodes[row]
        if kept[node] >= 0:
            representative[row], cosine[row] = kept[node], 1.0
            continue
        if linked[node]:
            span = slice(graph.indptr[node], graph.indptr[node + 1])
            near = kept[graph.indices[span]]
            reached = near >= 0
            if reached.any():
                # The nearest of the kept; of equally near ones the most preferred.
                near, close = near[reached], graph.data[span][reached]
                best = np.lexsort((rank[near], -close))[0]
                representative[row], cosine[row] = near[best], close[best]
                continue
        if kinds is not None and kinds[row] >= 0:
            places[int(kinds[row])] += 1
            if places[int(kinds[row])] > quota:
                continue
        kept[node] = row
    exact = (representative >= 0) & (exact_group >= 0)
    exact &= exact_group == exact_group[representative]
    stays = np.zeros(count, bool)
    stays[kept[kept >= 0]] = True
    return Walk(stays, representative, cosine, exact)
