"""Parquet files that hold image bytes: img2dataset's, Hugging Face's and our own shards."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.errors import InputError
from curate.formats import index
from curate.formats.img2dataset import NO_IMAGE, STATS, check_stats, failure
from curate.formats.index import Row, Scan
from curate.formats.sources import (
    File,
    Source,
    check_name,
    open_binary,
    readable,
    rows_changed,
    split_suffix,
)

__all__ = [
    "PATH_NAMES",
    "Roles",
    "count_elsewhere",
    "find_images",
    "find_path_column",
    "find_roles",
    "group",
    "holds_images",
    "is_plain",
    "make_row",
    "names_images",
    "note_elsewhere",
    "note_image",
    "pick_images",
    "read_fields",
    "read_images",
    "read_schema",
    "scan",
    "scan_rows",
]

_log = logging.getLogger(__name__)

#: Columns that name an image file beside the table.
PATH_NAMES = ("filepath", "file_name", "image_path", "path", "image")

_IMAGE_NAMES = ("image", "jpg", "png", "webp", "jpeg")
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Roles:
    """Which column is what; None where there is none.

    Parameters
    ----------
    image : str
    is_struct : bool
        Whether it is a struct with `bytes`, as Hugging Face's, or bytes alone.
    caption, key : str or None
    """

    image: str
    is_struct: bool
    caption: str | None
    key: str | None

    @property
    def leaf(self) -> str:
        """Path of the column that holds the bytes."""
        return f"{self.image}.bytes" if self.is_struct else self.image


def group(files: list[File]) -> list[Source]:
    """Return one source per Parquet file, with img2dataset's statistics beside it."""
    names = {file.name for file in files}
    sources = []
    for file in files:
        stem, suffix = split_suffix(file.name)
        if suffix == "parquet":
            has_stats = stem + STATS in names
            beside = ((stem + STATS).rpartition("/")[2],) if has_stats else ()
            name = check_name(file.name)
            sources.append(Source(name, file.url, "parquet", file.size_bytes, beside, (file,)))
    return sources


def find_path_column(schema: pa.Schema) -> str | None:
    """Return the text column that names image files, if the table has one and no image bytes."""
    if _find_image(schema) is not None:
        return None
    texts = [field.name for field in schema if _is_text(field.type)]
    return index.find_name(texts, PATH_NAMES)


def holds_images(schema: pa.Schema) -> bool:
    """Tell whether a Parquet file has a column of image bytes."""
    return _find_image(schema) is not None


def find_images(files: list[File]) -> str | None:
    """Return the name of the first Parquet file that holds images, other than img2dataset's."""
    names = {file.name for file in files}
    for file in files:
        stem, suffix = split_suffix(file.name)
        is_own = suffix == "parquet" and stem + STATS not in names
        if is_own and holds_images(read_schema(file.url, file.name)):
            return file.name
    return None


def names_images(files: list[File]) -> bool:
    """Tell whether Parquet files name images instead of holding them, by the first of them."""
    first = next(file for file in files if split_suffix(file.name)[1] == "parquet")
    return find_path_column(read_schema(first.url, first.name)) is not None


def read_schema(url: str, name: str) -> pa.Schema:
    """Return the schema of a Parquet file.

    Parameters
    ----------
    url, name : str
        The name is for error messages.

    Raises
    ------
    InputError
        If it is not whole, or two columns have one name.
    SourceChangedError
        If it is gone.
    """
    with _opened(url, name) as parquet:
        _check_columns(name, parquet.schema_arrow)
        return parquet.schema_arrow


@contextlib.contextmanager
def _opened(url: str, name: str) -> Iterator[pq.ParquetFile]:
    with open_binary(url) as file, readable(name, "a whole Parquet file"):
        yield pq.ParquetFile(file)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_captions(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind.value_type if is_list else kind)


def _has_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    i = kind.get_field_index("bytes")
    return i >= 0 and (_is_bytes(kind.field(i).type) or pa.types.is_null(kind.field(i).type))


def _image_features(schema: pa.Schema) -> list[str]:
    """Return the columns that Hugging Face's metadata calls images."""
    known = index.parse_json((schema.metadata or {}).get(b"huggingface", b"")) or {}
    info = known.get("info")
    features = info.get("features") if isinstance(info, dict) else None
    named = features.items() if isinstance(features, dict) else ()
    return [n for n, f in named if isinstance(f, dict) and f.get("_type") == "Image"]


def _find_image(schema: pa.Schema) -> tuple[str, bool] | None:
    """Return name and is-struct of the column with image bytes."""
    flat = [field.name for field in schema if _is_bytes(field.type)]
    structs = [field.name for field in schema if _has_bytes(field.type)]
    # A struct of bytes and a path may hold sound as well.
    told = [name for name in _image_features(schema) if name in structs]
    structs = told or structs
    name = index.find_name([*flat, *structs], _IMAGE_NAMES)
    if name is None and len(structs) == 1:
        name = structs[0]
    return None if name is None else (name, name in structs)


def find_roles(
    schema: pa.Schema, name: str, uid_column: str | None = None, caption_column: str | None = None
) -> Roles:
    """Tell which column is what.

    Parameters
    ----------
    schema : pyarrow.Schema
    name : str
        Of the file, for the error.
    uid_column, caption_column : str, optional
        What the user says.

    Raises
    ------
    InputError
        If there are no images, two columns have one name, there is no column of the name that
        the user says, or it holds no captions.
    """
    image = _find_image(schema)
    _check_columns(name, schema, uid_column, caption_column)
    if image is None:
        raise InputError(
            f"{name}: must have a column of image bytes ({', '.join(_IMAGE_NAMES)} or a struct "
            f"with bytes), or one of URLs; found {', '.join(schema.names[:12])}. Rename the "
            "column, or name that of URLs with --set download.url_column=NAME."
        )
    others = [field.name for field in schema if field.name != image[0]]
    captions = [n for n in others if _holds_captions(schema.field(n).type)]
    caption = caption_column or index.find_name(captions, index.CAPTION_NAMES)
    return Roles(*image, caption, index.find_name(others, index.KEY_NAMES))


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index a Parquet file; its images are read only where its statistics leave open if all exist.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Columns that identify a sample, and that hold its caption.

    Returns
    -------
    Scan

    Raises
    ------
    InputError
        If the file is not whole or a column is missing.
    SourceChangedError
        If it is gone.
    """
    rows: list[Row] = []
    elsewhere = 0
    with _opened(source.url, source.name) as parquet:
        schema = parquet.schema_arrow
        roles = find_roles(schema, source.name, uid_column, caption_column)
        columns = [f.name for f in schema if is_plain(f.type) and f.name != roles.image]
        for number in range(parquet.num_row_groups):
            sizes = _sizes(parquet, number, roles)
            if roles.is_struct and sizes is not None and None in sizes:
                column = parquet.read_row_group(number, [roles.image])[roles.image]
                elsewhere += count_elsewhere(column)
            table = parquet.read_row_group(number, columns)
            for i, fields in enumerate(read_fields(table) or [{}] * table.num_rows):
                row = make_row(fields, len(rows), roles, uid_column)
                row.row_group, row.row = number, i
                note_image(row, sizes[i] if sizes is not None else None, sizes is not None)
                rows.append(row)
    index.number_repeats(rows)
    counts = note_elsewhere(source, elsewhere)
    images = sum(row.ingest_reason not in (*NO_IMAGE, "image_missing") for row in rows)
    check_stats(source, images, len(rows), counts)
    return Scan(index.to_table(rows, source.name), counts)


def note_elsewhere(source: Source, count: int) -> dict[str, float]:
    """Warn of images of which a source has but the path, which is not followed; return counts."""
    if not count:
        return {}
    _log.warning(
        "%s: %d images are named by path and not stored: image_missing. Save it with their bytes.",
        source.name,
        count,
    )
    return {"images_elsewhere": count}


def count_elsewhere(column: pa.Array | pa.ChunkedArray) -> int:
    """Count the images of a struct column that have a path and no bytes."""
    if column.type.get_field_index("path") < 0:
        return 0
    lacks = pc.is_null(pc.struct_field(column, "bytes"))
    return int(pc.sum(pc.and_(lacks, pc.is_valid(pc.struct_field(column, "path")))).as_py() or 0)


def scan_rows(
    source: Source,
    table: tuple[str, str],
    key_names: tuple[str, ...],
    uid_column: str | None = None,
    caption_column: str | None = None,
) -> Scan:
    """Index a table of samples whose vectors lie elsewhere, at the same row.

    A caption counts as missing only where the table has a column of them, and keys may repeat: a
    row is told by its number.

    Parameters
    ----------
    source : Source
    table : (str, str)
        URL of the source's table, and its name for error messages.
    key_names : tuple of str
        Columns that may name a sample, best first.
    uid_column, caption_column : str, optional
        Columns that identify a sample, and that hold its caption.

    Raises
    ------
    InputError
        If the table is not whole or a column is missing.
    SourceChangedError
        If it is gone.
    """
    rows: list[Row] = []
    with _opened(*table) as parquet:
        schema = parquet.schema_arrow
        _check_columns(table[1], schema, uid_column, caption_column)
        columns = [field.name for field in schema if is_plain(field.type)]
        texts = [one for one in columns if _is_text(schema.field(one).type)]
        caption = caption_column or index.find_name(texts, index.CAPTION_NAMES)
        roles = Roles("", False, caption, index.find_name(columns, key_names))
        for number in range(parquet.num_row_groups):
            group = parquet.read_row_group(number, columns)
            for fields in read_fields(group) or [{}] * group.num_rows:
                row = make_row(fields, len(rows), roles, uid_column)
                if caption is None and row.ingest_reason == "caption_missing":
                    row.ingest_reason = None
                row.row = len(rows)
                rows.append(row)
    index.number_repeats(rows, is_fault=False)
    return Scan(index.to_table(rows, source.name))


def _check_columns(
    name: str,
    schema: pa.Schema,
    uid_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    twice = next((one for one in schema.names if schema.names.count(one) > 1), None)
    if twice is not None:
        raise InputError(
            f"{name}: must have columns of different names; found {twice} twice. Rename one."
        )
    for field, column in (("uid_column", uid_column), ("caption_column", caption_column)):
        if column is not None and column not in schema.names:
            raise InputError(
                f"{name}: ingest.{field} must be one of {', '.join(schema.names[:12])}; "
                f"got {column}. Choose one of them, or leave it out."
            )
    if caption_column is not None and not _holds_captions(schema.field(caption_column).type):
        raise InputError(
            f"{name}: ingest.caption_column must be text or lists of text; {caption_column} holds "
            f"{schema.field(caption_column).type}. Choose another, or leave it out."
        )


def is_plain(kind: pa.DataType) -> bool:
    """Tell whether a column is text, numbers or lists of such."""
    return not (_is_bytes(kind) or pa.types.is_fixed_size_binary(kind) or _has_bytes(kind))


def read_fields(table: pa.Table) -> list[dict[str, Any]]:
    """Return a table's rows; bytes of a text column that are not UTF-8 become lone surrogates.

    Parquet does not promise that text is valid, and one bad row must not cost the others.
    """
    columns = {}
    for name in table.column_names:
        column = table[name]
        if _is_text(column.type):
            kind = column.type
            plain = column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column
            raw = plain.cast(pa.large_binary()).to_pylist()
            columns[name] = [v if v is None else v.decode("utf-8", "surrogateescape") for v in raw]
        else:
            columns[name] = column.to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _sizes(parquet: pq.ParquetFile, number: int, roles: Roles) -> list[int | None] | None:
    """Return the images' lengths in a row group; None if statistics show that none is missing."""
    group = parquet.metadata.row_group(number)
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == roles.leaf and column.is_stats_set:
            known = column.statistics
            # Lengths matter less: writers leave out the minimum of values above 4 KiB.
            has_empty = known.has_min_max and not known.min
            if known.has_null_count and known.null_count == 0 and not has_empty:
                return None
    sizes: list[int | None] = []
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[number], columns=[roles.leaf]):
        sizes.extend(pc.binary_length(pick_images(batch.column(0), roles)).to_pylist())
    return sizes


def pick_images(column: pa.Array, roles: Roles) -> pa.Array:
    """Return the bytes that an image column holds."""
    if roles.is_struct:
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.binary()) if pa.types.is_null(column.type) else column


def make_row(fields: dict[str, Any], number: int, roles: Roles, uid_column: str | None) -> Row:
    """Return the row of a sample from its fields; its place and image are for the caller to add."""
    raw = fields.get(roles.caption) if roles.caption else None
    # Of several captions the first: the others stay in the metadata.
    caption, reason = index.clean_caption(index.first_text(raw))
    key = fields.get(roles.key) if roles.key else None
    return Row(
        index.clean_text(str(number if key is None else key)),
        caption=caption,
        metadata=index.encode_metadata(fields, {"uid", roles.key or "", roles.caption or ""}),
        ingest_reason=failure(fields) or reason,
        own_uid=index.find_uid(fields, uid_column),
    )


def note_image(row: Row, size: int | None, is_known: bool) -> None:
    """Put down the image's length and whether it is missing."""
    row.size_bytes = size
    if is_known and not size and row.ingest_reason not in NO_IMAGE:
        missing = "image_missing" if size is None else "image_empty"
        row.ingest_reason = index.first_reason(row.ingest_reason, missing)


def read_images(source: Source, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each row's image in order; None where the row has none.

    Only the row groups asked for are read, and of these only the image column, 64 rows at a time;
    a row that lies before its predecessor costs another pass over its row group.

    Parameters
    ----------
    source : Source
    rows : pyarrow.Table
        Columns `row_group` and `row`.

    Raises
    ------
    SourceChangedError
        If the file is gone or no longer holds the row.
    """
    wanted = zip(rows["row_group"].to_pylist(), rows["row"].to_pylist(), strict=True)
    try:
        with _opened(source.url, source.name) as parquet:
            roles = find_roles(parquet.schema_arrow, source.name)
            current, at = -1, -1
            stream: Iterator[bytes | None] = iter(())
            for number, row in wanted:
                if number != current or row <= at:
                    current, at = number, -1
                    stream = _stream(parquet, number, roles)
                for _ in range(row - at):
                    image = next(stream)
                at = row
                yield image
    except (InputError, StopIteration, IndexError, OSError) as error:
        raise rows_changed(source.name) from error


def _stream(parquet: pq.ParquetFile, number: int, roles: Roles) -> Iterator[bytes | None]:
    if number >= parquet.num_row_groups:
        return
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[number], columns=[roles.leaf]):
        for image in pick_images(batch.column(0), roles):
            yield image.as_py()
