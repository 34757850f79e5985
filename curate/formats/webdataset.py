"""WebDataset tars, with or without the table that img2dataset writes beside each."""

import contextlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from curate import storage
from curate.errors import InputError, SourceChangedError
from curate.formats import index
from curate.formats.img2dataset import join_table
from curate.formats.index import Row, Scan
from curate.formats.sources import File, Source, check_name, open_binary, split_suffix
from curate.formats.tar import Member, Walk

__all__ = [
    "SIZES",
    "Sample",
    "caption_fields",
    "group",
    "read_images",
    "refuse_compressed",
    "scan",
    "to_sample",
    "write",
]

#: Beside tars: samples by file name, from which open_clip knows how long an epoch is.
SIZES = "sizes.json"

_log = logging.getLogger(__name__)

#: Members that are no image even in a sample that has none.
_NOT_IMAGES = frozenset(
    (
        *("txt", "json", "jsonl", "caption", "transcript", "cls", "url", "md5", "html", "xml"),
        *("csv", "tsv", "parquet", "npy", "npz", "pt", "pth", "pyd", "ten", "cbor", "msgpack"),
        *("pkl", "pickle", "mp3", "mp4", "wav", "flac"),
    )
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
#: A remote tar is indexed in blocks: its headers alone would be one request each.
_SCAN_BYTES = 8 << 20
#: Images are read so many bytes at once, with what lies between them: everything where they make
#: up a share of the tar, else gaps that cost less than going there anew, on a disk and remotely.
_READ_BYTES = 16 << 20
_STREAMED_SHARE = 1 / 4
_GAP_BYTES, _REMOTE_GAP_BYTES = 64 << 10, 1 << 20


def group(files: list[File]) -> list[Source]:
    """Return one source per tar, with img2dataset's files of the same name beside it.

    Raises
    ------
    InputError
        If a tar is compressed.
    """
    by_name = {file.name: file for file in files}
    sources = []
    for file in files:
        stem, suffix = split_suffix(file.name)
        if suffix != "tar":
            continue
        table, stats = (by_name.get(stem + end) for end in (".parquet", "_stats.json"))
        names = tuple(one.name.rpartition("/")[2] for one in (table, stats) if one is not None)
        # The statistics hold times, and only their presence matters: no part of the identity.
        content = (file,) if table is None else (file, table)
        name = check_name(file.name)
        sources.append(Source(name, file.url, "webdataset", file.size_bytes, names, content))
    return sources


def refuse_compressed(url: str, head: bytes) -> None:
    """Raise if a file's first bytes are those of a compressed one.

    Raises
    ------
    InputError
    """
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise InputError(
                f"{url}: must be a plain tar; got one compressed with {kind}. Decompress it first."
            )


@dataclass(slots=True)
class _Group:
    """Members that follow each other under one key, by extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index a tar: on a disk without reading its images, remotely in one pass over all of it.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Fields of the JSON member, or columns of img2dataset's table, that identify a sample, and
        that hold its caption.

    Returns
    -------
    Scan
        Counts: `truncated_files`, `incomplete_shards` (img2dataset did not finish the shard),
        `unreadable_tables`, `stats_disagree`, `ignored_members`.

    Raises
    ------
    InputError
        If the tar is compressed.
    SourceChangedError
        If it is gone.
    """
    counts: dict[str, float] = {}
    rows: list[Row] = []
    with open_binary(source.content, _SCAN_BYTES) as file:
        walk = Walk(file)
        file.seek(0)
        refuse_compressed(source.url, file.read(8))
        for run in _groups(walk, file, counts):
            rows.extend(_row(one, uid_column, caption_column) for one in _split(run))
    if walk.damage:
        counts["truncated_files"] = 1
        _log.warning("%s: the tar is damaged (%s); read up to there", source.name, walk.damage)
    index.number_repeats(rows)
    rows.extend(join_table(source, rows, uid_column, counts, caption_column))
    return Scan(index.to_table(rows, source.name), counts)


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name, as webdataset does."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    is_meta = base.startswith("__") and base.endswith("__")
    return ("", "") if is_meta or not stem else (folder + slash + stem, extension.lower())


def _groups(walk: Walk, file: BinaryIO, counts: dict[str, float]) -> Iterator[_Group]:
    """Yield each run of members of one key; an extension that comes again starts a new one."""
    current: _Group | None = None
    for member in walk:
        key, extension = _split_name(member.name)
        if not extension:
            counts["ignored_members"] = counts.get("ignored_members", 0) + 1
            continue
        key = index.clean_text(key)
        if current is None or key != current.key or extension in current.members:
            if current is not None:
                yield current
            current = _Group(key)
        current.members[extension] = member
        payload = _payload(member, extension, file)
        if payload is not None:
            current.payloads[extension] = payload
    if current is not None:
        yield current


def _payload(member: Member, extension: str, file: BinaryIO) -> bytes | None:
    kind = extension.rpartition(".")[2]
    limit = {"txt": index.MAX_CAPTION_BYTES, "json": index.MAX_JSON_BYTES}.get(kind, -1)
    if not member.is_whole or member.size_bytes > limit:
        return None
    file.seek(member.offset)
    return file.read(member.size_bytes)


def _split(run: _Group) -> list[_Group]:
    """Cut a run whose keys had dots (`a.1.jpg a.1.txt a.2.jpg`) into its samples.

    Read by the rule of the first dot these are one sample without an image; as several samples
    of one key none is lost and the later ones are reported as `duplicate_key`.
    """
    if any("." not in name and _is_image(name) for name in run.members):
        return [run]
    stems = dict.fromkeys(name.rpartition(".")[0] for name in run.members if "." in name)
    if not any(_is_image(name.rpartition(".")[2]) for name in run.members):
        return [run]
    parts = {stem: _Group(run.key) for stem in stems}
    for name, member in run.members.items():
        stem, _, suffix = name.rpartition(".")
        for part in [parts[stem]] if stem else parts.values():
            if stem or suffix not in part.members:
                part.members[suffix] = member
                if name in run.payloads:
                    part.payloads[suffix] = run.payloads[name]
    return list(parts.values())


def _is_image(suffix: str) -> bool:
    return suffix in index.IMAGE_SUFFIXES or suffix in index.OTHER_IMAGE_SUFFIXES


def _find_image(members: dict[str, Member]) -> Member | None:
    name = index.find_name(members, (*index.IMAGE_SUFFIXES, *index.OTHER_IMAGE_SUFFIXES))
    if name is None:
        name = next((n for n in members if n.rpartition(".")[2] not in _NOT_IMAGES), None)
    image = members[name] if name else None
    return image if image is not None and image.is_whole else None


def _row(sample: _Group, uid_column: str | None, caption_column: str | None) -> Row:
    fields = index.parse_json(sample.payloads.get("json", b"")) or {}
    caption, reason = _caption(sample, fields, caption_column)
    image = _find_image(sample.members)
    row = Row(
        sample.key,
        caption=caption,
        metadata=index.encode_metadata(fields, ("key", "uid", *index.JSON_CAPTIONS)),
        own_uid=index.find_uid(fields, uid_column),
    )
    missing = None
    if image is None:
        missing = "image_missing"
    elif image.size_bytes == 0:
        missing = "image_empty"
    else:
        row.offset, row.size_bytes = image.offset, image.size_bytes
    row.ingest_reason = index.first_reason(missing, reason)
    return row


def _caption(
    sample: _Group, fields: dict[str, Any], caption_column: str | None
) -> tuple[str | None, str | None]:
    if caption_column is not None:
        return index.find_caption(fields, (caption_column,))
    text = sample.members.get("txt")
    if text is not None and text.is_whole:
        if text.size_bytes > index.MAX_CAPTION_BYTES:
            return None, "caption_invalid"
        return index.clean_caption(sample.payloads["txt"])
    return index.find_caption(fields, index.JSON_CAPTIONS)


def read_images(source: Source, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield the bytes of each row's image in order; None where the row has none.

    Where the images are more than a quarter of the part of the tar that they lie in, that part is
    read from end to end; else those that lie close to each other are read at once.

    Parameters
    ----------
    source : Source
    rows : pyarrow.Table
        Columns `offset` and `size_bytes`.

    Raises
    ------
    SourceChangedError
        If the tar is gone or shorter than it was.
    """
    spans = list(zip(rows["offset"].to_pylist(), rows["size_bytes"].to_pylist(), strict=True))
    if all(offset is None for offset, _ in spans):
        yield from (None for _ in spans)
        return
    start, data, gap = 0, b"", _choose_gap(source.content, spans)
    with open_binary(source.content, 0) as file:
        for i, (offset, size) in enumerate(spans):
            if offset is None:
                yield None
                continue
            if not (start <= offset and offset + size <= start + len(data)):
                start, end = offset, _reach(spans, i, gap)
                file.seek(start)
                data = file.read(end - start)
                if gap == _READ_BYTES:
                    _read_ahead(file, end)
            image = data[offset - start : offset - start + size]
            if len(image) < size:
                raise SourceChangedError(
                    f"{source.name}: must hold {offset + size} bytes; got fewer. "
                    "It changed after it was indexed: put it back or start anew."
                )
            yield image


def _read_ahead(file: BinaryIO, end: int) -> None:
    """Have a disk fetch what most probably comes next, while this part is worked on."""
    with contextlib.suppress(OSError, AttributeError):  # no file of this system; not Linux
        os.posix_fadvise(file.fileno(), end, _READ_BYTES, os.POSIX_FADV_WILLNEED)


_Spans = list[tuple[int | None, int | None]]


def _choose_gap(url: str, spans: _Spans) -> int:
    """Return how far apart two images may lie that are read at once."""
    placed = [(at, at + size) for at, size in spans if at is not None and size is not None]
    extent = max(end for _, end in placed) - min(start for start, _ in placed)
    if sum(end - start for start, end in placed) > _STREAMED_SHARE * extent:
        return _READ_BYTES
    return _GAP_BYTES if storage.is_local(url) else _REMOTE_GAP_BYTES


def _reach(spans: _Spans, first: int, gap: int) -> int:
    """Return where the read that begins at the image of row `first` ends."""
    start, end = spans[first][0] or 0, 0
    for i in range(first, len(spans)):
        offset, size = spans[i]
        if offset is None or size is None:
            continue
        near = end == 0 or end <= offset <= end + gap
        if end and (not near or offset + size > start + _READ_BYTES):
            break
        end = offset + size
    return end


@dataclass(frozen=True, slots=True)
class Sample:
    """What `write` puts in a tar under one key.

    Parameters
    ----------
    key : str
        Without dots.
    suffix : str or None
        Extension of the image, without the dot.
    image : bytes or None
        None where the source has none: the sample is written without.
    caption : str
    metadata : str
        JSON text.
    """

    key: str
    suffix: str | None
    image: bytes | None
    caption: str
    metadata: str


def caption_fields(most: int) -> list[str]:
    """Name the JSON fields of a sample's captions where one of the set has so many."""
    return ["caption", *(f"caption_{number}" for number in range(2, most + 1))]


def to_sample(row: dict[str, Any], most_captions: int = 1) -> Sample:
    """Return a row of `shards` keyed by uid, which is unique over a set and free of dots.

    Parameters
    ----------
    row : dict
    most_captions : int
        Captions that a sample of the set has at most. Besides in the list `captions`, which no
        trainer reads, they are in `caption`, `caption_2` and so on, as open_clip draws among them;
        "" where a sample has fewer, because loaders want the same fields in all.
    """
    fields = dict(row)
    further = (row.get("captions") or [])[1:]
    for name in caption_fields(most_captions)[1:]:
        fields[name] = further.pop(0) if further else ""
    image = fields.pop("image")
    # Loaders infer types from the first samples: a null there breaks the later ones.
    known = {name: value for name, value in fields.items() if value is not None}
    metadata = json.dumps(known, ensure_ascii=False)
    suffix = None if image is None else index.image_suffix(image)
    return Sample(row["uid"], suffix, image, row["caption"] or "", metadata)


def write(path: str, samples: Iterable[Sample]) -> int:
    """Write a tar whose bytes depend on the samples alone.

    Parameters
    ----------
    path : str
        Local, as `storage.commit` gives.
    samples : iterable of Sample

    Returns
    -------
    int
        Number of samples.

    Raises
    ------
    ValueError
        If a key holds a dot or comes twice: readers would join its members to another's.
    """
    seen: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if "." in sample.key or sample.key in seen:
                raise ValueError(f"key {sample.key!r} must be new and without dots")
            seen.add(sample.key)
            members = (
                (sample.suffix, sample.image),
                ("txt", sample.caption.encode()),
                ("json", sample.metadata.encode()),
            )
            for suffix, content in members:
                if content is None:
                    continue
                header = tarfile.TarInfo(f"{sample.key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return len(seen)
