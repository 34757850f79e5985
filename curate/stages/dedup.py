"""dedup: find the pairs that show the same picture, and the clusters they form.

It removes nothing: `select` walks the edges once it knows which samples it would rather keep.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate import storage
from curate.dedup import groups
from curate.schema import select_schema
from curate.stages.base import OneOrMore, Room, Step, Table, execution_only, one_task, shard_tasks
from curate.stages.dedup_earlier import open_runs
from curate.stages.dedup_inputs import (
    commit_keys,
    dedup_stage,
    earlier_runs,
    read_edges,
    read_keys,
    read_known,
    read_nodes,
    read_spots,
    shard_start,
    shard_starts,
)
from curate.stages.dedup_recall import (
    choose_reach,
    compare_all,
    compare_known,
    compare_pilot,
    draw_queries,
    known_tasks,
    measure_known_recall,
    measure_recall,
)
from curate.stages.dedup_search import (
    assign_shard,
    search_part,
    search_parts,
    spread_shard,
    train_cells,
)
from curate.stages.likeness import Likeness

__all__ = ["Dedup"]

Array = np.ndarray[Any, Any]

_COLUMNS = ("cluster_id", "cluster_size", "caption_agreement", "earlier_uid", "earlier_cosine")
#: Pairs of a spot that are compared to tell how many there are.
_SPOT_SAMPLE = 1000


class Dedup(Likeness):
    """Edges between samples of equal bytes or near-equal pictures, and their clusters."""

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 4

    target_recall: float = Field(
        0.999,
        description="share of a sample's copies to find, on average over samples that have any; "
        "decides how far from its own cell every vector is compared",
        gt=0,
        le=1,
    )
    max_probes: int = Field(
        32, description="cells that a vector is compared in, at most", ge=1, le=256
    )
    max_candidates: int = Field(
        128,
        description="candidates of a sample in one cell that pixels are asked about, those of the "
        "highest cosine; not used where pixels are not asked",
        ge=1,
    )
    seed: int = Field(0, description="draws the samples for centroids and recall", ge=0)
    against: OneOrMore = execution_only(
        (),
        "outputs of earlier runs: samples that duplicate what these kept are dropped; what those "
        "were compared with is included",
    )

    def reads(self) -> tuple[str, ...]:
        return ("image_emb", "sha256", *(("thumbnail",) if self.asks_pixels else ()))

    def wants(self) -> tuple[str, ...]:
        return ("text_emb",)

    def tables(self) -> tuple[Table, ...]:
        return (Table("dedup", _COLUMNS),)

    def sources(self) -> list[dict[str, Any]]:
        # What an earlier run is, wherever it lies.
        tables = ("embed.vectors", "dedup", "select")
        runs = open_runs(self.against)
        return [{"earlier": {table: run.tables[table] for table in tables}} for run in runs]

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("keys", commit_keys, shard_tasks),
            Step("collapse", _collapse, one_task),
            Step("centroids", train_cells, one_task),
            Step("cells", assign_shard, shard_tasks),
            Step("pilot", compare_pilot, shard_tasks),
            Step("queries", draw_queries, one_task),
            Step("recall", compare_all, shard_tasks),
            Step("known", compare_known, known_tasks),
            Step("reach", choose_reach, one_task),
            Step("spread", spread_shard, shard_tasks),
            Step("search", search_part, search_parts),
            Step("groups", _group, one_task),
            Step("captions", _compare_captions, one_task),
            Step("table", _write_shard, shard_tasks),
        )

    def facts(self, room: Room) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(room.path("groups.json"))
        return found | storage.read_json(room.path("captions.json"))


def _collapse(room: Room, task: str) -> dict[str, float]:
    """Commit which samples are equal: they are searched once, and their pairs never counted.

    Equal are equal bytes, and equal vectors where pixels are not asked or there are none.
    """
    names, valid, pixels, *keys = read_keys(room, "uid", "usable", "pixels", "bytes", "vector")
    edges = [groups.equal_value_edges(values, values != b"") for values in keys]
    left, right = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    # The lowest uid of those that have a vector: shards may come in any order.
    order = np.empty(len(names), np.int64)
    order[np.lexsort((names, ~valid))] = np.arange(len(names))
    nodes = groups.label_components(len(names), left, right, order)
    storage.commit_array(room.path("nodes.npy"), nodes)
    storage.commit_array(room.path("pixels.npy"), pixels)
    return {"samples": len(names), "equal": int((nodes != np.arange(len(nodes))).sum())}


def _group(room: Room, task: str) -> dict[str, float]:
    """Commit cluster labels of all rows, and what `run.json` says about them."""
    (names,) = read_keys(room, "uid")
    total = len(names)
    left, right, _ = read_edges(room, "edges")
    spots = read_spots(room)
    nodes = read_nodes(room)
    rank = np.empty(total, np.int64)
    rank[np.argsort(names, kind="stable")] = np.arange(total)
    centres, members = spots.stars()
    linked = np.r_[left, centres], np.r_[right, members]
    labels = groups.label_clusters(nodes, *linked, rank)
    sizes = np.bincount(labels, minlength=total)
    storage.commit_array(room.path("labels.npy"), labels)
    storage.commit_array(room.path("sizes.npy"), sizes[labels].astype(np.int32))
    storage.commit_array(room.path("cluster_uids.npy"), names[labels])
    storage.commit_json(
        room.path("groups.json"),
        {
            "edges": {"equal": int((nodes != np.arange(total)).sum()), "semantic": len(left)},
            "spots": _describe(spots, dedup_stage(room).seed),
            "clusters": int((sizes > 1).sum()),
            "largest_cluster": int(sizes.max(initial=0)),
            "recall": measure_recall(room, left, right, spots),
            **_name_earlier(room, nodes),
        },
    )
    return {"samples": total}


def _name_earlier(room: Room, nodes: Array) -> dict[str, Any]:
    """Commit the uid of the earlier sample that each row shows, and its cosine; count them."""
    rows, known, cosines = read_known(room, "earlier")
    runs, first = earlier_runs(room), shard_starts(room)[-1]
    uids = np.full(len(nodes), b"", "S32")
    nearness = np.full(len(nodes), np.nan, np.float32)
    for run in runs:
        theirs = np.flatnonzero((known >= first) & (known < first + run.starts[-1]))
        uids[rows[theirs]] = run.uids(known[theirs] - first)
        nearness[rows[theirs]] = cosines[theirs]
        first += run.starts[-1]
    storage.commit_array(room.path("earlier_uids.npy"), uids[nodes])
    storage.commit_array(room.path("earlier_cosines.npy"), nearness[nodes])
    if not runs:
        return {}
    return {
        "against": [{"out": run.out, "dedup": run.tables["dedup"]} for run in runs],
        "earlier": int((uids[nodes] != b"").sum()),
        "recall_against": measure_known_recall(room, rows),
    }


def _describe(spots: groups.Spots, seed: int) -> dict[str, int]:
    """Count what spots hold; of their pairs, which are not written, from a sample."""
    from curate.dedup.neighbors import exact_cosines

    rng = np.random.default_rng(seed)
    pairs = 0.0
    for start, end in pairwise(spots.starts.tolist()):
        asked = rng.integers(start, end, _SPOT_SAMPLE)
        other = rng.integers(start, end - 1, _SPOT_SAMPLE)
        other += other >= asked
        near = exact_cosines(spots.vectors[asked], spots.vectors[other]) >= spots.min_cosine
        pairs += near.mean() * (end - start) * (end - start - 1) / 2
    return {"spots": len(spots.starts) - 1, "members": len(spots.rows), "pairs": round(pairs)}


def _compare_captions(room: Room, task: str) -> dict[str, float]:
    """Commit how each caption agrees with those of its picture's copies, and how many contradict.

    A caption does where it is no more like those of the same picture than like any other's.
    """
    labels, sizes = (storage.read_array(room.path(name)) for name in ("labels.npy", "sizes.npy"))
    cluster = np.full(len(labels), -1)
    clusters, place = np.unique(labels[sizes > 1], return_inverse=True)
    cluster[sizes > 1] = place
    sums, everything, total = np.zeros((len(clusters), 1), np.float32), np.zeros(1), 0
    counts = np.zeros(len(clusters), np.int64)
    for rows, vectors in _caption_vectors(room):
        if total == 0:
            sums = np.zeros((len(clusters), vectors.shape[1]), np.float32)
        everything, total = everything + vectors.sum(0, np.float64), total + len(vectors)
        own = np.flatnonzero(cluster[rows] >= 0)
        np.add.at(sums, cluster[rows[own]], vectors[own])
        np.add.at(counts, cluster[rows[own]], 1)
    agreement = np.full(len(labels), np.nan, np.float32)
    for rows, vectors in _caption_vectors(room):
        own = np.flatnonzero(cluster[rows] >= 0)
        others = counts[cluster[rows[own]]] - 1
        own, others = own[others > 0], others[others > 0]
        rows = rows[own]
        agreement[rows] = ((vectors[own] * sums[cluster[rows]]).sum(1) - 1) / others
    storage.commit_array(room.path("caption_agreement.npy"), agreement.clip(-1, 1))
    any_two = float((everything**2).sum() - total) / (total * (total - 1)) if total > 1 else None
    found = {
        "compared": int(np.isfinite(agreement).sum()),
        "contradict": 0 if any_two is None else int((agreement <= any_two).sum()),
        "any_two": any_two,
    }
    storage.commit_json(room.path("captions.json"), {"captions_of_copies": found})
    return {"samples": len(labels)}


def _caption_vectors(room: Room) -> Iterator[tuple[Array, Array]]:
    """Yield, shard by shard, global rows and unit vectors of the captions that have one."""
    from curate.dedup.neighbors import unit_rows

    if not room.has("text_emb"):
        return
    for shard, start in zip(room.shards(), shard_starts(room), strict=False):
        vectors, valid = storage.read_vectors(room.read(shard, ["text_emb"])["text_emb"])
        usable = np.flatnonzero(valid & storage.has_direction(vectors))
        if len(usable):
            yield start + usable, unit_rows(vectors[usable])


def _write_shard(room: Room, shard: str) -> dict[str, float]:
    start = shard_start(room, shard)
    table = room.read(shard, [])
    names, sizes, agreement, earlier, nearness = (
        storage.read_array_rows(room.path(f"{name}.npy"), start, start + len(table))
        for name in (
            "cluster_uids",
            "sizes",
            "caption_agreement",
            "earlier_uids",
            "earlier_cosines",
        )
    )
    columns = (
        names.astype(str),
        sizes,
        pa.array(agreement, pa.float32(), from_pandas=True),
        pa.array(earlier.astype(str), pa.string(), mask=earlier == b""),
        pa.array(nearness, pa.float32(), from_pandas=True),
    )
    for field, column in zip(select_schema(room.stage.writes()), columns, strict=True):
        table = table.append_column(field, pa.array(column, field.type))
    room.commit_shard("dedup", shard, table)
    return {"samples": len(table)}
