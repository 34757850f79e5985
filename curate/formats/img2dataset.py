"""What img2dataset writes beside images: a table of all it tried to get, statistics at the end."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate import storage
from curate.formats import index
from curate.formats.index import Row
from curate.formats.sources import Source, open_binary, parent, split_suffix

__all__ = [
    "NO_IMAGE",
    "STATS",
    "check_stats",
    "failure",
    "find_incomplete",
    "join_table",
    "shard_of",
]

_log = logging.getLogger(__name__)

#: How the name of a shard's statistics ends.
STATS = "_stats.json"
#: What the column `status` says of samples without an image: reason codes of ours too.
_FAILED = ("failed_to_download", "failed_to_resize")
#: How `error_message` begins where there is a reason code of its own.
_REASONS = (
    ("refused: ", "url_refused"),
    ("hash mismatch", "hash_mismatch"),
    ("Use of image disallowed by X-Robots-Tag", "robots_disallowed"),
)
#: Reason codes of rows whose image was never had.
NO_IMAGE = frozenset((*_FAILED, *(code for _, code in _REASONS)))
_SHARD = re.compile(r"(?:.*/)?\d+")
_MAX_STATS_BYTES = 64 << 20


def failure(record: dict[str, Any]) -> str | None:
    """Return the reason code of a row of the table; None if its image was had."""
    status, message = record.get("status"), record.get("error_message")
    if status not in _FAILED:
        return None
    text = message if isinstance(message, str) else ""
    return next((code for start, code in _REASONS if text.startswith(start)), str(status))


def shard_of(name: str) -> str | None:
    """Return the shard that a file is part of: its path without suffixes; None if of none.

    Examples
    --------
    >>> [shard_of(f"a/00003{end}") for end in (".tar", ".parquet", "_stats.json", "/000031.jpg")]
    ['a/00003', 'a/00003', 'a/00003', 'a/00003']
    """
    stem, suffix = split_suffix(name)
    if _is_stats(name):
        return name.removesuffix(STATS)
    if suffix in ("tar", "parquet") and _SHARD.fullmatch(stem):
        return stem
    folder = parent(name)
    return folder if folder and _SHARD.fullmatch(folder) else None


def find_incomplete(names: Iterable[str]) -> list[str]:
    """Return the shards without statistics in folders where other shards have them, sorted.

    Shards that img2dataset has yet to begin are named by their part of the list, in `_tmp`.
    """
    given = list(names)
    complete = {name.removesuffix(STATS) for name in given if _is_stats(name)}
    folders = {parent(stem) for stem in complete}
    begun = {stem for stem, kind in map(split_suffix, given) if kind in ("tar", "parquet")}
    begun = {stem for stem in begun if _SHARD.fullmatch(stem) and parent(stem) in folders}
    known = {(parent(stem), int(stem.rpartition("/")[2])) for stem in begun | complete}
    waiting = {name for name in given if _is_listed(name, folders, known)}
    return sorted((begun - complete) | waiting)


def _is_listed(name: str, folders: set[str], known: set[tuple[str, int]]) -> bool:
    """Tell whether a file is the list of a shard that is yet to be begun."""
    place, _, number = split_suffix(name)[0].rpartition("/")
    if not name.endswith(".feather") or not number.isdecimal() or place.split("/")[-1] != "_tmp":
        return False
    return parent(place) in folders and (parent(place), int(number)) not in known


def _is_stats(name: str) -> bool:
    return name.endswith(STATS) and _SHARD.fullmatch(name.removesuffix(STATS)) is not None


def check_stats(source: Source, images: int, rows: int | None, counts: dict[str, float]) -> None:
    """Compare a shard's statistics with what it holds, and say where they differ.

    Parameters
    ----------
    source : Source
        With its companions.
    images : int
        Images that it holds.
    rows : int or None
        Samples that its table holds; None if there is none.
    counts : dict of str to float
        Gets `stats_disagree`.
    """
    name = next((name for name in source.companions if name.endswith(STATS)), None)
    if name is None:
        return
    with open_binary(storage.join(parent(source.url.rstrip("/")), name)) as file:
        stats = index.parse_json(file.read(_MAX_STATS_BYTES)) or {}
    told = {"successes": images} if rows is None else {"successes": images, "count": rows}
    wrong = [
        f"{field} {json.dumps(stats.get(field))}, found {number}"
        for field, number in told.items()
        if stats.get(field) != number
    ]
    if wrong:
        counts["stats_disagree"] = 1
        _log.warning("%s: %s disagrees with it: %s", source.name, name, "; ".join(wrong))


def join_table(
    source: Source,
    rows: list[Row],
    uid_column: str | None,
    counts: dict[str, float],
    caption_column: str | None = None,
) -> list[Row]:
    """Complete the rows of a shard from the table beside it, joined by key.

    Parameters
    ----------
    source : Source
        A tar or a directory of images with its companions.
    rows : list of Row
        Of its samples; uid, caption and metadata that they lack are filled in.
    uid_column : str or None
    counts : dict of str to float
        Gets `incomplete_shards`, `unreadable_tables` and `stats_disagree`.
    caption_column : str, optional
        Column that holds captions.

    Returns
    -------
    list of Row
        Samples that only the table has, in order of key: failed ones, those that a truncated tar
        has lost, and those whose key an earlier one has (`duplicate_key`).
    """
    images = sum(row.size_bytes is not None for row in rows)
    records = _read_companion(source, counts)
    check_stats(source, images, sum(map(len, records.values())) or None, counts)

    captions = (caption_column,) if caption_column else index.CAPTION_NAMES
    if not records:
        return []
    if not any(name.endswith(STATS) for name in source.companions):
        counts["incomplete_shards"] = 1
    ordinals: Counter[str] = Counter()
    for row in rows:
        ordinals[row.key] += 1
        if not records.get(row.key):
            continue
        record = records[row.key].pop(0)
        row.own_uid = row.own_uid or index.find_uid(record, uid_column)
        row.metadata = row.metadata or _record_metadata(record)
        if row.caption is None:
            row.caption, reason = index.find_caption(record, captions)
            if row.ingest_reason == "caption_missing":
                row.ingest_reason = reason
    lost = []
    for key in sorted(records):
        for record in records[key]:
            row = _lost_row(key, record, uid_column, captions)
            row.ordinal = ordinals[key]
            ordinals[key] += 1
            if row.ordinal:
                row.ingest_reason = index.first_reason(row.ingest_reason, "duplicate_key")
            lost.append(row)
    return lost


def _read_companion(source: Source, counts: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of the table beside the tar by key; the rows come in any order."""
    name = next((name for name in source.companions if name.endswith(".parquet")), None)
    if name is None:
        return {}
    try:
        with open_binary(storage.join(parent(source.url), name)) as file:
            parquet = pq.ParquetFile(file)
            columns = [f.name for f in parquet.schema_arrow if not pa.types.is_binary(f.type)]
            if not {"key", "status"} <= set(columns):
                return {}
            records = parquet.read(columns).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        counts["unreadable_tables"] = 1
        _log.warning("%s: the table beside it cannot be read: %s", source.name, error)
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(index.clean_text(str(record["key"])), []).append(record)
    return found


def _record_metadata(record: dict[str, Any]) -> str | None:
    return index.encode_metadata(record, ("key", "uid", *index.JSON_CAPTIONS))


def _lost_row(
    key: str, record: dict[str, Any], uid_column: str | None, captions: tuple[str, ...]
) -> Row:
    """Return the row of a sample that the table has and the tar has not."""
    caption, _ = index.find_caption(record, captions)
    return Row(
        key,
        caption=caption,
        metadata=_record_metadata(record),
        ingest_reason=failure(record) or "image_missing",
        own_uid=index.find_uid(record, uid_column),
    )
