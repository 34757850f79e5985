"""The index that every layout's reader returns, and the rules they share for captions and names."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

import pyarrow as pa

from curate.schema import REASONS, select_schema

__all__ = [
    "CAPTION_NAMES",
    "IMAGE_SUFFIXES",
    "JSON_CAPTIONS",
    "KEY_NAMES",
    "MAX_CAPTION_BYTES",
    "MAX_JSON_BYTES",
    "OTHER_IMAGE_SUFFIXES",
    "SCAN_SCHEMA",
    "UID",
    "Row",
    "Scan",
    "clean_caption",
    "clean_text",
    "encode_metadata",
    "find_caption",
    "find_name",
    "find_uid",
    "first_reason",
    "first_text",
    "image_suffix",
    "number_repeats",
    "parse_json",
    "to_table",
]

#: Extensions taken as the image, best first.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
#: Images that we know by name but cannot decode: they become rows so that embed can say so.
OTHER_IMAGE_SUFFIXES = ("avif", "heic", "heif", "ico", "jp2", "jxl", "ppm", "svg")
CAPTION_NAMES = (
    "caption", "text", "txt", "TEXT", "title", "captions", "sentences", "alt_text", "description",
)  # fmt: skip
JSON_CAPTIONS = ("caption", "text", "TEXT")
KEY_NAMES = ("key", "__key__", "id")
MAX_CAPTION_BYTES = 16 << 20
MAX_JSON_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
UID = re.compile(r"[0-9a-f]{32}")

_WHERE = ("member", "offset", "size_bytes", "row_group", "row")
_COLUMNS = ("key", "source_file", *_WHERE, "caption", "metadata", "ingest_reason")

#: The index columns but `uid`, which the stage derives from `own_uid` or from the other two.
SCAN_SCHEMA = pa.schema(
    [*select_schema(_COLUMNS), pa.field("ordinal", pa.int32()), pa.field("own_uid", pa.string())]
)

_RANK = {code: rank for rank, code in enumerate(REASONS)}


@dataclass(slots=True)
class Row:
    """One sample of a source: see the columns of the same names in `curate columns`.

    Parameters
    ----------
    ordinal : int
        How many rows of the same key came before it in its source.
    own_uid : str or None
        The identity that the source itself gives, if any.
    """

    key: str
    caption: str | None = None
    metadata: str | None = None
    ingest_reason: str | None = None
    member: str | None = None
    offset: int | None = None
    size_bytes: int | None = None
    row_group: int | None = None
    row: int | None = None
    ordinal: int = 0
    own_uid: str | None = None


@dataclass(frozen=True)
class Scan:
    """What reading one source gave.

    Parameters
    ----------
    table : pyarrow.Table
        Of `SCAN_SCHEMA`, in the source's order.
    counts : dict of str to float
        What was odd about the source, such as `truncated_files`.
    """

    table: pa.Table
    counts: dict[str, float] = field(default_factory=dict)


def to_table(rows: list[Row], source_file: str) -> pa.Table:
    """Turn the rows of one source into a table of `SCAN_SCHEMA`."""
    columns = {
        name: [source_file] * len(rows)
        if name == "source_file"
        else [getattr(row, name) for row in rows]
        for name in SCAN_SCHEMA.names
    }
    return pa.table(columns, schema=SCAN_SCHEMA)


def number_repeats(rows: Iterable[Row], is_fault: bool = True) -> None:
    """Give repeated keys their ordinal and, if they are a fault, `duplicate_key`, in place."""
    seen: Counter[str] = Counter()
    for row in rows:
        row.ordinal = seen[row.key]
        seen[row.key] += 1
        if row.ordinal and is_fault:
            row.ingest_reason = first_reason(row.ingest_reason, "duplicate_key")


def first_reason(*codes: str | None) -> str | None:
    """Return the code that comes first in `schema.REASONS`; None if there is none."""
    return min((code for code in codes if code), key=_RANK.__getitem__, default=None)


def clean_text(text: str) -> str:
    """Return `text` without what cannot be written as UTF-8 (lone surrogates become U+FFFD)."""
    return _SURROGATE.sub("\ufffd", text)


def clean_caption(raw: bytes | str | None) -> tuple[str | None, str | None]:
    """Return a caption as valid UTF-8 without NUL, and what was wrong with it.

    Returns
    -------
    caption : str or None
        None if there is none or it is blank.
    reason : {"caption_missing", "caption_invalid"} or None
    """
    if raw is None:
        return None, "caption_missing"
    # Bytes that are not UTF-8 become lone surrogates, which JSON text may hold as well.
    given = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    text = clean_text(given)
    reason = None if text == given else "caption_invalid"
    if "\0" in text:
        text, reason = text.replace("\0", ""), "caption_invalid"
    if not text.strip():
        return None, "caption_missing"
    return text, reason


def find_caption(fields: dict[str, Any], names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return caption and reason, as `clean_caption` does, of the first field that holds text.

    Of a list that is the first text that is not blank.
    """
    found = (first_text(fields[name]) for name in names if isinstance(fields.get(name), str | list))
    return clean_caption(next((one for one in found if one is not None), None))


def first_text(value: Any) -> str | None:
    """Return text as it is, and of a list the first that is not blank; None of anything else."""
    if isinstance(value, list):
        return next((one for one in value if isinstance(one, str) and one.strip()), None)
    return value if isinstance(value, str) else None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None if the data is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def encode_metadata(fields: dict[str, Any], without: Iterable[str] = ()) -> str | None:
    """Write a sample's other fields as JSON; None if there are none.

    Parameters
    ----------
    fields : dict
        Values of JSON or Arrow types; bytes are left out.
    without : iterable of str
        Names that have a column of their own, which takes neither lists nor objects whole.
    """
    omitted = set(without)
    kept = {
        name: value
        for name, value in fields.items()
        if (name not in omitted or isinstance(value, list | dict)) and not isinstance(value, bytes)
    }
    if not kept:
        return None
    try:
        text = json.dumps(_plain(kept), ensure_ascii=False, separators=(",", ":"))
    except RecursionError:  # nested beyond what any tool writes
        return None
    return clean_text(text)


def _plain(value: Any) -> Any:
    """Map a value to one that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int) else str(value)


def find_name(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """Return the first candidate that is among `names`."""
    present = set(names)
    return next((name for name in candidates if name in present), None)


def find_uid(fields: dict[str, Any], uid_column: str | None) -> str | None:
    """Return the identity that a source gives a sample.

    Parameters
    ----------
    fields : dict
    uid_column : str or None
        The column that holds it, of any text or number; None: `uid`, if it is 32 hex digits.
    """
    value = fields.get(uid_column or "uid")
    if uid_column is not None and isinstance(value, int | str) and str(value).strip():
        return clean_text(str(value))
    return value if isinstance(value, str) and UID.fullmatch(value) else None


_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def image_suffix(image: bytes) -> str:
    """Return the extension that fits an image's first bytes; "bin" if they are of no known kind."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if image.startswith(magic)), "bin")
