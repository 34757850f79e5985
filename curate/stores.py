"""Where files lie: local disks, object stores and HTTP servers, by fsspec.

A store is asked anew each time: a listing that was kept would hide what other workers have written
since. Its failures are told in one line. Clients of object stores try again by themselves; that of
HTTP does not, and is made to.
"""

import errno
import io
import logging
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from curate.errors import InputError, StorageError

__all__ = ["ask", "filesystem", "is_http", "is_local", "open_binary"]

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

#: How often an HTTP server is asked, and how long after the first failure; then twice as long.
_TRIES = 5
_PAUSE_SECONDS = 0.25
#: What an answer says that may be another one soon (RFC 9110, 6585).
_BUSY = (408, 425, 429)
_NO_SUCH_PATH = (None, 400, 404, 410)
#: What a caller may want to know of a path, rather than of its store.
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

#: Extras of the package that bring what a protocol needs.
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of `url` and its path there.

    Raises
    ------
    InputError
        If the protocol is unknown or the package it needs is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition(":")[0])
        advice = f"Run pip install 'curate[{extra}]'" if extra else f"{error}"
        raise InputError(
            f"{url}: needs a package that is not installed. {advice.rstrip('.')}."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{url}: must be a path or a URL that fsspec knows; got {error}. Correct it."
        ) from error


def is_local(url: str) -> bool:
    """Tell whether `url` is on a local disk."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def is_http(fs: fsspec.AbstractFileSystem) -> bool:
    """Tell whether a filesystem is HTTP servers: read only, and without listings."""
    return "http" in fs.protocol


def ask(fs: fsspec.AbstractFileSystem, url: str, request: Callable[[], _Answer]) -> _Answer:
    """Return what `request()` returns, trying again where that may help.

    Errors of a local disk and what a store says of a path (it is not there, it is no folder) come
    as they are.

    Raises
    ------
    StorageError
        If the store refuses, cannot be reached, or fails again and again.
    """
    if isinstance(fs, LocalFileSystem):
        return request()
    for number in range(_TRIES):
        try:
            return request()
        except Exception as error:
            status = _status(error)
            may_pass = _may_pass(error, status)
            if is_http(fs) and may_pass and number + 1 < _TRIES:
                time.sleep(_PAUSE_SECONDS * 2**number)
            elif isinstance(error, _ANSWERS) and not may_pass and status in _NO_SUCH_PATH:
                raise
            elif isinstance(error, OSError) or not _is_ours(error):
                raise _failure(url, error, status) from error
            else:
                raise
    raise AssertionError("the last try returns or raises")


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__
    return found


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error came from, if it names one."""
    known = (getattr(one, "status", None) for one in _chain(error))
    return next((status for status in known if isinstance(status, int)), None)


def _may_pass(error: BaseException, status: int | None) -> bool:
    if status is not None:
        return status in _BUSY or status >= 500
    return any(
        isinstance(one, ConnectionError | TimeoutError) or _package(one) == "aiohttp"
        for one in _chain(error)
        if not isinstance(one, ValueError)  # a URL that is none
    )


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _is_ours(error: BaseException) -> bool:
    """Tell whether an error is Python's or this package's own, and not of a store's client."""
    return _package(error) in ("builtins", "curate", "pyarrow", "numpy")


def _failure(url: str, error: Exception, status: int | None) -> StorageError:
    # The client's own words, which may come with advice of its own, are one line at most.
    why = str(error).partition("\n")[0].strip().rstrip(".") or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.EBUSY:  # s3fs: another checksum
        return StorageError(
            f"{url}: must stay as it is while it is read; it changed. Run the same command again "
            "to start anew with it."
        )
    if "Credential" in type(error).__name__:
        return StorageError(
            f"{url}: must be given credentials; got none ({why}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or a profile, or FSSPEC_S3_ANON=true for a public bucket."
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(
            f"{url}: must be accessible; got {why}. Check the credentials and what they allow."
        )
    return StorageError(
        f"{url}: must be reachable; got {why}. Run the same command again to resume."
    )


def open_binary(url: str, buffer_bytes: int = 1 << 20) -> BinaryIO:
    """Open a file for reading, wherever it is.

    Parameters
    ----------
    buffer_bytes : int
        How much of a remote file one request asks for at least; with 0, each read is one request.

    Raises
    ------
    FileNotFoundError
    StorageError
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    remote = _Remote(fs, path, url)
    return io.BufferedReader(remote, buffer_bytes) if buffer_bytes else remote  # type: ignore[return-value]


class _Remote(io.RawIOBase):
    """A remote file of which each read is one request for a range.

    A server that gives no ranges, or does not say how long a file is, is asked for the whole once,
    into a temporary file.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str) -> None:
        self._fs, self._path, self._url = fs, path, url
        self._file: Any = ask(fs, url, lambda: fs.open(path, "rb", cache_type="none"))
        # Objects' sizes are asked for when first needed; memory's "file" knows no other way.
        self._size: int | None = ask(fs, url, lambda: getattr(self._file, "size", None))
        self._at = 0
        self._whole: IO[bytes] | None = None
        if self._size is None:
            self._fetch_whole()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, of which the server learns with the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read the next range."""
        count = min(len(buffer), (self._size or 0) - self._at)
        if count <= 0:
            return 0
        data = self._read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        for file in (self._file, self._whole):
            if file is not None:
                file.close()
        super().close()

    def _read(self, count: int) -> bytes:
        if self._whole is None:
            try:
                return ask(self._fs, self._url, lambda: self._read_range(count))
            except FileNotFoundError as error:  # it was there, so this says nothing of its content
                raise StorageError(
                    f"{self._url}: must stay where it is while it is read; got {error}. "
                    "Put it back and run the same command again to resume."
                ) from error
            except ValueError:  # from HTTP's client alone: the server sent all of it
                self._fetch_whole()
        assert self._whole is not None
        self._whole.seek(self._at)
        return self._whole.read(count)

    def _read_range(self, count: int) -> bytes:
        self._file.seek(self._at)
        return bytes(self._file.read(count))

    def _fetch_whole(self) -> None:
        _log.info("%s: the server gives no ranges; each task fetches the whole", self._url)
        whole = tempfile.TemporaryFile()  # noqa: SIM115

        def fetch() -> None:
            whole.seek(0)
            whole.truncate()
            self._fs.get_file(self._path, whole)

        ask(self._fs, self._url, fetch)
        self._whole, self._size = whole, whole.seek(0, io.SEEK_END)
