"""Edges to groups, and the walk that decides which of them stay."""

from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["MAX_CLUSTER_SHARE", "equal_value_edges", "label_clusters", "unique_pairs", "walk"]

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


def label_clusters(count: int, left: Array, right: Array, order: Array) -> Array:
    """Label connected components; oversized ones are cut into stars.

    Parameters
    ----------
    count : int
        Number of samples N.
    left, right : (E,) int64
        Edges.
    order : (N,) int64
        Rank of each sample (by uid): decides labels and the centres of stars, so that neither
        depends on the order of rows.

    Returns
    -------
    (N,) int64
        Row of the lowest-ranked sample of each sample's cluster.
    """
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component)
    limit = max(_MIN_CUT_SIZE, int(MAX_CLUSTER_SHARE * count))
    labels = _lowest_of(component, order)
    if sizes.max(initial=0) <= limit:
        return labels
    chained = sizes[component] > limit
    neighbours = coo_matrix(
        (np.ones(2 * len(left), np.int8), (np.r_[left, right], np.r_[right, left])),
        shape=(count, count),
    ).tocsr()
    free = chained.copy()
    by_degree = np.lexsort((order, -np.diff(neighbours.indptr)))
    for centre in by_degree[chained[by_degree]]:
        if not free[centre]:
            continue
        around = neighbours.indices[neighbours.indptr[centre] : neighbours.indptr[centre + 1]]
        star = np.append(around[free[around]], centre)
        labels[star] = star[np.argmin(order[star])]
        free[star] = False
    return labels


def _lowest_of(component: Array, order: Array) -> Array:
    """Row of the lowest-ranked member of each row's component."""
    by_rank = np.argsort(order, kind="stable")
    _, first = np.unique(component[by_rank], return_index=True)
    return by_rank[first][component]


def walk(
    preference: Array,
    eligible: Array,
    left: Array,
    right: Array,
    cosines: Array,
    exact_group: Array,
) -> tuple[Array, Array, Array]:
    """Keep samples in order of preference unless they reach one already kept.

    Parameters
    ----------
    preference : (N,) int64
        Rows, most preferred first.
    eligible : (N,) bool
        Rows that passed all other rules.
    left, right : (E,) int64
        Semantic edges.
    cosines : (E,) float32
    exact_group : (N,) int64
        Rows of equal bytes share a number >= 0; -1 where there are no bytes.

    Returns
    -------
    representative : (N,) int64
        Row of the kept sample that an eligible row duplicates; -1 if kept or not eligible.
    cosine : (N,) float32
        To the representative; 1 for equal bytes, NaN where there is none.
    exact : (N,) bool
        Whether the duplicate is of equal bytes.
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
    exact = np.zeros(count, bool)
    kept = np.zeros(count, bool)
    kept_of_group: dict[int, int] = {}
    for row in preference[eligible[preference]]:
        group = int(exact_group[row])
        twin = kept_of_group.get(group, -1) if group >= 0 else -1
        if twin >= 0:
            representative[row], cosine[row], exact[row] = twin, 1.0, True
            continue
        if linked[row]:
            span = slice(graph.indptr[row], graph.indptr[row + 1])
            reached = kept[graph.indices[span]]
            if reached.any():
                # The nearest of the kept; of equally near ones the most preferred.
                near, close = graph.indices[span][reached], graph.data[span][reached]
                best = np.lexsort((rank[near], -close))[0]
                representative[row], cosine[row] = near[best], close[best]
                continue
        kept[row] = True
        if group >= 0:
            kept_of_group[group] = int(row)
    return representative, cosine, exact
