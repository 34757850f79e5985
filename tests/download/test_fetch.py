"""One fetch against a server that misbehaves in every way we know of."""

import gzip
import io
import ipaddress
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from curate.download import addresses, fetch
from curate.download.fetch import FetchError, Limits
from tests import web as local
from tests.web import Handler, Web

BODY = b"image bytes " * 1000
LOOPBACK = ("127.0.0.1",)


@pytest.fixture
def web() -> Iterator[Web]:
    with local.running() as one:
        yield one


def limits(**changed: Any) -> Limits:
    given: dict[str, Any] = {
        "max_bytes": 100_000, "max_seconds": 20.0, "stall_seconds": 10.0,
        "max_redirects": 3, "allowed": LOOPBACK,
    }  # fmt: skip
    return Limits(**{**given, **changed})


def get(url: str | None, **changed: Any) -> bytes:
    return fetch.fetch(url, limits(**changed), "agent")


def refusal(url: str | None, **changed: Any) -> str:
    with pytest.raises(FetchError) as caught:
        get(url, **changed)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def test_gets_what_is_there(web: Web) -> None:
    assert get(web.serve("/a.png", BODY)) == BODY
    assert web.agents == {"agent"}
    assert web.hosts == {f"127.0.0.1:{web.port}"}


def test_proxies_of_the_environment_are_not_used(web: Web, monkeypatch: Any) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(web.serve("/a.png", BODY)) == BODY


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "no URL"),
        ("", "no URL"),
        ("  ", "no URL"),
        ("file:///etc/passwd", "refused: neither http nor https"),
        ("FILE:///etc/passwd", "refused: neither http nor https"),
        ("ftp://example.com/a", "refused: neither http nor https"),
        ("data:image/png;base64,AAAA", "refused: neither http nor https"),
        ("//example.com/a.png", "refused: neither http nor https"),
        ("example.com/a.png", "refused: neither http nor https"),
        ("gopher://127.0.0.1:25/x", "refused: neither http nor https"),
        ("http:///a.png", "not a valid URL"),
        ("http://[::1", "not a valid URL"),
        ("http://127.0.0.1:99999/", "not a valid URL"),
        ("http://127.0.0.1:port/", "not a valid URL"),
        ("http://a..b/", "the host's name cannot be resolved"),
        ("http://" + "a" * 64 + ".example/", "the host's name cannot be resolved"),
        ("http://nothing.invalid/", "the host's name cannot be resolved"),
        ("http://fe80::1%25eth0/", "not a valid URL"),
        ("http://[fe80::1%25lo]/", "not a valid URL"),
        ("http://user:secret@127.0.0.1/", "refused: a user's name in the URL"),
        ("http://example.com@127.0.0.1/", "refused: a user's name in the URL"),
        ("http://x/" + "a" * 20_000, "a URL of more than 16384 characters"),
    ],
)
def test_urls_that_are_not_asked_for(url: str | None, message: str) -> None:
    assert refusal(url, allowed=()) == message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "0",
        "0.0.0.0", "127.0.0.2", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "localhost", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
        "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]",
        "[64:ff9b:1::1]", "[2001:db8::1]", "[2001::1]", "①②⑦.0.0.1", "１２７.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    text = refusal(f"http://{host}/", allowed=())
    # A system without IPv6 may refuse to resolve such an address: no connection either.
    assert text.startswith("refused: address ") or (
        host.startswith("[") and text == "the host's name cannot be resolved"
    )
    assert refusal(f"https://{host}:8443/a?b=c", allowed=()) == text


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2002:808:808::1"])
def test_public_addresses_are_allowed(text: str) -> None:
    assert addresses.is_allowed(ipaddress.ip_address(text))


def test_what_is_allowed_by_name_is_all_that_is() -> None:
    allowed = ("127.0.0.1", "10.1.0.0/16", "fd00::/8")
    for text in ("127.0.0.1", "::ffff:127.0.0.1", "10.1.200.3", "fd12::1", "9.9.9.9"):
        assert addresses.is_allowed(ipaddress.ip_address(text), allowed)
    for text in ("127.0.0.2", "10.2.0.1", "fc00::1", "::1"):
        assert not addresses.is_allowed(ipaddress.ip_address(text), allowed)


def names(monkeypatch: Any, *answers: list[str]) -> list[str]:
    """Let the resolver give an answer each time it is asked, the last for ever; note the names."""
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        found = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in a], socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolve)
    return asked


def test_one_private_address_among_several_is_enough(monkeypatch: Any) -> None:
    names(monkeypatch, ["8.8.8.8", "10.0.0.1"])
    assert refusal("http://mixed.example/") == "refused: address 10.0.0.1 is not public"


def test_a_name_is_resolved_once_for_judging_and_connecting(web: Web, monkeypatch: Any) -> None:
    # A second question would be answered with an address that is not allowed.
    asked = names(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])
    web.serve("/a.png", BODY)
    assert get(f"http://rebinding.example:{web.port}/a.png") == BODY
    assert asked == ["rebinding.example"]
    assert web.hosts == {f"rebinding.example:{web.port}"}


def test_the_next_address_is_tried(web: Web, monkeypatch: Any) -> None:
    names(monkeypatch, ["::1", "127.0.0.1"])
    web.serve("/a.png", BODY)
    url = f"http://two.example:{web.port}/a.png"
    assert get(url, allowed=("::1", "127.0.0.1")) == BODY
    assert refusal(url) == "refused: address ::1 is not public"


def test_names_of_other_scripts_are_asked_for_in_ascii(web: Web, monkeypatch: Any) -> None:
    asked = names(monkeypatch, ["127.0.0.1"])
    web.serve("/k%C3%A4fer%20a.png", BODY)
    assert get(f"http://bücher.example:{web.port}/käfer a.png#part") == BODY
    assert asked == ["xn--bcher-kva.example"]


def test_redirects_are_followed_and_judged(web: Web) -> None:
    web.serve("/a.png", BODY)
    web.redirect("/2", "/a.png", 307)
    assert get(web.redirect("/1", "2?x=1")) == BODY
    assert web.asked == {"/1": 1, "/2": 1, "/a.png": 1}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://10.0.0.1/", "refused: address 10.0.0.1 is not public"),
        ("http://127.0.0.2:{port}/a.png", "refused: address 127.0.0.2 is not public"),
        ("//0x7f.0.0.3/a.png", "refused: address 127.0.0.3 is not public"),
        ("http://169.254.169.254/latest/", "refused: address 169.254.169.254 is not public"),
        ("file:///etc/passwd", "refused: neither http nor https"),
        ("ftp://127.0.0.1/a", "refused: neither http nor https"),
        ("javascript:alert(1)", "refused: neither http nor https"),
        ("http://u@127.0.0.1:{port}/a.png", "refused: a user's name in the URL"),
        ("/loop", "more than 3 redirects"),
        ("http://[", "not a valid URL"),
    ],
)
def test_redirects_that_are_not_followed(web: Web, target: str, message: str) -> None:
    web.serve("/a.png", BODY)
    url = web.redirect("/loop", target.replace("{port}", str(web.port)))
    assert refusal(url) == message
    assert web.asked["/a.png"] == 0


def test_redirect_without_a_place(web: Web) -> None:
    url = web.answer("/a", lambda handler: handler.reply(b"", 302))
    assert refusal(url) == "HTTP Error 302: redirect to nowhere"


@pytest.mark.parametrize("status", [204, 304, 403, 404, 410, 429, 500, 503])
def test_other_answers(web: Web, status: int) -> None:
    url = web.answer("/a", lambda handler: handler.reply(b"", status))
    expected = "empty" if status == 204 else f"HTTP Error {status}: "
    assert refusal(url).startswith(expected)


def test_bodies_of_the_wrong_length(web: Web) -> None:
    assert refusal(web.answer("/cut", local.truncated(BODY, 500))) == "truncated"
    assert refusal(web.serve("/none", b"")) == "empty"
    assert refusal(web.serve("/long", BODY), max_bytes=len(BODY) - 1) == "more than 11999 bytes"
    assert get(web.url("/long"), max_bytes=len(BODY)) == BODY
    assert refusal(web.answer("/endless", local.endless(web))) == "more than 100000 bytes"


def chunked(handler: Handler, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for chunk in chunks:
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    handler.wfile.write(end)


def test_bodies_in_chunks(web: Web) -> None:
    assert get(web.answer("/a", lambda h: chunked(h, BODY, BODY))) == BODY + BODY
    assert refusal(web.answer("/b", lambda h: chunked(h, BODY, end=b""))) == "truncated"
    assert refusal(web.answer("/c", lambda h: chunked(h, *[BODY] * 9))) == "more than 100000 bytes"
    # A promise of 2^60 bytes must not be believed in advance.
    url = web.answer("/d", lambda h: chunked(h, end=b"1000000000000000\r\n" + BODY * 20))
    assert refusal(url) == "more than 100000 bytes"


def test_compressed_bodies_are_not_taken(web: Web) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    assert refusal(web.serve("/bomb", bomb, Content_Encoding="gzip")).startswith("compressed")
    # Without the header they are bytes like any others, and nobody unpacks them.
    assert get(web.serve("/plain", bomb)) == bomb


def test_what_is_no_http(web: Web) -> None:
    url = web.answer("/a", lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n") and None)
    assert refusal(url) == "not an answer in HTTP"
    many = b"".join(b"X-%d: y\r\n" % i for i in range(500))
    url = web.answer("/b", lambda h: h.wfile.write(b"HTTP/1.1 200 OK\r\n" + many) and None)
    assert refusal(url) == "not an answer in HTTP"
    # Plain HTTP where TLS was asked for.
    assert refusal(web.serve("/c", BODY).replace("http:", "https:")) == "no TLS with the server"


DRIPS = {
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "status": (b"HTTP/1.1 ", b"1"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
        b"X: y\r\n",
    ),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_servers_that_never_stall_and_never_end(web: Web, drip: str) -> None:
    url = web.answer("/drip", local.dripping(web, *DRIPS[drip]))
    begun = time.monotonic()
    assert refusal(url, max_seconds=0.3) == "timed out"
    assert time.monotonic() - begun < 5


def test_servers_that_say_nothing(web: Web) -> None:
    url = web.answer("/silent", local.silent(web))
    assert refusal(url, stall_seconds=0.1) == "timed out"


def test_time_is_counted_over_redirects(web: Web, monkeypatch: Any) -> None:
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(fetch.time, "monotonic", lambda: float(next(clock)))
    web.serve("/a.png", BODY)
    assert refusal(web.redirect("/1", "/a.png")) == "timed out"


def test_opt_out_is_heard_before_the_body_is_read(web: Web) -> None:
    url = web.answer("/endless", local.endless(web))
    with pytest.raises(FetchError, match="X-Robots-Tag"):
        fetch.fetch(url, limits(), "agent", lambda headers: "Date" in headers)


def test_a_port_where_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert refusal(f"http://127.0.0.1:{port}/") == "Connection refused"


def test_a_stream_reads_no_further_than_its_limit() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.sendall(bytes(4096))
        stream = fetch._Stream(one, limits(max_bytes=0), time.monotonic() + 5)
        stream._left_bytes = 4095
        with pytest.raises(FetchError, match="more than"):
            io.BufferedReader(stream).read(4096)
