"""The steps of `dedup` that search: cells, copies of vectors by ranges of them, pairs cell by cell.

Only pairs whose cells are near each other are compared. Every vector is copied, by ranges of cells,
to where it is at home and to where it visits, so that a task reads what it compares and no more.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from curate import storage
from curate.dedup import groups
from curate.dedup.registration import ReadImage
from curate.errors import InputError
from curate.stages.base import Room
from curate.stages.dedup_earlier import Earlier, read_copies
from curate.stages.dedup_inputs import (
    commit_edges,
    commit_spots,
    dedup_stage,
    draw_vectors,
    earlier_runs,
    searched_vectors,
    shard_start,
    shard_starts,
    shard_vectors,
    thumbnail_reader,
)
from curate.stages.dedup_recall import MOST_QUERIES, first_row, nearest_known
from curate.stages.embed import Embed

if TYPE_CHECKING:
    from curate.dedup.neighbors import Rows

__all__ = ["assign_shard", "search_part", "search_parts", "spread_shard", "train_cells"]

Array = np.ndarray[Any, Any]

#: Below this one cell is searched whole, which is brute force and takes a second.
_ONE_CELL_SAMPLES = 2000
#: Vectors per cell that k-means is trained on; FAISS's own recommendation is 39 to 256.
_TRAIN_PER_CELL = 64


def train_cells(room: Room, task: str) -> dict[str, float]:
    """Commit the centroids of the cells, and the queries that recall may be measured with."""
    from curate.dedup.cells import merge_cells, order_cells
    from curate.dedup.neighbors import train_centroids, unit_rows

    total = shard_starts(room)[-1]
    queries, rows = draw_vectors(room, MOST_QUERIES, "recall")
    storage.commit_array(room.path("queries.npy"), queries)
    storage.commit_array(room.path("query_rows.npy"), rows)
    runs = earlier_runs(room)
    if runs:
        # Their index is used, so that their vectors stay where they lie.
        _check_runs(room, runs, queries.shape[1])
        for name in ("centroids.npy", "parts.npy"):
            storage.commit_array(room.path(name), storage.read_array(runs[0].path("dedup", name)))
        return {}
    cells = 1 if total <= _ONE_CELL_SAMPLES else round(total**0.5)
    sample, _ = draw_vectors(room, cells * _TRAIN_PER_CELL, "centroids")
    cells = min(cells, max(1, len(sample)))
    if cells == 1:
        centroids = np.zeros((1, max(1, sample.shape[1])), np.float32)
    else:
        # Threads would change the order of sums, and with it the centroids.
        stage, rows = dedup_stage(room), unit_rows(sample)
        centroids = train_centroids(rows, cells, stage.seed, threads=1)
        if not stage.asks_pixels:  # else a pair by its cosine may be none
            centroids = merge_cells(rows, centroids, stage.min_cosine)
        centroids = centroids[order_cells(centroids)]
    storage.commit_array(room.path("centroids.npy"), centroids)
    return {"cells": len(centroids)}


def _check_runs(room: Room, runs: list[Earlier], width: int) -> None:
    """Refuse earlier runs whose vectors or cells are not of one space with this run's."""
    encoder = room.find(Embed).encoder
    centroids = [storage.read_array(run.path("dedup", "centroids.npy")) for run in runs]
    for run, theirs in zip(runs, centroids, strict=True):
        if room.folders["dedup"] == run.path("dedup"):
            raise InputError(
                f"{run.out}: must not be this run's own output (dedup.against). Name another, or "
                "write to another."
            )
        if theirs.shape[1] != width:
            raise InputError(
                f"{run.out}: must have vectors as wide as this run's, {width} (dedup.against); got "
                f"{theirs.shape[1]}. Embed both by one encoder."
            )
        if run.encoder != encoder:
            raise InputError(
                f"{run.out}: must be embedded by this run's encoder, {encoder} (dedup.against); "
                f"got {run.encoder}. Embed both by one encoder."
            )
        if not np.array_equal(theirs, centroids[0]):
            raise InputError(
                f"{run.out}: must share its cells with {runs[0].out} (dedup.against); it was not "
                "compared with it. Run one of the two against the other first."
            )


def assign_shard(room: Room, shard: str) -> dict[str, float]:
    """Commit the nearest cells of each vector, and their detours; -1 where there is no vector."""
    from curate.dedup.neighbors import assign_cells, unit_rows

    centroids = storage.read_array(room.path("centroids.npy"))
    vectors, valid = searched_vectors(room, shard)
    most = min(dedup_stage(room).max_probes, len(centroids))
    cells = np.full((most, len(vectors)), -1, np.int32)
    detours = np.full((most, len(vectors)), np.inf, np.float16)
    if valid.any():
        found = assign_cells(unit_rows(vectors[valid]), centroids, most, room.threads)
        cells[:, valid], detours[:, valid] = found
    storage.commit_array(room.path("cells", f"{shard}.npy"), cells)
    storage.commit_array(room.path("detours", f"{shard}.npy"), detours)
    return {"samples": len(vectors)}


def spread_shard(room: Room, shard: str) -> dict[str, float]:
    """Commit the vectors of a shard once for every task that compares them, in order of task."""
    reach = storage.read_json(room.path("reach.json"))["reach"]
    parts = storage.read_array(room.path("parts.npy"))
    vectors = shard_vectors(room, shard)
    cells = np.asarray(storage.read_array(room.path("cells", f"{shard}.npy")))
    detours = storage.read_array(room.path("detours", f"{shard}.npy"))
    visited = np.where((cells >= 0) & (detours <= np.float16(reach)), cells, -1)
    visited = visited[: max(1, int((visited >= 0).any(1).sum()))].T
    row, place = np.nonzero(visited >= 0)
    part = np.searchsorted(parts, visited[row, place], side="right") - 1
    keys = np.unique(part * len(vectors) + row)
    part, row = np.divmod(keys, max(1, len(vectors)))
    copies = np.empty(len(row), _visit_type(visited.shape[1], vectors.shape[1]))
    copies["row"] = shard_start(room, shard) + row
    copies["cells"], copies["vector"] = visited[row], vectors[row]
    storage.commit_array(room.path("visits", f"{shard}.npy"), copies)
    offsets = np.searchsorted(part, np.arange(len(parts)))
    storage.commit_array(room.path("visits", f"{shard}.offsets.npy"), offsets)
    return {"samples": len(vectors), "visits": int((visited >= 0).sum()), "copies": len(row)}


def _visit_type(cells: int, width: int) -> np.dtype[Any]:
    """A vector where it is compared: global row, cells it visits (home first, then -1), vector."""
    kinds = [("row", "<i8"), ("cells", "<i4", (cells,)), ("vector", "<f2", (width,))]
    return np.dtype(kinds)


def search_parts(room: Room) -> list[str]:
    """Name the ranges of cells; a function of the data alone, not of the workers."""
    parts = len(storage.read_array(room.path("parts.npy"))) - 1
    return [f"{number:06d}" for number in range(parts)]


def _by_cell(cells: Array, first: int, end: int) -> Iterator[tuple[Array, Array]]:
    """Yield, of each cell from `first` to `end`, who is compared in it, and who is at home there.

    Places (K,) int64, in order, and (K,) bool; of (N, C) visited cells.
    """
    row, slot = np.nonzero((cells >= first) & (cells < end))
    visited = cells[row, slot]
    order = np.argsort(visited, kind="stable")
    bounds = np.searchsorted(visited[order], np.arange(first, end + 1))
    for start, stop in pairwise(bounds.tolist()):
        chosen = order[start:stop]
        yield row[chosen], slot[chosen] == 0


def search_part(room: Room, task: str) -> dict[str, float]:
    """Commit the edges that have an end at home in a range of cells, and spots."""
    from curate.dedup.cells import search_cell
    from curate.dedup.neighbors import Rows

    stage = dedup_stage(room)
    first, end = storage.read_array(room.path("parts.npy"))[int(task) : int(task) + 2].tolist()
    vectors, rows, cells = read_copies(room.path(), room.shards(), int(task))
    everything = Rows.of(vectors)
    thumbnails = thumbnail_reader(room, rows)
    most = stage.max_candidates if stage.asks_pixels else None
    left, right, cosines = [], [], []
    spots: list[Array] = []
    for around, at_home in _by_cell(cells, first, end):
        if not at_home.any():
            continue

        def confirm(one: Array, two: Array, around: Array = around) -> Array:
            return stage.confirm(rows[around[one]], rows[around[two]], thumbnails)

        found = search_cell(
            everything.take(around),
            np.flatnonzero(at_home),
            stage.min_cosine,
            most,
            confirm if stage.asks_pixels else None,
        )
        query, base = around[found.left], around[found.right]
        mine = _is_mine(rows, cells, query, base)
        left.append(rows[query[mine]])
        right.append(rows[base[mine]])
        cosines.append(found.cosines[mine])
        spots += [around[spot] for spot in found.spots]
    low, high, values = groups.unique_pairs(*(_join(part) for part in (left, right, cosines)))
    confirmed = stage.confirm(low, high, thumbnails)
    edges = (low[confirmed], high[confirmed], values[confirmed])
    commit_edges(room, f"edges/{task}.parquet", *edges)
    known = _search_earlier(room, task, everything, rows, cells, thumbnails)
    commit_edges(room, f"earlier/{task}.parquet", *known)
    commit_spots(room, task, spots, rows, vectors)
    home = int(((cells[:, 0] >= first) & (cells[:, 0] < end)).sum())
    return {"samples": home, "candidates": len(low), "edges": int(confirmed.sum())}


def _search_earlier(
    room: Room, task: str, own: "Rows", rows: Array, cells: Array, thumbnails: ReadImage
) -> tuple[Array, Array, Array]:
    """Find the nearest earlier sample of those that are compared in one task."""
    from curate.dedup.neighbors import Rows

    first, end = storage.read_array(room.path("parts.npy"))[int(task) : int(task) + 2].tolist()
    found = []
    for number, run in enumerate(earlier_runs(room)):
        vectors, their_rows, their_cells = run.copies(int(task))
        theirs, their_rows = Rows.of(vectors), first_row(room, number) + their_rows
        both = zip(_by_cell(cells, first, end), _by_cell(their_cells, first, end), strict=True)
        for (here, home), (there, their_home) in both:
            # One of the two is at home in the cell, the other visits it or is at home too.
            for one, two in ((here, there[their_home]), (here[home], there[~their_home])):
                mine, known = (rows[one], own.take(one)), (their_rows[two], theirs.take(two))
                found.append(nearest_known(room, *mine, *known, thumbnails))
    left, right, cosines = (_join([pairs[end] for pairs in found]) for end in range(3))
    return groups.nearest_pairs(left, right, cosines, most=1)


def _join(parts: list[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _is_mine(rows: Array, cells: Array, query: Array, base: Array) -> Array:
    """Tell which pairs of a visitor or member with a member are not found elsewhere too."""
    both_home = cells[query, 0] == cells[base, 0]
    mutual = (cells[base] == cells[query, :1]).any(axis=1)
    # A pair whose ends visit each other's homes is found in both: the lower row's home has it.
    mine: Array = both_home | ~mutual | (rows[base] < rows[query])
    return mine
