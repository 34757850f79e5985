"""A web server on loopback that serves images and everything that can go wrong with them."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's pages say; unknown paths are 404s."""

    server: "Server"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.web.asked[path] += 1
            self.server.web.agents.add(self.headers.get("User-Agent", ""))
            self.server.web.hosts.add(self.headers.get("Host", ""))
        answer = self.server.web.pages.get(path)
        # Whoever asked may have left: that is what some of the pages are for.
        with contextlib.suppress(OSError):
            if answer is None:
                self.send_error(404)
            else:
                answer(self)

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        """Answer whole; underscores in the headers' names are dashes."""
        self.send_response(status)
        named = {"Content-Type": "image/png", "Content-Length": str(len(body))}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, web: "Web") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.web = web
        self.lock = threading.Lock()


@dataclass
class Web:
    """What a server answers, and what it was asked.

    Parameters
    ----------
    pages : dict of str to callable
        By path.
    """

    pages: dict[str, Answer] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    agents: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    port: int = 0
    #: Set when the test is over, for answers that never end.
    over: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(self, path: str, body: bytes, **headers: str) -> str:
        """Serve a body at a path; return its URL."""
        self.pages[path] = lambda handler: handler.reply(body, **headers)
        return self.url(path)

    def redirect(self, path: str, target: str, status: int = 302) -> str:
        self.pages[path] = lambda handler: handler.reply(b"", status, Location=target)
        return self.url(path)

    def answer(self, path: str, answer: Answer) -> str:
        self.pages[path] = answer
        return self.url(path)


@contextlib.contextmanager
def running() -> Iterator[Web]:
    """Run a server for the block."""
    web = Web()
    server = Server(web)
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def endless(web: Web) -> Answer:
    """Answer with a body that never ends, as fast as it is taken."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not web.over.is_set():
            handler.wfile.write(b"x" * 65536)

    return answer


def dripping(web: Web, head: bytes, drop: bytes) -> Answer:
    """Answer with raw bytes, then one drop every 20 ms for ever: never idle, never done."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(head)
        while not web.over.wait(0.02):
            handler.wfile.write(drop)
            handler.wfile.flush()

    return answer


def truncated(body: bytes, keep: int) -> Answer:
    """Promise a body and close after `keep` bytes of it."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:keep])

    return answer


def silent(web: Web) -> Answer:
    """Accept the request and say nothing."""
    return lambda handler: web.over.wait(60) and None  # type: ignore[func-returns-value]
