"""What the steps of `dedup` read, and what they leave for others to read."""

import bisect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import storage
from curate.dedup import groups
from curate.dedup.registration import ReadImage
from curate.formats.pixels import read_thumbnail
from curate.memorization.folds import hash_unit
from curate.stages.base import Room
from curate.stages.dedup_earlier import Earlier, count_rows, locate, open_runs

if TYPE_CHECKING:
    from curate.stages.dedup import Dedup

__all__ = [
    "commit_edges",
    "commit_spots",
    "dedup_stage",
    "draw_vectors",
    "earlier_runs",
    "read_edges",
    "read_known",
    "read_nodes",
    "read_pixels",
    "read_spots",
    "searched_vectors",
    "shard_start",
    "shard_starts",
    "shard_vectors",
    "thumbnail_reader",
]

Array = np.ndarray[Any, Any]


def dedup_stage(room: Room) -> "Dedup":
    """Return the run's own, as it judges the run's samples; a later stage may ask for it too."""
    from curate.stages.dedup import Dedup

    stage = room.find(Dedup)
    return stage.without_pixels() if room.has_source_vectors() else stage


@lru_cache(maxsize=8)
def _open_runs(outs: tuple[str, ...]) -> list[Earlier]:
    return open_runs(outs)


def earlier_runs(room: Room) -> list[Earlier]:
    """Return the runs that new samples are compared with, and those that these were."""
    return _open_runs(dedup_stage(room).against)


def shard_starts(room: Room) -> list[int]:
    """Global row at which each shard starts, and the total at the end."""
    return count_rows(room.layout())


def shard_start(room: Room, shard: str) -> int:
    """Global row at which a shard starts."""
    return shard_starts(room)[room.shards().index(shard)]


def shard_vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """(N, D) float16 and (N,) bool; zero and non-finite vectors count as missing."""
    vectors, valid = storage.read_vectors(room.read(shard, ["image_emb"])["image_emb"])
    return vectors, valid & storage.has_direction(vectors)


def searched_vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """As `shard_vectors`, but only one of equal samples counts."""
    return _first_of_equals(room, shard, shard_start(room, shard), read_nodes(room))


def _first_of_equals(room: Room, shard: str, start: int, nodes: Array) -> tuple[Array, Array]:
    vectors, valid = shard_vectors(room, shard)
    own = np.arange(start, start + len(vectors))
    return vectors, valid & (nodes[own] == own)


def draw_vectors(room: Room, count: int, purpose: str) -> tuple[Array, Array]:
    """Return the vectors with the `count` smallest hashes, and their global rows, in that order."""
    seed, nodes = dedup_stage(room).seed, read_nodes(room)
    ranks, rows, parts = [], [], []
    for shard, start in zip(room.shards(), shard_starts(room), strict=False):
        vectors, valid = _first_of_equals(room, shard, start, nodes)
        hashes = hash_unit(room.read(shard, [])["uid"].to_pylist(), seed, purpose)
        # No shard can give more than all of the draw; this bounds what is held.
        chosen = np.flatnonzero(valid)
        chosen = chosen[np.argsort(hashes[chosen], kind="stable")[:count]]
        ranks.append(hashes[chosen])
        rows.append(start + chosen)
        parts.append(vectors[chosen])
        if sum(map(len, ranks)) > 2 * count:
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


def read_nodes(room: Room) -> Array:
    """(N,) int64: the row by which each row of an equal sample is searched."""
    found: Array = storage.read_array(storage.join(room.folders["dedup"], "nodes.npy"))
    return found


def read_pixels(room: Room) -> Array:
    """(N,) bool: whether a row's pairs were confirmed by pixels, where the other's were too."""
    found: Array = storage.read_array(storage.join(room.folders["dedup"], "pixels.npy"))
    return found


def commit_spots(room: Room, task: str, spots: list[Array], rows: Array, vectors: Array) -> None:
    """Commit the spots of one task, given as places in the rows and vectors that it compared."""
    kinds = [("spot", "<i4"), ("row", "<i8"), ("min_cosine", "<f4")]
    members = np.zeros(
        sum(map(len, spots)), np.dtype([*kinds, ("vector", "<f2", (vectors.shape[1],))])
    )
    chosen = np.concatenate([*spots, np.zeros(0, np.int64)])
    members["spot"] = np.repeat(np.arange(len(spots)), [len(spot) for spot in spots])
    members["min_cosine"] = dedup_stage(room).min_cosine
    members["row"], members["vector"] = rows[chosen], vectors[chosen]
    storage.commit_array(room.path("spots", f"{task}.npy"), members)


def read_spots(room: Room) -> groups.Spots:
    """Return the spots that `search` left."""
    path = storage.join(room.folders["dedup"], "spots")
    files = [storage.read_array(storage.join(path, name)) for name in storage.list_names(path)]
    parts = [part for part in files if len(part)]
    if not parts:
        none = np.zeros(0, np.int64)
        return groups.Spots(none, np.zeros(1, np.int64), np.zeros((0, 1), np.float16), 1.0)
    sizes = np.concatenate([np.bincount(part["spot"]) for part in parts])
    return groups.Spots(
        np.concatenate([part["row"] for part in parts]),
        np.r_[0, np.cumsum(sizes)].astype(np.int64),
        np.concatenate([part["vector"] for part in parts]),
        float(parts[0]["min_cosine"][0]),
    )


def thumbnail_reader(room: Room) -> ReadImage:
    """Return a function that reads the thumbnail of a global row, earlier runs' after the own."""
    starts, shards, runs = shard_starts(room), room.shards(), earlier_runs(room)

    @lru_cache(maxsize=4)
    def shard_thumbnails(number: int) -> pa.ChunkedArray:
        return room.read(shards[number], ["thumbnail"])["thumbnail"]

    @lru_cache(maxsize=4096)
    def read(row: int) -> Image.Image:
        if row >= starts[-1]:
            run, own = locate(runs, starts[-1], row)
            return run.thumbnail(own)
        number = bisect.bisect_right(starts, row) - 1
        return read_thumbnail(shard_thumbnails(number)[row - starts[number]].as_py())

    return read


def commit_edges(room: Room, name: str, left: Array, right: Array, cosines: Array) -> None:
    """Commit pairs of global rows."""
    ends = {"left_row": left, "right_row": right}
    table = pa.table({**ends, "cosine": pa.array(cosines, pa.float32())})
    storage.commit_table(room.path(name), table)


def _read_pairs(room: Room, folder: str) -> tuple[Array, Array, Array]:
    path = storage.join(room.folders["dedup"], folder)
    tables = [storage.read_table(storage.join(path, n)) for n in storage.list_names(path)]
    if not tables:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    edges = pa.concat_tables(tables)
    return (
        edges["left_row"].to_numpy(),
        edges["right_row"].to_numpy(),
        edges["cosine"].to_numpy(),
    )


def read_edges(room: Room, folder: str) -> tuple[Array, Array, Array]:
    """Return all edges of a folder, once each, sorted: rows, rows, cosines."""
    return groups.unique_pairs(*_read_pairs(room, folder))


def read_known(room: Room, folder: str) -> tuple[Array, Array, Array]:
    """Return the earlier sample nearest to each row that has one, over all files of a folder."""
    return groups.nearest_pairs(*_read_pairs(room, folder), most=1)
