"""Show a run: a moving line per stage on a terminal, plain lines elsewhere."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from curate.report.text import tell_count

__all__ = ["PlainProgress", "TerminalProgress", "make_progress"]

#: Seconds between plain lines of one stage: often enough to see life, rare enough for a CI log.
_PLAIN_SECONDS = 10.0
#: Seconds after which a task that takes long gets a line all the same: CI ends what is silent.
_SILENT_SECONDS = 60.0
#: Columns from which a bar is worth its room.
_BAR_COLUMNS, _BAR_WIDTH = 72, 16
#: Redraws a second: more would take half a per cent of a core.
_REFRESHES = 4
#: Reasons that are named; the commonest first.
_NAMED = 3


def make_progress(stream: TextIO | None = None) -> "TerminalProgress | PlainProgress":
    """Return the display that fits a stream, by default stderr."""
    stream = stream or sys.stderr
    return TerminalProgress(stream) if _can_move(stream) else PlainProgress(stream)


def _can_move(stream: TextIO) -> bool:
    """Tell whether lines can be drawn again: not in a pipe, in a CI log, on a dumb terminal."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Stage:
    """What is counted of the stage that runs."""

    def __init__(self, name: str, workers: int, now: float) -> None:
        self.name, self.workers = name, workers
        self.step = "…"
        self.reasons: Counter[str] = Counter()
        self.tasks = self.done = self.fresh = 0
        self.samples = self.most_samples = 0.0
        self.begun = self.step_begun = now
        self.step_ended = now
        self.is_over = False

    def begin(self, step: str, tasks: int, done: int, now: float) -> None:
        """A step begins; what the stage's other steps counted stays."""
        self.step, self.tasks, self.done, self.fresh = step, tasks, done, 0
        self.samples, self.step_begun = 0.0, now

    def advance(self, counts: Mapping[str, float]) -> None:
        self.done += 1
        self.fresh += 1
        self.samples += counts.get("samples", 0)
        # Several steps of a stage pass over the same samples.
        self.most_samples = max(self.most_samples, self.samples)
        for name, number in counts.items():
            if name.startswith("reason."):
                self.reasons[name.removeprefix("reason.")] += int(number)

    def told(self, now: float) -> list[str]:
        """What there is to say of the step that runs, what matters most first."""
        seconds = now - self.step_begun
        parts = [f"{self.step} {self.done}/{self.tasks} tasks"]
        if self.fresh and seconds > 0 and self.done < self.tasks:
            left = (self.tasks - self.done) * seconds / self.fresh
            parts.append(f"{_clock(left)} left")
        if self.samples and seconds > 0:
            parts.append(f"{self.samples / seconds:.0f} samples/s")
        if self.workers:
            parts.append(tell_count(self.workers, "worker"))
        return parts + self._reasons()

    def summed(self) -> list[str]:
        """What there is to say of the whole stage at its end."""
        seconds = self.step_ended - self.begun
        parts = [f"done in {seconds:.1f} s"]
        if self.most_samples and seconds > 0:
            parts.append(f"{self.most_samples / seconds:.0f} samples/s")
        return parts + self._reasons()

    def _reasons(self) -> list[str]:
        named = self.reasons.most_common(_NAMED)
        parts = [f"{number:,} {code}" for code, number in named]
        if len(self.reasons) > _NAMED:
            rest = self.reasons.total() - sum(number for _, number in named)
            parts.append(f"{rest:,} other")
        return parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainProgress:
    """A line every few seconds and when a stage ends: for pipes, files and CI logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage: _Stage | None = None
        self._said = 0.0
        self._lock = threading.RLock()
        self._over = threading.Event()

    def __enter__(self) -> "PlainProgress":
        threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._over.set()
        if kind is None:
            with self._lock:
                self._close()

    def _break_silence(self) -> None:
        while not self._over.wait(_SILENT_SECONDS):
            with self._lock:
                now = time.monotonic()
                if self._stage is not None and now - self._said >= _SILENT_SECONDS:
                    self._said = now
                    self._say(self._stage.told(now))

    def note(self, text: str) -> None:
        """See `curate.engine.runner.Progress`."""
        print(text, file=self._stream, flush=True)

    def begin(self, stage: str, step: str, tasks: int, done: int, workers: int = 0) -> None:
        """See `curate.engine.runner.Progress`."""
        with self._lock:
            now = time.monotonic()
            if self._stage is None or self._stage.name != stage:
                self._close()
                self._stage, self._said = _Stage(stage, workers, now), now
            self._stage.begin(step, tasks, done, now)

    def advance(self, counts: Mapping[str, float]) -> None:
        """See `curate.engine.runner.Progress`."""
        with self._lock:
            assert self._stage is not None
            self._stage.advance(counts)
            now = time.monotonic()
            if now - self._said >= _PLAIN_SECONDS and self._stage.done < self._stage.tasks:
                self._said = now
                self._say(self._stage.told(now))

    def end(self) -> None:
        """See `curate.engine.runner.Progress`."""
        assert self._stage is not None
        # A stage is over when the next one begins; what lies between is not its own.
        self._stage.step_ended = time.monotonic()

    def _close(self) -> None:
        if self._stage is not None:
            self._say(self._stage.summed())
            self._stage = None

    def _say(self, parts: list[str]) -> None:
        assert self._stage is not None
        self.note(f"{self._stage.name}: {', '.join(parts)}")


class _Told(ProgressColumn):
    """As many parts as the terminal has room for beside the stage's name."""

    max_refresh = 0.5  # seconds: the clock of what is left need not flicker

    def __init__(self, room: Callable[[Task], int]) -> None:
        super().__init__(Column(no_wrap=True))
        self._room = room

    def render(self, task: Task) -> Text:
        """Return the parts that fit."""
        stage: _Stage = task.fields["stage"]
        parts = stage.summed() if stage.is_over else stage.told(time.monotonic())
        room, shown = self._room(task), ""
        for part in parts:
            longer = f"{shown}, {part}" if shown else part
            if len(longer) > room and shown:
                break
            shown = longer
        return Text(shown[: max(room, 0)], no_wrap=True, overflow="crop")


class TerminalProgress:
    """One moving line per stage: bar, tasks, time left, rate, workers, reasons so far."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, stderr=True)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        self._has_bar = self._console.width >= _BAR_COLUMNS
        if self._has_bar:
            columns.append(BarColumn(bar_width=_BAR_WIDTH))
        columns.append(_Told(self._room))
        self._progress = Progress(*columns, console=self._console, refresh_per_second=_REFRESHES)
        self._task = TaskID(0)
        self._stage: _Stage | None = None

    def _room(self, task: Task) -> int:
        names = max(len(one.description) for one in self._progress.tasks)
        return self._console.width - names - 2 - (_BAR_WIDTH + 1 if self._has_bar else 0)

    def __enter__(self) -> "TerminalProgress":
        self._progress.start()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._close()
        self._progress.stop()

    def note(self, text: str) -> None:
        """See `curate.engine.runner.Progress`."""
        self._progress.print(text, markup=False, highlight=False)

    def begin(self, stage: str, step: str, tasks: int, done: int, workers: int = 0) -> None:
        """See `curate.engine.runner.Progress`."""
        now = time.monotonic()
        if self._stage is None or self._stage.name != stage:
            self._close()
            self._stage = _Stage(stage, workers, now)
            self._stage.begin(step, tasks, done, now)
            self._task = self._progress.add_task(stage, start=False, stage=self._stage)
        self._stage.begin(step, tasks, done, now)
        # A bar that is full would count as the end of the stage.
        self._progress.update(self._task, total=tasks + 1, completed=done)
        self._progress.start_task(self._task)

    def advance(self, counts: Mapping[str, float]) -> None:
        """See `curate.engine.runner.Progress`."""
        assert self._stage is not None
        self._stage.advance(counts)
        self._progress.advance(self._task)

    def end(self) -> None:
        """See `curate.engine.runner.Progress`."""
        assert self._stage is not None
        # A stage is over when the next one begins; what lies between is not its own.
        self._stage.step_ended = time.monotonic()

    def _close(self) -> None:
        if self._stage is not None:
            self._stage.is_over = True
            self._progress.update(self._task, total=1, completed=1)
            self._stage = None
