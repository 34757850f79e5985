"""Layouts that image–text data comes in: one file each, named here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from curate.errors import InputError
from curate.formats import folder, parquet, webdataset
from curate.formats.index import IMAGE_SUFFIXES, Scan
from curate.formats.sources import File, Source, list_files, locate, split_suffix

__all__ = ["FORMATS", "Format", "detect", "list_sources", "read_images"]


@dataclass(frozen=True)
class Format:
    """A layout.

    Parameters
    ----------
    accepts : str
        What it consists of, for error messages.
    group : callable
        `group(files)` returns the sources that the files make up.
    scan : callable
        `scan(source, uid_column)` indexes one.
    read_images : callable
        `read_images(source, rows)` yields the bytes of the rows' images.
    """

    accepts: str
    group: Callable[[list[File]], list[Source]]
    scan: Callable[[Source, str | None], Scan]
    read_images: Callable[[Source, pa.Table], Iterator[bytes | None]]


FORMATS = {
    "webdataset": Format(
        "plain .tar files", webdataset.group, webdataset.scan, webdataset.read_images
    ),
    "parquet": Format(
        ".parquet files with image bytes", parquet.group, parquet.scan, parquet.read_images
    ),
    "folder": Format(
        "images with .txt or .json files beside them, or a .csv, .tsv, .jsonl or .parquet table "
        "that names images",
        folder.group,
        folder.scan,
        folder.read_images,
    ),
}

_TABLES = ("csv", "tsv", "jsonl")
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tbz2", ".txz")


def detect(names: Iterable[str]) -> str:
    """Tell the layout of files from their names.

    Parquet files beside images count as "folder": a table that names them. A `.parquet` that has
    a `.tar` of the same name belongs to that.

    Returns
    -------
    str
        Key of `FORMATS`.

    Raises
    ------
    InputError
        If there is no layout, more than one, or tars that are compressed.
    """
    named = list(names)
    suffixes = Counter(split_suffix(name)[1] for name in named)
    packed = next((name for name in named if name.lower().endswith(_COMPRESSED_TARS)), None)
    if packed is not None:
        raise InputError(f"{packed}: must be a plain tar; it is compressed. Decompress it first.")
    tars = {split_suffix(name)[0] for name in named if split_suffix(name)[1] == "tar"}
    alone = [
        name
        for name in named
        if split_suffix(name)[1] == "parquet" and split_suffix(name)[0] not in tars
    ]
    has_images = any(suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    has_folder = has_images or any(suffixes[suffix] for suffix in _TABLES)
    present = []
    if tars:
        present.append("webdataset")
    if alone and not (has_images and not tars):
        present.append("parquet")
    if has_folder:
        present.append("folder")
    if not present:
        raise InputError(f"must hold {_accepted()}; found {_summary(suffixes)}")
    if len(present) > 1:
        raise InputError(
            f"must be of one layout; found {' and '.join(present)} ({_summary(suffixes)}). "
            f"Choose with --set ingest.format={present[0]}"
        )
    return present[0]


def _accepted() -> str:
    return "; or ".join(known.accepts for known in FORMATS.values())


def _summary(suffixes: Counter[str]) -> str:
    common = suffixes.most_common(4)
    shown = [f"{count} {'.' + suffix if suffix else 'without suffix'}" for suffix, count in common]
    return ", ".join(shown + (["…"] if len(suffixes) > len(common) else []))


def list_sources(
    inputs: tuple[str, ...], root: str, layout: str = "auto"
) -> tuple[str, list[Source]]:
    """Return the layout of the inputs and their sources in order of name.

    Parameters
    ----------
    inputs : tuple of str
        Files, folders, patterns; fsspec URLs.
    root : str
        Folder to which names are relative.
    layout : str
        Key of `FORMATS`, or "auto".

    Raises
    ------
    InputError
        If an input is missing or empty, or there is nothing of the layout.
    """
    files = list_files(inputs, root)
    where = inputs[0] if len(inputs) == 1 else f"{inputs[0]} and {len(inputs) - 1} more"
    if any(file.name.rpartition("/")[2] == "run.json" for file in files):
        raise InputError(f"{where}: is an output of curate. Name its shards/ folder instead.")
    chosen = layout
    if layout == "auto":
        try:
            chosen = detect(file.name for file in files)
        except InputError as error:
            raise InputError(f"{where}: {error}.") from error
        if chosen == "parquet" and parquet.names_images(files):
            chosen = "folder"
    sources = sorted(FORMATS[chosen].group(files), key=lambda source: source.name)
    if not sources:
        found = _summary(Counter(split_suffix(file.name)[1] for file in files))
        raise InputError(
            f"{where}: must hold {FORMATS[chosen].accepts} (ingest.format {chosen}); "
            f"found {found}. Leave ingest.format at auto."
        )
    return chosen, sources


def read_images(root: str, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each index row's image, in order; None where it has none.

    Parameters
    ----------
    root : str
        Folder to which `source_file` is relative.
    rows : pyarrow.Table
        Columns source_file, member, offset, size_bytes, row_group, row.

    Raises
    ------
    SourceChangedError
        If a source is gone or no longer holds what was indexed.
    """
    names = rows["source_file"].to_pylist()
    start = 0
    while start < len(names):
        stop = start
        while stop < len(names) and names[stop] == names[start]:
            stop += 1
        part = rows.slice(start, stop - start)
        kind = _kind(part)
        if kind is None:
            yield from (None for _ in range(stop - start))
        else:
            source = Source(names[start], locate(root, names[start]), kind)
            yield from FORMATS[kind].read_images(source, part)
        start = stop


def _kind(rows: pa.Table) -> str | None:
    """Tell a source's layout from the columns that say where its images are."""
    columns = {"offset": "webdataset", "row_group": "parquet", "member": "folder"}
    return next((k for c, k in columns.items() if rows[c].null_count < len(rows)), None)
