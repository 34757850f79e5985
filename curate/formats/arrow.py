"""Folders that Hugging Face's `datasets.save_to_disk` writes: Arrow streams named by a state.json.

A `DatasetDict` is such a folder per split. A sample lies in a record batch, whose place in its file
the index says, so that images are read by ranges.
"""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from curate import storage
from curate.errors import InputError
from curate.formats import index
from curate.formats.index import Row, Scan
from curate.formats.parquet import (
    Roles,
    count_elsewhere,
    find_roles,
    is_plain,
    make_row,
    note_elsewhere,
    note_image,
    pick_images,
    read_fields,
)
from curate.formats.sources import (
    UNREADABLE,
    File,
    Source,
    check_name,
    list_folder,
    open_binary,
    parent,
    readable,
    rows_changed,
)

__all__ = ["group", "read_images", "scan"]

_STATE = "state.json"
_WHOLE = "a whole Arrow stream, as save_to_disk writes"


def group(files: list[File]) -> list[Source]:
    """Return one source per `.arrow` file that its folder's state.json names, if there is one.

    Others in such a folder are caches of `datasets`.

    Raises
    ------
    InputError
        If a file that is named is not there, or the folder holds a selection of its rows.
    """
    sources = []
    named: dict[str, set[str] | None] = {}
    for file in files:
        if not file.name.endswith(".arrow"):
            continue
        folder, base = parent(file.url), file.url.rpartition("/")[2]
        if folder not in named:
            named[folder] = _read_state(folder, parent(file.name))
        wanted = named[folder]
        if wanted is None or base in wanted:
            name = check_name(file.name)
            sources.append(Source(name, file.url, "arrow", file.size_bytes, (), (file,)))
    return sources


def _read_state(folder: str, name: str) -> set[str] | None:
    """Return the files that a state.json names; None if there is none."""
    held = list_folder(folder)
    if _STATE not in held:
        return None
    shown = f"{name}/{_STATE}" if name else _STATE
    state = index.parse_json(storage.read_bytes(held[_STATE].url)) or {}
    given = state.get("_data_files")
    entries = given if isinstance(given, list) else []
    files = {str(one["filename"]) for one in entries if isinstance(one, dict) and "filename" in one}
    lacking = sorted(files - held.keys())
    if not files or lacking:
        raise InputError(
            f"{shown}: must name the files of its folder (_data_files); "
            f"{f'{lacking[0]} is not there' if lacking else 'names none'}. Save or copy it again."
        )
    if state.get("_indices_data_files"):
        raise InputError(
            f"{shown}: must be of a whole dataset; it holds a selection of its rows. Call "
            "flatten_indices() before save_to_disk()."
        )
    return files


def _messages(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield the messages of a stream from where the file is on, and where each begins."""
    stream = pa.PythonFile(file, mode="r")
    while True:
        begin = stream.tell()
        try:
            yield begin, pa.ipc.read_message(stream)
        except EOFError:
            return


def _decode(head: bytes, message: Any) -> pa.RecordBatch:
    """Return a record batch; `head` is the schema, and dictionaries where there are any."""
    stream = io.BytesIO(head + message.serialize().to_pybytes())
    return pa.ipc.open_stream(stream).read_next_batch()


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index one file.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Columns that identify a sample, and that hold its caption.

    Raises
    ------
    InputError
        If the file is not whole or a column is missing.
    SourceChangedError
        If it is gone.
    """
    rows: list[Row] = []
    head, roles, plain, elsewhere = b"", None, list[str](), 0
    with readable(source.name, _WHOLE), open_binary(source.url) as file:
        for begin, message in _messages(file):
            if message.type != "record batch":
                head += message.serialize().to_pybytes()
                if message.type == "schema":
                    schema = pa.ipc.read_schema(message)
                    roles = find_roles(schema, source.name, uid_column, caption_column)
                    plain = [field.name for field in schema if is_plain(field.type)]
                continue
            if roles is None:
                raise pa.ArrowInvalid("it has no schema")
            batch = _decode(head, message)
            images = pick_images(batch.column(roles.image), roles)
            if roles.is_struct:
                elsewhere += count_elsewhere(batch.column(roles.image))
            sizes = pc.binary_length(images).to_pylist()
            fields = read_fields(pa.table(batch).select(plain)) if plain else [{}] * len(batch)
            for place, known in enumerate(fields):
                row = make_row(known, len(rows), roles, uid_column)
                row.offset, row.row = begin, place
                note_image(row, sizes[place], True)
                rows.append(row)
    if roles is None:
        raise InputError(
            f"{source.name}: must be an Arrow stream, as save_to_disk writes; it is empty. "
            "Remove it or copy it again."
        )
    index.number_repeats(rows)
    return Scan(index.to_table(rows, source.name), note_elsewhere(source, elsewhere))


def read_images(source: Source, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each row's image in order; None where the row has none.

    A record batch is held while rows that follow each other lie in it.

    Parameters
    ----------
    source : Source
    rows : pyarrow.Table
        Columns `offset` and `row`.

    Raises
    ------
    SourceChangedError
        If the file is gone or no longer holds the row.
    """
    wanted = zip(rows["offset"].to_pylist(), rows["row"].to_pylist(), strict=True)
    try:
        with open_binary(source.url) as file:
            head, roles = _read_head(file, source.name)
            at, images = -1, None
            for offset, row in wanted:
                if offset != at:
                    file.seek(offset)
                    _, message = next(_messages(file))
                    batch, at = _decode(head, message), offset
                    images = pick_images(batch.column(roles.image), roles)
                assert images is not None
                yield images[row].as_py()
    except (InputError, StopIteration, IndexError, *UNREADABLE) as error:
        raise rows_changed(source.name) from error


def _read_head(file: BinaryIO, name: str) -> tuple[bytes, Roles]:
    """Return what comes before the first record batch, and which column holds images."""
    head, roles = b"", None
    for _, message in _messages(file):
        if message.type == "record batch":
            break
        head += message.serialize().to_pybytes()
        if message.type == "schema":
            roles = find_roles(pa.ipc.read_schema(message), name)
    if roles is None:
        raise InputError(f"{name}: must be an Arrow stream; it has no schema. Copy it again.")
    return head, roles
