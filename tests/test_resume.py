"""A run that was killed or stopped resumes to what an undisturbed one gives."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.kill import kill_after, spread_delays
from tests.support import (
    TIMEOUT_SECONDS,
    assert_equal_decisions,
    assert_sound,
    command,
    launch,
    list_tree,
    read_summary,
    succeed,
    table_differences,
    write_subset,
)

KILLS = 3


@dataclass(frozen=True)
class Calm:
    """An undisturbed run."""

    source: Path
    out: Path
    seconds: float

    def arguments(self, out: Path) -> tuple[str, ...]:
        settings = ("--set", "ingest.shard_samples=20", "--set", "write.shard_samples=30")
        return ("run", "dedup", "--input", str(self.source), "--output", str(out), *settings)

    def assert_equalled_by(self, out: Path) -> None:
        assert_sound(out)
        assert_equal_decisions(self.out, out)
        assert list_tree(out) == list_tree(self.out)
        assert table_differences(self.out, out) == []
        assert read_summary(out)["counts"] == read_summary(self.out)["counts"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    run = Calm(write_subset(folder / "in", 80, 2), folder / "out", 0)
    begun = time.monotonic()
    succeed(*run.arguments(run.out), by=launch)
    return Calm(run.source, run.out, time.monotonic() - begun)


def test_undisturbed_run_means_something(calm: Calm) -> None:
    assert_sound(calm.out)
    counts = read_summary(calm.out)["counts"]
    assert counts["ingested"] == 80
    assert len(list((calm.out / "decisions").iterdir())) == 4
    assert len(list((calm.out / "shards").iterdir())) == 2
    assert {"decode_error", "duplicate_bytes", "duplicate_perceptual"} <= counts["dropped"].keys()


def test_kill_of_all_processes_at_random_moments(calm: Calm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    given = command(*calm.arguments(out))
    hits = [kill_after(given, s, environment) for s in spread_delays(0, KILLS, calm.seconds)]
    assert hits[0], "the first comes in the first third of the run"
    succeed(*calm.arguments(out))
    calm.assert_equalled_by(out)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let children be interrupted: of a shell's background jobs, they inherit that they cannot."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watched(calm: Calm, out: Path, pattern: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command until a file appears in its OUT."""
    with subprocess.Popen(
        command(*calm.arguments(out)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not list(out.glob(pattern)):
            assert process.poll() is None, "the run ended early"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process


def assert_stopped(process: subprocess.Popen[str]) -> None:
    stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "resource_tracker" not in stderr
    assert stderr.splitlines()[-1] == (
        "Stopped. What was finished is kept: run the same command again to resume."
    )


@pytest.mark.usefixtures("interruptible")
def test_interrupt_says_how_to_resume(calm: Calm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with watched(calm, out, "stages/embed.vectors-*/precision.json") as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert_stopped(process)
    assert read_summary(out)["status"] == "unfinished"
    succeed(*calm.arguments(out))
    calm.assert_equalled_by(out)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
@pytest.mark.parametrize("seconds", [0, 1.5])
def test_stopped_while_workers_start(
    calm: Calm, tmp_path: Path, number: signal.Signals, seconds: float
) -> None:
    # To the command alone, as a scheduler does.
    with watched(calm, tmp_path / "out", "run.json") as process:
        time.sleep(seconds)
        process.send_signal(number)
        assert_stopped(process)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    scratch = Path(tempfile.gettempdir()) / f"curate-dask-{process.pid}-*"
    while list(scratch.parent.glob(scratch.name)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
