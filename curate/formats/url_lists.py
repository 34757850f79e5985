"""Lists of URLs: tables that say where images are, to be downloaded before they are samples."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curate.errors import InputError
from curate.formats import index
from curate.formats.folder import read_records
from curate.formats.img2dataset import STATS
from curate.formats.parquet import PATH_NAMES, holds_images, read_schema
from curate.formats.sources import (
    TABLES,
    File,
    Source,
    check_name,
    list_files,
    readable,
    split_suffix,
)

__all__ = ["URL_NAMES", "Columns", "find_columns", "find_lists", "read_rows", "to_array"]

URL_NAMES = ("url", "URL", "image_url", "IMAGE_URL", "img_url", "Url")
_CAPTION_NAMES = (*index.CAPTION_NAMES, "CAPTION", "Caption", "alt", "alt_text")
#: What img2dataset writes beside the columns of a list; a list's own of these names are renamed.
_TAKEN = frozenset(
    (
        *("key", "status", "error_message", "width", "height", "original_width", "exif"),
        *("original_height", "uid", "url", "caption", "jpg", "json", "txt"),
        *("md5", "sha256", "sha512"),
    )
)
_RENAMED = "list_"
_NO_LISTS = ("tar", "npz", "npy", *index.IMAGE_SUFFIXES)
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Columns:
    """Which column of a list is what.

    Parameters
    ----------
    url : str
    caption : str or None
    hash : str or None
        Expected hash of the bytes.
    others : dict of str to pyarrow.DataType
        Everything else, by the name it is passed on under.
    sources : dict of str to str
        Its name in the list, by the same.
    """

    url: str
    caption: str | None
    hash: str | None
    others: dict[str, pa.DataType]
    sources: dict[str, str]


def find_lists(
    inputs: tuple[str, ...], root: str, url_column: str | None = None
) -> list[Source] | None:
    """Return the lists that the inputs are, in order of name; None if they are none.

    Tables without image bytes, without files of images, tars or vectors beside them, and with a
    column of URLs but none that names image files.

    Parameters
    ----------
    inputs : tuple of str
    root : str
        Folder to which names are relative.
    url_column : str, optional
        Column of URLs, which then alone decides.

    Raises
    ------
    InputError
        If an input is missing or no whole table.
    """
    if all(split_suffix(text)[1] in _NO_LISTS for text in inputs):
        return None  # without listing what may be many
    files = list_files(inputs, root)
    tables = [file for file in files if split_suffix(file.name)[1] in TABLES]
    suffixes = {split_suffix(file.name)[1] for file in files}
    if not tables or suffixes & set(_NO_LISTS):
        return None
    is_downloaded = any(file.name.endswith(STATS) for file in files)
    if is_downloaded or not _is_list(tables[0], url_column):
        return None
    return [
        Source(check_name(file.name), file.url, "url_list", file.size_bytes, (), (file,))
        for file in tables
    ]


def _is_list(table: File, url_column: str | None) -> bool:
    if split_suffix(table.name)[1] == "parquet":
        schema = read_schema(table.url, table.name)
        if holds_images(schema):
            return False
        names = list(_plain_types(schema))
    else:
        names = list(_types(table.url, table.name))
    if url_column is not None:
        return url_column in names
    return index.find_name(names, PATH_NAMES) is None and bool(index.find_name(names, URL_NAMES))


def _types(url: str, name: str) -> dict[str, pa.DataType]:
    """Return a list's columns; all of a CSV are text, and a JSONL's are told by its first rows."""
    suffix = split_suffix(name)[1]
    if suffix == "parquet":
        return _plain_types(read_schema(url, name))
    if suffix != "jsonl":
        return {name: pa.string() for name in next(read_records(url), {}) if name}
    found: dict[str, set[pa.DataType]] = {}
    for fields in itertools.islice(read_records(url), _BATCH_ROWS):
        for column, value in fields.items():
            kinds = found.setdefault(column, set())
            if value is not None:
                kinds.add(_JSON.get(type(value), pa.string()))
    return {column: _common(kinds) for column, kinds in found.items()}


def _plain_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    return {field.name: _plain_type(field.type) for field in schema if _is_kept(field.type)}


_JSON = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    if kinds == {pa.int64(), pa.float64()}:
        return pa.float64()
    return kinds.pop() if len(kinds) == 1 else pa.string()


def _is_kept(kind: pa.DataType) -> bool:
    """Tell whether values of a type can be passed on: not bytes."""
    types = pa.types
    return not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that values are passed on in: one that JSON has."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _plain_type(kind.value_type)
        return pa.string() if types.is_string(inner) else pa.list_(inner)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return kind if is_number else pa.string()


def find_columns(
    source: Source,
    url: str | None = None,
    caption: str | None = None,
    hash_column: str | None = None,
) -> Columns:
    """Tell which of a list's columns is what.

    Parameters
    ----------
    source : Source
    url, caption : str, optional
        Columns; default: the first of the usual names.
    hash_column : str, optional

    Raises
    ------
    InputError
        If a named column is missing, or there is none of URLs; the message says which were found.
    """
    types = _types(source.url, source.name)
    shown = ", ".join(list(types)[:12]) or "none"
    for field, name in (("url_column", url), ("caption_column", caption), ("", hash_column)):
        if name is not None and name not in types:
            what = f"download.{field}" if field else "the hash to verify"
            raise InputError(
                f"{source.name}: must have the column {name} ({what}); found {shown}. Correct it."
            )
    url = url or index.find_name(types, URL_NAMES)
    if url is None:
        raise InputError(
            f"{source.name}: must have a column of URLs ({', '.join(URL_NAMES[:4])}); found "
            f"{shown}. Name it with --set download.url_column=NAME."
        )
    caption = caption or index.find_name(types, _CAPTION_NAMES)
    sources: dict[str, str] = {}
    for own in types:
        name = own
        while name in _TAKEN or name in sources or (name != own and name in types):
            name = _RENAMED + name
        if own not in (url, caption, hash_column):
            sources[name] = own
    others = {name: types[own] for name, own in sources.items()}
    return Columns(url, caption, hash_column, others, sources)


def read_rows(source: Source) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a list as they come, some thousand at a time.

    Raises
    ------
    InputError
        If the table is not whole.
    """
    records = read_records(source.url)
    with readable(source.name, "a whole table"):
        while batch := list(itertools.islice(records, _BATCH_ROWS)):
            yield batch


def to_array(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """Pack a column's values; what is not of its type becomes null, or text where that is text."""
    return pa.array([_fit(value, kind) for value in values], kind)


def _fit(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_string(kind):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return index.clean_text(text)
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if pa.types.is_list(kind):
        return value if isinstance(value, list) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if pa.types.is_floating(kind):
        return float(value)
    return value if isinstance(value, int) and abs(value) < 1 << 63 else None
