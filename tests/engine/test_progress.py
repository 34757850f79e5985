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
