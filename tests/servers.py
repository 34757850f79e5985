"""Real servers on loopback that count what they are asked and can be made to fail."""

import contextlib
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

#: What a client needs to reach an endpoint of moto's; no other store is asked for credentials.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
#: What S3 says with a status.
FAILURES = {500: "InternalError", 503: "SlowDown"}

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Gate:
    """Stands before a server: notes requests, and fails those that a rule picks.

    Parameters
    ----------
    rule : callable
        `rule(method, path)` returns None, a status to fail with, "cut" for half a body, or "slow"
        for an answer that comes after the next request.
    seen : list of (str, str, str)
        Method, path and range of every request.
    sent_bytes : Counter of str
        Bytes of the bodies that were sent, by path.
    """

    app: App
    rule: Callable[[str, str], int | str | None] = lambda method, path: None
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    _next: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._next:
            self.seen.append((method, path, environ.get("HTTP_RANGE", "")))
            self._next.notify_all()
        fate = self.rule(method, path)
        if fate == "slow":
            with self._next:
                before = len(self.seen)
                self._next.wait_for(lambda: len(self.seen) > before, timeout=60)
        if isinstance(fate, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = FAILURES.get(fate, "Failed")
            answer = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
            return Response(answer, fate, content_type="application/xml")(environ, start)
        body = b"".join(self.app(environ, start))
        body = body[: len(body) // 2] if fate == "cut" else body
        with self._next:
            self.sent_bytes[path] += len(body) if method == "GET" else 0
        return [body]

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in path for one, path, _ in self.seen)

    def fail(self, count: int, fate: int | str, method: str, part: str = "") -> None:
        """Fail the next requests of one kind."""
        left = iter(range(count))

        def rule(asked: str, path: str) -> int | str | None:
            is_meant = asked == method and part in path
            return fate if is_meant and next(left, None) is not None else None

        self.rule = rule


@dataclass
class Server:
    """Where a server listens, and its gate."""

    url: str
    gate: Gate


@contextlib.contextmanager
def serve(app: App) -> Iterator[Server]:
    """Serve on any free port of loopback."""
    gate = Gate(app)
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.port}", gate)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_s3() -> Iterator[Server]:
    """Serve an S3 endpoint that holds its objects in memory."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    with serve(DomainDispatcherApplication(create_backend_app)) as server:
        reset = urllib.request.Request(f"{server.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # what an earlier endpoint of this process held
        yield server


@contextlib.contextmanager
def serve_files(folder: Path, ranges: bool = True) -> Iterator[Server]:
    """Serve the files of a folder, as a plain web server does."""

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        path = folder / request.path.lstrip("/")
        if not path.is_file():
            return Response("no such file", 404)(environ, start)
        response = Response(path.read_bytes(), content_type="application/octet-stream")
        response.last_modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        if ranges:
            size_bytes = path.stat().st_size
            response.make_conditional(environ, accept_ranges=True, complete_length=size_bytes)
        return response(environ, start)

    with serve(app) as server:
        yield server


@contextlib.contextmanager
def use_s3() -> Iterator[tuple[Server, Any]]:
    """Serve S3 to this process and those that it starts, with one bucket; yield a client, too."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch, serve_s3() as server:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        yield server, fs
        s3fs.S3FileSystem.clear_instance_cache()
