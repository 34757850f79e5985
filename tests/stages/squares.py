"""Drawn squares with captions that tell their colours, and the steps of `score` over them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from curate import storage
from curate.formats.pixels import make_thumbnail
from curate.models import clip_proxy
from curate.models.encoders import torch_threads
from curate.stages.base import Room
from curate.stages.score import Score
from curate.stages.score_clips import MEMORIZATION

COLUMNS = ("memorization_score", "memorization_score_stderr", "memorization_kind")
COLOURS = ("black", "white", "red", "green", "blue", "yellow")
#: Samples of a set, unless another number is asked for.
COUNT = 48


@contextmanager
def small_work() -> Iterator[None]:
    """Small batches: filling up shards of a few rows would take longest."""
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.setattr(clip_proxy, "_BATCHES", {"cpu": 32, "cuda": 32})
        yield


@dataclass(frozen=True)
class Squares:
    """Samples to be scored."""

    uids: list[str]
    thumbnails: list[bytes | None]
    captions: list[str | None]
    clusters: list[str | None]
    image: np.ndarray
    text: np.ndarray

    def take(self, rows: np.ndarray) -> "Squares":
        lists = (self.uids, self.thumbnails, self.captions, self.clusters)
        taken = ([one[row] for row in rows] for one in lists)
        return Squares(*taken, self.image[rows], self.text[rows])


def _draw(square: str, ground: str, x: int, y: int) -> bytes:
    picture = Image.new("RGB", (96, 72), ground)
    ImageDraw.Draw(picture).rectangle((x, y, x + 40, y + 40), fill=square)
    return make_thumbnail(picture, 128)


@cache
def make_squares(count: int = COUNT) -> Squares:
    """Squares of one colour on another, with captions that say so; every fifth has a twin."""
    rng = np.random.default_rng(0)
    pairs = [rng.choice(6, 2, replace=False) for _ in range(count)]
    places = rng.integers(0, 30, (count, 2)).tolist()
    known = np.stack([np.eye(12)[[square, 6 + ground]].sum(0) for square, ground in pairs])
    sides = [known @ rng.normal(size=(12, w)) + rng.normal(size=(count, w)) for w in (24, 16)]
    image, text = (
        (side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16) for side in sides
    )
    names = [(COLOURS[square], COLOURS[ground]) for square, ground in pairs]
    return Squares(
        [f"{number:032x}" for number in rng.permutation(count)],
        [_draw(*name, *place) for name, place in zip(names, places, strict=True)],
        [f"a {square} square {row} on {ground}" for row, (square, ground) in enumerate(names)],
        [f"{row - row % 5 // 4:032x}" for row in range(count)],
        image,
        text,
    )


def lay_out(folder: Path, samples: Squares, stage: Score, shards: list[np.ndarray]) -> Room:
    """Write what the stages before `score` leave behind, one shard for every array of rows."""
    tables = ("ingest", "embed.vectors", "embed.thumbnails", "dedup", "score", MEMORIZATION)
    places = {name: str(folder / name) for name in tables}
    layout = []
    for number, rows in enumerate(shards):
        part, name, whole = samples.take(rows), f"{number:05d}", np.ones(len(rows), bool)
        contents = {
            "ingest": {"caption": pa.array(part.captions, pa.string())},
            "embed.vectors": {
                "image_emb": storage.vector_column(part.image, whole),
                "text_emb": storage.vector_column(part.text, whole),
            },
            "embed.thumbnails": {"thumbnail": pa.array(part.thumbnails, pa.binary())},
            "dedup": {"cluster_id": pa.array(part.clusters, pa.string())},
        }
        for table, columns in contents.items():
            path = f"{places[table]}/shards/{name}.parquet"
            uids = pa.array(part.uids, pa.string())
            storage.commit_table(path, pa.table({"uid": uids, **columns}))
        layout.append({"name": name, "samples": len(rows)})
    storage.commit_json(f"{places['ingest']}/layout.json", {"shards": layout})
    origins = dict.fromkeys(("image_emb", "text_emb"), "embed.vectors")
    origins |= {"caption": "ingest", "thumbnail": "embed.thumbnails", "cluster_id": "dedup"}
    return Room(stage, places, origins, frozenset({"score", MEMORIZATION}))


def measure(room: Room, after: dict[str, Callable[[Room], None]] | None = None) -> pa.Table:
    """Run all steps, doing something after some of them."""
    for step in room.stage.steps():
        for task in step.tasks(room):
            step.run(room, task)
        (after or {}).get(step.name, lambda room: None)(room)
    paths = [room.shard_path(MEMORIZATION, shard) for shard in room.shards()]
    return pa.concat_tables([storage.read_table(path) for path in paths])
