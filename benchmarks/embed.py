"""How much of the cores does `embed` use for what it must do? `python -m benchmarks.embed INPUT`.

Runs ingest and embed of the `offline` pipeline with one worker per core, then measures decode,
hash and forward passes alone, one after the other, on one core and the same samples, in the
number format that the run chose. Prints one JSON line; `efficiency` is their core-seconds over
wall-seconds times cores.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from curate.config import load_pipeline
from curate.engine import runner
from curate.engine.progress import PlainProgress
from curate.engine.workers import ClusterOptions, count_cores
from curate.formats.pixels import decode
from curate.models.encoders import Encoder, Precision, load_encoder, pad_rows, torch_threads
from curate.stages.base import Room

_PIPELINE = "ingest: {}\nembed: {encoder: offline}\n"
_THUMBNAIL_PX = 128


def _alone(room: Room, choice: dict[str, Any]) -> dict[str, float]:
    """Core-seconds of each part over all samples, on one thread."""
    seconds = {"decode": 0.0, "hash": 0.0, "forward": 0.0}
    encoder = load_encoder("offline", choice["device"])
    for shard in room.shards():
        index = room.read(shard, [*_location(), "caption"])
        prepared = []
        for data in room.open_images(index):
            begun = time.process_time()
            found = decode(data, 100_000_000, _THUMBNAIL_PX) if data else None
            seconds["decode"] += time.process_time() - begun
            begun = time.process_time()
            hashlib.sha256(data or b"").hexdigest()
            seconds["hash"] += time.process_time() - begun
            if found and found.image is not None:
                prepared.append(encoder.prepare(found.image))
        captions = [caption for caption in index["caption"].to_pylist() if caption]
        seconds["forward"] += _forward(encoder, prepared, captions, choice)
    return seconds


def _location() -> tuple[str, ...]:
    return ("source_file", "member", "offset", "size_bytes", "row_group", "row")


def _forward(
    encoder: Encoder, prepared: list[Any], captions: list[str], choice: dict[str, Any]
) -> float:
    """Core-seconds of both towers, fed with full batches of one length."""
    tokens = sorted(encoder.tokenize(captions), key=len)
    image = Precision(choice["image"]["dtype"], choice["image"]["channels_last"])
    text = Precision(choice["text"]["dtype"], choice["text"]["channels_last"])
    size = choice["batch"]
    begun = time.process_time()
    for start in range(0, len(prepared), size["image"]):
        batch = np.stack(prepared[start : start + size["image"]])
        encoder.encode_images(pad_rows(batch, size["image"]), image)
    for start in range(0, len(tokens), size["text"]):
        rows = tokens[start : start + size["text"]]
        width = next(one for one in encoder.text_lengths if one >= len(rows[-1]))
        ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        encoder.encode_texts(pad_rows(ids, size["text"]), text)
    return time.process_time() - begun


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
        with torch_threads(1):
            alone = _alone(room, choice)
    wall = steps["shards"]["wall_seconds"] + steps["probe"]["wall_seconds"]
    cores = count_cores()
    report = {
        "samples": steps["shards"]["samples"],
        "wall_seconds": round(wall, 1),
        "probe_seconds": steps["probe"]["wall_seconds"],
        "samples_per_second": round(steps["shards"]["samples"] / wall, 1),
        "core_seconds_alone": {name: round(value, 1) for name, value in alone.items()},
        "efficiency": round(sum(alone.values()) / (wall * cores), 3),
        "efficiency_without_probe": round(
            sum(alone.values()) / (steps["shards"]["wall_seconds"] * cores), 3
        ),
        "precision": {tower: choice[tower]["dtype"] for tower in ("image", "text")},
        "cores": cores,
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
