"""The table that img2dataset writes beside each tar: one row per sample it tried to get."""

import logging
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate import storage
from curate.formats import index
from curate.formats.index import Row
from curate.formats.sources import Source, open_binary, parent

__all__ = ["join_table"]

_log = logging.getLogger(__name__)


def join_table(
    source: Source,
    rows: list[Row],
    uid_column: str | None,
    counts: dict[str, float],
    caption_column: str | None = None,
) -> list[Row]:
    """Complete the rows of a tar from the table beside it, joined by key.

    Parameters
    ----------
    source : Source
        A tar with its companions.
    rows : list of Row
        Of the tar; uid, caption and metadata that they lack are filled in.
    uid_column : str or None
    counts : dict of str to float
        Gets `incomplete_shards` and `unreadable_tables`.
    caption_column : str, optional
        Column that holds captions.

    Returns
    -------
    list of Row
        Samples that only the table has, in order of key: failed ones, and those that a truncated
        tar has lost.
    """
    records = _read_companion(source, counts)
    captions = (caption_column,) if caption_column else index.CAPTION_NAMES
    if not records:
        return []
    if not any(name.endswith("_stats.json") for name in source.companions):
        counts["incomplete_shards"] = 1
    for row in rows:
        record = records.pop(row.key, None) if row.ordinal == 0 else None
        if record is None:
            continue
        row.own_uid = row.own_uid or index.find_uid(record, uid_column)
        row.metadata = row.metadata or _record_metadata(record)
        if row.caption is None:
            row.caption, reason = index.find_caption(record, captions)
            if row.ingest_reason == "caption_missing":
                row.ingest_reason = reason
    return [_lost_row(key, records[key], uid_column, captions) for key in sorted(records)]


def _read_companion(source: Source, counts: dict[str, float]) -> dict[str, dict[str, Any]]:
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
    return {index.clean_text(str(record["key"])): record for record in reversed(records)}


def _record_metadata(record: dict[str, Any]) -> str | None:
    return index.encode_metadata(record, ("key", "uid", *index.JSON_CAPTIONS))


def _lost_row(
    key: str, record: dict[str, Any], uid_column: str | None, captions: tuple[str, ...]
) -> Row:
    """Return the row of a sample that the table has and the tar has not."""
    caption, _ = index.find_caption(record, captions)
    status = record["status"]
    return Row(
        key,
        caption=caption,
        metadata=_record_metadata(record),
        ingest_reason=status if status in index.FAILED else "image_missing",
        own_uid=index.find_uid(record, uid_column),
    )
