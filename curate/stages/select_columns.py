"""Columns that rules of `select` may name besides those of the schema.

`metadata.FIELD` is a number in the source's own metadata, `TABLE.COLUMN` one in a table of
`select.score_tables`. Before anything is decided they are put beside each shard, null where there
is none.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate import storage
from curate.errors import InputError
from curate.formats import lookup
from curate.formats.sources import TABLES, split_suffix
from curate.plugins import find_column
from curate.schema import COLUMNS
from curate.stages.base import Room
from curate.stages.outside import (
    Outside,
    file_tasks,
    open_runs,
    read_file,
    sample_digests,
    sample_fields,
    sort,
)

if TYPE_CHECKING:
    from curate.stages.select import Select

__all__ = [
    "ScoreTable",
    "check_joined",
    "check_number",
    "check_tables",
    "find_columns",
    "is_outside",
    "join_shard",
    "join_tasks",
    "read_joined",
    "sort_table",
    "table_tasks",
]

Array = np.ndarray[Any, Any]

_METADATA = "metadata"


class ScoreTable(Outside):
    """A table of numbers by sample; `name` is what rules call it, default: the file's stem."""

    on: Annotated[str, Field(min_length=1)] = "uid"

    @property
    def title(self) -> str:
        return self.name or split_suffix(super().title)[0]

    def key_kind(self) -> str:
        return self.on


def is_outside(column: str) -> bool:
    """Tell whether a rule's column is not one of the schema."""
    return "." in column


def check_number(column: str) -> str:
    """Return `column` if it may be compared with numbers; whose it is cannot be told here.

    Raises
    ------
    ValueError
    """
    found = COLUMNS.get(column) or find_column(column)
    kind = None if found is None else found.type
    is_number = kind is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind))
    if not is_number and not is_outside(column):
        raise ValueError(
            "a numeric column (see `curate columns`), metadata.FIELD, or TABLE.COLUMN of "
            f"select.score_tables; {column!r} is not"
        )
    return column


def check_tables(columns: Iterable[str], tables: Iterable[ScoreTable]) -> None:
    """Check that each column from outside is the metadata's or of a table that is given.

    Raises
    ------
    ValueError
    """
    titles = [table.title for table in tables]
    for column in filter(is_outside, columns):
        title = column.partition(".")[0]
        if title != _METADATA and title not in titles:
            known = ", ".join([_METADATA, *titles])
            raise ValueError(
                f"on columns of what there is ({known}, before the dot); {column!r} is not"
            )


def _split(stage: "Select") -> dict[str, list[str]]:
    """Return the columns that rules name, by table."""
    found: dict[str, list[str]] = {}
    for column in stage.outside_columns():
        title, _, name = column.partition(".")
        found.setdefault(title, []).append(name)
    return found


def _stage(room: Room) -> "Select":
    from curate.stages.select import Select

    return room.find(Select)


def find_columns(stage: "Select") -> None:
    """Check before anything runs that tables have the columns that rules name.

    Raises
    ------
    InputError
        If one has not; the message names those that it has.
    """
    for table in stage.tables_used():
        for file in table.list_files():
            if split_suffix(file.name)[1] not in TABLES:
                raise InputError(
                    f"{file.name}: must be a table ({', '.join(TABLES)}) to be of use in "
                    "select.score_tables; it is not. Convert it."
                )
            lookup.find_key(file, table.key_names(), _split(stage)[table.title])


def table_tasks(room: Room) -> list[str]:
    """One task per file of the tables that rules name."""
    return file_tasks(_stage(room).tables_used())


def join_tasks(room: Room) -> list[str]:
    """One task per shard, if there is anything to join."""
    return room.shards() if _stage(room).outside_columns() else []


def sort_table(room: Room, task: str) -> dict[str, float]:
    """Put one file of a table down sorted by key, with the columns that rules name."""
    stage = _stage(room)
    table, file = read_file(stage.tables_used(), task)
    names = _split(stage)[table.title]
    return {"keys": sort(room, table, file, names, room.path("tables"), task)}


def join_shard(room: Room, shard: str) -> dict[str, float]:
    """Commit the columns from outside of one shard's samples."""
    stage = _stage(room)
    index = room.read(shard, ["key", "metadata"])
    fields, by_table, tasks = sample_fields(index), _split(stage), table_tasks(room)
    result = index.select(["uid"])
    for name in by_table.get(_METADATA, ()):
        values = np.array([_to_number(known.get(name)) for known in fields], float)
        result = result.append_column(f"{_METADATA}.{name}", _column(values))
    for number, table in enumerate(stage.tables_used()):
        rows, digests = sample_digests(index, fields, table.on)
        names = by_table[table.title]
        values = np.full((len(index), len(names)), np.nan)
        seen = np.zeros(len(index), bool)
        for runs in open_runs(room.path("tables"), tasks, number):
            for places, numbers in runs.rows(digests):
                _fill(values, seen, rows[places], numbers, table, index)
        for place, name in enumerate(names):
            result = result.append_column(f"{table.title}.{name}", _column(values[:, place]))
    storage.commit_table(_path(room, shard), result)
    return {"samples": len(index)}


def _fill(
    values: Array, seen: Array, rows: Array, numbers: Array, table: ScoreTable, index: pa.Table
) -> None:
    """Take over what a table says of samples; a second row of one sample must say the same."""
    first, place = np.unique(rows, return_index=True)
    new = first[~seen[first]]
    values[new] = numbers[place[~seen[first]]]
    seen[first] = True
    same = (values[rows] == numbers) | (np.isnan(values[rows]) & np.isnan(numbers))
    differing = np.flatnonzero(~same.all(axis=1))
    if len(differing):
        key, uid = (index[name][int(rows[differing[0]])].as_py() for name in ("key", "uid"))
        raise InputError(
            f"{table.title}: must say one thing of a sample (select.score_tables, on {table.on}); "
            f"has differing rows for key {key}, uid {uid}. Leave one, or join on what tells them "
            "apart."
        )


def _to_number(value: Any) -> float:
    """Return a number that metadata holds, as text where it comes from a CSV; else NaN."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return math.nan
    return number


def _column(values: Array) -> pa.Array:
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def _path(room: Room, shard: str) -> str:
    return room.path("joined", f"{shard}.parquet")


def read_joined(room: Room, table: pa.Table, shard: str) -> pa.Table:
    """Put a shard's columns from outside beside those of earlier stages."""
    if not _stage(room).outside_columns():
        return table
    path = _path(room, shard)
    return storage.join_aligned([("index", table), (path, storage.read_table(path))])


def check_joined(room: Room, table: pa.Table) -> dict[str, int]:
    """Return how many samples have a value, by column from outside.

    Raises
    ------
    InputError
        If none has: a name is wrong, or the join is on the wrong thing.
    """
    stage, counts = _stage(room), {}
    for column in stage.outside_columns():
        counts[column] = len(table) - table[column].null_count
        if counts[column] == 0 and len(table):
            raise InputError(f"select: {column} {_advise(room, stage, column)}")
    return counts


def _advise(room: Room, stage: "Select", column: str) -> str:
    title, _, _ = column.partition(".")
    index = room.read(room.shards()[0], ["key", "metadata"])
    fields = sample_fields(index)
    if title == _METADATA:
        numeric = {
            name for known in fields for name in known if not math.isnan(_to_number(known[name]))
        }
        shown = ", ".join(sorted(numeric)[:12]) or "none"
        return f"must be a number in the samples' metadata; none has it. Numbers there: {shown}."
    table = next(one for one in stage.tables_used() if one.title == title)
    rows, _ = sample_digests(index, fields, table.on)
    has = "have one" if len(rows) else "have none"
    return (
        f"must be a number of some sample; none of the samples is in the table by {table.on} (they "
        f"{has}), or none has the number. Join on something else, or correct the table."
    )
