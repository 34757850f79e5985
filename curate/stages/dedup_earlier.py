"""What `dedup` needs of earlier runs that it compares new samples with (`dedup.against`).

An earlier run is read and never written: its centroids, its cells and the copies of its vectors, as
they lie in its stage folders, are the index that new samples are searched in.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from curate import storage
from curate.errors import InputError
from curate.formats.pixels import read_thumbnail

__all__ = ["Earlier", "locate", "open_runs"]

Array = np.ndarray[Any, Any]

_TABLES = ("ingest", "embed.vectors", "dedup", "select")


@dataclass(frozen=True)
class Earlier:
    """The kept samples of an earlier run.

    Parameters
    ----------
    out : str
        Its output folder.
    tables : dict of str to str
        Fingerprint of each of its tables.
    encoder : str
    against : tuple of (str, str)
        Output folder and dedup's fingerprint of each run that it was compared with itself.
    """

    out: str
    tables: dict[str, str]
    encoder: str
    against: tuple[tuple[str, str], ...]

    def path(self, table: str, *names: str) -> str:
        """Return the location of a file of one of its tables."""
        return storage.join(self.out, "stages", f"{table}-{self.tables[table]}", *names)

    @cached_property
    def starts(self) -> list[int]:
        """Row at which each of its shards starts, and the total."""
        starts = [0]
        for shard in storage.read_json(self.path("ingest", "layout.json"))["shards"]:
            starts.append(starts[-1] + shard["samples"])
        return starts

    @cached_property
    def shards(self) -> list[str]:
        """Names of its shards."""
        layout = storage.read_json(self.path("ingest", "layout.json"))
        return [shard["name"] for shard in layout["shards"]]

    @cached_property
    def kept(self) -> Array:
        """(N,) int64: for each row that stands for equals the one of them that was kept, or -1."""
        path = self.path("select", "decisions.parquet")
        rows = np.flatnonzero(storage.read_table(path, ["keep"])["keep"].to_numpy())
        kept = np.full(self.starts[-1], -1, np.int64)
        kept[storage.read_array(self.path("dedup", "nodes.npy"))[rows]] = rows
        return kept

    def vectors(self, shard: str) -> tuple[Array, Array]:
        """Rows that stand for kept samples of a shard, (K,) int64, and their vectors (K, D)."""
        number = self.shards.index(shard)
        start, end = self.starts[number : number + 2]
        rows = np.flatnonzero(self.kept[start:end] >= 0)
        table = storage.read_table(
            self.path("embed.vectors", "shards", f"{shard}.parquet"), ["image_emb"]
        )
        vectors, valid = storage.read_vectors(table["image_emb"])
        usable = valid[rows] & np.isfinite(vectors[rows]).all(1) & vectors[rows].any(1)
        return start + rows[usable], vectors[rows[usable]]

    def uids(self, rows: Array) -> list[str]:
        """Uids of the samples that were kept of rows that stand for equals."""
        kept = self.kept[rows]
        found = np.empty(len(rows), "S32")
        for shard, (start, end) in zip(self.shards, pairwise(self.starts), strict=True):
            inside = np.flatnonzero((kept >= start) & (kept < end))
            if len(inside):
                path = self.path("ingest", "shards", f"{shard}.parquet")
                uids = storage.read_table(path, ["uid"])["uid"].to_numpy(zero_copy_only=False)
                found[inside] = uids[kept[inside] - start].astype("S32")
        return [uid.decode() for uid in found.tolist()]

    def visits(self, part: int) -> list[Array]:
        """Vectors of kept samples where they are compared in one task, shard by shard."""
        found = []
        for shard in self.shards:
            offsets = storage.read_array(self.path("dedup", "visits", f"{shard}.offsets.npy"))
            path = self.path("dedup", "visits", f"{shard}.npy")
            copies = storage.read_array_rows(path, int(offsets[part]), int(offsets[part + 1]))
            found.append(copies[self.kept[copies["row"]] >= 0])
        return found

    def thumbnail(self, row: int) -> Image.Image:
        """Return the thumbnail of a row."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return read_thumbnail(self._thumbnails(number)[row - self.starts[number]].as_py())

    @cached_property
    def _thumbnails(self) -> Any:
        @lru_cache(maxsize=4)
        def read(number: int) -> Any:
            path = self.path("embed.thumbnails", "shards", f"{self.shards[number]}.parquet")
            return storage.read_table(path, ["thumbnail"])["thumbnail"]

        return read


def locate(runs: Sequence[Earlier], first: int, row: int) -> tuple[Earlier, int]:
    """Find the run and its own row that a row counted from `first` on means."""
    for run in runs:
        if row < first + run.starts[-1]:
            return run, row - first
        first += run.starts[-1]
    raise IndexError(row)


def open_runs(outs: Sequence[str]) -> list[Earlier]:
    """Open finished runs, and the runs that they were compared with themselves.

    Raises
    ------
    InputError
        If one is missing, unfinished, or made without dedup.
    """
    runs = {run.tables["dedup"]: run for run in map(_open, outs)}
    waiting = list(runs.values())
    while waiting:
        run = waiting.pop()
        for out, fingerprint in run.against:
            if fingerprint not in runs:
                if not storage.exists(storage.join(out, "run.json")):
                    raise InputError(
                        f"{run.out}: was compared with {out} (dedup.against), which must be there "
                        "too; it is not. Name its place in dedup.against as well."
                    )
                runs[fingerprint] = _open(out)
                waiting.append(runs[fingerprint])
    return [runs[fingerprint] for fingerprint in sorted(runs)]


def _open(out: str) -> Earlier:
    path = storage.join(out, "run.json")
    summary = storage.read_json(path) if storage.exists(path) else {}
    if summary.get("status") != "finished":
        found = "it is unfinished" if summary else "it holds no run.json"
        raise InputError(
            f"{out}: must be the output of a finished run (dedup.against); {found}. Finish it, or "
            "name another."
        )
    stages = summary["stages"]
    missing = [table for table in _TABLES if table not in stages]
    if missing:
        raise InputError(
            f"{out}: must be a run with embed, dedup and select (dedup.against); it has no "
            f"{missing[0]}. Name another."
        )
    local = storage.is_local(out)
    return Earlier(
        os.path.abspath(out) if local else out,
        {table: facts["fingerprint"] for table, facts in stages.items()},
        stages["embed.vectors"]["parameters"]["encoder"],
        tuple((one["out"], one["dedup"]) for one in summary["facts"]["dedup"].get("against", [])),
    )
