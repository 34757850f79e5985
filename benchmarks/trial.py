"""A finished run as arrays, spoilt in memory and scored by the score stage's own steps."""

import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate import storage
from curate.memorization.folds import hash_unit
from curate.models.encoders import Precision, load_encoder
from curate.stages.base import Room
from curate.stages.score import Score

__all__ = ["Corpus", "Scored", "embed_captions", "embed_pictures", "read_corpus", "run_score"]

Array = np.ndarray[Any, Any]

_SHARD = 1000
_TABLES = {
    "caption": "ingest",
    "image_emb": "embed.vectors",
    "text_emb": "embed.vectors",
    "cluster_id": "dedup",
}


@dataclass(frozen=True)
class Corpus:
    """Pairs with both vectors.

    Parameters
    ----------
    uids, captions, clusters : (N,) str
    kinds, name_groups, categories, sources : (N,) str
        Of the planted truth: see `benchmarks.corpora`.
    image : (N, D) float32
    text : (N, E) float32
    concepts : Path
        Folder of the encoder's concepts, which may not exist.
    shared : bool
        Whether both vectors lie in one space, D = E.
    languages : (N,) str, optional
        Of the captions, before anything was swapped.
    """

    uids: Array
    captions: Array
    clusters: Array
    kinds: Array
    name_groups: Array
    categories: Array
    sources: Array
    image: Array
    text: Array
    concepts: Path
    shared: bool = False
    languages: Array | None = None

    def __len__(self) -> int:
        return len(self.uids)

    def take(self, rows: Array) -> "Corpus":
        """Choose rows."""
        arrays = {name: v for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **{name: value[rows] for name, value in arrays.items()})

    def by_language(self) -> dict[str, Array]:
        """Which captions are in each language, if that is known: (N,) bool each."""
        if self.languages is None:
            return {}
        return {str(one): self.languages == one for one in np.unique(self.languages)}

    def one_per_cluster(self) -> "Corpus":
        """Choose one row of each cluster, by hash."""
        order = np.argsort(hash_unit(self.uids.tolist(), 0, "one per cluster"), kind="stable")
        _, first = np.unique(self.clusters[order], return_index=True)
        return self.take(np.sort(order[first]))

    def with_clusters(self, clusters: Array) -> "Corpus":
        """Group the rows otherwise."""
        return replace(self, clusters=clusters)

    def with_captions(self, rows: Array, captions: Array, text: Array) -> "Corpus":
        """Give rows other captions, whose vectors are (len(rows), E)."""
        every, vectors = self.captions.astype(object), self.text.copy()
        every[rows], vectors[rows] = captions, text
        return replace(self, captions=every.astype(str), text=vectors)

    def with_vectors(self, image: Array, text: Array) -> "Corpus":
        """See the same pairs through another encoder, one space for both: (N, D) float32 each."""
        return replace(self, image=image, text=text, concepts=Path("none"), shared=True)

    def with_pictures(self, rows: Array, image: Array) -> "Corpus":
        """Give rows other pictures, whose vectors are (len(rows), D), each its own cluster."""
        vectors, clusters = self.image.copy(), self.clusters.astype(object)
        vectors[rows] = image
        clusters[rows] = [f"planted {uid}" for uid in self.uids[rows]]
        return replace(self, image=vectors, clusters=clusters.astype(str))


@dataclass(frozen=True)
class Scored:
    """What the score stage said.

    Parameters
    ----------
    columns : dict of str to (N,) float64
        NaN where null.
    evidence, fit : pyarrow.Table
        What the detector judges, and what it was fitted on.
    embedded : list of ((N, W), (N, W)) float32
        Images and captions under each proxy, of unit norm up to float16.
    facts : dict
    seconds : float
    """

    columns: dict[str, Array]
    evidence: pa.Table
    fit: pa.Table
    embedded: list[tuple[Array, Array]]
    facts: dict[str, Any]
    seconds: float


def _folder(out: Path, table: str) -> Path:
    """Folder of a table of the run; the latest one if there are several."""
    found = sorted((out / "stages").glob(f"{table}-*"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def _read(out: Path, table: str) -> pa.Table:
    paths = sorted((_folder(out, table) / "shards").glob("*.parquet"))
    columns = ["uid", *(name for name, home in _TABLES.items() if home == table)]
    return pa.concat_tables([storage.read_table(str(path), columns) for path in paths])


def read_corpus(out: str, truth: str) -> Corpus:
    """Read the pairs of a finished run that have both vectors, with their planted truth."""
    tables = dict.fromkeys(_TABLES.values())
    whole = storage.join_aligned((table, _read(Path(out), table)) for table in tables)
    whole = whole.filter(whole["image_emb"].is_valid()).combine_chunks()
    whole = whole.filter(whole["text_emb"].is_valid()).combine_chunks()
    keys = pq.read_table(Path(out) / "decisions", columns=["uid", "key"]).to_pylist()
    planted = {row["key"]: row for row in pq.read_table(truth).to_pylist()}
    by_uid = {row["uid"]: planted[row["key"]] for row in keys}
    rows = [by_uid[uid] for uid in whole["uid"].to_pylist()]
    return Corpus(
        *(np.array(whole[name].to_pylist(), str) for name in ("uid", "caption", "cluster_id")),
        *(np.array([row[n] for row in rows], str) for n in ("kind", "name_group", "category")),
        np.array([row["source"] for row in rows], str),
        *(storage.read_vectors(whole[n])[0].astype("f4") for n in ("image_emb", "text_emb")),
        _folder(Path(out), "score") / "concepts",
    )


@cache
def _encoder() -> Any:
    return load_encoder("offline", "cpu")


def embed_captions(captions: list[str]) -> Array:
    """Embed by the packaged text tower: (N, E) float32."""
    tokens = _encoder().tokenize(captions)
    vectors = np.empty((len(captions), _encoder().text_width), np.float32)
    lengths = np.array([len(row) for row in tokens])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        batch = np.stack([tokens[row] for row in same])
        vectors[same] = _encoder().encode_texts(batch, Precision())
    return vectors


def embed_pictures(pictures: list[Image.Image]) -> Array:
    """Embed by the packaged image tower: (N, D) float32."""
    vectors = [
        _encoder().encode_images(_encoder().prepare(picture)[None], Precision())
        for picture in pictures
    ]
    return np.concatenate(vectors)


def run_score(corpus: Corpus, stage: Score) -> Scored:
    """Run the score stage's steps, in shards of a thousand, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        room = _lay_out(folder, corpus, stage)
        begun = time.monotonic()
        for step in stage.steps():
            for task in step.tasks(room):
                step.run(room, task)
        seconds = time.monotonic() - begun
        columns, evidence, fit = (
            # Copied out of the folder, which is gone after this.
            pa.Table.from_pylist(pa.concat_tables(map(storage.read_table, paths)).to_pylist())
            for paths in (
                [room.shard_path("score", shard) for shard in room.shards()],
                [room.path("evidence", f"{shard}.parquet") for shard in room.shards()],
                [room.path("fit", f"{shard}.parquet") for shard in room.shards()],
            )
        )
        embedded = _read_embedded(room, stage.proxies)
        facts = stage.facts(room)
    values = {
        name: columns[name].cast(pa.float64()).to_numpy()
        for name in columns.column_names
        if name != "uid"
    }
    return Scored(values, evidence, fit, embedded, facts, seconds)


def _read_embedded(room: Room, proxies: int) -> list[tuple[Array, Array]]:
    paths = [room.path("projections", f"{shard}.parquet") for shard in room.shards()]
    table = pa.concat_tables(map(storage.read_table, paths))
    sides = [
        [storage.read_vectors(table[f"{side}_{p}"])[0].astype(np.float32) for p in range(proxies)]
        for side in ("image", "text")
    ]
    return list(zip(*sides, strict=True))


def _lay_out(folder: str, corpus: Corpus, stage: Score) -> Room:
    """Write the tables that the stage reads."""
    folders = {name: f"{folder}/{name}" for name in (*_TABLES.values(), "score")}
    folders["score.memorization"] = f"{folder}/score.memorization"
    origins = {**_TABLES, **({"clip_score": "embed.vectors"} if corpus.shared else {})}
    layout = []
    for start in range(0, len(corpus), _SHARD):
        part, name = corpus.take(np.arange(start, min(start + _SHARD, len(corpus)))), f"{start:07d}"
        layout.append({"name": name, "samples": len(part)})
        whole = np.ones(len(part), bool)
        columns = {
            "caption": pa.array(part.captions.tolist()),
            "image_emb": storage.vector_column(part.image, whole),
            "text_emb": storage.vector_column(part.text, whole),
            "cluster_id": pa.array(part.clusters.tolist()),
        }
        if corpus.shared:
            columns["clip_score"] = pa.array((part.image * part.text).sum(1), pa.float32())
        for table in dict.fromkeys(_TABLES.values()):
            own = {name: value for name, value in columns.items() if origins[name] == table}
            content = pa.table({"uid": pa.array(part.uids.tolist()), **own})
            storage.commit_table(f"{folders[table]}/shards/{name}.parquet", content)
    storage.commit_json(f"{folders['ingest']}/layout.json", {"shards": layout})
    for extra in corpus.concepts.glob("*.npy"):
        storage.commit_array(f"{folders['score']}/concepts/{extra.name}", np.load(extra))
    tables = {"score", "score.memorization"}
    return Room(stage, folders, origins, frozenset(tables))
