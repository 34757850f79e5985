import io
import re

import pytest

from curate.engine import progress as module
from curate.engine.progress import PlainProgress, TerminalProgress, make_progress


class Terminal(io.StringIO):
    """A stream that says that people look at it."""

    def isatty(self) -> bool:
        return True


def test_the_display_fits_the_stream() -> None:
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), TerminalProgress)


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with make_progress(stream) as progress:
        progress.begin("embed", "shards", 8, 2)
        for _ in range(6):
            now += 4
            progress.advance(50)
        progress.end()
        progress.begin("dedup", "groups", 1, 0)
        progress.advance(0)
        progress.end()
    lines = stream.getvalue().splitlines()
    # A line each time ten seconds have passed, and one at the end of a step.
    assert lines == [
        "embed.shards: 5/8 tasks, 12.0 s, 12 samples/s",
        "embed.shards: 8/8 tasks, 24.0 s, 12 samples/s",
        "dedup.groups: 1/1 tasks, 0.0 s",
    ]


def test_a_step_with_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with PlainProgress(stream) as progress:
        progress.begin("embed", "shards", 3, 3)
        progress.end()
    assert stream.getvalue().startswith("embed.shards: 3/3 tasks")
    assert capsys.readouterr().out == ""


def test_terminal_line() -> None:
    stream = Terminal()
    with TerminalProgress(stream) as progress:
        progress.begin("embed", "shards", 4, 1)
        for _ in range(3):
            progress.advance(10)
        progress.end()
        progress.begin("dedup", "groups", 1, 0)
        progress.advance(0)
        progress.end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "embed.shards" in shown
    assert "4/4" in shown
    assert "samples/s" in shown
    assert "dedup.groups" in shown


def test_an_error_ends_the_display() -> None:
    stream = Terminal()

    def stumble() -> None:
        with TerminalProgress(stream) as progress:
            progress.begin("embed", "shards", 4, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stumble()
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back
