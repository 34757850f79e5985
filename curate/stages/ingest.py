"""Ingest: an index of where every sample lies. No pixel is decoded and nothing is copied."""

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from curate import formats, storage
from curate.errors import InputError
from curate.formats.img2dataset import STATS
from curate.formats.index import UID, first_reason
from curate.formats.sources import Source, find_root, identify, open_binary
from curate.schema import select_schema
from curate.stages.base import Room, Stage, Step, Table, execution_only, one_task, shard_tasks
from curate.stages.ingest_spool import Spool, open_spool

__all__ = [
    "DOWNLOADED",
    "Ingest",
    "Layout",
    "VectorChoice",
    "assign_uids",
    "commit_sources",
    "count_rows",
    "cut_shards",
    "draw_places",
    "draw_ranks",
    "hash_uid",
    "read_source",
    "shard_size",
    "source_tasks",
    "to_uid",
]

_log = logging.getLogger(__name__)

_COLUMNS = (
    "uid",
    "key",
    "source_file",
    "member",
    "offset",
    "size_bytes",
    "row_group",
    "row",
    "caption",
    "metadata",
    "ingest_reason",
)
Layout = Literal[
    "auto", "webdataset", "parquet", "arrow", "folder", "clip_retrieval", "datacomp", "npy"
]  # fmt: skip
VectorChoice = Literal["l14", "b32", "dedup"] | None

#: Folder of the shards of `download`, within the stage's own.
DOWNLOADED = "images"
#: How often `incomplete: wait` looks.
_POLL_SECONDS = 5.0
#: A scan file has the index columns and the uid that a row falls back to if its own is taken.
_SCAN_SCHEMA = select_schema(_COLUMNS).append(pa.field("hash_uid", pa.string()))
_SCAN_GROUP_ROWS = 8192
#: Where a scan file's footer says how wide the vectors of its source are.
_WIDTHS = b"curate.widths"
_MAX_ROWS_IN_MEMORY = 10_000_000


class Ingest(Stage):
    """Index the input: one row per sample, with what was wrong before any pixel was read."""

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 3

    inputs: tuple[str, ...] = execution_only(
        (), "Files, folders, patterns and fsspec URLs to read; set by the command line."
    )
    root: str | None = execution_only(
        None, "Folder to which names of sources are relative; default: the one all inputs are in."
    )
    format: Layout = Field(
        default="auto", description="Layout of the input; auto: told from the names of the files."
    )
    vectors: VectorChoice = Field(
        default=None,
        description="Which of DataComp's arrays are taken: l14, b32, or the descriptor `dedup`, of "
        "images alone; default: the first of these that is there.",
    )
    incomplete: Literal["refuse", "skip", "wait"] = execution_only(
        "refuse",
        "What to do with shards that img2dataset has not finished: they have no _stats.json where "
        "others have one.",
    )
    wait_seconds: float = execution_only(
        86_400, "How long `incomplete: wait` waits for all of them.", gt=0
    )
    dataset: str = Field(
        default="", description="Name that keeps uids of different data sets apart."
    )
    uid_column: str | None = Field(
        default=None,
        description="Column or JSON field that identifies a sample; default: `uid`, where it is "
        "32 hex digits. Other values are hashed.",
        min_length=1,
    )
    caption_column: str | None = Field(
        default=None,
        description="Column or JSON field that holds captions, of a list the first; default: "
        "`caption`, `text` and the like, in tars and folders the .txt before them.",
        min_length=1,
    )
    limit: int | None = Field(
        default=None, description="Take this many samples at random; default: all.", ge=1
    )
    seed: int = Field(default=0, description="Seed of the draw of `limit`.")
    spool: str | None = execution_only(
        None,
        "Folder on a disk of the worker's machine where remote tars stay until embed has read "
        "them; default: in OUT where that is on a disk, else among temporary files.",
        min_length=1,
    )
    spool_gb: float = execution_only(
        32.0,
        "GB that they may take on a disk, never more than a quarter of what is free; the others "
        "are read twice. 0: all are.",
        ge=0,
    )
    shard_samples: int | None = Field(
        default=None,
        description="Samples per shard; default: a 16th of all, within 256 to 10 000.",
        ge=1,
    )

    def tables(self) -> tuple[Table, ...]:
        """Return the index."""
        return (Table("ingest", _COLUMNS),)

    def steps(self) -> tuple[Step, ...]:
        """List the sources, scan each, decide the shards, write them."""
        return (
            Step("list", _list, one_task),
            Step("scan", _scan, source_tasks),
            Step("layout", _decide_layout, one_task),
            Step("shards", _write_shard, shard_tasks),
        )

    def folder(self) -> str:
        """Return the folder to which names of sources are relative.

        Raises
        ------
        InputError
            If the inputs are in no common place.
        """
        return self.root.rstrip("/") if self.root else find_root(self.inputs)

    def list_sources(self) -> list[Source]:
        """Return the input's sources in order of name.

        Raises
        ------
        InputError
            If an input is missing, empty or of another layout.
        """
        if self.incomplete == "refuse":
            self._refuse(formats.find_incomplete(self.inputs, self.folder()))
        layout, sources = formats.list_sources(
            self.inputs, self.folder(), self.format, skip_incomplete=True
        )
        if self.format == "auto":
            _log.info("ingest.format: %s (detected), %d sources", layout, len(sources))
        return sources

    def sources(self) -> list[dict[str, Any]]:
        """Return name, size and digest of each source, in order of name.

        Raises
        ------
        InputError
            If an input is missing, empty or of another layout.
        """
        return [identify(source) | _supply(source) for source in self.list_sources()]

    def placed(self, folders: dict[str, str]) -> Stage:
        """Read what `download` made of the input, where the pipeline has it."""
        if "download" not in folders:
            return self
        images = storage.join(folders["download"], DOWNLOADED)
        # The rows' own uids are among what was downloaded, whatever column they were in.
        told = {"inputs": (images,), "root": images, "format": "webdataset", "uid_column": None}
        return self.model_copy(update=told)

    def prepare(self) -> None:
        """Wait for incomplete shards, or tell which are skipped."""
        if self.incomplete == "refuse" or not self.inputs:
            return
        begun, waited = time.monotonic(), False
        while unfinished := formats.find_incomplete(self.inputs, self.folder()):
            if self.incomplete == "skip":
                _log.warning("ingest: skipped, as incomplete: %s", ", ".join(unfinished))
                return
            if time.monotonic() - begun > self.wait_seconds:
                self._refuse(unfinished)
            if not waited:
                _log.warning("ingest: waits for %s", ", ".join(unfinished))
            waited = True
            time.sleep(_POLL_SECONDS)
            for text in self.inputs:
                storage.filesystem(text)[0].invalidate_cache()

    def _refuse(self, unfinished: list[str]) -> None:
        if unfinished:
            more = f" and {len(unfinished) - 1} more" if len(unfinished) > 1 else ""
            raise InputError(
                f"{self.inputs[0]}: shard {unfinished[0]}{more} must have its {STATS} as "
                "others have; it has none, so its download is not finished. Finish it, or choose "
                "--set ingest.incomplete=skip or =wait."
            )

    def facts(self, room: Room) -> dict[str, Any]:
        """Return the shards that were skipped, if there are any."""
        skipped = storage.read_json(room.path("skipped.json"))
        return {"skipped_shards": skipped} if skipped else {}

    def supplies_vectors(self) -> bool:
        kinds = {source.kind for source in self.list_sources()}
        return any(formats.FORMATS[kind].open_vectors is not None for kind in kinds)

    @field_validator("spool")
    @classmethod
    def _check_spool(cls, value: str | None) -> str | None:
        if value is not None and not storage.is_local(value):
            raise ValueError(f"a folder on a disk; got {value}")
        return value

    def copies(self, folder: str) -> Spool:
        """Return the copies of remote tars that belong to the index in `folder`."""
        return open_spool(folder, self.spool, self.spool_gb)

    def open(self, table: pa.Table, folder: str) -> Iterator[bytes | None]:
        """Yield the image bytes of index rows, in order; None where a row has none.

        Parameters
        ----------
        table : pyarrow.Table
            Columns source_file, member, offset, size_bytes, row_group, row.
        folder : str
            Of the index.

        Raises
        ------
        SourceChangedError
            If a source is gone or no longer holds what was indexed.
        """
        return formats.read_images(self.folder(), table, self.copies(folder).find)

    def open_vectors(self, table: pa.Table, layout: dict[str, Any]) -> formats.Vectors:
        """Return the vectors of index rows, in order.

        Parameters
        ----------
        table : pyarrow.Table
            Columns source_file, row.
        layout : dict
            What `layout.json` holds.

        Raises
        ------
        SourceChangedError
            If a source is gone or no longer holds what was indexed.
        """
        kind, widths = layout["format"], layout["vectors"]
        return formats.read_vectors(self.folder(), table, kind, self.vectors, widths)


def _supply(source: Source) -> dict[str, Any]:
    """What a source's identity says besides of one whose vectors are taken as they are."""
    return {} if formats.FORMATS[source.kind].open_vectors is None else {"supplies": "vectors"}


def _ingest(room: Room) -> Ingest:
    assert isinstance(room.stage, Ingest)
    return room.stage


def _list(room: Room, task: str) -> dict[str, float]:
    """Put down the sources, so that not every task has to list the whole input again."""
    ingest = _ingest(room)
    sources = ingest.list_sources()
    unfinished = formats.find_incomplete(ingest.inputs, ingest.folder())
    storage.commit_json(room.path("skipped.json"), unfinished)
    count = commit_sources(room, sources)
    return {"sources": count, "size_bytes": sum(s.size_bytes for s in sources)}


def commit_sources(room: Room, sources: list[Source]) -> int:
    """Put down what a stage reads from outside, for its tasks; return how many."""
    storage.commit_json(room.path("sources.json"), [source.to_json() for source in sources])
    return len(sources)


def source_tasks(room: Room) -> list[str]:
    """One task per source put down."""
    count = len(storage.read_json(room.path("sources.json")))
    width = max(5, len(str(count - 1)))
    return [str(i).zfill(width) for i in range(count)]


def read_source(room: Room, task: str, root: str) -> Source:
    """Return the source of a task; `root` is what names are relative to."""
    return Source.from_json(storage.read_json(room.path("sources.json"))[int(task)], root)


def _scan_url(room: Room, task: str) -> str:
    return room.path("scan", f"{task}.parquet")


def _scan(room: Room, task: str) -> dict[str, float]:
    """Index one source."""
    ingest = _ingest(room)
    source = _keep(room, read_source(room, task, ingest.folder()))
    found = formats.FORMATS[source.kind].scan(source, ingest.uid_column, ingest.caption_column)
    widths = formats.measure_vectors(source, ingest.vectors, found.table.num_rows)
    table = assign_uids(found.table, ingest.dataset)
    table = table.replace_schema_metadata({_WIDTHS: json.dumps(widths)})
    with storage.commit(_scan_url(room, task)) as path:
        pq.write_table(table, path, compression="ZSTD", row_group_size=_SCAN_GROUP_ROWS)
    kept = {"spooled_bytes": os.path.getsize(source.copy)} if source.copy else {}
    return {"samples": table.num_rows, **found.counts, **kept}


def _keep(room: Room, source: Source) -> Source:
    """Copy a remote tar to a disk, so that what is read for its index need not be read again."""
    wanted = any(stage.name == "embed" for stage in room.pipeline)
    if not wanted or source.kind != "webdataset" or storage.is_local(source.url):
        return source
    return replace(source, copy=_ingest(room).copies(room.path()).fetch(source))


def hash_uid(*parts: str | int) -> str:
    """Return the uid, 32 hex digits, that follows from what identifies a sample."""
    # JSON keeps the parts apart whatever they hold: ("a", "bc") and ("ab", "c") differ.
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def to_uid(own: str, dataset: str) -> str:
    """Return the uid of a sample to which its source gives an identity: this, if it is one."""
    return own if UID.fullmatch(own) else hash_uid(dataset, own)


def assign_uids(table: pa.Table, dataset: str) -> pa.Table:
    """Turn a scan's table into one with the uids of its samples.

    Parameters
    ----------
    table : pyarrow.Table
        Of `formats.index.SCAN_SCHEMA`.
    dataset : str
        Name that keeps uids of different data sets apart.

    Returns
    -------
    pyarrow.Table
        The columns of the index, and `hash_uid`, which a row falls back to if its uid is taken.
    """
    names = ("source_file", "key", "ordinal", "own_uid")
    uids: list[str] = []
    fallbacks: list[str | None] = []
    for source, key, ordinal, own in zip(*(table[n].to_pylist() for n in names), strict=True):
        hashed = hash_uid(dataset, source, key, ordinal)
        if own is None:
            uids.append(hashed)
        else:
            uids.append(to_uid(own, dataset))
        fallbacks.append(None if own is None else hashed)
    columns = {name: table[name] for name in _COLUMNS if name != "uid"}
    return (
        pa.table(columns | {"uid": uids, "hash_uid": fallbacks})
        .select(_SCAN_SCHEMA.names)
        .cast(_SCAN_SCHEMA)
    )


def _decide_layout(room: Room, task: str) -> dict[str, float]:
    """Decide which rows of which scan make up which shard."""
    ingest = _ingest(room)
    records = storage.read_json(room.path("sources.json"))
    urls = [_scan_url(room, task) for task in source_tasks(room)]
    counts = [count_rows(url) for url in urls]
    if not sum(counts):
        shown = ", ".join(ingest.inputs[:3])
        raise InputError(
            f"{shown}: must hold image–text samples; found none in {len(urls)} sources. "
            "Check that the files are whole."
        )
    vectors = _agree_on_widths([record["name"] for record in records], urls)
    _check_fields(ingest, records[0]["kind"], urls)
    repeats = _find_repeats(urls, sum(counts))
    storage.commit_array(room.path("repeats.npy"), repeats)
    if ingest.limit is not None and ingest.limit < sum(counts):
        picked = _pick(urls, repeats, ingest.limit, ingest.seed)
        storage.commit_array(room.path("picked.npy"), picked)
        counts = np.bincount(picked[:, 0], minlength=len(urls)).tolist()
    total = sum(counts)
    size = ingest.shard_samples or shard_size(total)
    shards = [
        {"name": str(i).zfill(5), "samples": sum(b - a for _, a, b in parts), "parts": parts}
        for i, parts in enumerate(cut_shards(counts, size))
    ]
    layout = {"samples": total, "format": records[0]["kind"], "vectors": vectors, "shards": shards}
    storage.commit_json(room.path("layout.json"), layout)
    return {"samples": total, "shards": len(shards), "repeated_uids": len(repeats)}


def _agree_on_widths(names: list[str], urls: list[str]) -> dict[str, int | None] | None:
    """Return how wide all sources' vectors are; None where they hold images.

    Raises
    ------
    InputError
        If widths differ: such vectors are of two spaces.
    """
    known: dict[str, tuple[int, str]] = {}
    for name, url in zip(names, urls, strict=True):
        with open_binary(url) as file:
            widths = json.loads(pq.read_schema(file).metadata[_WIDTHS])
        for modality, width in widths.items():
            if width is None:
                continue
            first, where = known.setdefault(modality, (width, name))
            if width != first:
                raise InputError(
                    f"{name}: {modality} vectors must be {first} numbers wide, as in {where}; got "
                    f"{width}. Two models' vectors cannot be compared: run them apart."
                )
    found = {modality: width for modality, (width, _) in known.items()}
    return {"image": found["image"], "text": found.get("text")} if found else None


def shard_size(total: int) -> int:
    """Return the rows of a shard: a 16th of all, within 256 to 10 000."""
    return min(max(math.ceil(total / 16), 256), 10_000)


def cut_shards(counts: list[int], size: int) -> list[list[list[int]]]:
    """Cut scans laid end to end into shards of `size` rows: [scan, start, stop] by shard."""
    shards: list[list[list[int]]] = []
    room = 0
    for scan, count in enumerate(counts):
        start = 0
        while start < count:
            if room == 0:
                shards.append([])
                room = size
            stop = min(count, start + room)
            shards[-1].append([scan, start, stop])
            room -= stop - start
            start = stop
    return shards


def count_rows(url: str) -> int:
    """Return the rows of a Parquet file."""
    with open_binary(url) as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


def _check_fields(ingest: Ingest, kind: str, urls: list[str]) -> None:
    """Raise if no sample has a field that the user named.

    Raises
    ------
    InputError
    """
    named = {"uid_column": "hash_uid"}
    if kind in ("webdataset", "folder"):  # others have a schema that says it at once
        named["caption_column"] = "caption"
    for field, column in named.items():
        name = getattr(ingest, field)
        if name is not None and not any(_has_values(url, column) for url in urls):
            found = ", ".join(_list_fields(urls[0])) or "none"
            raise InputError(
                f"ingest.{field}: must name a field that samples have; got {name}, which none "
                f"has; found {found}. Leave it out or correct it."
            )


def _has_values(url: str, column: str) -> bool:
    values = storage.read_table(url, [column])[column]
    return bool(values.null_count < len(values))


def _list_fields(url: str) -> list[str]:
    """Return some names of fields that a scan's samples have."""
    texts = storage.read_table(url, ["metadata"])["metadata"].slice(0, 100).to_pylist()
    return list(dict.fromkeys(name for text in texts if text for name in json.loads(text)))[:12]


def _find_repeats(urls: list[str], total: int) -> npt.NDArray[np.int64]:
    """Return (scan, row) of each row whose uid an earlier row has: (R, 2) int64, sorted.

    Above 10 million rows the uids are taken in classes by their last digits, one at a time.
    """
    passes = math.ceil(total / _MAX_ROWS_IN_MEMORY)
    found = []
    for number in range(passes):
        parts, places = [], []
        for scan, url in enumerate(urls):
            uids = _read_uids(url)
            rows = np.flatnonzero(uids[:, 1] % np.uint64(passes) == number)
            parts.append(uids[rows])
            places.append(np.stack([np.full(len(rows), scan), rows], axis=1))
        uids, place = np.concatenate(parts), np.concatenate(places)
        order = np.lexsort((uids[:, 1], uids[:, 0]))  # stable: the earliest row comes first
        ordered = uids[order]
        found.append(place[order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]])
    repeats = np.concatenate(found).astype(np.int64)
    return repeats[np.lexsort((repeats[:, 1], repeats[:, 0]))]


def _read_uids(url: str) -> npt.NDArray[np.uint64]:
    """Return the uids of a scan: (N, 2) uint64."""
    uids = storage.read_table(url, ["uid"])["uid"].to_pylist()
    raw = np.frombuffer(bytes.fromhex("".join(uids)), dtype=">u8").reshape(-1, 2)
    return raw.astype(np.uint64)


def _rows_of(places: npt.NDArray[np.int64], scan: int) -> npt.NDArray[np.int64]:
    """Return the rows of one scan among sorted (scan, row) pairs."""
    first, last = np.searchsorted(places[:, 0], [scan, scan + 1])
    return np.asarray(places[first:last, 1])


def _pick(
    urls: list[str], repeats: npt.NDArray[np.int64], limit: int, seed: int
) -> npt.NDArray[np.int64]:
    """Draw samples, by the uids that they get: (limit, 2) int64, see `draw_places`."""

    def read() -> Iterator[list[str]]:
        for scan, url in enumerate(urls):
            table = storage.read_table(url, ["uid", "hash_uid"])
            uids, fallbacks = table["uid"].to_pylist(), table["hash_uid"].to_pylist()
            for row in _rows_of(repeats, scan):
                uids[row] = fallbacks[row] or hash_uid("again", uids[row])
            yield uids

    return draw_places(read(), limit, seed)


def draw_places(files: Iterable[list[str]], limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw rows by the hash of seed and uid, so that the draw knows no order.

    Parameters
    ----------
    files : iterable of list of str
        uids of each file's rows.
    limit, seed : int

    Returns
    -------
    (limit, 2) int64
        Number of the file and row, sorted.
    """
    places = np.zeros((0, 2), np.int64)
    ranks = np.zeros(0, np.uint64)
    for number, uids in enumerate(files):
        ranks = np.append(ranks, draw_ranks(uids, seed))
        here = np.stack([np.full(len(uids), number), np.arange(len(uids))], axis=1)
        places = np.concatenate([places, here])
        if len(ranks) > limit:
            best = np.argsort(ranks, kind="stable")[:limit]
            ranks, places = ranks[best], places[best]
    return places[np.lexsort((places[:, 1], places[:, 0]))]


def draw_ranks(uids: list[str], seed: int) -> npt.NDArray[np.uint64]:
    """Return the places of samples in a random order that seed and uid decide: (N,) uint64."""
    drawn = [hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=8).digest() for uid in uids]
    return np.frombuffer(b"".join(drawn), np.dtype(">u8")).astype(np.uint64)


def _write_shard(room: Room, task: str) -> dict[str, float]:
    """Put one shard of the index together."""
    layout = storage.read_json(room.path("layout.json"))
    parts = next(shard["parts"] for shard in layout["shards"] if shard["name"] == task)
    repeats = storage.read_array(room.path("repeats.npy"))
    picked_url = room.path("picked.npy")
    picked = storage.read_array(picked_url) if storage.exists(picked_url) else None
    names = source_tasks(room)
    tables = []
    for scan, start, stop in parts:
        rows = np.arange(start, stop) if picked is None else _rows_of(picked, scan)[start:stop]
        table = storage.read_rows(_scan_url(room, names[scan]), rows)
        tables.append(_replace_repeats(table, np.isin(rows, _rows_of(repeats, scan))))
    table = pa.concat_tables(tables).combine_chunks()
    room.commit_shard("ingest", task, table)
    reasons = Counter(code for code in table["ingest_reason"].to_pylist() if code)
    return {"samples": table.num_rows, **{f"reason.{code}": n for code, n in reasons.items()}}


def _replace_repeats(table: pa.Table, is_repeat: npt.NDArray[np.bool_]) -> pa.Table:
    """Give the marked rows the uid they fall back to, and drop the column that holds it.

    What the source gave stays in their metadata, so that a list of uids finds them too.
    """
    names = ("uid", "hash_uid", "ingest_reason", "metadata")
    uids, fallbacks, reasons, fields = (table[name].to_pylist() for name in names)
    for row in np.flatnonzero(is_repeat):
        known = json.loads(fields[row] or "{}")
        fields[row] = json.dumps({**known, "uid": uids[row]}, ensure_ascii=False)
        uids[row] = fallbacks[row] or hash_uid("again", uids[row])
        reasons[row] = first_reason(reasons[row], "duplicate_uid")
    for name, values in (("uid", uids), ("ingest_reason", reasons), ("metadata", fields)):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, pa.string()))
    return table.select(_COLUMNS).cast(select_schema(_COLUMNS))
