"""From what the user names (files, folders, patterns, URLs) to files with relative names."""

import contextlib
import functools
import glob
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from curate import storage
from curate.errors import InputError, SourceChangedError
from curate.stores import ask, is_http

__all__ = [
    "TABLES",
    "UNREADABLE",
    "File",
    "Source",
    "check_name",
    "find_root",
    "first_line",
    "identify",
    "list_files",
    "list_folder",
    "locate",
    "open_binary",
    "parent",
    "readable",
    "rows_changed",
    "split_suffix",
]

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 16 << 10
_BLOCKS = 64
#: What stores call an object's checksum; an ETag may also depend on how it was uploaded. A plain
#: HTTP server knows a time at best.
_CHECKSUMS = (
    *("md5Hash", "content_md5", "crc32c", "ETag", "etag", "checksum"),
    *("Content-MD5", "Digest", "Last-Modified"),
)
#: Suffixes of tables.
TABLES = ("parquet", "csv", "tsv", "jsonl")
_SOURCE_SUFFIXES = ("tar", *TABLES)
#: What reading a damaged table raises.
UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the input.

    Parameters
    ----------
    name : str
        Relative to the root.
    url : str
    size_bytes : int
    checksum : str or None
        The store's own hash of its content.
    """

    name: str
    url: str
    size_bytes: int
    checksum: str | None = None


@dataclass(frozen=True)
class Source:
    """The unit that is scanned at once: a tar, a Parquet file, a table or a directory of images.

    Parameters
    ----------
    name : str
        Relative to the root; a directory's ends with "/".
    url : str
    kind : str
        Key of `formats.FORMATS`.
    size_bytes : int
    companions : tuple of str
        Names of files beside it that belong to it.
    files : tuple of File
        Everything that it is made of; known only where the input has been listed.
    copy : str or None
        Where its content lies besides, on a local disk.
    """

    name: str
    url: str
    kind: str
    size_bytes: int = 0
    companions: tuple[str, ...] = ()
    files: tuple[File, ...] = field(default=(), compare=False, repr=False)
    copy: str | None = field(default=None, compare=False)

    @property
    def content(self) -> str:
        """Where its content is best read: a copy on a disk, if there is one."""
        return self.copy or self.url

    def to_json(self) -> dict[str, Any]:
        """Return all but `url` and `copy`, which are places, and `files`."""
        names = ("name", "kind", "size_bytes", "companions")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def from_json(value: dict[str, Any], root: str) -> "Source":
        """Read what `to_json` gave."""
        url = locate(root, value["name"])
        return Source(
            value["name"], url, value["kind"], value["size_bytes"], tuple(value["companions"])
        )


def split_suffix(name: str) -> tuple[str, str]:
    """Split a path into what comes before the last dot of its base name and the lower-case rest.

    Examples
    --------
    >>> split_suffix("a.b/c.d.JPG")
    ('a.b/c.d', 'jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (folder + slash + stem, suffix.lower()) if dot and stem else (name, "")


def parent(name: str) -> str:
    """Return the folder part of a path, "" if there is none."""
    return name.rpartition("/")[0]


def locate(root: str, name: str) -> str:
    """Return the URL of a source from its name, which for the root itself is "./"."""
    return root if name == "./" else storage.join(root, name)


def check_name(name: str) -> str:
    """Return `name` if it can be written as UTF-8.

    Raises
    ------
    InputError
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name!a}: a name must be valid UTF-8. Rename it.") from error
    return name


def open_binary(url: str, buffer_bytes: int = 1 << 20) -> BinaryIO:
    """Open a file that was listed before, for reading.

    Parameters
    ----------
    buffer_bytes : int
        As of `storage.open_binary`.

    Raises
    ------
    SourceChangedError
        If it is gone.
    """
    try:
        return storage.open_binary(url, buffer_bytes)
    except OSError as error:
        why = error.strerror or str(error)
        raise SourceChangedError(
            f"{url}: must stay as it is while runs use it; {why}. Put it back or start anew."
        ) from error


@contextlib.contextmanager
def readable(name: str, what: str, advice: str = "Remove it or copy it again.") -> Iterator[None]:
    """Say in one line that a table cannot be read.

    Parameters
    ----------
    name : str
        Of the file.
    what : str
        What it must be.
    advice : str

    Raises
    ------
    InputError
        If the block finds it damaged.
    """
    try:
        yield
    except UNREADABLE as error:
        raise InputError(
            f"{name}: must be {what}; cannot be read: {first_line(error)}. {advice}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind."""
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def rows_changed(name: str) -> SourceChangedError:
    """Return the error of a source whose rows are not those that were indexed."""
    return SourceChangedError(
        f"{name}: must hold the rows that were indexed; it does not. Put it back or start anew."
    )


def _patterns(inputs: Iterable[str]) -> Iterator[tuple[fsspec.AbstractFileSystem, str, str]]:
    """Yield filesystem, path there and text of each input, with braces expanded."""
    for given in inputs:
        is_literal = "{" not in given or storage.exists(given)
        for text in [given] if is_literal else storage.expand_braces(given):
            fs, path = storage.filesystem(text)
            if is_http(fs) and (glob.has_magic(path) or path.endswith("/")):
                raise InputError(
                    f"{text}: must name a file, as an HTTP server lists none and a query is no "
                    "part of a name. Name files, or ranges of them as {000..123}."
                )
            yield fs, path.rstrip("/") or "/", text


def _is_pattern(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    return glob.has_magic(path) and not ask(fs, path, lambda: fs.exists(path))


def find_root(inputs: tuple[str, ...]) -> str:
    """Return the folder that all inputs are in: names are relative to it.

    A folder counts as itself, a file as the folder it is in, a pattern as the folder above its
    first wildcard; so the root does not depend on which files a folder or pattern holds.

    Raises
    ------
    InputError
        If there is none.
    """
    return _find_root(inputs, os.getcwd())


# Every task asks, and to answer takes a look at every input; a relative one depends on `_`.
@functools.lru_cache(maxsize=64)
def _find_root(inputs: tuple[str, ...], _: str) -> str:
    folders: list[list[str]] = []
    first: fsspec.AbstractFileSystem | None = None
    for fs, path, text in _patterns(inputs):
        first = first or fs
        if fs != first:
            raise InputError(f"{text}: inputs must be in one store. Copy them or run twice.")
        if _is_pattern(fs, path):
            parts = path.split("/")
            wild = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            folders.append(parts[:wild])
        else:
            is_file = is_http(fs) or split_suffix(path)[1] in _SOURCE_SUFFIXES
            is_file = is_file or not ask(fs, text, partial(fs.isdir, path))
            folders.append((parent(path) if is_file else path).split("/"))
    if first is None:
        raise InputError("--input: must name at least one file or folder; got none. Add one.")
    shared = folders[0]
    for parts in folders[1:]:
        same = (a == b for a, b in zip(shared, parts, strict=False))
        shared = shared[: next((i for i, equal in enumerate(same) if not equal), len(parts))]
    path = "/".join(shared)
    if isinstance(first, LocalFileSystem):
        return path or "/"
    if is_http(first) and len(shared) < 3:  # "https:", "", the server
        raise InputError(f"{inputs[0]}: inputs must be on one server. Copy them or run twice.")
    if not path.strip("/") and first.protocol not in ("memory", ("memory",)):
        raise InputError(f"{inputs[0]}: inputs must share a bucket. Copy them or run twice.")
    return str(first.unstrip_protocol(path))


def list_files(inputs: tuple[str, ...], root: str) -> list[File]:
    """Return all files of the inputs, sorted by name, each once.

    Names with a part that begins with "." are left out, except where the user names them.

    Raises
    ------
    InputError
        If an input does not exist, holds nothing or is not below `root`.
    """
    files: dict[str, File] = {}
    for fs, path, text in _patterns(inputs):
        found = _find(fs, path, text)
        if not found:
            raise InputError(f"{text}: must hold files; it is empty. Name another.")
        for one, info in found.items():
            file = _file(fs, one, info, root, text)
            files[file.name] = file
    return [files[name] for name in sorted(files)]


def _find(fs: fsspec.AbstractFileSystem, path: str, text: str) -> dict[str, dict[str, Any]]:
    """Return the store's record of each file below `path`, which may be a pattern."""
    try:
        is_pattern = _is_pattern(fs, path)
        if is_pattern:
            matches = ask(fs, text, lambda: fs.glob(path, detail=True))
        else:
            matches = {path: ask(fs, text, lambda: fs.info(path))}
        found: dict[str, dict[str, Any]] = {}
        for one, info in matches.items():
            found |= _find_below(fs, one) if info["type"] == "directory" else {one: info}
    except FileNotFoundError as error:
        raise InputError(
            f"{text}: must be a file, folder or pattern; no such path. Correct it."
        ) from error
    except OSError as error:
        why = f"{error.filename or text}: {error.strerror or error}"
        raise InputError(f"{text}: must be readable; got {why}. Check permissions.") from error
    if not matches:
        raise InputError(f"{text}: must match at least one file; matches none. Correct it.")
    return found


def _find_below(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """Return the record of each file below a folder."""
    prefix = folder.rstrip("/") + "/"
    # By default an unreadable folder would be passed over in silence.
    options = {"on_error": "raise"} if isinstance(fs, LocalFileSystem) else {}
    found = {}
    listed = ask(fs, folder, lambda: fs.find(folder, detail=True, **options))
    for name, info in listed.items():
        if _is_hidden(name[len(prefix) :]):
            continue
        if info.get("islink") and fs.isdir(name):
            _log.warning("%s: a link to a folder is not followed; name it as an input", name)
            continue
        found[name] = info
    return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _file(
    fs: fsspec.AbstractFileSystem, path: str, info: dict[str, Any], root: str, text: str
) -> File:
    prefix = storage.filesystem(root)[1].rstrip("/") + "/"
    if not path.startswith(prefix):
        raise InputError(
            f"{text}: must be below ingest.root; got {root}. Set the root above all inputs."
        )
    name = path[len(prefix) :]
    return File(name, storage.join(root, name), int(info["size"] or 0), _checksum(fs, info))


def _checksum(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> str | None:
    if isinstance(fs, LocalFileSystem):
        return None
    return next((str(info[name]).strip('"') for name in _CHECKSUMS if info.get(name)), None)


def list_folder(folder: str) -> dict[str, File]:
    """Return the files right in a folder by base name, sorted; none if there is no such folder."""
    fs, path = storage.filesystem(folder)
    try:
        found = ask(fs, folder, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    files = {}
    for info in sorted(found, key=lambda info: str(info["name"])):
        base = info["name"].rstrip("/").rsplit("/", 1)[-1]
        if info["type"] != "directory" and not _is_hidden(base):
            url = storage.join(folder, base)
            files[base] = File(base, url, int(info["size"] or 0), _checksum(fs, info))
    return files


def identify(source: Source) -> dict[str, Any]:
    """Return what tells a source's content: its name, size and a digest of all its files.

    A file's digest is its store's checksum (of an HTTP server that has none the time of the last
    change), else BLAKE2b of up to 64 evenly spaced blocks of 16 KiB: all of a file of 1 MiB or
    less. Neither times of local files nor places of any are part of it.

    Raises
    ------
    SourceChangedError
        If a file is gone.
    """
    whole = hashlib.blake2b(digest_size=16)
    for file in source.files:
        record = [file.name, str(file.size_bytes), file.checksum or _digest(file)]
        # A name cannot hold NUL, so that no two lists of records read the same.
        whole.update("\0".join([*record, ""]).encode("utf-8", "surrogatepass"))
    size_bytes = sum(file.size_bytes for file in source.files)
    return {"name": source.name, "size_bytes": size_bytes, "digest": whole.hexdigest()}


def _digest(file: File) -> str:
    content = hashlib.blake2b(digest_size=16)
    with open_binary(file.url, _BLOCK_BYTES) as opened:
        if file.size_bytes <= _BLOCKS * _BLOCK_BYTES:
            content.update(opened.read())
        else:
            for i in range(_BLOCKS):
                opened.seek(i * (file.size_bytes - _BLOCK_BYTES) // (_BLOCKS - 1))
                content.update(opened.read(_BLOCK_BYTES))
    return content.hexdigest()
