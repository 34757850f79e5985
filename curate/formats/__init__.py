"""Layouts that image–text data comes in: one file each, named here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.errors import InputError, SourceChangedError
from curate.formats import (
    arrow,
    clip_retrieval,
    datacomp,
    folder,
    img2dataset,
    npy,
    parquet,
    webdataset,
)
from curate.formats.arrays import Pair, Stored, no_images, normalise
from curate.formats.index import IMAGE_SUFFIXES, Scan
from curate.formats.sources import File, Source, list_files, locate, split_suffix
from curate.stores import is_http

__all__ = [
    "FORMATS",
    "Format",
    "Vectors",
    "detect",
    "find_incomplete",
    "list_sources",
    "measure_vectors",
    "read_images",
    "read_vectors",
]

Array = np.ndarray[Any, Any]


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
        `scan(source, uid_column, caption_column)` indexes one.
    read_images : callable
        `read_images(source, rows)` yields the bytes of the rows' images.
    open_vectors : callable or None
        `open_vectors(source, choice)` opens a source's vectors; None where it holds images.
    """

    accepts: str
    group: Callable[[list[File]], list[Source]]
    scan: Callable[[Source, str | None, str | None], Scan]
    read_images: Callable[[Source, pa.Table], Iterator[bytes | None]]
    open_vectors: Callable[[Source, str | None], Pair] | None = None


FORMATS = {
    "webdataset": Format(
        "plain .tar files", webdataset.group, webdataset.scan, webdataset.read_images
    ),
    "parquet": Format(
        ".parquet files with image bytes", parquet.group, parquet.scan, parquet.read_images
    ),
    "arrow": Format(
        "folders of datasets.save_to_disk (data-*.arrow)",
        arrow.group,
        arrow.scan,
        arrow.read_images,
    ),
    "folder": Format(
        "images with .txt or .json files beside them, or a .csv, .tsv, .jsonl or .parquet table "
        "that names images",
        folder.group,
        folder.scan,
        folder.read_images,
    ),
    "clip_retrieval": Format(
        "clip-retrieval's img_emb/ and metadata/",
        clip_retrieval.group,
        clip_retrieval.scan,
        no_images,
        clip_retrieval.open_vectors,
    ),
    "datacomp": Format(
        ".parquet files with a .npz beside each",
        datacomp.group,
        datacomp.scan,
        no_images,
        datacomp.open_vectors,
    ),
    "npy": Format("vectors as .npy files", npy.group, npy.scan, no_images, npy.open_vectors),
}

_TABLES = ("csv", "tsv", "jsonl")
#: Layouts whose sources need no folder to be listed.
_OF_SINGLE_FILES = ("webdataset", "parquet", "npy")
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tbz2", ".txz")


def detect(names: Iterable[str]) -> str:
    """Tell the layout of files from their names.

    Parquet files beside images count as "folder": a table that names them. A `.parquet` that has
    a `.tar` of the same name belongs to that. A `.npy` that is no part of clip-retrieval's folders
    counts only where there is nothing else.

    Returns
    -------
    str
        Key of `FORMATS`.

    Raises
    ------
    InputError
        If there is no layout, more than one, or tars that are compressed.
    """
    given = list(names)
    stems = datacomp.find_stems(given)
    has_parts = clip_retrieval.holds(given)
    # What belongs to vectors says nothing about images.
    named = [
        name
        for name in given
        if split_suffix(name)[0] not in stems and not (has_parts and clip_retrieval.belongs(name))
    ]
    suffixes = Counter(split_suffix(name)[1] for name in given)
    packed = next((name for name in named if name.lower().endswith(_COMPRESSED_TARS)), None)
    if packed is not None:
        raise InputError(f"{packed}: must be a plain tar; it is compressed. Decompress it first.")
    present = list(_image_layouts(named))
    if has_parts:
        present.append("clip_retrieval")
    if stems:
        # Tables alone lack their vectors, which is for that layout to say.
        present = [one for one in present if one != "parquet"] + ["datacomp"]
    if not present and suffixes["npy"]:
        present.append("npy")
    if not present:
        raise InputError(f"must hold {_accepted()}; found {_summary(suffixes)}. Name other paths")
    if len(present) > 1:
        raise InputError(
            f"must be of one layout; found {' and '.join(present)} ({_summary(suffixes)}). "
            f"Choose with --set ingest.format={present[0]}"
        )
    return present[0]


def _image_layouts(named: list[str]) -> Iterator[str]:
    """Yield the layouts of images that there are among files."""
    suffixes = Counter(split_suffix(name)[1] for name in named)
    tars = {split_suffix(name)[0] for name in named if split_suffix(name)[1] == "tar"}
    alone = any(
        split_suffix(name)[1] == "parquet" and split_suffix(name)[0] not in tars for name in named
    )
    has_images = any(suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    if tars:
        yield "webdataset"
    if alone and not (has_images and not tars):
        yield "parquet"
    if any(split_suffix(name)[1] == "arrow" for name in named):
        yield "arrow"
    if has_images or any(suffixes[suffix] for suffix in _TABLES):
        yield "folder"


def _accepted() -> str:
    return "; or ".join(known.accepts for known in FORMATS.values())


def _summary(suffixes: Counter[str]) -> str:
    common = suffixes.most_common(4)
    shown = [f"{count} {'.' + suffix if suffix else 'without suffix'}" for suffix, count in common]
    return ", ".join(shown + (["…"] if len(suffixes) > len(common) else []))


def find_incomplete(inputs: tuple[str, ...], root: str) -> list[str]:
    """Return the names of img2dataset's shards among the inputs that are not complete.

    Raises
    ------
    InputError
        If an input is missing or empty.
    """
    return img2dataset.find_incomplete(file.name for file in list_files(inputs, root))


def list_sources(
    inputs: tuple[str, ...], root: str, layout: str = "auto", skip_incomplete: bool = False
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
    skip_incomplete : bool
        Leave out shards that img2dataset has not finished.

    Raises
    ------
    InputError
        If an input is missing or empty, or there is nothing of the layout.
    """
    files = list_files(inputs, root)
    if skip_incomplete:
        unfinished = set(img2dataset.find_incomplete(file.name for file in files))
        files = [file for file in files if img2dataset.shard_of(file.name) not in unfinished]
    where = inputs[0] if len(inputs) == 1 else f"{inputs[0]} and {len(inputs) - 1} more"
    if any(file.name.rpartition("/")[2] == "run.json" for file in files):
        raise InputError(f"{where}: is an output of curate. Name its shards/ folder instead.")
    chosen = layout
    if layout == "auto":
        try:
            chosen = detect(file.name for file in files)
        except InputError as error:
            raise InputError(f"{where}: {error}.") from error
        if chosen == "parquet" and datacomp.has_vectors(files):
            chosen = "datacomp"
        elif chosen == "parquet" and parquet.names_images(files):
            chosen = "folder"
        elif chosen == "folder" and (held := parquet.find_images(files)) is not None:
            raise InputError(
                f"{where}: must be of one layout; found folder and parquet ({held} holds images, "
                "and there are files of others). Choose with --set ingest.format=folder, or move "
                "one of the two."
            )
    if is_http(storage.filesystem(root)[0]) and chosen not in _OF_SINGLE_FILES:
        raise InputError(
            f"{where}: must be on a disk or an object store, as layout {chosen} is told from the "
            "files of folders, and an HTTP server lists none. Copy it."
        )
    sources = sorted(FORMATS[chosen].group(files), key=lambda source: source.name)
    if not sources:
        found = _summary(Counter(split_suffix(file.name)[1] for file in files))
        raise InputError(
            f"{where}: must hold {FORMATS[chosen].accepts} (ingest.format {chosen}); "
            f"found {found}. Leave ingest.format at auto."
        )
    return chosen, sources


def read_images(
    root: str, rows: pa.Table, find_copy: Callable[[str], str | None] = lambda name: None
) -> Iterator[bytes | None]:
    """Yield the bytes of each index row's image, in order; None where it has none.

    Parameters
    ----------
    root : str
        Folder to which `source_file` is relative.
    rows : pyarrow.Table
        Columns source_file, member, offset, size_bytes, row_group, row.
    find_copy : callable
        `find_copy(name)` returns where a copy of a source lies on a local disk, or None.

    Raises
    ------
    SourceChangedError
        If a source is gone or no longer holds what was indexed.
    """
    for name, part in _by_source(rows):
        kind = _kind(name, part)
        if kind is None:
            yield from (None for _ in range(len(part)))
        else:
            source = Source(name, locate(root, name), kind, copy=find_copy(name))
            yield from FORMATS[kind].read_images(source, part)


def _by_source(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Cut index rows where the source changes."""
    names = rows["source_file"].to_pylist()
    start = 0
    while start < len(names):
        stop = start
        while stop < len(names) and names[stop] == names[start]:
            stop += 1
        yield names[start], rows.slice(start, stop - start)
        start = stop


def _kind(name: str, rows: pa.Table) -> str | None:
    """Tell a source's layout from the columns that say where its images are."""
    if name.endswith(".arrow"):
        return "arrow"
    columns = {"offset": "webdataset", "row_group": "parquet", "member": "folder"}
    return next((k for c, k in columns.items() if rows[c].null_count < len(rows)), None)


@dataclass(frozen=True)
class Vectors:
    """Vectors of samples as their source gives them.

    Parameters
    ----------
    images : (N, D) float16, unit norm
    has_image : (N,) bool
        False where the source has no usable vector; zeros in `images`.
    texts : (N, E) float16, unit norm
    has_text : (N,) bool
    """

    images: Array
    has_image: Array
    texts: Array
    has_text: Array


def measure_vectors(source: Source, choice: str | None, samples: int) -> dict[str, int | None]:
    """Check that a source has one vector per sample, and return how wide they are.

    Parameters
    ----------
    source : Source
    choice : str or None
        Which of a source's vectors; None: the layout's default.
    samples : int
        Rows of its index.

    Returns
    -------
    dict
        Numbers per vector of `image` and `text`, None where there is none; empty where the source
        holds images instead.

    Raises
    ------
    InputError
        If numbers of rows differ, or an array is not one of vectors.
    """
    opener = FORMATS[source.kind].open_vectors
    if opener is None:
        return {}
    pair = opener(source, choice)
    for stored in (pair.image, pair.text):
        if stored is not None and stored.rows != samples:
            raise InputError(
                f"{source.name}: must have as many rows in all its files; {stored.name} has "
                f"{stored.rows}, its metadata {samples}. Copy them again."
            )
    return {"image": pair.image.width, "text": pair.text.width if pair.text else None}


def read_vectors(
    root: str, rows: pa.Table, kind: str, choice: str | None, widths: dict[str, int | None]
) -> Vectors:
    """Return the vectors of index rows, in order.

    Parameters
    ----------
    root : str
        Folder to which `source_file` is relative.
    rows : pyarrow.Table
        Columns source_file, row.
    kind : str
        Key of `FORMATS`.
    choice : str or None
        Which of a source's vectors.
    widths : dict
        What `measure_vectors` told of all sources. Without texts theirs are as wide as images.

    Raises
    ------
    SourceChangedError
        If a source is gone or no longer holds what was indexed.
    """
    opener = FORMATS[kind].open_vectors
    assert opener is not None
    width = widths["image"] or 0
    found = Vectors(
        *_no_vectors(len(rows), width), *_no_vectors(len(rows), widths["text"] or width)
    )
    start = 0
    for name, part in _by_source(rows):
        source, places = Source(name, locate(root, name), kind), part["row"].to_numpy()
        try:
            pair = opener(source, choice)
        except InputError as error:
            raise SourceChangedError(str(error)) from error
        own = slice(start, start + len(part))
        _fill(pair.image, places, found.images[own], found.has_image[own])
        if pair.text is not None:
            _fill(pair.text, places, found.texts[own], found.has_text[own])
        start += len(part)
    return found


def _no_vectors(count: int, width: int) -> tuple[Array, Array]:
    return np.zeros((count, width), np.float16), np.zeros(count, bool)


def _fill(stored: Stored, rows: Array, vectors: Array, valid: Array) -> None:
    if stored.width != vectors.shape[1]:
        raise SourceChangedError(
            f"{stored.name}: must hold vectors of {vectors.shape[1]} numbers, as when it was "
            f"indexed; got {stored.width}. Put it back or start anew."
        )
    vectors[:], valid[:] = normalise(stored.take(rows))
