"""Kills a run again and again, lets it end, compares: `python -m benchmarks.kill --help`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import click
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpora import BUNDLED_SAMPLE


def run_command(pipeline: str, source: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a run."""
    given = ["--input", str(source), "--output", str(out), *more]
    return [sys.executable, "-m", "curate", "run", pipeline, *given]


def kill_after(command: Sequence[str], seconds: float, environment: dict[str, str]) -> bool:
    """Start a command, kill its whole process group after a while, tell whether that hit."""
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return False


def spread_delays(seed: int, rounds: int, seconds: float) -> list[float]:
    """Draw one moment in each of `rounds` equal parts of a run's first half, in random order."""
    rng = Random(f"kill:{seed}")
    delays = [seconds / 2 * (i + rng.random()) / rounds for i in range(rounds)]
    rng.shuffle(delays)
    return delays


@contextlib.contextmanager
def dask_cluster(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a scheduler and two worker processes on loopback; yield the scheduler's address."""
    dask = str(Path(sys.executable).with_name("dask"))
    file = folder / "scheduler.json"
    listen = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--port", "0"]
    worker = ["--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard"]
    commands = [
        [dask, "scheduler", *listen, "--scheduler-file", str(file)],
        *[[dask, "worker", "--scheduler-file", str(file), *worker]] * 2,
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    processes = [subprocess.Popen(command, cwd=folder, **quiet) for command in commands]
    try:
        while not file.exists():
            if processes[0].poll() is not None:
                raise click.ClickException("the Dask scheduler did not start")
            time.sleep(0.1)
        yield json.loads(file.read_text(encoding="utf-8"))["address"]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def list_files(out: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}


def read_sorted(out: Path, name: str) -> pa.Table:
    """Return `decisions` or `shards` as one table in order of uid."""
    paths = sorted((out / name).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths]).sort_by("uid")


def compare(undisturbed: Path, killed: Path) -> dict[str, object]:
    """Tell how two outputs of one pipeline on one input differ."""
    names = list_files(undisturbed), list_files(killed)
    first, second = (read_sorted(out, "decisions") for out in (undisturbed, killed))
    unequal = [n for n in first.column_names if not first[n].equals(second[n])]
    formats = [_precision(out) for out in (undisturbed, killed)]
    return {
        "equal_decisions": not unequal,
        "unequal_columns": unequal,
        # Each run decides by its own probe; where they differ, cosines and scores may.
        "equal_precision": formats[0] == formats[1],
        "stray_files": sorted(names[1] - names[0]),
        "missing_files": sorted(names[0] - names[1]),
    }


def is_equal(difference: dict[str, object]) -> bool:
    """Tell whether `compare` found no difference."""
    return bool(difference["equal_decisions"]) and not (
        difference["stray_files"] or difference["missing_files"]
    )


def _precision(out: Path) -> list[tuple[str, bool]]:
    summary = json.loads((out / "run.json").read_text(encoding="utf-8"))
    found = summary["facts"]["embed"]["precision"]
    return [(found[tower]["dtype"], found[tower]["channels_last"]) for tower in ("image", "text")]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--pipeline", default="offline", show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Worker processes of every run.")
@click.option(
    "--separate-scheduler",
    is_flag=True,
    help="The killed runs use a Dask scheduler and two workers that are started once.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--input",
    "source",
    type=click.Path(exists=True, path_type=Path),
    default=BUNDLED_SAMPLE / "shards",
    help="Folder of shards, by default the bundled sample.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="New folder for both outputs, which then stay; by default one that is removed.",
)
def main(
    rounds: int,
    pipeline: str,
    workers: int | None,
    separate_scheduler: bool,
    seed: int,
    source: Path,
    work: Path | None,
) -> None:
    """Kill -9 the process group of a run at random moments, then let it end.

    Prints a line of JSON: kills, runs that came to their end between them, and of these the
    first that differs from an undisturbed one: whether the decisions are equal, and files that
    one output has and the other lacks.
    """
    with tempfile.TemporaryDirectory(prefix="curate-kill-") as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # What killed workers leave in the system's folder of temporary files goes with ours.
        environment = os.environ | {"TMPDIR": temporary}
        calm, killed = folder / "undisturbed", folder / "killed"
        where = [] if workers is None else ["--workers", str(workers)]
        begun = time.monotonic()
        _finish(run_command(pipeline, source, calm, *where), environment)
        seconds = time.monotonic() - begun
        with contextlib.ExitStack() as stack:
            if separate_scheduler:
                address = stack.enter_context(dask_cluster(Path(temporary), environment))
                where = ["--scheduler", address]
            command = run_command(pipeline, source, killed, *where)
            ended: list[dict[str, object]] = []
            for delay in spread_delays(seed, rounds, seconds):
                while not kill_after(command, delay, environment):
                    # It came through before its kill: judged like the last, then begun anew.
                    ended.append(compare(calm, killed))
                    shutil.rmtree(killed)
                click.echo(f"killed after {delay:.1f} s", err=True)
            _finish(command, environment)
        ended.append(compare(calm, killed))
        report = {"kills": rounds, "ended": len(ended), "undisturbed_seconds": round(seconds, 1)}
        worst = next((one for one in ended if not is_equal(one)), ended[-1])
        click.echo(json.dumps({**report, **worst}))


def _finish(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
