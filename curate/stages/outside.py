"""Files from outside that say something of samples: how they are named, identified and joined."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from curate.formats import lookup
from curate.formats.sources import TABLES, File, find_root, list_files, split_suffix
from curate.stages.base import Room
from curate.stages.ingest import Ingest, to_uid

__all__ = [
    "NAMES",
    "Outside",
    "file_tasks",
    "open_runs",
    "read_file",
    "sample_digests",
    "sample_fields",
    "sort",
]

Array = np.ndarray[Any, Any]

#: What samples are known by -> other names of the same in their sources' metadata and in tables.
NAMES = {"uid": ("uid", "UID"), "url": ("url", "URL"), "md5": ("md5", "MD5", "hash")}


class Outside(BaseModel):
    """A list or table: where it lies and what it is called."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None

    @property
    def title(self) -> str:
        """Its name; default: that of the file or folder."""
        return self.name or posixpath.basename(self.path.rstrip("/"))

    def key_kind(self) -> str:
        """Return what its rows are known by."""
        raise NotImplementedError

    def key_names(self) -> tuple[str, ...]:
        """Return the columns that may hold this, best first."""
        kind = self.key_kind()
        return (self.column,) if self.column else NAMES.get(kind, (kind,))

    def list_files(self) -> list[File]:
        """Return its files in order of name.

        Raises
        ------
        InputError
            If there is none.
        """
        return list_files((self.path,), find_root((self.path,)))

    def identity(self) -> dict[str, Any]:
        """Return everything but where it lies."""
        return {**self.model_dump(mode="json", exclude={"path"}), "name": self.title}

    def content(self) -> dict[str, Any]:
        """Return what it holds: all of it counts, and not the names of its files.

        Raises
        ------
        InputError
            If there is none.
        """
        return {"name": self.title, "digests": sorted(map(lookup.hash_whole, self.list_files()))}


def _files(given: Sequence[Outside]) -> Iterator[tuple[int, File]]:
    for number, one in enumerate(given):
        yield from ((number, file) for file in one.list_files())


def file_tasks(given: Sequence[Outside]) -> list[str]:
    """Name one task per file: the number of the list or table, and that of the file."""
    counts = [0] * len(given)
    tasks = []
    for number, _ in _files(given):
        tasks.append(f"{number:03d}-{counts[number]:05d}")
        counts[number] += 1
    return tasks


def read_file(given: Sequence[Outside], task: str) -> tuple[Outside, File]:
    """Return the list or table of a task, and its file."""
    number, place = map(int, task.split("-"))
    return given[number], given[number].list_files()[place]


def sort(
    room: Room, one: Outside, file: File, values: Sequence[str], folder: str, name: str
) -> int:
    """Put a file down in sorted runs (`lookup.sort_runs`); return how many keys it has."""
    if split_suffix(file.name)[1] in TABLES:
        key = lookup.find_key(file, one.key_names(), values)
        batches = lookup.read_batches(file, key, values)
    else:
        batches = lookup.read_lines(file)
    dataset = room.find(Ingest).dataset

    def digested() -> Iterator[tuple[Array, Array]]:
        for keys, numbers in batches:
            texts = [(key or "").strip() for key in keys]
            rows = [row for row, text in enumerate(texts) if text]
            present = [texts[row] for row in rows]
            yield _digest(present, one.key_kind(), dataset, file.name), numbers[rows]

    return lookup.sort_runs(digested(), folder, name)


def _digest(texts: list[str], kind: str, dataset: str, where: str) -> Array:
    if kind == "uid":
        texts = [to_uid(text, dataset) for text in texts]
    return lookup.digest(texts, kind, where)


def sample_fields(table: pa.Table) -> list[dict[str, Any]]:
    """Return the metadata of index rows as it was read."""
    return [json.loads(text) if text else {} for text in table["metadata"].to_pylist()]


def sample_digests(
    table: pa.Table, fields: Sequence[dict[str, Any]], kind: str
) -> tuple[Array, Array]:
    """Return by what samples are looked up.

    Parameters
    ----------
    table : pyarrow.Table
        Columns uid and key of N index rows.
    fields : sequence of dict
        Their metadata.
    kind : str
        `uid`, `key`, or a field of the metadata.

    Returns
    -------
    rows : (R,) int64
        Rows that have such a thing.
    digests : (R,) of `lookup.DIGEST`
    """
    if kind == "uid":
        # Where another sample has the uid that the source gives, the metadata still says it.
        own = zip(table["uid"].to_pylist(), fields, strict=True)
        texts = [known.get("uid") or uid for uid, known in own]
    elif kind == "key":
        texts = table["key"].to_pylist()
    else:
        names = NAMES.get(kind, (kind,))
        texts = [_first(known, names) for known in fields]
    if kind in lookup.HASHES:
        texts = [text if lookup.is_hash(text, kind) else None for text in texts]
    rows = [row for row, text in enumerate(texts) if text]
    digests = lookup.digest([texts[row] for row in rows], kind, "metadata")
    return np.array(rows, np.int64), digests


def _first(known: dict[str, Any], names: Sequence[str]) -> str:
    found = (known[name] for name in names if isinstance(known.get(name), str | int))
    return str(next(found, "")).strip()


def open_runs(folder: str, tasks: Sequence[str], number: int) -> list[lookup.Runs]:
    """Return the sorted runs of all files of one list or table."""
    own = [task for task in tasks if int(task.partition("-")[0]) == number]
    return [lookup.Runs.open(folder, task) for task in own]
