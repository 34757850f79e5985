"""Show a run: a moving line per step on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["PlainProgress", "TerminalProgress", "make_progress"]

#: Seconds between plain lines of one step: often enough to see life, rare enough for a CI log.
_PLAIN_SECONDS = 10.0


def make_progress(stream: TextIO = sys.stderr) -> "TerminalProgress | PlainProgress":
    """Return the display that fits a stream."""
    return TerminalProgress(stream) if stream.isatty() else PlainProgress(stream)


class PlainProgress:
    """A line when a step begins, every few seconds, and when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label = ""
        self._tasks = self._done = 0
        self._samples = self._begun = self._said = 0.0

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to put back."""

    def begin(self, stage: str, step: str, tasks: int, done: int) -> None:
        """See `curate.engine.runner.Progress`."""
        self._label, self._tasks, self._done = f"{stage}.{step}", tasks, done
        self._samples = 0.0
        self._begun = self._said = time.monotonic()

    def advance(self, samples: float) -> None:
        """See `curate.engine.runner.Progress`."""
        self._done += 1
        self._samples += samples
        now = time.monotonic()
        if now - self._said >= _PLAIN_SECONDS and self._done < self._tasks:
            self._said = now
            self._say(now - self._begun)

    def end(self) -> None:
        """See `curate.engine.runner.Progress`."""
        self._say(time.monotonic() - self._begun)

    def _say(self, seconds: float) -> None:
        rate = f", {self._samples / seconds:.0f} samples/s" if self._samples and seconds else ""
        counted = f"{self._done}/{self._tasks} tasks"
        print(f"{self._label}: {counted}, {seconds:.1f} s{rate}", file=self._stream, flush=True)


class TerminalProgress:
    """One moving line per step: bar, tasks, rate, time spent, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream, stderr=True),
        )
        self._task = TaskID(0)
        self._samples = self._begun = 0.0

    def __enter__(self) -> "TerminalProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, stage: str, step: str, tasks: int, done: int) -> None:
        """See `curate.engine.runner.Progress`."""
        self._samples, self._begun = 0.0, time.monotonic()
        self._task = self._progress.add_task(
            f"{stage}.{step}", total=tasks, completed=done, rate=""
        )

    def advance(self, samples: float) -> None:
        """See `curate.engine.runner.Progress`."""
        self._samples += samples
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = f"{self._samples / seconds:.0f} samples/s" if self._samples else ""
        self._progress.update(self._task, advance=1, rate=rate)

    def end(self) -> None:
        """See `curate.engine.runner.Progress`."""
        self._progress.stop_task(self._task)
