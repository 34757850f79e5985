"""What `ingest` and `write` reach of the disk: `python -m benchmarks.throughput FOLDER`.

Writes tars of random bytes as images, then in turns, each from a cold cache: reads headers and
captions alone; runs `ingest`; copies the tars one after the other; runs `write` with every sample
kept. What is written is synced before the clock stops. Prints one JSON line: medians, and rates as
shares of the plain ones' in the same round.
"""

import io
import json
import os
import shutil
import statistics
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import pyarrow as pa

from curate.config import Pipeline
from curate.engine.runner import BoundStage, bind
from curate.engine.workers import ClusterOptions, Workers
from curate.schema import select_schema
from curate.stages.base import Room, Stage, Step, Table, shard_tasks
from curate.stages.ingest import Ingest
from curate.stages.write import Write

_BLOCK_BYTES = 1 << 20


class Everything(Stage):
    """Stands for all stages between: hashes every image and keeps it."""

    name: ClassVar[str] = "everything"
    columns: ClassVar[tuple[str, ...]] = ("sha256", "keep", "weight", "captions")

    def reads(self) -> tuple[str, ...]:
        return ("source_file", "member", "offset", "size_bytes", "row_group", "row", "caption")

    def tables(self) -> tuple[Table, ...]:
        return (Table("everything", self.columns),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _keep_all, shard_tasks),)


def _keep_all(room: Room, shard: str) -> dict[str, float]:
    import hashlib

    index = room.read(shard, room.stage.reads())
    hashes = [hashlib.sha256(image or b"").hexdigest() for image in room.open_images(index)]
    count = len(index)
    captions = [[caption] for caption in index["caption"].to_pylist()]
    columns = (hashes, [True] * count, [1.0] * count, captions)
    table = index.select(["uid"])
    for field, column in zip(select_schema(Everything.columns), columns, strict=True):
        table = table.append_column(field, pa.array(column, field.type))
    room.commit_shard("everything", shard, table)
    return {"samples": count}


def write_tars(folder: Path, tars: int, samples: int, image_bytes: int) -> list[Path]:
    """Write tars as img2dataset does, with images of about a size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(tars):
        path = folder / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(samples):
                size = int(image_bytes * (0.5 + rng.random()))
                fields = {"key": f"{number:05d}{i:05d}", "url": f"https://host/{i}.jpg"}
                for suffix, content in (
                    ("jpg", b"\xff\xd8\xff" + rng.bytes(size)),
                    ("txt", f"a picture of thing {i} beside another one".encode()),
                    ("json", json.dumps({**fields, "width": 512, "height": 384}).encode()),
                ):
                    header = tarfile.TarInfo(f"{fields['key']}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        paths.append(path)
    return paths


def _evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(folder: Path) -> None:
    def flush(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(flush, (path for path in folder.rglob("*") if path.is_file())))


def _timed(paths: list[Path], work: Callable[[], Any], written: Path | None = None) -> float:
    _evict(paths)
    begun = time.monotonic()
    work()
    if written is not None:
        _sync(written)
    return time.monotonic() - begun


def _read_headers(paths: list[Path]) -> int:
    """Read what an index needs, and make nothing of it."""
    size_bytes = 0
    for path in paths:
        with path.open("rb") as file:
            position = 0
            while True:
                file.seek(position)
                header = file.read(512)
                if len(header) < 512 or not header[0]:
                    break
                size = int(header[124:135], 8)
                if header[:100].rstrip(b"\0").endswith((b".txt", b".json")):
                    size_bytes += len(file.read(size))
                position += 512 + -(-size // 512) * 512
    return size_bytes


def _copy(paths: list[Path], folder: Path) -> None:
    folder.mkdir()
    for path in paths:
        with path.open("rb") as source, (folder / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK_BYTES)


def _run(bound: BoundStage, workers: Workers) -> None:
    room = replace(bound.room, threads=workers.threads)
    for step in bound.stage.steps():
        for _ in workers.map(_work, step.tasks(room), room, step.name):
            pass


def _place(bound: BoundStage) -> Path:
    return Path(bound.room.path())


def _work(room: Room, step: str, task: str) -> None:
    next(one for one in room.stage.steps() if one.name == step).run(room, task)


def _measure(
    paths: list[Path], pipeline: Pipeline, folder: Path, pool: Workers, ours_first: bool
) -> dict[str, float]:
    """Return the seconds of one round, in which nothing is reused."""
    out, copied = folder / "out", folder / "copy"
    ingest, everything, write = bind(pipeline, str(out))
    pairs = (
        (
            ("ingest", lambda: _run(ingest, pool), _place(ingest)),
            ("headers", lambda: _read_headers(paths), None),
        ),
        (
            ("write", lambda: _run(write, pool), _place(write)),
            ("copy", lambda: _copy(paths, copied), copied),
        ),
    )
    found = {}
    for pair in pairs:
        for name, work, written in pair if ours_first else pair[::-1]:
            found[name] = _timed(paths, work, written)
        if "ingest" in found and "write" not in found:
            _run(everything, pool)
    shutil.rmtree(out)
    shutil.rmtree(copied)
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tars", default=8)
@click.option("--samples", default=2500, help="Per tar.")
@click.option("--image-bytes", default=40_000)
@click.option("--rounds", default=5)
@click.option("--workers", default=1)
def main(
    folder: Path, tars: int, samples: int, image_bytes: int, rounds: int, workers: int
) -> None:
    """Measure in FOLDER, which must not exist and is removed at the end."""
    paths = write_tars(folder / "in", tars, samples, image_bytes)
    inputs = (str(folder / "in"),)
    stages = (Ingest(inputs=inputs), Everything(), Write())
    pipeline = Pipeline("throughput", "", stages)
    seconds: dict[str, list[float]] = {n: [] for n in ("headers", "ingest", "copy", "write")}
    with Workers(ClusterOptions(workers=workers), str(folder)) as pool:
        pool.start()
        for number in range(rounds + 1):
            found = _measure(paths, pipeline, folder, pool, ours_first=number % 2 == 1)
            for name in seconds if number else ():  # the first loads the workers' modules
                seconds[name].append(found[name])
    size_bytes = sum(path.stat().st_size for path in paths)
    shutil.rmtree(folder)
    shares = {
        f"{name}_of_{plain}": round(
            statistics.median(a / b for a, b in zip(seconds[plain], seconds[name], strict=True)), 3
        )
        for name, plain in (("ingest", "headers"), ("write", "copy"))
    }
    medians = {
        f"{name}_seconds": round(statistics.median(all_), 2) for name, all_ in seconds.items()
    }
    result = {
        "samples": tars * samples,
        "size_bytes": size_bytes,
        "workers": workers,
        "rounds": rounds,
        **medians,
        **shares,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
