"""Search one cell: the pairs in it, and spots where pairs would be too many to write down.

A spot is a picture and everything near it, thousands of times the same logo. Its pairs grow with
the square of its size, so they are not written: whoever needs them compares the spot's vectors
(`groups.walk` does, with those that it keeps, which are few). What is near two pictures that share
most of what is near them is one spot, or a large one would be stored again for each at its rim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from curate.dedup.groups import label_components
from curate.dedup.neighbors import Rows, assign_cells, pairs_within, unit_rows

__all__ = ["Found", "merge_cells", "order_cells", "search_cell"]

Array = np.ndarray[Any, Any]

#: Pairs that a cell may give per member before spots are looked for. With two cells visited per
#: sample this stays under ten edges a sample.
_PAIRS_PER_MEMBER = 4
#: Fewer pairs than this at one picture are no spot, nor are many of which fewer than this share are
#: pairs of each other: comparing what is kept of them would cost their square after all.
_LEAST_SPOT, _LEAST_DENSITY = 16, 0.25
#: Of what is near a picture, the share in one spot above which it joins that spot.
_MOST_SHARED = 0.5
#: Rows above which spots are looked for before all pairs are computed, and how many members ask.
_LARGE_CELL, _ASKED = 256, 64
#: Pairs, at most, that are held before those within spots are left out: at the rim of a large spot
#: nearly everything is near everything.
_MOST_PAIRS = 1 << 25
#: Spots looked for among those asked, at most.
_MOST_SPOTS = 64
#: Pairs of a centre that are confirmed before more are, and centres near each other that may turn
#: out to be in no spot: then it is a series, of which each picture differs.
_FIRST_CONFIRMED, _MOST_FAILED = 8, 8


class Found(NamedTuple):
    """What a cell holds.

    Parameters
    ----------
    left, right : (E,) int64
        Pairs, as places in what was searched.
    cosines : (E,) float32
    spots : list of (S,) int64
        Places of each spot, its centre first; pairs within one are not among the pairs above.
    """

    left: Array
    right: Array
    cosines: Array
    spots: list[Array]


_Confirm = Callable[[Array, Array], Array] | None


def search_cell(
    around: Rows,
    members: Array,
    min_cosine: float,
    most: int | None = None,
    confirm: _Confirm = None,
) -> Found:
    """Find the pairs of a cell's members with each other and with its visitors.

    Parameters
    ----------
    around : Rows of (N, D)
        Members and visitors.
    members : (M,) int64
        Places of the members in `around`.
    min_cosine : float
    most : int, optional
        Pairs per row, those of the highest cosine; all if None.
    confirm : callable, optional
        Tells which pairs of places count. Asked only about the pairs of a spot's centre; the caller
        must ask about those returned.
    """
    # With `most` a cell is large as soon as a row may have more copies in it than may be written.
    large = _LARGE_CELL if most is None else min(most, _LARGE_CELL)
    spots: list[Array] = []
    inside = np.zeros((0, len(around)), bool)
    if len(around) > large:
        spots, inside = _find_spots(around, members, min_cosine, confirm)
    # By the first spot that holds them: nobody of it needs comparing with them.
    home = np.where(inside.any(0), inside.argmax(0), -1) if spots else np.full(len(around), -1)
    is_member = np.zeros(len(around), bool)
    is_member[members] = True
    parts = []
    for first in range(-1, len(spots)):
        base = members[home[members] == first]
        asking = np.flatnonzero(~inside[first]) if first >= 0 else np.arange(len(around))
        rows = around.take(base)
        for some in np.array_split(asking, len(asking) * len(base) // _MOST_PAIRS + 1):
            query, other, cosines = pairs_within(
                around.take(some), rows, min_cosine, _plus_self(most)
            )
            left, right = some[query], base[other]
            # Of two members each finds the other; with `most` perhaps only one does.
            apart = left != right
            if most is None:
                apart &= (left < right) | ~is_member[left]
            if spots:
                apart &= ~(inside[:, left] & inside[:, right]).any(0)
            parts.append((left[apart], right[apart], cosines[apart]))
    left, right, cosines = (np.concatenate(ends) for ends in zip(*parts, strict=True))
    if confirm is None and most is None:
        budget = _PAIRS_PER_MEMBER * len(members)
        uncovered, more = _cover(left, right, len(around), budget)
        left, right, cosines = left[uncovered], right[uncovered], cosines[uncovered]
        spots += more
    return Found(left, right, cosines, spots)


def _plus_self(most: int | None) -> int | None:
    return None if most is None else most + 1


def _find_spots(
    around: Rows, members: Array, min_cosine: float, confirm: _Confirm
) -> tuple[list[Array], Array]:
    """Find spots among the pairs of a few members, where a cell is too large to see all.

    Returns
    -------
    spots : list of (S,) int64
    inside : (T, N) bool
        Which rows each of the spots holds.
    """
    asked = members[np.linspace(0, len(members) - 1, _ASKED).astype(int)]
    number, other, cosines = pairs_within(around.take(asked), around, min_cosine)
    apart = asked[number] != other
    number, other, cosines = number[apart], other[apart], cosines[apart]
    rest = np.ones(len(number), bool)
    centres: list[int] = []
    spots: list[Array] = []
    failed = np.zeros(_ASKED, int)
    for _ in range(_MOST_SPOTS):
        degrees = np.bincount(number[rest], minlength=_ASKED)
        degrees[failed >= _MOST_FAILED] = 0
        centre = int(degrees.argmax())
        if degrees.mean() <= _PAIRS_PER_MEMBER or degrees[centre] < _LEAST_SPOT:
            break
        # All that is near, or what is left of a spot would be cut smaller and smaller.
        around_it = number == centre
        near = alike = other[around_it]
        if confirm is not None:
            near = near[np.lexsort((near, -cosines[around_it]))]
            near = _confirmed(asked[centre], near, confirm)
        inside = np.zeros(len(around), bool)
        inside[near] = inside[asked[centre]] = True
        # Where pairs must be confirmed, those of two pictures' copies with each other are not.
        shared = (
            [] if confirm is not None else [spot[inside].mean() > _MOST_SHARED for spot in spots]
        )
        for place in np.flatnonzero(shared):
            if (covered := _covered(inside | spots[place], asked, number, other)) is not None:
                spots[place] |= inside
                break
        else:
            covered = _covered(inside, asked, number, other) if len(near) >= _LEAST_SPOT else None
            if covered is None:
                failed[np.isin(asked, alike)] += 1
                failed[centre] = _MOST_FAILED
                continue
            centres.append(asked[centre])
            spots.append(inside)
        rest &= ~covered
    # The centre comes first.
    places = [np.flatnonzero(spot) for spot in spots]
    ordered = [
        np.r_[centre, rows[rows != centre]] for centre, rows in zip(centres, places, strict=True)
    ]
    return ordered, np.array(spots, bool).reshape(len(spots), len(around))


def _covered(inside: Array, asked: Array, number: Array, other: Array) -> Array | None:
    """Tell which pairs of those asked a spot of these rows covers; None if too few are pairs."""
    covered: Array = inside[asked[number]] & inside[other]
    dense = covered.sum() >= _LEAST_DENSITY * inside[asked].sum() * (inside.sum() - 1)
    return covered if dense else None


def _confirmed(centre: int, near: Array, confirm: Callable[[Array, Array], Array]) -> Array:
    """Ask about what is near a centre, nearest first, for as long as many of it are copies.

    Series of pictures are as dense as spots; to ask about all that is near would cost more than the
    search itself.
    """
    copies = []
    start, size = 0, _FIRST_CONFIRMED
    while start < len(near):
        block = near[start : start + size]
        copies.append(block[confirm(np.full(len(block), centre), block)])
        if len(copies[-1]) < _LEAST_DENSITY * len(block):
            break
        start, size = start + size, 2 * size
    return np.sort(np.concatenate(copies))


def _cover(left: Array, right: Array, count: int, budget: int) -> tuple[Array, list[Array]]:
    """Tell which pairs to write, (E,) bool, and the spots that stand for the others."""
    rest = np.ones(len(left), bool)
    spots: list[Array] = []
    while rest.sum() > budget:
        degrees = np.bincount(np.r_[left[rest], right[rest]], minlength=count)
        centre = int(degrees.argmax())
        if degrees[centre] < _LEAST_SPOT:
            break
        near = np.r_[right[left == centre], left[right == centre]]
        inside = np.zeros(count, bool)
        inside[near] = inside[centre] = True
        covered = inside[left] & inside[right]
        if covered.sum() < _LEAST_DENSITY * len(near) ** 2 / 2:
            break
        spots.append(np.r_[centre, near])
        rest &= ~covered
    return rest, spots


def merge_cells(sample: Array, centroids: Array, min_cosine: float) -> Array:
    """Merge cells of which most members are pairs of each other's, on average.

    Centroids go where the data is, so many fall on a picture that is everywhere; each of its copies
    would then have to visit all of these cells.

    Parameters
    ----------
    sample : (M, D) float32, unit norm
        What the centroids were trained on.
    centroids : (C, D) float32, unit norm
    min_cosine : float

    Returns
    -------
    (K, D) float32, unit norm
        K <= C.
    """
    home = assign_cells(sample, centroids, 1)[0][0]
    sums = np.zeros_like(centroids)
    np.add.at(sums, home, sample)
    # Copies of one picture have this cosine to their middle; others that strayed in do not count.
    near = (sample * centroids[home]).sum(1) >= min_cosine**0.5
    means = np.zeros_like(centroids)
    np.add.at(means, home[near], sample[near])
    members, middle = (np.bincount(rows, minlength=len(centroids)) for rows in (home, home[near]))
    means[2 * middle < members] = 0
    means /= np.maximum(middle, 1)[:, None]
    one, other = np.nonzero(np.triu(means @ means.T >= min_cosine, 1))
    merged = label_components(len(centroids), one, other, np.arange(len(centroids)))
    if len(one) == 0:
        return centroids
    labels, place = np.unique(merged, return_inverse=True)
    whole = np.zeros((len(labels), centroids.shape[1]), np.float32)
    np.add.at(whole, place, sums)
    alone = np.bincount(place) == 1
    whole[alone] = centroids[labels[alone]]
    return unit_rows(whole)


def order_cells(centroids: Array) -> Array:
    """Order cells so that near ones follow each other: halves along the widest direction, again.

    Parameters
    ----------
    centroids : (C, D) float32

    Returns
    -------
    (C,) int64
    """
    if len(centroids) <= 2:
        return np.arange(len(centroids))
    centred = centroids - centroids.mean(0)
    # Power iteration, begun at the farthest: any direction of much variance will do.
    direction = centred[np.linalg.norm(centred, axis=1).argmax()]
    for _ in range(10):
        direction = centred.T @ (centred @ direction)
        norm = np.linalg.norm(direction)
        if norm == 0:
            return np.arange(len(centroids))
        direction = direction / norm
    order = np.argsort(centred @ direction, kind="stable")
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    return np.concatenate([half[order_cells(centroids[half])] for half in halves])
