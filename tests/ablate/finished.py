"""A finished run of two hundred concepts, written down: real select behind stand-in scores."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate import storage
from curate.stages.base import Room
from curate.stages.select import Select

#: Samples; every third has another's caption, which the scores know.
COUNT, SHARD, WIDTH = 1200, 400, 96
SWAPPED = 3
#: From here on every two are copies, with an edge between them.
FIRST_COPY = 800
#: Of vectors: as much as leaves something to be learnt.
NOISE = 1.0
_WORDS = ("red", "blue", "green", "old", "new", "big", "small", "round", "flat", "tall")
_TABLES = {
    "ingest": ("caption", "ingest_reason", "key", "metadata"),
    "embed.vectors": ("image_emb", "text_emb"),
    "embed.pixels": ("decode_reason", "width", "height", "sha256"),
    "embed.thumbnails": ("thumbnail",),
    "dedup": ("cluster_id",),
    "score": ("mismatch_probability", "rarity", "alignment_in"),
}


def uid_of(number: int) -> str:
    return f"{number:032x}"


def write_run(out: Path, swapped: bool = True, **without: bool) -> Path:
    """Write OUT; `thumbnail=False` and such leave a column out."""
    rng = np.random.default_rng(0)
    concepts = rng.normal(size=(COUNT, WIDTH))
    image = concepts + NOISE * rng.normal(size=(COUNT, WIDTH))
    given = np.arange(COUNT)
    wrong = (given % SWAPPED == 0) & swapped
    given[wrong] = np.roll(given[wrong], 1)
    turned = (concepts[given] @ rng.normal(size=(WIDTH, WIDTH))) / WIDTH**0.5
    text = turned + NOISE * rng.normal(size=(COUNT, WIDTH))
    columns: dict[str, Any] = {
        "caption": pa.array([_caption(number) for number in given]),
        "ingest_reason": pa.nulls(COUNT, pa.string()),
        "key": pa.array([str(number) for number in range(COUNT)]),
        "metadata": pa.nulls(COUNT, pa.string()),
        "image_emb": _vectors(image),
        "text_emb": _vectors(text),
        "decode_reason": pa.nulls(COUNT, pa.string()),
        "width": pa.array(np.full(COUNT, 32), pa.int32()),
        "height": pa.array(np.full(COUNT, 32), pa.int32()),
        "sha256": pa.array([f"{number:064x}" for number in range(COUNT)]),
        "thumbnail": pa.array([_picture(concepts[number]) for number in range(COUNT)]),
        "cluster_id": pa.array(
            [uid_of(number - number % 2 * (number >= FIRST_COPY)) for number in range(COUNT)]
        ),
        "mismatch_probability": pa.array(
            np.where(wrong, 0.9, 0.01) + 0.05 * rng.random(COUNT), pa.float32()
        ),
        "rarity": pa.array(rng.random(COUNT), pa.float32()),
        "alignment_in": pa.array(rng.random(COUNT), pa.float32()),
    }
    absent = {name for name, there in without.items() if not there}
    folders = {name: f"{out}/stages/{name}-0" for name in (*_TABLES, "select")}
    whole = pa.table({"uid": [uid_of(number) for number in range(COUNT)], **columns})
    starts = range(0, COUNT, SHARD)
    names = [f"{number:05d}" for number in range(len(starts))]
    for table, held in _TABLES.items():
        content = whole.select(["uid", *(name for name in held if name not in absent)])
        for name, start in zip(names, starts, strict=True):
            path = f"{folders[table]}/shards/{name}.parquet"
            storage.commit_table(path, content.slice(start, SHARD))
    shards = [{"name": name, "samples": SHARD} for name in names]
    storage.commit_json(f"{folders['ingest']}/layout.json", {"shards": shards})
    _write_edges(folders["dedup"])
    _decide(out, folders, {"min_caption_chars": 3})
    return out


def _write_edges(folder: str) -> None:
    left = np.arange(FIRST_COPY, COUNT, 2)
    # Half of the copies are near, half nearer.
    cosines = np.where(left % 4 == 0, 0.8, 0.99)
    edges = {"left_row": left, "right_row": left + 1, "cosine": pa.array(cosines, pa.float32())}
    storage.commit_table(f"{folder}/edges/0.parquet", pa.table(edges))
    storage.commit_array(f"{folder}/nodes.npy", np.arange(COUNT))
    storage.commit_array(f"{folder}/pixels.npy", np.zeros(COUNT, bool))


def _decide(out: Path, folders: dict[str, str], parameters: dict[str, Any]) -> None:
    stage = Select(**parameters)
    origins = {name: table for table, names in _TABLES.items() for name in names}
    present = {
        name: table
        for name, table in origins.items()
        if name in storage.list_columns(f"{folders[table]}/shards/00000.parquet")
    }
    room = Room(stage, folders, present, frozenset({"select"}))
    for step in stage.steps():
        for task in step.tasks(room):
            step.run(room, task)
    stages = {name: {"fingerprint": "0", "parameters": {}} for name in folders}
    stages["select"]["parameters"] = parameters
    stages["dedup"]["parameters"] = {"min_cosine": 0.7}
    stages["embed.vectors"]["parameters"] = {"encoder": "offline"}
    run = {"status": "finished", "name": "test", "stages": stages, "facts": {}}
    storage.commit_json(f"{out}/run.json", run)


def _caption(number: int) -> str:
    digits = [number // 10**place % 10 for place in range(4)]
    return " ".join(_WORDS[digit] for digit in digits)


def _vectors(values: np.ndarray) -> pa.Array:
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    return storage.vector_column(unit, np.ones(len(values), bool))


def _picture(concept: np.ndarray) -> bytes:
    grid = np.clip(127 + 60 * concept[:24].reshape(2, 4, 3), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize((32, 32)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()
