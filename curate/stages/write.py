"""write: the only stage that drops rows. Kept samples go to shards, every decision to a table."""

import hashlib
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curate import storage
from curate.errors import SourceChangedError
from curate.formats import webdataset
from curate.schema import public_columns, select_schema
from curate.stages.base import Room, Stage, Step, Table, one_task, shard_tasks

__all__ = ["Write"]

_LOCATION = ("source_file", "member", "offset", "size_bytes", "row_group", "row")
#: Images held at once while a shard is written.
_ROWS_AT_ONCE = 256


class Write(Stage):
    """Write kept samples with their original bytes, and the decision on every sample."""

    name: ClassVar[str] = "write"
    version: ClassVar[int] = 3
    publishes: ClassVar[tuple[str, ...]] = ("decisions", "shards", "webdataset")
    reads_further: ClassVar[bool] = True

    shard_samples: int = Field(
        10_000, description="kept samples per shard at most; shards are of even size", ge=1
    )
    webdataset: bool = Field(False, description="also write tars that open_clip can train on")

    def reads(self) -> tuple[str, ...]:
        return (*_LOCATION, "key", "caption", "sha256", "keep", "weight", "captions")

    def wants(self) -> tuple[str, ...]:
        columns = (*public_columns("decisions"), *public_columns("shards"))
        return tuple(c for c in dict.fromkeys(columns) if c not in ("uid", "image", *self.reads()))

    def tables(self) -> tuple[Table, ...]:
        return (Table("write", ()),)

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("decisions", _write_decisions, shard_tasks),
            Step("layout", _decide_layout, one_task),
            Step("shards", _write_shard, _shard_names),
        )


def _stage(room: Room) -> Write:
    assert isinstance(room.stage, Write)
    return room.stage


def _fill(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """Bring a table to the public form: the named columns, null where a stage did not run."""
    schema = select_schema(names)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _write_decisions(room: Room, shard: str) -> dict[str, float]:
    """One row per ingested sample: the columns that all runs have, then those of plug-ins."""
    names, further = public_columns("decisions"), room.further()
    known = [name for name in names if name == "uid" or room.has(name)]
    table = room.read(shard, [*known, *further])
    content = _fill(table, names)
    for name in further:
        content = content.append_column(name, table[name])
    storage.commit_table(room.path("decisions", f"{shard}.parquet"), content)
    kept = int(np.count_nonzero(table["keep"].to_numpy()))
    return {"samples": len(table), "kept": kept}


def _decide_layout(room: Room, task: str) -> dict[str, float]:
    """Cut the kept samples, in order, into shards whose sizes differ by at most one."""
    shards = room.shards()
    wants_tars = _stage(room).webdataset
    kept, captions = [], 1
    for shard in shards:
        table = room.read(shard, ["keep", *(("captions",) if wants_tars else ())])
        kept.append(int(np.count_nonzero(table["keep"].to_numpy())))
        if wants_tars:
            captions = max(captions, pc.max(pc.list_value_length(table["captions"])).as_py() or 1)
    total = sum(kept)
    count = -(-total // _stage(room).shard_samples)
    bounds = [total * i // count for i in range(count + 1)] if count else []
    starts = np.concatenate([[0], np.cumsum(kept)]).astype(int)
    layout: list[dict[str, Any]] = []
    for number, (first, end) in enumerate(pairwise(bounds)):
        parts = []
        for shard, start, stop in zip(shards, starts[:-1], starts[1:], strict=True):
            low, high = max(first, start), min(end, stop)
            if low < high:
                parts.append([shard, int(low - start), int(high - start)])
        layout.append(
            {"name": f"{number:05d}", "samples": end - first, "captions": captions, "parts": parts}
        )
    storage.commit_json(room.path("layout.json"), layout)
    if layout and wants_tars:
        sizes = {f"{shard['name']}.tar": shard["samples"] for shard in layout}
        storage.commit_json(room.path("webdataset", webdataset.SIZES), sizes)
    return {"samples": total}


def _shard_names(room: Room) -> list[str]:
    return [shard["name"] for shard in storage.read_json(room.path("layout.json"))]


def _write_shard(room: Room, task: str) -> dict[str, float]:
    """Copy original bytes into one output shard, checking them against the hash of the decode.

    Where the source has vectors alone there are neither bytes nor hashes.
    """
    layout = storage.read_json(room.path("layout.json"))
    own = next(shard for shard in layout if shard["name"] == task)
    parts = own["parts"]
    names = public_columns("shards")
    written = size_bytes = 0
    fingerprint = room.path().rsplit("-", 1)[-1].rstrip("/")
    with storage.commit_batches(
        room.path("shards", f"{task}.parquet"),
        select_schema(names),
        {"curate.fingerprint": fingerprint},
    ) as append:
        for table in _kept_rows(room, parts):
            append(_fill(table, names))
            written += len(table)
            size_bytes += pc.sum(pc.binary_length(table["image"])).as_py() or 0
    if _stage(room).webdataset:
        with storage.commit(room.path("webdataset", f"{task}.tar")) as path:
            webdataset.write(path, _tar_samples(room, parts, own["captions"]))
    return {"samples": written, "size_bytes": size_bytes}


def _kept_rows(room: Room, parts: list[list[Any]]) -> Iterator[pa.Table]:
    """Yield the kept rows of an output shard with their images, a few hundred at a time."""
    names = [n for n in public_columns("shards") if n != "image" and (n == "uid" or room.has(n))]
    columns = list(dict.fromkeys([*names, *_LOCATION, "keep"]))
    for shard, first, end in parts:
        table = room.read(shard, columns)
        kept = table.filter(table["keep"]).slice(first, end - first)
        # Opened once: how a source is best read depends on all that is wanted of it.
        stream = room.open_images(kept)
        for start in range(0, len(kept), _ROWS_AT_ONCE):
            block = kept.slice(start, _ROWS_AT_ONCE)
            images = list(islice(stream, len(block)))
            _check_bytes(block, images)
            yield block.append_column("image", pa.array(images, pa.binary()))


def _check_bytes(block: pa.Table, images: list[bytes | None]) -> None:
    hashes = zip(block["sha256"].to_pylist(), images, strict=True)
    for row, (expected, data) in enumerate(hashes):
        found = None if data is None else hashlib.sha256(data).hexdigest()
        if found != expected:
            source, key = block["source_file"][row].as_py(), block["key"][row].as_py()
            raise SourceChangedError(
                f"{source}, key {key}: must hold the bytes that were embedded; they changed "
                "since. Run again with another --output."
            )


def _tar_samples(room: Room, parts: list[list[Any]], captions: int) -> Iterator[webdataset.Sample]:
    for table in _kept_rows(room, parts):
        rows = table.drop_columns([*_LOCATION, "keep"]).to_pylist()
        yield from (webdataset.to_sample(row, captions) for row in rows)
