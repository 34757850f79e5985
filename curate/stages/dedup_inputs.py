"""What the steps of `dedup` read, and what they leave for others to read."""

import bisect
from functools import cache, lru_cache
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
    "commit_keys",
    "commit_spots",
    "dedup_stage",
    "draw_vectors",
    "earlier_runs",
    "read_edges",
    "read_keys",
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


def shard_vectors(room: Room, shard: str) -> Array:
    """(N, D) float16; zeros where there is none."""
    vectors, _ = storage.read_vectors(room.read(shard, ["image_emb"])["image_emb"])
    return vectors


def searched_vectors(room: Room, shard: str) -> tuple[Array, Array]:
    """(N, D) float16, and which count, (N,) bool: one of equal samples, and no zeros or NaN."""
    usable = storage.read_array(room.path("keys", f"{shard}.npy"))["usable"]
    own = shard_start(room, shard) + np.arange(len(usable))
    return shard_vectors(room, shard), usable & (read_nodes(room)[own] == own)


#: What tells samples apart, and draws among them: equal bytes or vectors have equal digests, empty
#: where there is none; `pixels` is whether its pairs are confirmed by pixels.
_KEYS = [
    ("uid", "S32"),
    ("bytes", "S32"),
    ("vector", "S32"),
    ("usable", "?"),
    ("pixels", "?"),
    ("recall", "<f8"),
    ("centroids", "<f8"),
]


def commit_keys(room: Room, shard: str) -> dict[str, float]:
    """Commit what later steps over all samples need to know of a shard's."""
    from curate.dedup.neighbors import row_digests

    stage = dedup_stage(room)
    table = room.read(shard, ["sha256", "image_emb"])
    vectors, valid = storage.read_vectors(table["image_emb"])
    keys = np.zeros(len(table), _KEYS)
    uids, digests = (table[name].fill_null("").to_pylist() for name in ("uid", "sha256"))
    keys["uid"], keys["bytes"] = uids, [digest[-32:] for digest in digests]  # 128 bits are enough
    keys["usable"] = valid & storage.has_direction(vectors)
    keys["pixels"] = table["sha256"].is_valid().to_numpy() & stage.asks_pixels
    if not stage.asks_pixels:
        keys["vector"] = np.where(keys["usable"], row_digests(vectors), b"")
    for purpose in ("recall", "centroids"):
        keys[purpose] = hash_unit(uids, stage.seed, purpose)
    storage.commit_array(room.path("keys", f"{shard}.npy"), keys)
    return {"samples": len(table)}


def read_keys(room: Room, *columns: str) -> tuple[Array, ...]:
    """Return some of the keys of all samples: (N,) each."""
    files = [storage.read_array(room.path("keys", f"{shard}.npy")) for shard in room.shards()]
    return tuple(np.concatenate([keys[column] for keys in files]) for column in columns)


def draw_vectors(room: Room, count: int, purpose: str) -> tuple[Array, Array]:
    """Return the vectors with the `count` smallest draws, and their global rows, in that order."""
    nodes, (usable, draws) = read_nodes(room), read_keys(room, "usable", purpose)
    rows = np.flatnonzero(usable & (nodes == np.arange(len(nodes))))
    rows = rows[np.argsort(draws[rows], kind="stable")[:count]]
    found: Array = np.zeros((len(rows), 0), np.float16)
    for shard, start in zip(room.shards(), shard_starts(room), strict=False):
        vectors = shard_vectors(room, shard)
        if found.shape[1] == 0:
            found = np.zeros((len(rows), vectors.shape[1]), np.float16)
        inside = np.flatnonzero((rows >= start) & (rows < start + len(vectors)))
        found[inside] = vectors[rows[inside] - start]
    return found, rows


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


def thumbnail_reader(room: Room, rows: Array) -> ReadImage:
    """Return a function that reads thumbnails of global rows, earlier runs' after the own.

    Of the own only those of `rows`, (R,) int, whose files it keeps: pictures that are compared lie
    in shards all over, and each shard is read once.
    """
    starts, shards, runs = shard_starts(room), room.shards(), earlier_runs(room)

    @cache  # only where pictures are asked for
    def wanted() -> Array:
        return np.unique(rows)

    @cache
    def shard_thumbnails(number: int) -> tuple[Array, pa.ChunkedArray]:
        first, end = np.searchsorted(wanted(), starts[number : number + 2])
        own = wanted()[first:end]
        files = room.read(shards[number], ["thumbnail"])["thumbnail"]
        return own, files.take(pa.array(own - starts[number]))

    @lru_cache(maxsize=4096)
    def read(row: int) -> Image.Image:
        if row >= starts[-1]:
            run, own = locate(runs, starts[-1], row)
            return run.thumbnail(own)
        number = bisect.bisect_right(starts, row) - 1
        kept, files = shard_thumbnails(number)
        return read_thumbnail(files[int(np.searchsorted(kept, row))].as_py())

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
