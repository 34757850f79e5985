"""The steps of `dedup` that measure recall: what brute force finds, and the reach that this asks.

Brute force compares drawn samples, the queries, with everything. Of a query with many copies some
pairs stand for all: a share of them is as good an estimate, and a picture that is everywhere would
else give every query of it as many pairs as it has copies.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.dedup import groups
from curate.dedup.registration import ReadImage
from curate.memorization.folds import hash_unit
from curate.stages.base import Room
from curate.stages.dedup_inputs import (
    commit_edges,
    dedup_stage,
    earlier_runs,
    read_known,
    searched_vectors,
    shard_start,
    shard_starts,
    thumbnail_reader,
)

if TYPE_CHECKING:
    from curate.dedup.neighbors import Rows

__all__ = [
    "MOST_QUERIES",
    "choose_reach",
    "compare_all",
    "compare_known",
    "compare_pilot",
    "draw_queries",
    "first_row",
    "known_tasks",
    "measure_known_recall",
    "measure_recall",
    "nearest_known",
]

Array = np.ndarray[Any, Any]

#: Recall rests on so many samples that have a copy, but on no more of a small set than a hundredth:
#: confirming their pairs by pixels would cost more than the search itself.
_RECALL_ROWS, _RECALL_ROWS_PIXELS = 3000, 100
#: Samples compared with everything to see how many have one; and at most, where few do.
_PILOT_ROWS, _PILOT_ROWS_PIXELS = 4096, 400
MOST_QUERIES = 65536
#: Pairs of a query that are asked about.
_PAIRS_ASKED = 16
#: Pairs read at which all but those are let go.
_MOST_READ = 1 << 20
#: Candidates per sample whose recall is asked about, in multiples of `max_candidates`.
_MORE_CANDIDATES = 4
#: Multiples of the golden ratio's fraction are spread evenly: each query asks about others.
_GOLDEN = 0.6180339887498949
#: Samples at home in the cells of one task: 64 tasks, within these. 16 k of 1280 float16 and
#: bfloat16 with as many visitors are 170 MB. Pictures take a hundred times as long as vectors, and
#: a series is in few cells.
_LEAST_TASK, _LEAST_PICTURES, _MOST_TASK, _TASKS = 2048, 256, 16384, 64
#: 95 % of a normal distribution lies within so many standard deviations.
_Z = 1.96


def _pilot_rows(room: Room) -> int:
    return _PILOT_ROWS_PIXELS if dedup_stage(room).asks_pixels else _PILOT_ROWS


def compare_pilot(room: Room, shard: str) -> dict[str, float]:
    """Commit the pairs of the first queries with one shard, found by brute force."""
    return _compare(room, shard, "pilot", 0, _pilot_rows(room))


def draw_queries(room: Room, task: str) -> dict[str, float]:
    """Commit how many queries it takes to have enough that have a copy."""
    rows = storage.read_array(room.path("query_rows.npy"))
    pilot = rows[: _pilot_rows(room)]
    share = np.isin(pilot, _read_asked(room)[0]).mean() if len(pilot) else 0.0
    wanted = _RECALL_ROWS
    if dedup_stage(room).asks_pixels:
        wanted = min(wanted, max(_RECALL_ROWS_PIXELS, shard_starts(room)[-1] // 100))
    count = MOST_QUERIES if share == 0 else int(np.ceil(wanted / share))
    count = min(max(count, len(pilot)), len(rows))
    storage.commit_json(room.path("queries.json"), {"queries": count})
    return {"queries": count}


def compare_all(room: Room, shard: str) -> dict[str, float]:
    """Commit the pairs of the other queries with one shard."""
    count = storage.read_json(room.path("queries.json"))["queries"]
    return _compare(room, shard, "rest", _pilot_rows(room), count)


def _compare(room: Room, shard: str, name: str, first: int, end: int) -> dict[str, float]:
    from curate.dedup.neighbors import Rows, pairs_within

    stage = dedup_stage(room)
    queries = storage.read_array_rows(room.path("queries.npy"), first, end)
    rows = storage.read_array_rows(room.path("query_rows.npy"), first, end)
    start = shard_start(room, shard)
    vectors, valid = searched_vectors(room, shard)
    base = np.flatnonzero(valid)
    query, other = np.zeros(0, int), np.zeros(0, int)
    if len(base) and len(queries):
        most = stage.max_candidates * _MORE_CANDIDATES if stage.asks_pixels else None
        query, other, _ = pairs_within(
            Rows.of(queries), Rows.of(vectors[base]), stage.min_cosine, most
        )
    apart = rows[query] != start + base[other]
    query, other = query[apart], other[apart]
    left, right = rows[query], start + base[other]
    confirmed = stage.confirm(left, right, thumbnail_reader(room, np.r_[left, right]))
    query, other = query[confirmed], base[other[confirmed]]
    draws = hash_unit(room.read(shard, [])["uid"].to_pylist(), stage.seed, "pairs")
    ranks = (draws[other] + (first + query) * _GOLDEN) % 1
    table = pa.table(_asked(rows[query], start + other, ranks), names=_ASKED)
    storage.commit_table(room.path("recall", f"{name}-{shard}.parquet"), table)
    return {"samples": len(vectors)}


_ASKED = ("query_row", "other_row", "rank")


def _asked(query: Array, other: Array, ranks: Array) -> list[Array]:
    """Keep of each query's pairs those of the lowest rank: query rows, other rows, ranks."""
    query, other, high = groups.nearest_pairs(query, other, -ranks, _PAIRS_ASKED)
    return [query, other, -high]


def _read_asked(room: Room) -> tuple[Array, Array]:
    """Return the pairs that recall is asked about: rows of queries, rows of their copies."""
    folder = room.path("recall")
    parts = [[np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)]]
    for name in storage.list_names(folder):
        table = storage.read_table(storage.join(folder, name))
        parts.append([table[column].to_numpy() for column in _ASKED])
        if sum(len(part[0]) for part in parts) > _MOST_READ:
            parts = [_asked(*map(np.concatenate, zip(*parts, strict=True)))]
    query, other, _ = _asked(*map(np.concatenate, zip(*parts, strict=True)))
    return query, other


def known_tasks(room: Room) -> list[str]:
    """Name the shards of earlier runs: number of the run, name of the shard."""
    return [f"{i}-{shard}" for i, run in enumerate(earlier_runs(room)) for shard in run.shards]


def compare_known(room: Room, task: str) -> dict[str, float]:
    """Commit the earlier sample nearest to each query, of one shard, found by brute force."""
    from curate.dedup.neighbors import Rows

    number, shard = task.split("-")
    run = earlier_runs(room)[int(number)]
    count = storage.read_json(room.path("queries.json"))["queries"]
    queries = storage.read_array_rows(room.path("queries.npy"), 0, count)
    asked = storage.read_array_rows(room.path("query_rows.npy"), 0, count)
    rows, vectors = run.vectors(shard)
    first = first_row(room, int(number))
    own, theirs, thumbnails = Rows.of(queries), Rows.of(vectors), thumbnail_reader(room, asked)
    best = nearest_known(room, asked, own, first + rows, theirs, thumbnails)
    commit_edges(room, f"known/{task}.parquet", *best)
    return {"samples": len(rows)}


def first_row(room: Room, number: int) -> int:
    """Row from which the rows of an earlier run are counted: after this run's, and each other's."""
    runs = earlier_runs(room)
    return shard_starts(room)[-1] + sum(run.starts[-1] for run in runs[:number])


def nearest_known(
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
    query, other = _read_asked(room)
    reach = 0.0
    if len(query):
        needed = np.minimum(*_needed_detours(room, query, other))
        _, number, each = np.unique(query, return_inverse=True, return_counts=True)
        reach = _enough(room, needed, 1 / each[number] / len(each))
    runs = earlier_runs(room)
    if runs:
        left, right, _ = read_known(room, "known")
        theirs = max(storage.read_json(run.path("dedup", "reach.json"))["reach"] for run in runs)
        forth, back = _needed_detours(room, left, right)
        needed = np.where(back <= theirs, 0, forth)
        reach = max(reach, theirs, _enough(room, needed, np.full(len(left), 1 / max(1, len(left)))))
    storage.commit_json(room.path("reach.json"), {"reach": reach})
    return {} if runs else {"parts": _cut_parts(room)}


def _cut_parts(room: Room) -> int:
    """Commit where each task's cells start; return how many tasks there are."""
    homes = np.zeros(len(storage.read_array(room.path("centroids.npy"))), np.int64)
    for shard in room.shards():
        own = storage.read_array(room.path("cells", f"{shard}.npy"))[0]
        homes += np.bincount(own[own >= 0], minlength=len(homes))
    total = int(homes.sum())
    least = _LEAST_PICTURES if dedup_stage(room).asks_pixels else _LEAST_TASK
    size = min(max(total // _TASKS, least), _MOST_TASK)
    # A cell belongs to the task that its middle falls into.
    middle = np.cumsum(homes) - homes / 2
    _, starts = np.unique((middle // size).astype(int), return_index=True)
    storage.commit_array(room.path("parts.npy"), np.r_[starts, len(homes)].astype(np.int64))
    return len(starts)


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
                first_row(room, number) + start,
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


def measure_recall(room: Room, left: Array, right: Array, spots: groups.Spots) -> dict[str, Any]:
    """Tell how many of the pairs that brute force finds are among the edges or within a spot.

    Parameters
    ----------
    left, right : (E,) int64
        All edges, the smaller row first.
    """
    query, other = _read_asked(room)
    low, high = np.minimum(query, other), np.maximum(query, other)
    total = shard_starts(room)[-1]
    found = np.isin(low * total + high, left * total + right) | spots.contain(low, high)
    _, number, each = np.unique(query, return_inverse=True, return_counts=True)
    return _describe_recall(room, np.bincount(number, found, len(each)) / each)


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
