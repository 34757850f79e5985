"""Time and memory of a whole run: `python -m benchmarks.whole PIPELINE INPUT OUT`.

Runs the real command, watches the memory of all its processes, then runs it again (nothing to do)
and asks for `--help`. Prints one JSON line.
"""

import json
import subprocess
import sys
import time
from typing import Any

import click
import psutil

__all__ = ["stage_seconds", "watch_command"]

_COMMAND = [sys.executable, "-m", "curate"]
_SAMPLE_SECONDS = 0.2


def watch_command(arguments: list[str]) -> tuple[float, int, int]:
    """Run a command; return wall-seconds, peak bytes of one process, and of all together."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [*_COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    one = together = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        for child in [root, *_children(root)]:
            try:
                # Unique to the process: memory-mapped vectors are the page cache's, not its own.
                sizes.append(child.memory_full_info().uss)
            except psutil.Error:
                continue
        one, together = max([one, *sizes]), max(together, sum(sizes))
        time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"curate {' '.join(arguments)}: exit {process.returncode}")
    return time.monotonic() - begun, one, together


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def stage_seconds(summary: dict[str, Any]) -> dict[str, float]:
    """Return the wall-seconds of each stage, of its slowest table, from a `run.json`."""
    seconds: dict[str, float] = {}
    for table, facts in summary["stages"].items():
        stage = table.partition(".")[0]
        spent = sum(step["wall_seconds"] for step in facts["steps"].values())
        seconds[stage] = round(max(seconds.get(stage, 0.0), spent), 1)
    return seconds


@click.command()
@click.argument("pipeline")
@click.argument("source")
@click.argument("out")
@click.option("--workers", type=int)
def main(pipeline: str, source: str, out: str, workers: int | None) -> None:
    """Run PIPELINE on SOURCE into OUT, which must not exist, and report."""
    arguments = ["run", pipeline, "--input", source, "--output", out]
    if workers is not None:
        arguments += ["--workers", str(workers)]
    wall, one, together = watch_command(arguments)
    again, _, _ = watch_command(arguments)
    help_seconds, _, _ = watch_command(["--help"])
    with open(f"{out}/run.json", encoding="utf-8") as file:
        summary = json.load(file)
    report = {
        "pipeline": pipeline,
        "counts": summary["counts"],
        "wall_seconds": round(wall, 1),
        "stage_seconds": stage_seconds(summary),
        "peak_mb_one_process": round(one / 1e6),
        "peak_mb_all": round(together / 1e6),
        "again_seconds": round(again, 2),
        "help_seconds": round(help_seconds, 2),
        "cores": psutil.cpu_count(),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
