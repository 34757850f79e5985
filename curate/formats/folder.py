"""Image files: with a text or JSON file beside each, or named by a table."""

import csv
import io
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate import storage
from curate.errors import InputError, SourceChangedError
from curate.formats import index
from curate.formats.img2dataset import STATS, join_table
from curate.formats.index import Row, Scan
from curate.formats.parquet import PATH_NAMES, find_path_column, read_fields, read_schema
from curate.formats.sources import (
    TABLES,
    File,
    Source,
    check_name,
    list_folder,
    open_binary,
    parent,
    split_suffix,
)
from curate.stores import ask

__all__ = ["group", "read_images", "read_records", "scan"]

_IMAGES = (*index.IMAGE_SUFFIXES, *index.OTHER_IMAGE_SUFFIXES)


def group(files: list[File]) -> list[Source]:
    """Return one source per table that names images, else one per directory that holds images.

    A table stands for all images in its folder and below: those that it does not name are not
    samples. Tables without a column that names images are passed over, unless one is img2dataset's
    of the directory of the same name.

    Raises
    ------
    InputError
        If there are neither images nor a table that names some.
    """
    by_name = {file.name: file for file in files}
    downloaded = {
        stem for stem in map(_stem, files) if {stem + ".parquet", stem + STATS} <= by_name.keys()
    }
    tables = [
        file
        for file in files
        if split_suffix(file.name)[1] in TABLES and _stem(file) not in downloaded
    ]
    usable = [file for file in tables if _path_column(file.url) is not None]
    covered = {parent(file.name) for file in usable}
    sources = [
        Source(check_name(f.name), f.url, "folder", f.size_bytes, (), (f, *_named_files(f.url)))
        for f in usable
    ]
    folders: dict[str, list[File]] = {stem: [] for stem in downloaded}
    for file in files:
        suffix = split_suffix(file.name)[1]
        if suffix in (*_IMAGES, "txt", "json") and not _is_covered(file.name, covered):
            folders.setdefault(parent(file.name), []).append(file)
    for name, held in folders.items():
        if name in downloaded or any(split_suffix(file.name)[1] in _IMAGES for file in held):
            size = sum(file.size_bytes for file in held)
            url = (
                parent(held[0].url) if held else by_name[f"{name}.parquet"].url[: -len(".parquet")]
            )
            shown = check_name(name or ".") + "/"
            table, stats = (by_name.get(name + end) for end in (".parquet", STATS))
            beside = tuple(f.name.rpartition("/")[2] for f in (table, stats) if f is not None)
            content = tuple(held) if table is None else (*held, table)
            sources.append(Source(shown, url, "folder", size, beside, content))
    if tables and not sources:
        shown = ", ".join(list(next(read_records(tables[0].url), {}))[:12]) or "no rows"
        raise InputError(
            f"{tables[0].url}: must have a column that names images ({', '.join(PATH_NAMES)}), or "
            f"one of URLs (url); found {shown}. Rename the column, or name that of URLs with "
            "--set download.url_column=NAME."
        )
    return sources


def _stem(file: File) -> str:
    return split_suffix(file.name)[0]


def _is_covered(name: str, folders: set[str]) -> bool:
    while name:
        name = parent(name)
        if name in folders:
            return True
    return False


def _named_files(url: str) -> list[File]:
    """Return the image files that a table names and that exist."""
    members = {member for member in map(_clean_member, _paths(url)) if member}
    found = _find_members(parent(url), members)
    return [found[name] for name in sorted(found)]


def _paths(url: str) -> Iterator[Any]:
    column = _path_column(url)
    return (fields.get(column) for fields in read_records(url)) if column else iter(())


def _find_members(folder: str, members: Iterable[str]) -> dict[str, File]:
    """Return those of the members of a folder that exist; each directory is listed once."""
    wanted: dict[str, set[str]] = {}
    for member in members:
        wanted.setdefault(parent(member), set()).add(member.rpartition("/")[2])
    found = {}
    for below, bases in wanted.items():
        for base, file in list_folder(storage.join(folder, below) if below else folder).items():
            if base in bases:
                name = f"{below}/{base}" if below else base
                found[name] = File(name, file.url, file.size_bytes, file.checksum)
    return found


def _clean_member(path: Any) -> str | None:
    """Return a path relative to the table's folder; None if it leaves it or is no path."""
    if not isinstance(path, str) or not path or "\0" in path or index.clean_text(path) != path:
        return None
    clean = posixpath.normpath(path)
    leaves = clean in (".", "..") or clean.startswith(("/", "../", "~"))
    return None if leaves or "://" in path or re.match(r"[A-Za-z]:[\\/]|\\", path) else clean


def _path_column(url: str) -> str | None:
    """Return the column of a table that names images, from its first line or schema."""
    if split_suffix(url)[1] == "parquet":
        return find_path_column(read_schema(url, url))
    return index.find_name(next(read_records(url), {}), PATH_NAMES)


def read_records(url: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; bytes that are not UTF-8 come as lone surrogates."""
    suffix = split_suffix(url)[1]
    with open_binary(url) as file:
        if suffix == "parquet":
            parquet = pq.ParquetFile(file)
            names = [f.name for f in parquet.schema_arrow if not pa.types.is_binary(f.type)]
            for batch in parquet.iter_batches(1024, columns=names):
                yield from read_fields(pa.table(batch))
            return
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        if suffix == "jsonl":
            for line in text:
                value = index.parse_json(line.encode("utf-8", "surrogateescape"))
                if line.strip():
                    yield value or {}
            return
        yield from _csv_records(text, suffix)


def _csv_records(text: io.TextIOWrapper, suffix: str) -> Iterator[dict[str, Any]]:
    # The module's limit is 128 KiB a field and can be set for the whole process alone.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * index.MAX_CAPTION_BYTES))
    head = text.readline()
    delimiter = "\t" if suffix == "tsv" or "\t" in head else ","
    names = next(csv.reader([head], delimiter=delimiter), [])
    for fields in csv.reader(text, delimiter=delimiter):
        if fields:
            yield dict(itertools.zip_longest(names, fields[: len(names)]))


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index one table, or one directory of images.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Columns or JSON fields that identify a sample, and that hold its caption.

    Returns
    -------
    Scan
        In a table a path may come many times, each time as a sample of its own.
    """
    counts: dict[str, float] = {}
    if source.name.endswith("/"):
        rows = _scan_directory(source, uid_column, caption_column)
        index.number_repeats(rows)
        rows.extend(join_table(source, rows, uid_column, counts, caption_column))
    else:
        rows = _scan_table(source, uid_column, caption_column)
    return Scan(index.to_table(rows, source.name), counts)


def _scan_directory(
    source: Source, uid_column: str | None, caption_column: str | None
) -> list[Row]:
    files = list_folder(source.url)
    # img2dataset's table names samples by keys, which its files have as stems.
    own = ("key",) if source.companions else ()
    rows = []
    used: set[str] = set()
    for name, file in files.items():
        stem, suffix = split_suffix(name)
        if suffix not in _IMAGES:
            continue
        text, fields = files.get(f"{stem}.txt"), _read_fields(files.get(f"{stem}.json"))
        used.add(f"{stem}.txt")
        if text is not None and caption_column is None:
            caption, reason = _read_caption(text)
        else:
            names = (caption_column,) if caption_column else index.JSON_CAPTIONS
            caption, reason = index.find_caption(fields, names)
        row = Row(
            index.clean_text(stem if source.companions else name),
            caption=caption,
            metadata=index.encode_metadata(fields, (*own, "uid", *index.JSON_CAPTIONS)),
            own_uid=index.find_uid(fields, uid_column),
        )
        _note_image(row, name if index.clean_text(name) == name else None, file, reason)
        rows.append(row)
    for name, file in files.items():
        if split_suffix(name)[1] == "txt" and name not in used:
            caption, _ = _read_caption(file)
            key = index.clean_text(name)
            rows.append(Row(key, caption=caption, ingest_reason="image_missing"))
    return rows


def _note_image(row: Row, member: str | None, file: File | None, reason: str | None) -> None:
    missing = None
    if member is None or file is None:
        missing = "image_missing"
    else:
        row.member, row.size_bytes = member, file.size_bytes
        missing = "image_empty" if file.size_bytes == 0 else None
    row.ingest_reason = index.first_reason(missing, reason)


def _read_caption(file: File) -> tuple[str | None, str | None]:
    if file.size_bytes > index.MAX_CAPTION_BYTES:
        return None, "caption_invalid"
    with open_binary(file.url) as opened:
        return index.clean_caption(opened.read())


def _read_fields(file: File | None) -> dict[str, Any]:
    if file is None or file.size_bytes > index.MAX_JSON_BYTES:
        return {}
    with open_binary(file.url) as opened:
        return index.parse_json(opened.read()) or {}


def _scan_table(source: Source, uid_column: str | None, caption_column: str | None) -> list[Row]:
    column = _path_column(source.url)
    folder = parent(source.url)
    named = {member for member in map(_clean_member, _paths(source.url)) if member}
    files = _find_members(folder, named)
    rows: list[Row] = []
    for number, fields in enumerate(read_records(source.url)):
        path = fields.get(column) if column else None
        name = caption_column or index.find_name(fields, index.CAPTION_NAMES)
        raw = fields.get(name) if name else None
        caption, reason = index.clean_caption(raw if isinstance(raw, str) else None)
        key = index.find_name(fields, index.KEY_NAMES)
        shown = (fields[key] if key else path) or number
        row = Row(
            index.clean_text(str(shown)),
            caption=caption,
            metadata=index.encode_metadata(fields, {"uid", column or "", name or "", key or ""}),
            own_uid=index.find_uid(fields, uid_column),
        )
        member = _clean_member(path)
        _note_image(row, member, files.get(member or ""), reason)
        rows.append(row)
    # A table may rightly give an image several captions.
    index.number_repeats(rows, is_fault=False)
    return rows


def read_images(source: Source, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each row's image in order; None where the row has none.

    Parameters
    ----------
    source : Source
    rows : pyarrow.Table
        Columns `member` and `size_bytes`.

    Raises
    ------
    SourceChangedError
        If an image is gone or of another length.
    """
    folder = source.url.rstrip("/") if source.name.endswith("/") else parent(source.url)
    fs, base = storage.filesystem(folder)
    for member, size in zip(
        rows["member"].to_pylist(), rows["size_bytes"].to_pylist(), strict=True
    ):
        if member is None:
            yield None
            continue
        try:
            # Read by path: as a URL a name with "::" would be taken apart.
            path = f"{base.rstrip('/')}/{member}"
            image = ask(fs, path, partial(fs.cat_file, path))
        except OSError as error:
            raise _changed(source, member, error.strerror or str(error)) from error
        if len(image) != size:
            raise _changed(source, member, f"{len(image)} bytes")
        yield image


def _changed(source: Source, member: str, got: str) -> SourceChangedError:
    return SourceChangedError(
        f"{source.name}: {member}: must stay as it was indexed; got {got}. "
        "Put it back or start anew."
    )
