"""dedup: find the pairs that show the same picture, and the clusters they form.

It removes nothing: `select` walks the edges once it knows which samples it would rather keep.
"""

import bisect
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from curate import storage
from curate.dedup import groups
from curate.formats.pixels import read_thumbnail
from curate.memorization.folds import hash_unit
from curate.stages.base import Room, Step, Table, one_task, shard_tasks
from curate.stages.likeness import Likeness

__all__ = ["Dedup", "read_edges", "read_nodes", "shard_starts"]

Array = np.ndarray[Any, Any]

#: Below this one cell is searched whole, which is brute force and takes a second.
_ONE_CELL_SAMPLES = 2000
#: Vectors per cell that k-means is trained on; FAISS's own recommendation is 39 to 256.
_TRAIN_PER_CELL = 64
#: Samples whose home is in the cells of one search task: 16 k visitors of 1280 float32 are 80 MB.
_TASK_SAMPLES = 2048
#: Samples whose neighbours are also found by brute force, to choose the probes and measure recall;
#: fewer where pixels are asked, since confirming their pairs costs more than the search itself.
_RECALL_ROWS, _RECALL_ROWS_PIXELS = 4096, 400


class Dedup(Likeness):
    """Edges between samples of equal bytes or near-equal pictures, and their clusters."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 2

    target_recall: float = Field(
        0.999,
        description="share of a sample's copies to find, on average over samples that have any; "
        "decides how many cells are searched for every vector",
        gt=0,
        le=1,
    )
    max_probes: int = Field(
        32, description="cells searched for every vector, at most", ge=1, le=256
    )
    seed: int = Field(0, description="draws the samples for centroids and recall")

    def reads(self) -> tuple[str, ...]:
        return ("image_emb", "sha256", *(("thumbnail",) if self.asks_pixels else ()))

    def tables(self) -> tuple[Table, ...]:
        return (Table("dedup", ("cluster_id", "cluster_size")),)

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("collapse", _collapse, one_task),
            Step("centroids", _train, one_task),
            Step("cells", _assign, shard_tasks),
            Step("recall", _recall, shard_tasks),
            Step("probes", _choose_probes, one_task),
            Step("search", _search, _search_tasks),
            Step("groups", _group, one_task),
            Step("table", _write_shard, shard_tasks),
        )

    def facts(self, room: Room) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(room.path("groups.json"))
        return found


def _stage(room: Room) -> Dedup:
    assert isinstance(room.stage, Dedup)
    return room.stage


def shard_starts(room: Room) -> list[int]:
    """Global row at which each shard starts, and the total at the end."""
    layout = storage.read_json(storage.join(room.folders["ingest"], "layout.json"))
    starts = [0]
    for shard in layout["shards"]:
        starts.append(starts[-1] + shard["samples"])
    return starts


def _vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """(N, D) float16 and (N,) bool; zero and non-finite vectors count as missing."""
    vectors, valid = storage.read_vectors(room.read(shard, ["image_emb"])["image_emb"])
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    return vectors, valid & np.isfinite(norms) & (norms > 0)


def _searched(room: Room, shard: str) -> tuple[Array, Array]:
    """As `_vectors`, but only one of equal samples counts."""
    vectors, valid = _vectors(room, shard)
    start = shard_starts(room)[room.shards().index(shard)]
    own = np.arange(start, start + len(vectors))
    return vectors, valid & (read_nodes(room)[own] == own)


def _hash_ranks(room: Room, shard: str, purpose: str) -> Array:
    """(N,) float64, uniform, a function of seed and uid alone."""
    uids = room.read(shard, [])["uid"].to_pylist()
    return hash_unit(uids, _stage(room).seed, purpose)


def _draw(room: Room, count: int, purpose: str) -> tuple[Array, Array]:
    """Return the vectors with the `count` smallest hashes, and their global rows, in that order."""
    starts = shard_starts(room)
    ranks, rows, parts = [], [], []
    for shard, start in zip(room.shards(), starts, strict=False):
        vectors, valid = _searched(room, shard)
        hashes = _hash_ranks(room, shard, purpose)
        # No shard can give more than all of the draw; this bounds what is held.
        chosen = np.flatnonzero(valid)
        chosen = chosen[np.argsort(hashes[chosen], kind="stable")[:count]]
        ranks.append(hashes[chosen])
        rows.append(start + chosen)
        parts.append(vectors[chosen])
        if sum(map(len, ranks)) > 4 * count:
            ranks, rows, parts = _smallest(count, ranks, rows, parts)
    _, (chosen_rows,), (vectors,) = _smallest(count, ranks, rows, parts)
    return vectors, chosen_rows


def _smallest(
    count: int, ranks: list[Array], rows: list[Array], parts: list[Array]
) -> tuple[list[Array], list[Array], list[Array]]:
    all_ranks = np.concatenate(ranks)
    order = np.argsort(all_ranks, kind="stable")[:count]
    return (
        [all_ranks[order]],
        [np.concatenate(rows)[order]],
        [np.concatenate(parts)[order]],
    )


def _collapse(room: Room, task: str) -> dict[str, float]:
    """Commit which samples are equal: they are searched once, and their pairs never counted.

    Equal are equal bytes, and equal vectors where pixels are not asked.
    """
    from curate.dedup.neighbors import row_digests

    uids, digests, vectors, usable = [], [], [], []
    for shard in room.shards():
        table = room.read(shard, ["sha256"])
        uids.append(table["uid"].to_numpy(zero_copy_only=False).astype("S32"))
        digests.append(_digests(table["sha256"]))
        found, valid = _vectors(room, shard)
        usable.append(valid)
        if not _stage(room).asks_pixels:
            vectors.append(np.where(valid, row_digests(found), b""))
    valid = np.concatenate(usable)
    columns = [np.concatenate(parts) for parts in (digests, vectors) if parts]
    edges = [groups.equal_value_edges(keys, keys != b"") for keys in columns]
    left, right = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    names = np.concatenate(uids)
    # The lowest uid of those that have a vector: shards may come in any order.
    order = np.empty(len(names), np.int64)
    order[np.lexsort((names, ~valid))] = np.arange(len(names))
    nodes = groups.label_components(len(names), left, right, order)
    storage.commit_array(room.path("nodes.npy"), nodes)
    return {"samples": len(names), "equal": int((nodes != np.arange(len(nodes))).sum())}


def _digests(column: pa.ChunkedArray) -> Array:
    """(N,) S64: sha256 as text, empty where there is none."""
    return np.asarray(column.fill_null("").to_numpy(zero_copy_only=False)).astype("S64")


def read_nodes(room: Room) -> Array:
    """(N,) int64: the row by which each row of an equal sample is searched."""
    found: Array = storage.read_array(storage.join(room.folders["dedup"], "nodes.npy"))
    return found


def _train(room: Room, task: str) -> dict[str, float]:
    """Commit the centroids of the cells, and the queries that recall is measured with."""
    from curate.dedup.neighbors import train_centroids, unit_rows

    total = shard_starts(room)[-1]
    cells = 1 if total <= _ONE_CELL_SAMPLES else round(total**0.5)
    sample, _ = _draw(room, cells * _TRAIN_PER_CELL, "centroids")
    cells = min(cells, max(1, len(sample)))
    if cells == 1:
        centroids = np.zeros((1, max(1, sample.shape[1])), np.float32)
    else:
        # Threads would change the order of sums, and with it the centroids.
        centroids = train_centroids(unit_rows(sample), cells, _stage(room).seed, threads=1)
    asked = _RECALL_ROWS_PIXELS if _stage(room).asks_pixels else _RECALL_ROWS
    queries, rows = _draw(room, asked, "recall")
    storage.commit_array(room.path("recall_vectors.npy"), queries)
    storage.commit_array(room.path("recall_rows.npy"), rows)
    storage.commit_array(room.path("centroids.npy"), centroids)
    return {}


def _assign(room: Room, shard: str) -> dict[str, float]:
    """Commit the nearest cells of each vector, nearest first; -1 where there is no vector."""
    from curate.dedup.neighbors import assign_cells, unit_rows

    centroids = storage.read_array(room.path("centroids.npy"))
    vectors, valid = _searched(room, shard)
    probes = min(_stage(room).max_probes, len(centroids))
    cells = np.full((len(vectors), probes), -1, np.int32)
    if valid.any():
        found = assign_cells(unit_rows(vectors[valid]), centroids, probes, room.threads)
        cells[valid] = found
    storage.commit_array(room.path("cells", f"{shard}.npy"), cells)
    return {"samples": len(vectors)}


def _search_tasks(room: Room) -> list[str]:
    """Name ranges of cells `first-end`; a function of the data alone, not of the workers."""
    cells = len(storage.read_array(room.path("centroids.npy")))
    tasks = max(1, min(cells, -(-shard_starts(room)[-1] // _TASK_SAMPLES)))
    bounds = [cells * i // tasks for i in range(tasks + 1)]
    return [f"{a:06d}-{b:06d}" for a, b in pairwise(bounds)]


def _search(room: Room, task: str) -> dict[str, float]:
    """Commit the edges that have an end at home in a range of cells."""
    first, end = map(int, task.split("-"))
    vectors, rows, probes = _load_cells(room, first, end)
    stage = _stage(room)
    left, right, cosines = [], [], []
    for cell in range(first, end):
        pairs = _search_cell(vectors, rows, probes, cell, stage.min_cosine, room.threads)
        left.append(pairs[0])
        right.append(pairs[1])
        cosines.append(pairs[2])
    low, high, values = groups.unique_pairs(
        np.concatenate(left), np.concatenate(right), np.concatenate(cosines)
    )
    confirmed = _confirm(room, low, high)
    _commit_edges(room, f"edges/{task}.parquet", low[confirmed], high[confirmed], values[confirmed])
    # Rows at home in these cells, so that the counts of all tasks add up to the samples.
    home = int(((probes[:, 0] >= first) & (probes[:, 0] < end)).sum())
    return {"samples": home, "candidates": len(low), "edges": int(confirmed.sum())}


def _load_cells(room: Room, first: int, end: int) -> tuple[Array, Array, Array]:
    """Unit vectors, global rows and cells of everything that visits a range of cells."""
    from curate.dedup.neighbors import unit_rows

    starts = shard_starts(room)
    vectors, rows, probes = [], [], []
    count = storage.read_json(room.path("probes.json"))["probes"]
    for shard, start in zip(room.shards(), starts, strict=False):
        cells = storage.read_array(room.path("cells", f"{shard}.npy"))[:, :count]
        chosen = np.flatnonzero(((cells >= first) & (cells < end)).any(axis=1))
        found, _ = _vectors(room, shard)
        vectors.append(unit_rows(found[chosen]))
        rows.append(start + chosen)
        probes.append(np.asarray(cells[chosen]))
    return np.concatenate(vectors), np.concatenate(rows), np.concatenate(probes)


def _search_cell(
    vectors: Array, rows: Array, probes: Array, cell: int, min_cosine: float, threads: int
) -> tuple[Array, Array, Array]:
    """Pairs of a member of the cell with another member or a visitor, each in one cell only."""
    from curate.dedup.neighbors import pairs_within

    members = np.flatnonzero(probes[:, 0] == cell)
    around = np.flatnonzero((probes == cell).any(axis=1))
    if len(members) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    query, base, cosines = pairs_within(vectors[around], vectors[members], min_cosine, threads)
    query, base = around[query], members[base]
    # A pair whose ends visit each other's homes is found in both: the lower row's home has it.
    both_home = probes[query, 0] == cell
    mutual = (probes[base] == probes[query, :1]).any(axis=1)
    mine = np.where(both_home, rows[query] < rows[base], ~mutual | (rows[base] < rows[query]))
    return rows[query[mine]], rows[base[mine]], cosines[mine]


def _confirm(room: Room, left: Array, right: Array) -> Array:
    return _stage(room).confirm(left, right, _thumbnail_reader(room))


def _thumbnail_reader(room: Room) -> Callable[[int], Image.Image]:
    starts, shards = shard_starts(room), room.shards()

    @lru_cache(maxsize=4)
    def shard_thumbnails(number: int) -> pa.ChunkedArray:
        return room.read(shards[number], ["thumbnail"])["thumbnail"]

    @lru_cache(maxsize=4096)
    def read(row: int) -> Image.Image:
        number = bisect.bisect_right(starts, row) - 1
        return read_thumbnail(shard_thumbnails(number)[row - starts[number]].as_py())

    return read


def _commit_edges(room: Room, name: str, left: Array, right: Array, cosines: Array) -> None:
    table = pa.table({"left_row": left, "right_row": right, "cosine": cosines})
    storage.commit_table(room.path(name), table)


def read_edges(room: Room, folder: str) -> tuple[Array, Array, Array]:
    """Return all edges of a folder, once each, sorted: rows, rows, cosines."""
    path = storage.join(room.folders["dedup"], folder)
    tables = [storage.read_table(storage.join(path, n)) for n in storage.list_names(path)]
    edges = pa.concat_tables(tables)
    return groups.unique_pairs(
        edges["left_row"].to_numpy(), edges["right_row"].to_numpy(), edges["cosine"].to_numpy()
    )


def _recall(room: Room, shard: str) -> dict[str, float]:
    """Commit the edges between a fixed sample of rows and one shard, found by brute force."""
    from curate.dedup.neighbors import pairs_within, unit_rows

    queries = unit_rows(storage.read_array(room.path("recall_vectors.npy")))
    rows = storage.read_array(room.path("recall_rows.npy"))
    start = shard_starts(room)[room.shards().index(shard)]
    vectors, valid = _searched(room, shard)
    base = np.flatnonzero(valid)
    left, right, cosines = np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
    if len(base) and len(queries):
        found = pairs_within(queries, unit_rows(vectors[base]), _stage(room).min_cosine)
        left, right, cosines = groups.unique_pairs(rows[found[0]], start + base[found[1]], found[2])
    confirmed = _confirm(room, left, right)
    name = f"recall/{shard}.parquet"
    _commit_edges(room, name, left[confirmed], right[confirmed], cosines[confirmed])
    return {"samples": len(vectors)}


def _choose_probes(room: Room, task: str) -> dict[str, float]:
    """Commit how many cells to search: the fewest by which brute force's pairs are found."""
    left, right, _ = read_edges(room, "recall")
    most = min(_stage(room).max_probes, len(storage.read_array(room.path("centroids.npy"))))
    chosen = 1
    if len(left):
        cells = _cells_of(room, np.unique(np.r_[left, right]))
        first, second = (np.stack([cells[row] for row in side.tolist()]) for side in (left, right))
        for chosen in range(1, most + 1):
            found = _meet(first, second, chosen)
            if _average_recall(room, left, right, found)["recall"] >= _stage(room).target_recall:
                break
    storage.commit_json(room.path("probes.json"), {"probes": chosen})
    return {"probes": chosen}


def _cells_of(room: Room, rows: Array) -> dict[int, Array]:
    """The cells of some rows, nearest first."""
    found: dict[int, Array] = {}
    for shard, (start, end) in zip(room.shards(), pairwise(shard_starts(room)), strict=True):
        inside = rows[(rows >= start) & (rows < end)]
        if len(inside):
            cells = storage.read_array(room.path("cells", f"{shard}.npy"))
            found |= dict(zip(inside.tolist(), cells[inside - start], strict=True))
    return found


def _meet(left: Array, right: Array, probes: int) -> Array:
    """Whether either end of a pair visits the other's home: (E,) bool from (E, C) cells."""
    forth = (left[:, :probes] == right[:, :1]).any(1)
    found: Array = forth | (right[:, :probes] == left[:, :1]).any(1)
    return found


def _average_recall(room: Room, left: Array, right: Array, found: Array) -> dict[str, Any]:
    """Macro-average over sampled rows that have a neighbour of the share of them that was found."""
    queries = np.asarray(storage.read_array(room.path("recall_rows.npy")))
    ends = np.r_[left, right]
    asked = np.isin(ends, queries)
    _, row = np.unique(ends[asked], return_inverse=True)
    if len(row) == 0:
        return {"rows": 0, "recall": None, "stderr": None}
    shares = np.bincount(row, np.r_[found, found][asked]) / np.bincount(row)
    stderr = float(shares.std() / len(shares) ** 0.5)
    return {"rows": len(shares), "recall": float(shares.mean()), "stderr": stderr}


def _measure_recall(room: Room, left: Array, right: Array, total: int) -> dict[str, Any]:
    """Of the pairs that brute force finds, how many are among the edges."""
    true_left, true_right, _ = read_edges(room, "recall")
    found = np.isin(true_left * total + true_right, left * total + right)
    measured = _average_recall(room, true_left, true_right, found)
    # Where nothing has a neighbour nothing was missed.
    reached = measured["recall"] is None or measured["recall"] >= _stage(room).target_recall
    probes = storage.read_json(room.path("probes.json"))["probes"]
    return {**measured, "reached": reached, "probes": probes}


def _group(room: Room, task: str) -> dict[str, float]:
    """Commit cluster labels of all rows, and what `run.json` says about them."""
    names = np.concatenate(
        [room.read(shard, [])["uid"].to_numpy(zero_copy_only=False) for shard in room.shards()]
    ).astype("S32")
    total = len(names)
    left, right, _ = read_edges(room, "edges")
    nodes = read_nodes(room)
    rank = np.empty(total, np.int64)
    rank[np.argsort(names, kind="stable")] = np.arange(total)
    labels = groups.label_clusters(nodes, left, right, rank)
    sizes = np.bincount(labels, minlength=total)
    storage.commit_array(room.path("sizes.npy"), sizes[labels].astype(np.int32))
    storage.commit_array(room.path("cluster_uids.npy"), names[labels])
    storage.commit_json(
        room.path("groups.json"),
        {
            "edges": {"equal": int((nodes != np.arange(total)).sum()), "semantic": len(left)},
            "clusters": int((sizes > 1).sum()),
            "largest_cluster": int(sizes.max(initial=0)),
            "recall": _measure_recall(room, left, right, total),
        },
    )
    return {"samples": total}


def _write_shard(room: Room, shard: str) -> dict[str, float]:
    start = shard_starts(room)[room.shards().index(shard)]
    uids = room.read(shard, [])
    span = slice(start, start + len(uids))
    names = storage.read_array(room.path("cluster_uids.npy"))[span].astype(str)
    sizes = storage.read_array(room.path("sizes.npy"))[span]
    table = uids.append_column("cluster_id", pa.array(names, pa.string()))
    table = table.append_column("cluster_size", pa.array(sizes, pa.int32()))
    room.commit_shard("dedup", shard, table)
    return {"samples": len(uids)}
