"""The steps of `dedup` that search: cells, the reach that recall asks for, pairs cell by cell.

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
    read_edges,
    read_known,
    searched_vectors,
    shard_start,
    shard_starts,
    shard_vectors,
    thumbnail_reader,
)
from curate.stages.embed import Embed

if TYPE_CHECKING:
    from curate.dedup.neighbors import Rows

__all__ = [
    "assign_shard",
    "choose_reach",
    "compare_all",
    "compare_known",
    "compare_pilot",
    "draw_queries",
    "known_tasks",
    "measure_known_recall",
    "measure_recall",
    "search_part",
    "search_parts",
    "spread_shard",
    "train_cells",
]

Array = np.ndarray[Any, Any]

#: Below this one cell is searched whole, which is brute force and takes a second.
_ONE_CELL_SAMPLES = 2000
#: Vectors per cell that k-means is trained on; FAISS's own recommendation is 39 to 256.
_TRAIN_PER_CELL = 64
#: Samples at home in the cells of one task: 64 tasks, within these. 16 k of 1280 float16 and
#: bfloat16 with as many visitors are 170 MB.
_LEAST_TASK, _MOST_TASK, _TASKS = 2048, 16384, 64
#: Recall rests on so many samples that have a copy, but on no more of a small set than a hundredth:
#: confirming their pairs by pixels would cost more than the search itself.
_RECALL_ROWS, _RECALL_ROWS_PIXELS = 3000, 100
#: Samples compared with everything to see how many have one; and at most, where few do.
_PILOT_ROWS, _PILOT_ROWS_PIXELS = 4096, 400
_MOST_QUERIES = 65536
#: Candidates per sample whose recall is asked about, in multiples of `max_candidates`.
_MORE_CANDIDATES = 4
#: 95 % of a normal distribution lies within so many standard deviations.
_Z = 1.96


def train_cells(room: Room, task: str) -> dict[str, float]:
    """Commit the centroids of the cells, and the queries that recall may be measured with."""
    from curate.dedup.cells import merge_cells, order_cells
    from curate.dedup.neighbors import train_centroids, unit_rows

    total = shard_starts(room)[-1]
    queries, rows = draw_vectors(room, _MOST_QUERIES, "recall")
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


def _pilot_rows(room: Room) -> int:
    return _PILOT_ROWS_PIXELS if dedup_stage(room).asks_pixels else _PILOT_ROWS


def compare_pilot(room: Room, shard: str) -> dict[str, float]:
    """Commit the edges between the first queries and one shard, found by brute force."""
    return _compare(room, shard, "pilot", 0, _pilot_rows(room))


def draw_queries(room: Room, task: str) -> dict[str, float]:
    """Commit how many queries it takes to have enough that have a copy."""
    rows = storage.read_array(room.path("query_rows.npy"))
    left, right, _ = read_edges(room, "recall")
    pilot = rows[: _pilot_rows(room)]
    share = np.isin(pilot, np.r_[left, right]).mean() if len(pilot) else 0.0
    wanted = _RECALL_ROWS
    if dedup_stage(room).asks_pixels:
        wanted = min(wanted, max(_RECALL_ROWS_PIXELS, shard_starts(room)[-1] // 100))
    count = _MOST_QUERIES if share == 0 else int(np.ceil(wanted / share))
    count = min(max(count, len(pilot)), len(rows))
    storage.commit_json(room.path("queries.json"), {"queries": count})
    return {"queries": count}


def compare_all(room: Room, shard: str) -> dict[str, float]:
    """Commit the edges between the other queries and one shard."""
    count = storage.read_json(room.path("queries.json"))["queries"]
    return _compare(room, shard, "rest", _pilot_rows(room), count)


def _compare(room: Room, shard: str, name: str, first: int, end: int) -> dict[str, float]:
    from curate.dedup.neighbors import Rows, pairs_within

    stage = dedup_stage(room)
    queries = np.asarray(storage.read_array(room.path("queries.npy"))[first:end])
    rows = np.asarray(storage.read_array(room.path("query_rows.npy"))[first:end])
    start = shard_start(room, shard)
    vectors, valid = searched_vectors(room, shard)
    base = np.flatnonzero(valid)
    left, right, cosines = np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
    if len(base) and len(queries):
        most = stage.max_candidates * _MORE_CANDIDATES if stage.asks_pixels else None
        one, other = Rows.of(queries), Rows.of(vectors[base])
        found = pairs_within(one, other, stage.min_cosine, most)
        left, right, cosines = groups.unique_pairs(rows[found[0]], start + base[found[1]], found[2])
    confirmed = stage.confirm(left, right, thumbnail_reader(room))
    edges = (left[confirmed], right[confirmed], cosines[confirmed])
    commit_edges(room, f"recall/{name}-{shard}.parquet", *edges)
    return {"samples": len(vectors)}


def known_tasks(room: Room) -> list[str]:
    """Name the shards of earlier runs: number of the run, name of the shard."""
    return [f"{i}-{shard}" for i, run in enumerate(earlier_runs(room)) for shard in run.shards]


def compare_known(room: Room, task: str) -> dict[str, float]:
    """Commit the earlier sample nearest to each query, of one shard, found by brute force."""
    from curate.dedup.neighbors import Rows

    number, shard = task.split("-")
    run = earlier_runs(room)[int(number)]
    count = storage.read_json(room.path("queries.json"))["queries"]
    queries = np.asarray(storage.read_array(room.path("queries.npy"))[:count])
    asked = np.asarray(storage.read_array(room.path("query_rows.npy"))[:count])
    rows, vectors = run.vectors(shard)
    first = _first_row(room, int(number))
    own, theirs, thumbnails = Rows.of(queries), Rows.of(vectors), thumbnail_reader(room)
    best = _nearest_known(room, asked, own, first + rows, theirs, thumbnails)
    commit_edges(room, f"known/{task}.parquet", *best)
    return {"samples": len(rows)}


def _first_row(room: Room, number: int) -> int:
    """Row from which the rows of an earlier run are counted: after this run's, and each other's."""
    runs = earlier_runs(room)
    return shard_starts(room)[-1] + sum(run.starts[-1] for run in runs[:number])


def _nearest_known(
    room: Room,
    rows: Array,
    own: "Rows",
    known_rows: Array,
    known: "Rows",
    thumbnails: ReadImage,
) -> tuple[Array, Array, Array]:
    """Of each of some samples the nearest earlier one that counts: rows, rows, cosines."""
    from curate.dedup.neighbors import pairs_within

    stage = dedup_stage(room)
    most = stage.max_candidates if stage.asks_pixels else 1
    left, right, cosines = np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
    if len(own) and len(known):
        found = pairs_within(own, known, stage.min_cosine, most)
        left, right, cosines = rows[found[0]], known_rows[found[1]], found[2]
    confirmed = stage.confirm(left, right, thumbnails)
    return groups.nearest_pairs(left[confirmed], right[confirmed], cosines[confirmed], most=1)


def choose_reach(room: Room, task: str) -> dict[str, float]:
    """Commit how long a detour pays, and which cells each task searches.

    The shortest by which brute force's pairs are found. Half of what `target_recall` would let go
    is let go: the reach is fitted to these queries, and does a little worse on all others.
    """
    left, right, _ = read_edges(room, "recall")
    reach = 0.0
    if len(left):
        needed = np.minimum(*_needed_detours(room, left, right))
        pairs, query = _asked_ends(room, left, right)
        each = np.bincount(query)
        reach = _enough(room, needed[pairs], 1 / each[query] / len(each))
    runs = earlier_runs(room)
    if runs:
        left, right, _ = read_known(room, "known")
        theirs = max(storage.read_json(run.path("dedup", "reach.json"))["reach"] for run in runs)
        forth, back = _needed_detours(room, left, right)
        needed = np.where(back <= theirs, 0, forth)
        reach = max(reach, theirs, _enough(room, needed, np.full(len(left), 1 / max(1, len(left)))))
    storage.commit_json(room.path("reach.json"), {"reach": reach})
    if runs:
        return {}
    homes = np.zeros(len(storage.read_array(room.path("centroids.npy"))), np.int64)
    for shard in room.shards():
        own = storage.read_array(room.path("cells", f"{shard}.npy"))[0]
        homes += np.bincount(own[own >= 0], minlength=len(homes))
    total = int(homes.sum())
    size = min(max(total // _TASKS, _LEAST_TASK), _MOST_TASK)
    # A cell belongs to the task that its middle falls into.
    middle = np.cumsum(homes) - homes / 2
    _, starts = np.unique((middle // size).astype(int), return_index=True)
    storage.commit_array(room.path("parts.npy"), np.r_[starts, len(homes)].astype(np.int64))
    return {"parts": len(starts)}


def _enough(room: Room, needed: Array, shares: Array) -> float:
    """Detour that finds what has to be found of pairs that need one and make up a share each."""
    goal = 1 - (1 - dedup_stage(room).target_recall) / 2
    order = np.argsort(needed, kind="stable")
    possible = needed[order][np.isfinite(needed[order])]
    if len(possible) == 0:
        return 0.0
    enough = int(np.searchsorted(np.cumsum(shares[order]), goal - 1e-9))
    return float(possible[min(enough, len(possible) - 1)])


def _needed_detours(room: Room, left: Array, right: Array) -> tuple[Array, Array]:
    """Detour of each pair's one end to the other's home, and back; infinite if not in the list."""
    rows = np.unique(np.r_[left, right])
    files = [
        (room.path("cells", f"{shard}.npy"), room.path("detours", f"{shard}.npy"), start)
        for shard, start in zip(room.shards(), shard_starts(room), strict=False)
    ]
    for number, run in enumerate(earlier_runs(room)):
        files += [
            (
                run.path("dedup", "cells", f"{shard}.npy"),
                run.path("dedup", "detours", f"{shard}.npy"),
                _first_row(room, number) + start,
            )
            for shard, start in zip(run.shards, run.starts, strict=False)
        ]
    most = dedup_stage(room).max_probes
    cells, detours = [np.zeros((most, 0), np.int32)], [np.zeros((most, 0), np.float16)]
    for cells_path, detours_path, start in files:
        its_cells = storage.read_array(cells_path)
        inside = rows[(rows >= start) & (rows < start + its_cells.shape[1])] - start
        if len(inside):
            cells.append(_as_high(its_cells[:, inside], most, -1))
            detours.append(_as_high(storage.read_array(detours_path)[:, inside], most, np.inf))
    all_cells, all_detours = np.concatenate(cells, 1), np.concatenate(detours, 1)
    one, two = np.searchsorted(rows, left), np.searchsorted(rows, right)

    def way(start: Array, end: Array) -> Array:
        there = all_cells[:, start] == all_cells[0, end]
        return np.where(there, all_detours[:, start], np.float16(np.inf)).min(0)

    return way(one, two), way(two, one)


def _as_high(columns: Array, height: int, filler: float) -> Array:
    """Cut or fill (H, E) to (height, E)."""
    short = max(0, height - len(columns))
    return np.pad(columns[:height], ((0, short), (0, 0)), constant_values=filler)


def _asked_ends(room: Room, left: Array, right: Array) -> tuple[Array, Array]:
    """Pair of each end that is a query, and the query's number among those with a pair."""
    count = storage.read_json(room.path("queries.json"))["queries"]
    queries = np.asarray(storage.read_array(room.path("query_rows.npy"))[:count])
    ends = np.r_[left, right]
    asked = np.flatnonzero(np.isin(ends, queries))
    return asked % max(1, len(left)), np.unique(ends[asked], return_inverse=True)[1]


def spread_shard(room: Room, shard: str) -> dict[str, float]:
    """Commit the vectors of a shard once for every task that compares them, in order of task."""
    reach = storage.read_json(room.path("reach.json"))["reach"]
    parts = storage.read_array(room.path("parts.npy"))
    vectors, _ = shard_vectors(room, shard)
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
    thumbnails = thumbnail_reader(room)
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
        theirs, their_rows = Rows.of(vectors), _first_row(room, number) + their_rows
        both = zip(_by_cell(cells, first, end), _by_cell(their_cells, first, end), strict=True)
        for (here, home), (there, their_home) in both:
            # One of the two is at home in the cell, the other visits it or is at home too.
            for one, two in ((here, there[their_home]), (here[home], there[~their_home])):
                mine, known = (rows[one], own.take(one)), (their_rows[two], theirs.take(two))
                found.append(_nearest_known(room, *mine, *known, thumbnails))
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


def measure_recall(room: Room, left: Array, right: Array, spots: groups.Spots) -> dict[str, Any]:
    """Tell how many of the pairs that brute force finds are among the edges or within a spot."""
    true_left, true_right, _ = read_edges(room, "recall")
    total = shard_starts(room)[-1]
    found = np.isin(true_left * total + true_right, left * total + right)
    found |= spots.contain(true_left, true_right)
    pairs, query = _asked_ends(room, true_left, true_right)
    counts = np.bincount(query)
    return _describe_recall(room, np.bincount(query, found[pairs], len(counts)) / counts)


def measure_known_recall(room: Room, rows: Array) -> dict[str, Any]:
    """Tell how many queries that are copies of an earlier sample were found to be."""
    asked, _, _ = read_known(room, "known")
    return _describe_recall(room, np.isin(asked, rows))


def _describe_recall(room: Room, shares: Array) -> dict[str, Any]:
    """Mean of what was found of each query's pairs, with its interval."""
    if len(shares) == 0:  # where nothing has a copy nothing was missed
        return {"rows": 0, "recall": None, "interval": None, "reached": True}
    recall = float(shares.mean())
    return {
        "rows": len(shares),
        "recall": recall,
        "interval": _interval(recall, len(shares)),
        "reached": recall >= dedup_stage(room).target_recall,
    }


def _interval(share: float, count: int) -> list[float]:
    """Wilson's (1927) 95 % interval; wider than need be for a mean of shares."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * (share * (1 - share) / count + (_Z / (2 * count)) ** 2) ** 0.5
    return [round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)]
