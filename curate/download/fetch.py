"""One file from an untrusted URL, within limits: what an image server may make us do, and no more.

Only http and https. The address that was judged is the one connected to, for every redirect anew,
so that a name which resolves differently the second time gains nothing. Proxies, cookies and
credentials of the environment are not used, and bodies are not decompressed.
"""

import contextlib
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from functools import cache
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from curate.download.addresses import RefusedError, resolve

__all__ = ["FetchError", "Limits", "fetch"]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
#: What may come besides the body: status lines, headers, the lengths of chunks.
_OVERHEAD_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 10
#: RFC 3986's reserved characters, and % of what is quoted already.
_SAFE = "%/:=&?~#+!$,;'@()*[]"
_MAX_URL_CHARS = 16_384


class FetchError(Exception):
    """Why a file could not be had: a short text that is the same for the same cause."""


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Parameters
    ----------
    max_bytes : int
    max_seconds : float
        From the first connection to the last byte, redirects included.
    stall_seconds : float
        How long nothing may come.
    max_redirects : int
    allowed : tuple of str
        Addresses and CIDR ranges that may be reached although they are not public.
    """

    max_bytes: int
    max_seconds: float
    stall_seconds: float
    max_redirects: int
    allowed: tuple[str, ...] = ()


def fetch(
    url: str | None,
    limits: Limits,
    user_agent: str,
    opts_out: Callable[[Message], bool] = lambda headers: False,
) -> bytes:
    """Return the file at a URL.

    Parameters
    ----------
    url : str or None
    limits : Limits
    user_agent : str
    opts_out : callable
        Tells by a response's headers whether its owner does not want it used.

    Raises
    ------
    FetchError
        If it cannot be had; "refused: ..." if it was not asked for.
    """
    deadline = time.monotonic() + limits.max_seconds
    try:
        target = _check_url(url or "")
        for _ in range(limits.max_redirects + 1):
            with _opened(target, limits, deadline, user_agent) as response:
                if response.status not in _REDIRECTS:
                    return _read(response, limits, opts_out)
                place = response.headers.get("Location")
                if place is None:
                    raise FetchError(f"HTTP Error {response.status}: redirect to nowhere")
            target = _check_url(urljoin(target.geturl(), _quote(place)))
        raise FetchError(f"more than {limits.max_redirects} redirects")
    except RefusedError as error:
        raise FetchError(f"refused: {error}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(_explain(error)) from error


def _explain(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "the host's name cannot be resolved"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the server's certificate cannot be verified"
    if isinstance(error, ssl.SSLError):
        return "no TLS with the server"
    if isinstance(error, http.client.IncompleteRead):
        return "truncated"
    if isinstance(error, http.client.InvalidURL):
        return "not a valid URL"
    if isinstance(error, http.client.HTTPException):
        return "not an answer in HTTP"
    if isinstance(error, OSError):
        return error.strerror or "no connection"
    return "not a valid URL"


def _quote(url: str) -> str:
    # Locations are read as Latin-1: what is not ASCII there is mostly UTF-8.
    with contextlib.suppress(UnicodeError):
        url = url.encode("latin-1").decode("utf-8")
    return url.strip()


def _check_url(url: str) -> SplitResult:
    """Return the parts of a URL that may be asked for: host in ASCII, path quoted."""
    url = url.strip()
    if not url:
        raise FetchError("no URL")
    if len(url) > _MAX_URL_CHARS:
        raise FetchError(f"a URL of more than {_MAX_URL_CHARS} characters")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise RefusedError("neither http nor https")
    if "@" in parts.netloc:
        raise RefusedError("a user's name in the URL")
    host = parts.hostname or ""
    if not host or "%" in host:
        raise FetchError("not a valid URL")
    if ":" not in host:
        host = host.encode("idna").decode("ascii")
    port = parts.port or _PORTS[parts.scheme]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path, query = quote(parts.path or "/", safe=_SAFE), quote(parts.query, safe=_SAFE)
    return SplitResult(parts.scheme, place, path, query, "")


class _Stream(io.RawIOBase):
    """What a socket receives, up to a deadline and a number of bytes."""

    def __init__(self, raw: socket.socket, limits: Limits, deadline: float) -> None:
        self._raw = raw
        self._limits = limits
        self._deadline = deadline
        self._left_bytes = limits.max_bytes + _OVERHEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        _arm(self._raw, self._limits, self._deadline)
        count = self._raw.recv_into(buffer)
        self._left_bytes -= count
        if self._left_bytes < 0:
            raise FetchError(f"more than {self._limits.max_bytes} bytes")
        return count


class _Channel:
    """As much of a socket as `http.client` uses; closing is left to who opened it."""

    def __init__(self, raw: socket.socket, limits: Limits, deadline: float) -> None:
        self._stream = io.BufferedReader(_Stream(raw, limits, deadline))
        self.sendall = raw.sendall

    def makefile(self, mode: str) -> "io.BufferedReader[_Stream]":
        return self._stream

    def close(self) -> None:
        """Keep it open: the response is still to be read."""


def _arm(raw: socket.socket, limits: Limits, deadline: float) -> None:
    left_seconds = deadline - time.monotonic()
    if left_seconds <= 0:
        raise TimeoutError
    raw.settimeout(min(left_seconds, limits.stall_seconds))


@contextlib.contextmanager
def _opened(
    target: SplitResult, limits: Limits, deadline: float, user_agent: str
) -> Iterator[http.client.HTTPResponse]:
    """Yield the response to a request, its body unread."""
    host, port = target.hostname or "", target.port or _PORTS[target.scheme]
    with _connect(host, port, limits, deadline) as plain, contextlib.ExitStack() as stack:
        raw = plain
        if target.scheme == "https":
            _arm(plain, limits, deadline)
            raw = stack.enter_context(_tls().wrap_socket(plain, server_hostname=host))
        _arm(raw, limits, deadline)
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = _PORTS[target.scheme]
        connection.sock = _Channel(raw, limits, deadline)
        path = f"{target.path}?{target.query}" if target.query else target.path
        headers = {"User-Agent": user_agent, "Accept": "image/*,*/*;q=0.8", "Connection": "close"}
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            yield response


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(host: str, port: int, limits: Limits, deadline: float) -> socket.socket:
    """Connect to the first of a host's addresses that answers, all of them judged before."""
    failure: OSError = OSError("no address")
    for family, place in resolve(host, port, limits.allowed):
        with contextlib.ExitStack() as stack:
            try:
                raw = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                _arm(raw, limits, deadline)
                raw.connect(place)
            except OSError as error:
                failure = error
            else:
                stack.pop_all()
                return raw
    raise failure


def _read(
    response: http.client.HTTPResponse, limits: Limits, opts_out: Callable[[Message], bool]
) -> bytes:
    status = response.status
    if not 200 <= status < 300:
        phrase = http.client.responses.get(status, "")
        raise FetchError(f"HTTP Error {status}: {phrase}".rstrip(": "))
    if opts_out(response.headers):
        raise FetchError("Use of image disallowed by X-Robots-Tag directive")
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"):
        raise FetchError("compressed, which was not asked for")
    expected = response.length
    too_long = FetchError(f"more than {limits.max_bytes} bytes")
    if expected is not None and expected > limits.max_bytes:
        raise too_long
    body = io.BytesIO()
    while chunk := response.read(_CHUNK_BYTES):
        body.write(chunk)
        if body.tell() > limits.max_bytes:
            raise too_long
    if expected is not None and body.tell() < expected:
        raise FetchError("truncated")
    if not body.tell():
        raise FetchError("empty")
    return body.getvalue()
