"""What the steps of `dedup` read, and what they leave for others to read."""

import bisect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import storage
from curate.dedup import groups
from curate.formats.pixels import read_thumbnail
from curate.memorization.folds import hash_unit
from curate.stages.base import Room
from curate.stages.dedup_earlier import Earlier, locate, open_runs

if TYPE_CHECKING:
    from curate.stages.dedup import Dedup

__all__ = [
    "commit_edges",
    "dedup_stage",
    "draw_vectors",
    "earlier_runs",
    "read_edges",
    "read_nodes",
    "read_pixels",
    "read_spots",
    "searched_vectors",
    "shard_starts",
    "shard_vectors",
    "spot_type",
    "thumbnail_reader",
]

Array = np.ndarray[Any, Any]


def dedup_stage(room: Room) -> "Dedup":
    """Return the run's own, as it judges the run's samples; a later stage may ask for it too."""
    from curate.stages.dedup import Dedup

    stage = next(stage for stage in (room.stage, *room.pipeline) if isinstance(stage, Dedup))
    return stage.without_pixels() if room.has_source_vectors() else stage


@lru_cache(maxsize=8)
def _open_runs(outs: tuple[str, ...]) -> list[Earlier]:
    return open_runs(outs)


def earlier_runs(room: Room) -> list[Earlier]:
    """Return the runs that new samples are compared with, and those that these were."""
    return _open_runs(dedup_stage(room).against)


def shard_starts(room: Room) -> list[int]:
    """Global row at which each shard starts, and the total at the end."""
    layout = storage.read_json(storage.join(room.folders["ingest"], "layout.json"))
    starts = [0]
    for shard in layout["shards"]:
        starts.append(starts[-1] + shard["samples"])
    return starts


def shard_vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """(N, D) float16 and (N,) bool; zero and non-finite vectors count as missing."""
    vectors, valid = storage.read_vectors(room.read(shard, ["image_emb"])["image_emb"])
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    return vectors, valid & np.isfinite(norms) & (norms > 0)


def searched_vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """As `shard_vectors`, but only one of equal samples counts."""
    vectors, valid = shard_vectors(room, shard)
    start = shard_starts(room)[room.shards().index(shard)]
    own = np.arange(start, start + len(vectors))
    return vectors, valid & (read_nodes(room)[own] == own)


def _hash_ranks(room: Room, shard: str, purpose: str) -> Array:
    """(N,) float64, uniform, a function of seed and uid alone."""
    uids = room.read(shard, [])["uid"].to_pylist()
    return hash_unit(uids, dedup_stage(room).seed, purpose)


def draw_vectors(room: Room, count: int, purpose: str) -> tuple[Array, Array]:
    """Return the vectors with the `count` smallest hashes, and their global rows, in that order."""
    starts = shard_starts(room)
    ranks, rows, parts = [], [], []
    for shard, start in zip(room.shards(), starts, strict=False):
        vectors, valid = searched_vectors(room, shard)
        hashes = _hash_ranks(room, shard, purpose)
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


def spot_type(width: int) -> np.dtype[Any]:
    """One member of one spot, as stored; `spot` counts within its file."""
    kinds = [("spot", "<i4"), ("row", "<i8"), ("min_cosine", "<f4"), ("vector", "<f2", (width,))]
    return np.dtype(kinds)


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


def thumbnail_reader(room: Room) -> Callable[[int], Image.Image]:
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
