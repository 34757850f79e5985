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

__all__ = ["Earlier", "count_rows", "locate", "open_runs", "read_copies"]

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
    def _layout(self) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(self.path("ingest", "layout.json"))
        return found

    @cached_property
    def starts(self) -> list[int]:
        """Row at which each of its shards starts, and the total."""
        return count_rows(self._layout)

    @cached_property
    def shards(self) -> list[str]:
        """Names of its shards."""
        return [shard["name"] for shard in self._layout["shards"]]

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
        usable = valid[rows] & storage.has_direction(vectors[rows])
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

    def copies(self, part: int) -> tuple[Array, Array, Array]:
        """Vectors, rows and visited cells of kept samples that are compared in one task."""
        vectors, rows, cells = read_copies(self.path("dedup"), self.shards, part)
        kept = self.kept[rows] >= 0
        return vectors[kept], rows[kept], cells[kept]

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


def count_rows(layout: dict[str, Any]) -> list[int]:
    """Return the global row at which each shard of a run starts, and the total at the end."""
    starts = [0]
    for shard in layout["shards"]:
        starts.append(starts[-1] + shard["samples"])
    return starts


def read_copies(folder: str, shards: Sequence[str], part: int) -> tuple[Array, Array, Array]:
    """Read what dedup copied for one task, from the folder of a run's table.

    Returns
    -------
    vectors : (N, D) float16
    rows : (N,) int64
        Of the run.
    cells : (N, C) int32
        Visited ones, the home first; -1 after the last.
    """
    found = []
    for shard in shards:
        path = storage.join(folder, "visits", f"{shard}.npy")
        offsets = storage.read_array(storage.join(folder, "visits", f"{shard}.offsets.npy"))
        found.append(storage.read_array_rows(path, int(offsets[part]), int(offsets[part + 1])))
    slots = max(copies["cells"].shape[1] for copies in found)
    cells = np.full((sum(map(len, found)), slots), -1, np.int32)
    start = 0
    for copies in found:
        cells[start : start + len(copies), : copies["cells"].shape[1]] = copies["cells"]
        start += len(copies)
    vectors = np.concatenate([copies["vector"] for copies in found])
    return vectors, np.concatenate([copies["row"] for copies in found]), cells


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
