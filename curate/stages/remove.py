"""remove: samples that lists from outside name (takedowns, opt-outs, hashes), before any decode.

It drops nothing itself: `embed` leaves what is listed unread, and `select` drops it.
"""

from collections import Counter
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate.formats import lookup
from curate.formats.sources import TABLES, split_suffix
from curate.schema import select_schema
from curate.stages.base import Room, Stage, Step, Table, shard_tasks
from curate.stages.outside import (
    Outside,
    file_tasks,
    open_runs,
    read_file,
    sample_digests,
    sample_fields,
    sort,
)

__all__ = ["BYTES_REASON", "REMOVALS", "ByteLists", "RemovalList", "Remove"]

Array = np.ndarray[Any, Any]

_COLUMNS = ("removal_list", "removal_reason")
#: What a list names samples by -> reason code.
_REASONS = {
    "uid": "removed_by_uid",
    "url": "removed_by_url",
    "md5": "removed_by_hash",
    "sha256": "removed_by_hash",
}
#: Of a hash of the bytes that a source stores.
BYTES_REASON = "removed_by_hash"
#: Reasons of samples of which nothing may be shown.
REMOVALS = tuple(dict.fromkeys(_REASONS.values()))


class RemovalList(Outside):
    """Samples to leave out: a file with one key a line, or a column of a table."""

    by: Literal["uid", "url", "md5", "sha256"]

    def key_kind(self) -> str:
        return self.by


class Remove(Stage):
    """Find the samples that removal lists name by uid, URL or hash."""

    name: ClassVar[str] = "remove"

    lists: tuple[RemovalList, ...] = Field(
        (),
        description="[{path, by: uid | url | md5 | sha256, column, name}]: plain text with one key "
        "a line, or Parquet, CSV, TSV, JSONL; hashes are those of the downloaded file",
    )

    def reads(self) -> tuple[str, ...]:
        return ("key", "metadata")

    def tables(self) -> tuple[Table, ...]:
        return (Table(self.name, _COLUMNS),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("lists", _sort_list, _list_tasks), Step("shards", _find, shard_tasks))

    def hashed_fields(self) -> dict[str, Any]:
        return {"lists": [one.identity() for one in self.lists]}

    def sources(self) -> list[dict[str, Any]]:
        for one in self.lists:
            for file in one.list_files():
                if split_suffix(file.name)[1] in TABLES:
                    lookup.find_key(file, one.key_names())
        return [one.content() for one in self.lists]


def _lists(room: Room) -> tuple[RemovalList, ...]:
    return room.find(Remove).lists


def _list_tasks(room: Room) -> list[str]:
    return file_tasks(_lists(room))


def _folder(room: Room) -> str:
    return room.path("lists", table="remove")


def _sort_list(room: Room, task: str) -> dict[str, float]:
    one, file = read_file(_lists(room), task)
    return {"keys": sort(room, one, file, (), _folder(room), task)}


def _find(room: Room, shard: str) -> dict[str, float]:
    """Commit the first list, in the order given, that names each sample of a shard."""
    table = room.read(shard, ["key", "metadata"])
    fields = sample_fields(table) if _lists(room) else []
    tasks = _list_tasks(room)
    found = np.full(len(table), -1)
    for number, one in enumerate(_lists(room)):
        rows, digests = sample_digests(table, fields, one.by)
        for runs in open_runs(_folder(room), tasks, number):
            hits = rows[runs.holds(digests)]
            found[hits[found[hits] < 0]] = number
    named = [None if i < 0 else _lists(room)[i].title for i in found]
    reasons = [None if i < 0 else _REASONS[_lists(room)[i].by] for i in found]
    result = table.select(["uid"])
    for field, column in zip(select_schema(_COLUMNS), (named, reasons), strict=True):
        result = result.append_column(field, pa.array(column, field.type))
    room.commit_shard("remove", shard, result)
    counts = Counter(code for code in reasons if code)
    return {"samples": len(table), **{f"reason.{code}": n for code, n in counts.items()}}


class ByteLists:
    """The lists of hashes, to be asked about the bytes that a source stores."""

    def __init__(self, room: Room) -> None:
        self.lists: list[tuple[str, str, list[lookup.Runs]]] = []
        if not room.has("removal_reason"):
            return
        tasks = _list_tasks(room)
        for number, one in enumerate(_lists(room)):
            if one.by in lookup.HASHES:
                runs = open_runs(_folder(room), tasks, number)
                self.lists.append((one.title, one.by, runs))

    def find(self, data: bytes) -> str | None:
        """Return the name of the first list that holds the hash of an image's bytes."""
        for title, kind, runs in self.lists:
            wanted = lookup.hash_bytes(data, kind)
            if any(part.holds(wanted)[0] for part in runs):
                return title
        return None
