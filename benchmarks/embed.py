"""How much of the cores does `embed` use for what it must do? `python -m benchmarks.embed INPUT`.

Runs ingest and embed of the `offline` pipeline with one worker per core, then measures decode,
hash and forward passes alone, one after the other, on one core and the same samples, in the
number format that the run chose. Prints one JSON line; `efficiency` is their core-seconds over
wall-seconds times cores. What the run does besides (scaling to the tower's size, thumbnails) is
measured too, and not counted. Cores that share a cache or memory are slower when all are busy:
`side_by_side` measures the parts in as many processes at once as there are cores.
"""

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from curate.config import load_pipeline
from curate.engine import runner
from curate.engine.progress import PlainProgress
from curate.engine.workers import ClusterOptions, count_cores, keep_freed_memory
from curate.formats.pixels import decode, make_thumbnail
from curate.models.encoders import Encoder, Precision, load_encoder, pad_rows, torch_threads
from curate.stages.base import Room

_PIPELINE = "ingest: {}\nembed: {encoder: offline}\n"
_THUMBNAIL_PX = 128


def measure_alone(room: Room, choice: dict[str, Any], shards: list[str]) -> dict[str, float]:
    """Core-seconds of each part over the samples of some shards, on one thread."""
    seconds = dict.fromkeys(("decode", "hash", "forward", "scale", "thumbnail"), 0.0)

    def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.process_time()
        result = function(*arguments)
        seconds[part] += time.process_time() - begun
        return result

    encoder = load_encoder("offline", choice["device"])
    for shard in shards:
        index = room.read(shard, [*_location(), "caption"])
        prepared = []
        for data in room.open_images(index):
            found = timed("decode", decode, data, 100_000_000, encoder.image_px) if data else None
            timed("hash", lambda content: hashlib.sha256(content).hexdigest(), data or b"")
            if found and found.image is not None:
                timed("thumbnail", make_thumbnail, found.image, _THUMBNAIL_PX)
                prepared.append(timed("scale", encoder.prepare, found.image))
        captions = [caption for caption in index["caption"].to_pylist() if caption]
        timed("forward", _forward, encoder, prepared, captions, choice)
    return seconds


def _side_by_side(room: Room, choice: dict[str, Any], cores: int) -> dict[str, float]:
    """The same, by as many processes as there are cores, each with its part of the shards."""
    parts = [room.shards()[first::cores] for first in range(cores)]
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_alone_in_process, [room] * cores, [choice] * cores, parts))
    return {part: sum(one[part] for one in found) for part in found[0]}


def _alone_in_process(room: Room, choice: dict[str, Any], shards: list[str]) -> dict[str, float]:
    keep_freed_memory()  # as workers do
    with torch_threads(1):
        return measure_alone(room, choice, shards)


def _location() -> tuple[str, ...]:
    return ("source_file", "member", "offset", "size_bytes", "row_group", "row")


def _forward(
    encoder: Encoder, prepared: list[Any], captions: list[str], choice: dict[str, Any]
) -> None:
    """Run both towers on full batches of one length."""
    tokens = sorted(encoder.tokenize(captions), key=len)
    image = Precision(choice["image"]["dtype"], choice["image"]["channels_last"])
    text = Precision(choice["text"]["dtype"], choice["text"]["channels_last"])
    size = choice["batch"]
    for start in range(0, len(prepared), size["image"]):
        batch = np.stack(prepared[start : start + size["image"]])
        encoder.encode_images(pad_rows(batch, size["image"]), image)
    for start in range(0, len(tokens), size["text"]):
        rows = tokens[start : start + size["text"]]
        width = next(one for one in encoder.text_lengths if one >= len(rows[-1]))
        ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        encoder.encode_texts(pad_rows(ids, size["text"]), text)


@click.command()
@click.argument("source")
@click.option("--workers", type=int, help="Worker processes; default: one per core.")
def main(source: str, workers: int | None) -> None:
    """Measure on the samples of SOURCE."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        file.write_text(_PIPELINE)
        pipeline = load_pipeline(str(file), [("ingest", "inputs", (source,))])
        out = str(Path(folder) / "out")
        with runner.lock_output(out):
            import sys

            summary = runner.run(pipeline, out, ClusterOptions(workers), PlainProgress(sys.stderr))
        steps = summary["stages"]["embed.vectors"]["steps"]
        room = runner.bind(pipeline, out)[1].room
        choice = summary["facts"]["embed"]["precision"]
        cores = count_cores()
        alone = _alone_in_process(room, choice, room.shards())
        crowded = _side_by_side(room, choice, cores)
    wall = steps["shards"]["wall_seconds"] + steps["probe"]["wall_seconds"]
    wall_shards = steps["shards"]["wall_seconds"]
    needed, shared = (
        sum(seconds[part] for part in ("decode", "hash", "forward")) for seconds in (alone, crowded)
    )
    report = {
        "samples": steps["shards"]["samples"],
        "wall_seconds": round(wall, 1),
        "probe_seconds": steps["probe"]["wall_seconds"],
        "samples_per_second": round(steps["shards"]["samples"] / wall, 1),
        "core_seconds_alone": {name: round(value, 1) for name, value in alone.items()},
        "core_seconds_side_by_side": {name: round(value, 1) for name, value in crowded.items()},
        "efficiency": round(needed / (wall * cores), 3),
        "efficiency_without_probe": round(needed / (wall_shards * cores), 3),
        "efficiency_side_by_side": round(shared / (wall * cores), 3),
        "efficiency_side_by_side_without_probe": round(shared / (wall_shards * cores), 3),
        "precision": {tower: choice[tower]["dtype"] for tower in ("image", "text")},
        "cores": cores,
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
