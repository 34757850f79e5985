"""How much of the cores does `embed` use for what it must do? `python -m benchmarks.embed INPUT`.

Runs ingest and embed of the `offline` pipeline with one worker per core, then measures decode,
hash and forward passes alone, one after the other, on one core and the same samples, in the
number format that the run chose. Prints one JSON line; `efficiency` is their core-seconds over
wall-seconds times cores. What the run does besides (scaling to the tower's size, thumbnails) is
measured too, and not counted.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
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


def _alone(room: Room, choice: dict[str, Any]) -> dict[str, float]:
    """Core-seconds of each part over all samples, on one thread."""
    seconds = dict.fromkeys(("decode", "hash", "forward", "scale", "thumbnail"), 0.0)

    def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.process_time()
        result = function(*arguments)
        seconds[part] += time.process_time() - begun
        return result

    encoder = load_encoder("offline", choice["device"])
    for shard in room.shards():
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
        keep_freed_memory()  # as workers do
        with torch_threads(1):
            alone = _alone(room, choice)
    wall = steps["shards"]["wall_seconds"] + steps["probe"]["wall_seconds"]
    cores = count_cores()
    needed = sum(alone[part] for part in ("decode", "hash", "forward"))
    report = {
        "samples": steps["shards"]["samples"],
        "wall_seconds": round(wall, 1),
        "probe_seconds": steps["probe"]["wall_seconds"],
        "samples_per_second": round(steps["shards"]["samples"] / wall, 1),
        "core_seconds_alone": {name: round(value, 1) for name, value in alone.items()},
        "efficiency": round(needed / (wall * cores), 3),
        "efficiency_without_probe": round(needed / (steps["shards"]["wall_seconds"] * cores), 3),
        "precision": {tower: choice[tower]["dtype"] for tower in ("image", "text")},
        "cores": cores,
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
