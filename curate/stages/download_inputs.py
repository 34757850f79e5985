"""What `download` reads: rows of URL lists in one form, and which of them make up which shard."""

import hashlib
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate import storage
from curate.errors import InputError
from curate.formats import index, url_lists
from curate.stages.base import Room
from curate.stages.ingest import (
    count_rows,
    cut_shards,
    draw_places,
    hash_uid,
    read_source,
    shard_size,
    source_tasks,
    to_uid,
)

if TYPE_CHECKING:
    from curate.stages.download import Download

__all__ = [
    "decide_shards",
    "hash_shard",
    "read_layout",
    "read_list",
    "read_shard",
    "shard_names",
]

_ROWS_PER_GROUP = 8192
#: Parameters that say which rows a shard has, and nothing more of it.
_OF_LISTS = frozenset(
    (
        *("dataset", "uid_column", "limit", "seed", "shard_samples"),
        *("url_column", "caption_column"),
    )
)


def _stage(room: Room) -> "Download":
    from curate.stages.download import Download

    return room.find(Download)


def _rows_url(room: Room, task: str) -> str:
    return room.path("rows", f"{task}.parquet")


def read_list(room: Room, task: str) -> dict[str, float]:
    """Bring one list to the form that is downloaded: its URLs, captions, uids, everything else."""
    stage = _stage(room)
    source = read_source(room, task, stage.folder())
    columns = url_lists.find_columns(
        source, stage.url_column, stage.caption_column, stage.verify_hash
    )
    seen: Counter[str | None] = Counter()
    schema = _schema(columns, stage.verify_hash)
    total = 0
    with storage.commit(_rows_url(room, task)) as path, pq.ParquetWriter(path, schema) as writer:
        for rows in url_lists.read_rows(source):
            uids = [_uid(row, columns, source.name, stage, seen) for row in rows]
            arrays = {"uid": pa.array(uids, pa.string())}
            for name, own in _sources(columns, stage.verify_hash).items():
                values = [row.get(own) for row in rows]
                if name == stage.verify_hash:
                    values = [v.strip().lower() if isinstance(v, str) else v for v in values]
                arrays[name] = url_lists.to_array(values, schema.field(name).type)
            writer.write_table(pa.table(arrays, schema), row_group_size=_ROWS_PER_GROUP)
            total += len(rows)
    return {"samples": total}


def _sources(columns: url_lists.Columns, verify_hash: str | None) -> dict[str, str]:
    """Name the columns of a list in img2dataset's order, each with its own name."""
    named = dict(columns.sources)
    if columns.caption is not None:
        named["caption"] = columns.caption
    if verify_hash is not None and columns.hash is not None:
        named[verify_hash] = columns.hash
    return {**named, "url": columns.url}


def _schema(columns: url_lists.Columns, verify_hash: str | None) -> pa.Schema:
    names = ["uid", *_sources(columns, verify_hash)]
    return pa.schema([pa.field(name, columns.others.get(name, pa.string())) for name in names])


def _uid(
    row: dict[str, Any],
    columns: url_lists.Columns,
    name: str,
    stage: "Download",
    seen: Counter[str | None],
) -> str:
    """Return the identity of a row: the list's own, else from its list's name and its URL."""
    own = index.find_uid(row, stage.uid_column)
    if own is not None:
        return to_uid(own, stage.dataset)
    url = row.get(columns.url)
    text = url if isinstance(url, str) else ""
    ordinal = seen[text]
    seen[text] += 1
    return hash_uid(stage.dataset, name, index.clean_text(text), ordinal)


def decide_shards(room: Room, task: str) -> dict[str, float]:
    """Decide which rows of which list make up which shard."""
    stage = _stage(room)
    urls = [_rows_url(room, task) for task in source_tasks(room)]
    counts = [count_rows(url) for url in urls]
    if not sum(counts):
        raise InputError(f"{stage.inputs[0]}: must list URLs; it has no rows. Check --input.")
    if stage.limit is not None and stage.limit < sum(counts):
        uids = (storage.read_table(url, ["uid"])["uid"].to_pylist() for url in urls)
        picked = draw_places(uids, stage.limit, stage.seed)
        storage.commit_array(room.path("picked.npy"), picked)
        counts = np.bincount(picked[:, 0], minlength=len(urls)).tolist()
    size = stage.shard_samples or _choose_size(sum(counts))
    shards = [
        {"name": str(number).zfill(5), "samples": sum(b - a for _, a, b in parts), "parts": parts}
        for number, parts in enumerate(cut_shards(counts, size))
    ]
    layout = {"samples": sum(counts), "shard_samples": size, "shards": shards}
    storage.commit_json(room.path("layout.json"), layout)
    return {"samples": sum(counts), "shards": len(shards)}


def _choose_size(total: int) -> int:
    """Return the URLs of a shard: as of samples, in steps, so that a list that grows keeps it."""
    return min(256 << math.ceil(math.log2(shard_size(total) / 256)), 10_000)


def read_layout(room: Room) -> dict[str, Any]:
    """Return what was decided: `samples`, `shard_samples` (of a full shard), `shards`."""
    found: dict[str, Any] = storage.read_json(room.path("layout.json"))
    return found


def shard_names(room: Room) -> list[str]:
    """One task per shard of URLs."""
    return [shard["name"] for shard in read_layout(room)["shards"]]


def read_shard(room: Room, task: str) -> pa.Table:
    """Return the rows of a shard, all in the columns of the first that is not of another list."""
    parts = next(shard["parts"] for shard in read_layout(room)["shards"] if shard["name"] == task)
    picked_url = room.path("picked.npy")
    picked = storage.read_array(picked_url) if storage.exists(picked_url) else None
    names = source_tasks(room)
    tables = []
    for number, start, stop in parts:
        rows = np.arange(start, stop)
        if picked is not None:
            rows = picked[picked[:, 0] == number, 1][start:stop]
        tables.append(storage.read_rows(_rows_url(room, names[number]), rows))
    return _unite(tables)


def hash_shard(room: Room, rows: pa.Table) -> str:
    """Return what tells a shard: its rows, and what is wanted of their images."""
    stage = _stage(room)
    wanted = {k: v for k, v in stage.hashed_fields().items() if k not in _OF_LISTS}
    record = [stage.version, wanted, read_layout(room)["shard_samples"], rows.to_pylist()]
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()


def _unite(tables: list[pa.Table]) -> pa.Table:
    """Put rows of several lists under each other; what a list has not is null in its rows."""
    names = dict.fromkeys(name for table in tables for name in table.column_names if name != "url")
    schema = []
    for name in [*names, "url"]:
        kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
        schema.append(pa.field(name, kinds.pop() if len(kinds) == 1 else pa.string()))
    united = [
        pa.table(
            [
                url_lists.to_array(table[field.name].to_pylist(), field.type)
                if field.name in table.column_names
                else pa.nulls(len(table), field.type)
                for field in schema
            ],
            schema=pa.schema(schema),
        )
        for table in tables
    ]
    return pa.concat_tables(united).combine_chunks()
