"""What reading remote tars once is worth: `python -m benchmarks.spool FOLDER`.

Serves tars of random bytes as images over HTTP on loopback, and has a worker of another process
`ingest` them and read every image as `embed` does, in turns with copies kept (`ingest.spool_gb`)
and without. No encoder runs. Prints one JSON line: requests and bytes, medians of the seconds, and
those with copies as a share of those without in the same round.
"""

import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.throughput import write_tars
from curate.config import load_pipeline
from curate.engine.runner import BoundStage, bind
from curate.engine.workers import ClusterOptions, Workers
from curate.stages.base import Room
from tests.servers import App, Server, serve, serve_files

_SPOOL_GB = {"once": 32.0, "twice": 0.0}


def slow_down(app: App, rate_mb: float) -> App:
    """Have every answer take as long as a connection of `rate_mb` megabytes a second would."""

    def slowed(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        body = b"".join(app(environ, start))
        if environ["REQUEST_METHOD"] == "GET":
            time.sleep(len(body) / 1e6 / rate_mb)
        return [body]

    return slowed


def _work(room: Room, step: str, task: str) -> None:
    next(one for one in room.stage.steps() if one.name == step).run(room, task)


def _run(bound: BoundStage, pool: Workers) -> None:
    """Carry out a stage, without vectors, which take longest and see no more of the tars."""
    room = replace(bound.room, threads=pool.threads)
    room = replace(room, missing=room.missing - {"embed.vectors"})
    for step in bound.stage.steps():
        tasks = step.tasks(room) if step.tables is None else ()
        for _ in pool.map(_work, tasks, room, step.name):
            pass


def _measure(server: Server, inputs: list[str], out: Path, pool: Workers, spool_gb: float) -> Any:
    settings = [("ingest", "inputs", tuple(inputs)), ("ingest", "spool_gb", spool_gb)]
    stages = [
        one
        for one in bind(load_pipeline("dedup", settings), str(out))
        if one.stage.name in ("ingest", "remove", "embed")
    ]
    server.gate.seen.clear()
    server.gate.sent_bytes.clear()
    begun = time.monotonic()
    for one in stages:
        _run(one, pool)
    seconds = time.monotonic() - begun
    shutil.rmtree(out)
    requests = sum(method == "GET" for method, _, _ in server.gate.seen)
    return {
        "requests": requests,
        "sent_bytes": server.gate.sent_bytes.total(),
        "seconds": seconds,
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tars", default=4, show_default=True)
@click.option("--samples", default=1000, show_default=True, help="Per tar.")
@click.option("--image-bytes", default=20_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--rate-mb", default=0.0, show_default=True, help="MB a second of one connection.")
def main(
    folder: Path, tars: int, samples: int, image_bytes: int, rounds: int, rate_mb: float
) -> None:
    """Measure in FOLDER, which must not exist and is removed at the end."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    paths = write_tars(folder / "in", tars, samples, image_bytes)
    found: dict[str, list[Any]] = {name: [] for name in _SPOOL_GB}
    with (
        serve_files(folder / "in") as plain,
        Workers(ClusterOptions(workers=1), str(folder)) as pool,
    ):
        pool.start()
        app = slow_down(plain.gate.app, rate_mb) if rate_mb else plain.gate.app
        with serve(app) as server:
            inputs = [f"{server.url}/{path.name}" for path in paths]
            for number in range(rounds + 1):
                for name in list(_SPOOL_GB)[:: -1 if number % 2 else 1]:
                    one = _measure(server, inputs, folder / "out", pool, _SPOOL_GB[name])
                    if number:  # the first loads the worker's modules
                        found[name].append(one)
    size_bytes = sum(path.stat().st_size for path in paths)
    shutil.rmtree(folder)
    seconds = {name: [one["seconds"] for one in all_] for name, all_ in found.items()}
    shares = [a / b for a, b in zip(seconds["once"], seconds["twice"], strict=True)]
    result: dict[str, Any] = {
        "samples": tars * samples,
        "size_bytes": size_bytes,
        "rate_mb": rate_mb,
        "rounds": rounds,
        "seconds_share": round(statistics.median(shares), 3),
        "seconds_shares": [round(share, 3) for share in shares],
    }
    for name, all_ in found.items():
        result[name] = {
            **all_[-1],
            "sent_share": round(all_[-1]["sent_bytes"] / size_bytes, 3),
            "seconds": round(statistics.median(seconds[name]), 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
