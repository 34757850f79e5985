"""Pairs to be scored, two noisy views of hidden numbers, and the stage without the engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate import storage
from curate.stages.base import Room
from curate.stages.score import Score

#: Samples of a set, unless another number is asked for.
COUNT = 900


@dataclass
class Pairs:
    """Samples to be scored and the truth about them."""

    uids: list[str]
    image: np.ndarray
    text: np.ndarray
    captions: list[str | None]
    clusters: list[str]
    valid: np.ndarray
    swapped: np.ndarray
    clip_score: bool = False

    def take(self, rows: np.ndarray) -> "Pairs":
        return Pairs(
            [self.uids[row] for row in rows],
            self.image[rows],
            self.text[rows],
            [self.captions[row] for row in rows],
            [self.clusters[row] for row in rows],
            self.valid[rows],
            self.swapped[rows],
            self.clip_score,
        )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make_pairs(count: int = COUNT, share: float = 0.1, widths: tuple[int, int] = (48, 32)) -> Pairs:
    """Clusters of one or two samples; a share of captions permuted between clusters."""
    rng = np.random.default_rng(0)
    group = np.sort(rng.integers(int(0.8 * count), size=count))
    hidden = rng.normal(size=(count, 5))[group] + 0.02 * rng.normal(size=(count, 5))
    views = []
    for width in widths:
        clear = np.tanh(hidden @ rng.normal(size=(5, width)))
        views.append(clear + 0.1 * rng.normal(size=(count, width)))
    swapped = rng.random(count) < share
    rows = np.flatnonzero(swapped)
    source = np.arange(count)
    source[rows] = np.roll(rows, len(rows) // 2)
    return Pairs(
        [f"{number:032x}" for number in rng.permutation(count)],
        unit_rows(views[0]),
        unit_rows(views[1][source]),
        [f"caption {group[row]}" for row in source],
        [f"{number:032x}" for number in group],
        np.ones(count, bool),
        swapped,
    )


def lay_out(folder: Path, samples: Pairs, stage: Score, shards: int = 1) -> Room:
    """Write what the stages before `score` leave behind."""
    tables = ("ingest", "embed.vectors", "dedup", *(table.name for table in stage.tables()))
    places = {name: str(folder / name) for name in tables}
    names = [f"{number:05d}" for number in range(shards)]
    layout = []
    for name, rows in zip(names, np.array_split(np.arange(len(samples.uids)), shards), strict=True):
        part = samples.take(rows)
        uids = pa.array(part.uids, pa.string())
        vectors = {
            "image_emb": storage.vector_column(part.image, part.valid),
            "text_emb": storage.vector_column(part.text, part.valid),
        }
        if samples.clip_score:
            with np.errstate(invalid="ignore"):
                cosines = (part.image.astype("f4") * part.text.astype("f4")).sum(1)
            vectors["clip_score"] = pa.array(cosines, from_pandas=True)
        contents = {
            "ingest": {"caption": pa.array(part.captions, pa.string())},
            "embed.vectors": vectors,
            "dedup": {"cluster_id": pa.array(part.clusters, pa.string())},
        }
        for table, columns in contents.items():
            path = f"{places[table]}/shards/{name}.parquet"
            storage.commit_table(path, pa.table({"uid": uids, **columns}))
        layout.append({"name": name, "samples": len(rows)})
    storage.commit_json(f"{places['ingest']}/layout.json", {"shards": layout})
    origins = dict.fromkeys(("image_emb", "text_emb"), "embed.vectors")
    if samples.clip_score:
        origins["clip_score"] = "embed.vectors"
    origins |= {"caption": "ingest", "cluster_id": "dedup"}
    return Room(stage, places, origins, frozenset(table.name for table in stage.tables()))


def run_steps(room: Room) -> tuple[pa.Table, dict[str, float]]:
    """Run all steps; return the columns of all tables, and the steps' counts, summed."""
    counts: dict[str, float] = {}
    for step in room.stage.steps():
        for task in step.tasks(room):
            for name, value in step.run(room, task).items():
                counts[name] = counts.get(name, 0) + value
    shards = [_read(room, shard) for shard in room.shards()]
    return pa.concat_tables(shards), counts


def _read(room: Room, shard: str) -> pa.Table:
    paths = [room.shard_path(table.name, shard) for table in room.stage.tables()]
    return storage.join_aligned((path, storage.read_table(path)) for path in paths)


def read_column(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as float64, NaN where it is null."""
    return np.asarray(table[name].to_pandas(), dtype=float)
