import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from curate.engine import progress as module
from curate.engine.progress import PlainProgress, TerminalProgress, make_progress


class Terminal(io.StringIO):
    """A stream that says that people look at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs these tests may be a CI, or have no colours."""
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("variables", "moves"),
    [
        ({}, True),
        ({"CI": "false"}, True),
        ({"NO_COLOR": "1"}, True),
        ({"CI": "true"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "unknown"}, False),
    ],
    ids=["terminal", "not-ci", "no-color", "ci", "dumb", "unknown"],
)
def test_the_display_fits_the_stream(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], moves: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), TerminalProgress if moves else PlainProgress)


#: Three stages, shown for long enough to be drawn anew.
SCRIPT = """
import time
from curate.engine.progress import make_progress
with make_progress() as progress:
    progress.note("Dask dashboard: http://127.0.0.1:8787/status")
    for stage in ("ingest", "decontaminate", "report"):
        progress.begin(stage, "shards", 3, 0, 2)
        for _ in range(3):
            time.sleep(0.1)
            progress.advance({"samples": 40, "reason.decode_error": 7})
        progress.end()
"""


def on_a_terminal(columns: int, **variables: str) -> str:
    """Run the script on a terminal of so many columns; return everything that is sent to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=theirs, env={**environment, **variables}
    )
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 1 << 16):
            sent += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return sent.decode()


def drawn(sent: str) -> list[str]:
    return [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)) if line
    ]


def test_a_terminal_of_forty_columns() -> None:
    sent = on_a_terminal(40)
    lines = drawn(sent)
    assert all(len(line) <= 40 for line in lines)
    assert "0/0" not in sent, "a stage is shown before its first step"
    last = [line.split()[:3] for line in lines[-3:]]
    assert last == [[name, "done", "in"] for name in ("ingest", "decontaminate", "report")]
    assert sent.rstrip("\r\n").endswith("\x1b[?25h"), "the cursor is back"


def test_a_terminal_without_colours() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9](;[0-9;]*)?m")
    assert colour.search(on_a_terminal(100))
    assert not colour.search(on_a_terminal(100, NO_COLOR="1"))


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"CI": "true"}], ids=["dumb", "ci"])
def test_a_terminal_that_cannot_be_drawn_on(variables: dict[str, str]) -> None:
    sent = on_a_terminal(40, **variables)
    assert "\x1b" not in sent
    names = [line.partition(":")[0] for line in sent.splitlines()]
    assert names == ["Dask dashboard", "ingest", "decontaminate", "report"]


def test_a_long_task_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.01)
    said = threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            if "0/1 tasks" in text:
                said.set()
            return super().write(text)

    stream = Stream()
    with PlainProgress(stream) as progress:
        progress.begin("select", "decide", 1, 0, 2)
        assert said.wait(60)
        progress.advance({"samples": 3})
        progress.end()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "select: decide 0/1 tasks, 2 workers"
    assert lines[-1].startswith("select: done in")


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with make_progress(stream) as progress:
        progress.note("Dask dashboard: off")
        progress.begin("embed", "shards", 8, 2, 2)
        for number in range(6):
            now += 4
            progress.advance({"samples": 50, "reason.decode_error": number % 2})
        progress.end()
        now += 100  # whatever a run does between stages is not a stage's
        progress.begin("dedup", "cells", 1, 0, 1)
        progress.advance({})
        progress.end()
        progress.begin("dedup", "groups", 1, 0, 1)
        progress.end()
    # A line each time ten seconds have passed, and one at the end of a stage.
    assert stream.getvalue().splitlines() == [
        "Dask dashboard: off",
        "embed: shards 5/8 tasks, 0:12 left, 12 samples/s, 2 workers, 1 decode_error",
        "embed: done in 24.0 s, 12 samples/s, 3 decode_error",
        "dedup: done in 0.0 s",
    ]


def test_only_the_commonest_reasons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    stream = io.StringIO()
    with PlainProgress(stream) as progress:
        progress.begin("select", "decide", 1, 0)
        counts = {f"reason.{code}": number for number, code in enumerate("abcde")}
        progress.advance({"samples": 1, **counts})
        progress.end()
    assert stream.getvalue() == "select: done in 0.0 s, 4 e, 3 d, 2 c, 1 other\n"


def test_a_step_with_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with PlainProgress(stream) as progress:
        progress.begin("embed", "shards", 3, 3)
        progress.end()
    assert stream.getvalue().startswith("embed: done in 0.0 s")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [20, 34, 50, 80, 140])
def test_a_line_per_stage_that_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with TerminalProgress(stream) as progress:
        progress.begin("embed", "shards", 4, 1, 2)
        for _ in range(3):
            progress.advance({"samples": 10, "reason.decode_error": 1})
        progress.end()
        for step in ("cells", "search", "groups"):
            progress.begin("dedup", step, 1, 0, 2)
            progress.advance({})
            progress.end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-2:]
    assert [line.split()[0] for line in last] == ["embed", "dedup"]
    assert "done in" in last[0]
    assert all(len(line) <= columns for line in re.split(r"[\r\n]+", shown))
    if columns >= 80:
        assert "samples/s, 3 decode_error" in last[0]
        assert "━" in last[0]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_an_error_ends_the_display(stream: io.StringIO) -> None:
    def stumble() -> None:
        with make_progress(stream) as progress:
            progress.begin("embed", "shards", 4, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stumble()
    assert "done" not in stream.getvalue()
    assert ("\x1b[?25h" in stream.getvalue()) == stream.isatty()  # the cursor is back
