import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from curate import storage
from curate.formats.pixels import make_thumbnail
from curate.stages import dedup_recall
from curate.stages.base import Room
from curate.stages.dedup import Dedup
from curate.stages.dedup_inputs import read_edges

Array = np.ndarray[Any, Any]

WIDTH = 48
ORIGINS = {"image_emb": "embed.vectors", "sha256": "embed.pixels", "thumbnail": "embed.thumbnails"}


class Data:
    """Samples as plain arrays: what the stage reads, before it is cut into shards."""

    def __init__(self, vectors: Array, sha256: list[str | None]) -> None:
        self.uids = [hashlib.md5(f"sample {i}".encode()).hexdigest() for i in range(len(vectors))]
        self.vectors = vectors.astype(np.float16)
        self.valid = np.ones(len(vectors), bool)
        self.sha256 = sha256
        self.thumbnails: list[bytes | None] = [None] * len(vectors)


def clustered(count: int, seed: int = 0) -> Data:
    """Draw families of pictures of several sizes, tight and loose, and loners."""
    rng = np.random.default_rng(seed)
    families = rng.integers(0, count // 3, count)
    centres = rng.standard_normal((count // 3, WIDTH))
    spread = rng.uniform(0.05, 0.6, (count // 3, 1))[families]
    vectors = centres[families] + spread * rng.standard_normal((count, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    digests: list[str | None] = [hashlib.sha256(f"{i}".encode()).hexdigest() for i in range(count)]
    return Data(vectors, digests)


def run(
    folder: Path,
    data: Data,
    stage: Dedup,
    shards: list[list[int]],
    texts: Array | None = None,
) -> tuple[Room, dict[str, float]]:
    """Lay data out as the earlier stages do, and run every step of the stage."""
    folders = {
        name: str(folder / name.replace(".", "-"))
        for name in ("ingest", "dedup", *dict.fromkeys(ORIGINS.values()))
    }
    origins = ORIGINS if texts is None else {**ORIGINS, "text_emb": "embed.vectors"}
    room = Room(stage, folders, origins, frozenset({"dedup"}))
    layout = []
    for number, rows in enumerate(shards):
        name = f"{number:05d}"
        layout.append({"name": name, "samples": len(rows)})
        uids = pa.table({"uid": pa.array([data.uids[r] for r in rows], pa.string())})
        columns = {
            "image_emb": storage.vector_column(data.vectors[rows], data.valid[rows]),
            "sha256": pa.array([data.sha256[r] for r in rows], pa.string()),
            "thumbnail": pa.array([data.thumbnails[r] for r in rows], pa.binary()),
        }
        room.commit_shard("ingest", name, uids)
        for column, values in columns.items():
            table = uids.append_column(column, values)
            if texts is not None and column == "image_emb":
                texts_of = storage.vector_column(texts[rows], np.ones(len(rows), bool))
                table = table.append_column("text_emb", texts_of)
            room.commit_shard(ORIGINS[column], name, table)
    storage.commit_json(room.path("layout.json", table="ingest"), {"shards": layout})
    counts: Counter[str] = Counter()
    for step in stage.steps():
        for task in step.tasks(room):
            for key, value in step.run(room, task).items():
                counts[f"{step.name}.{key}"] += int(value)
    return room, dict(counts)


def cut(count: int, shards: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(count), shards)]


def found_edges(room: Room, data: Data, shards: list[list[int]]) -> dict[tuple[str, str], float]:
    uids = [data.uids[row] for rows in shards for row in rows]
    left, right, cosines = read_edges(room, "edges")
    pairs = zip(left.tolist(), right.tolist(), cosines.tolist(), strict=True)
    return {(min(uids[a], uids[b]), max(uids[a], uids[b])): cosine for a, b, cosine in pairs}


def true_edges(data: Data, min_cosine: float) -> dict[tuple[str, str], float]:
    """Compare every pair in float64."""
    rows = data.vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    usable = data.valid & np.isfinite(norms) & (norms > 0)
    rows[~usable] = 0
    norms[~usable] = 1
    rows /= norms[:, None]
    cosines = rows @ rows.T
    left, right = np.nonzero(np.triu(cosines >= min_cosine, 1))
    return {
        (min(data.uids[a], data.uids[b]), max(data.uids[a], data.uids[b])): float(cosines[a, b])
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    }


def clusters_of(room: Room) -> dict[str, tuple[str, int]]:
    found = {}
    for shard in room.shards():
        table = storage.read_table(room.shard_path("dedup", shard))
        for row in table.to_pylist():
            found[row["uid"]] = (row["cluster_id"], row["cluster_size"])
    return found


def flood(data: Data, edges: set[tuple[str, str]]) -> dict[str, str]:
    """Label every uid with the smallest one that it reaches, by passing labels along edges."""
    label = {uid: uid for uid in data.uids}
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            lowest = min(label[a], label[b])
            if label[a] != lowest or label[b] != lowest:
                label[a] = label[b] = lowest
                changed = True
    return label


def test_several_cells_against_brute_force(tmp_path: Path) -> None:
    data = clustered(2600)
    data.vectors[5] = 0
    data.vectors[6] = np.nan
    data.vectors[7, 3] = np.inf
    data.vectors[8] = data.vectors[9]
    data.valid[8] = False
    data.sha256[8] = None
    data.sha256[10] = data.sha256[2000] = data.sha256[1999]
    data.sha256[5] = data.sha256[30]  # bytes count where a vector does not
    data.vectors[[10, 2000]] = data.vectors[1999]
    data.vectors[700] = data.vectors[600]  # equal without being of equal bytes
    shards = cut(2600, 5)
    room, counts = run(tmp_path, data, Dedup(min_cosine=0.8), shards)

    assert len(storage.read_array(room.path("centroids.npy"))) == 51
    equal = {10, 1999, 2000, 600, 700}
    nodes = storage.read_array(room.path("nodes.npy"))
    assert nodes[5] == 30
    for members in ({10, 1999, 2000}, {600, 700}):
        lowest = min(members, key=lambda row: data.uids[row])
        assert {int(nodes[row]) for row in members} == {lowest}
    assert np.flatnonzero(nodes != np.arange(2600)).tolist() == sorted(
        {5} | equal - set(nodes[list(equal)].tolist())
    )
    # Equals are searched once.
    assert counts["search.samples"] == 2600 - 4 - 3
    data.valid[[row for row in equal if nodes[row] != row]] = False
    truth = true_edges(data, 0.8)
    found = found_edges(room, data, shards)
    assert len(truth) > 1000
    assert found.keys() <= truth.keys()
    assert len(found) >= 0.99 * len(truth)
    for pair, cosine in found.items():
        assert cosine == pytest.approx(truth[pair], abs=1e-5)
    unusable = {data.uids[row] for row in (5, 6, 7, 8)}
    assert not any(unusable & set(pair) for pair in found)

    twins = {(data.uids[row], data.uids[nodes[row]]) for row in {5} | equal}
    expected = flood(data, found.keys() | twins)
    sizes = Counter(expected.values())
    clusters = clusters_of(room)
    assert clusters == {uid: (label, sizes[label]) for uid, label in expected.items()}
    assert {clusters[data.uids[row]] for row in (6, 7, 8)} == {
        (data.uids[row], 1) for row in (6, 7, 8)
    }

    facts = room.stage.facts(room)
    assert facts["edges"] == {"equal": 4, "semantic": len(found)}
    assert facts["clusters"] == sum(size > 1 for size in sizes.values())
    assert facts["largest_cluster"] == max(sizes.values())


def recall_of(data: Data, room: Room, shards: list[list[int]], rows: Array) -> list[float]:
    """Share of the true neighbours found, of every one of some rows that has any."""
    truth, found = true_edges(data, room.stage.min_cosine), found_edges(room, data, shards)
    shares = []
    for uid in (data.uids[row] for row in rows):
        mine = [pair for pair in truth if uid in pair]
        if mine:
            shares.append(sum(pair in found for pair in mine) / len(mine))
    return shares


@pytest.mark.parametrize(("target", "most"), [(0.9, 32), (0.999, 32), (1.0, 32), (0.999, 2)])
def test_the_reach_grows_until_the_recall_is_reached(
    tmp_path: Path, target: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup_recall, "_PAIRS_ASKED", 2400)  # all, so that it can be foretold
    data = clustered(2400, seed=1)
    shards = cut(2400, 3)
    stage = Dedup(min_cosine=0.7, target_recall=target, max_probes=most, seed=4)
    room, counts = run(tmp_path, data, stage, shards)
    asked = storage.read_array(room.path("query_rows.npy"))
    assert len(set(asked.tolist())) == counts["queries.queries"] == 2400  # all of so small a set
    shares = recall_of(data, room, shards, asked)
    recall = room.stage.facts(room)["recall"]
    assert recall["rows"] == len(shares)
    assert recall["recall"] == pytest.approx(np.mean(shares), abs=1e-6)
    low, high = recall["interval"]
    assert low < recall["recall"] <= high <= 1
    visited = counts["spread.visits"] / 2400
    if most == 2:  # what cannot be reached is told
        assert visited <= 2
        assert not recall["reached"]
        assert recall["recall"] < target
        return
    assert recall["recall"] >= target
    assert recall["reached"]
    assert 1 < visited < 32
    # The shortest that finds them: any less misses more than half of what may be missed.
    path = room.path("reach.json")
    reach = storage.read_json(path)["reach"]
    storage.commit_json(path, {"reach": float(np.nextafter(np.float16(reach), np.float16(0)))})
    for step in stage.steps():
        for task in step.tasks(room) if step.name in ("spread", "search", "groups") else ():
            step.run(room, task)
    assert room.stage.facts(room)["recall"]["recall"] < 1 - (1 - target) / 2


def test_some_pairs_of_a_query_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup_recall, "_PAIRS_ASKED", 4)
    monkeypatch.setattr(dedup_recall, "_MOST_READ", 1000)
    data = clustered(2400, seed=1)
    shards = cut(2400, 3)
    room, _ = run(tmp_path, data, Dedup(min_cosine=0.7, target_recall=0.9, seed=4), shards)
    asked = dedup_recall._read_asked(room)
    truth = true_edges(data, 0.7)
    pairs = {
        tuple(sorted((data.uids[a], data.uids[b]))) for a, b in zip(*map(list, asked), strict=True)
    }
    assert pairs < truth.keys()
    degrees = Counter(uid for pair in truth for uid in pair)
    given = Counter(data.uids[row] for row in asked[0])
    assert given == {uid: min(4, degree) for uid, degree in degrees.items()}
    # Which ones differs from query to query, or all would ask about the same few.
    assert max(Counter(asked[1].tolist()).values()) < 40
    shares = recall_of(data, room, shards, np.arange(2400))
    recall = room.stage.facts(room)["recall"]
    assert recall["rows"] == len(shares)
    assert recall["recall"] == pytest.approx(np.mean(shares), abs=0.01)


def test_order_and_size_of_shards_do_not_matter(tmp_path: Path) -> None:
    data = clustered(2100, seed=2)
    data.sha256[100] = data.sha256[1700]
    rng = np.random.default_rng(3)
    mixed = [part.tolist() for part in np.array_split(rng.permutation(2100), [7, 900, 901])]
    results = []
    for name, shards in (("one", cut(2100, 1)), ("eight", cut(2100, 8)), ("mixed", mixed)):
        room, _ = run(tmp_path / name, data, Dedup(min_cosine=0.75), shards)
        results.append((found_edges(room, data, shards), clusters_of(room), room.stage.facts(room)))
    for edges, clusters, facts in results[1:]:
        assert edges.keys() == results[0][0].keys()
        assert clusters == results[0][1]
        assert facts["edges"] == results[0][2]["edges"]
        assert facts["recall"] == results[0][2]["recall"]


def draw(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (100, 80), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers(5, 50, 4).tolist()
        pen.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def test_pixels_confirm_what_cosines_propose(tmp_path: Path) -> None:
    # Every picture has the same vector: the tower cannot tell them apart.
    data = Data(np.ones((12, WIDTH)), [f"{i:064x}" for i in range(12)])
    pictures = [draw(i) for i in range(6)]
    pictures += [p.crop((4, 3, 96, 77)).resize((100, 80)) for p in pictures[:4]]
    pictures += [pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    data.thumbnails = [make_thumbnail(picture, 128) for picture in pictures] + [None]
    data.valid[11] = False
    shards = cut(12, 3)
    stage = Dedup(min_cosine=0.9, min_pixel_match=0.97)
    assert "thumbnail" in stage.reads()
    room, counts = run(tmp_path, data, stage, shards)
    assert counts["search.candidates"] == 11 * 10 // 2
    planted = {tuple(sorted((data.uids[i], data.uids[i + 6]))) for i in range(4)}
    assert found_edges(room, data, shards).keys() == planted
    assert counts["search.edges"] == 4
    assert room.stage.facts(room)["recall"] == {
        "rows": 8,
        "recall": 1.0,
        "interval": [0.675584, 1.0],
        "reached": True,
    }
    assert "thumbnail" not in Dedup().reads()


@pytest.mark.parametrize(
    ("asked", "edges"),
    [
        ({"min_pixel_match": 0.96}, {(0, 1), (0, 2), (1, 2)}),
        ({"max_patch_difference": 15}, {(0, 1)}),
        ({"min_pixel_match": 0.96, "max_patch_difference": 15}, {(0, 1)}),
    ],
)
def test_another_of_a_series_is_no_copy(
    tmp_path: Path, asked: dict[str, Any], edges: set[tuple[int, int]]
) -> None:
    data = Data(np.ones((3, WIDTH)), [f"{i:064x}" for i in range(3)])
    numbered = draw(0)
    ImageDraw.Draw(numbered).ellipse((80, 60, 87, 67), fill="black")
    copy = draw(0).resize((70, 56))
    data.thumbnails = [make_thumbnail(picture, 128) for picture in (draw(0), copy, numbered)]
    shards = cut(3, 2)
    stage = Dedup(min_cosine=0.9, **asked)
    assert "thumbnail" in stage.reads()
    room, _ = run(tmp_path, data, stage, shards)
    wanted = {tuple(sorted((data.uids[a], data.uids[b]))) for a, b in edges}
    assert found_edges(room, data, shards).keys() == wanted


def test_captions_of_one_picture_that_contradict_each_other(tmp_path: Path) -> None:
    data = clustered(60, seed=6)
    rng = np.random.default_rng(7)
    topics = np.eye(WIDTH)[rng.integers(0, 8, 60)] + 0.05 * rng.standard_normal((60, WIDTH))
    data.vectors[:4] = data.vectors[0]
    topics[:4] = topics[0]
    topics[3] = np.eye(WIDTH)[20]  # of the same picture, it speaks of something else
    topics[59] = 0
    texts = topics.astype(np.float16)
    shards = cut(60, 3)
    room, _ = run(tmp_path, data, Dedup(min_cosine=0.97), shards, texts)
    found = pa.concat_tables(
        [storage.read_table(room.shard_path("dedup", shard)) for shard in room.shards()]
    )
    unit = texts.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit.T
    labels = np.array(found["cluster_id"].to_pylist())
    agreement = found["caption_agreement"].to_pylist()
    compared = 0
    for row in range(60):
        others = np.flatnonzero((labels == labels[row]) & unit.any(1) & (np.arange(60) != row))
        if len(others) == 0 or row == 59:
            assert agreement[row] is None
            continue
        compared += 1
        assert agreement[row] == pytest.approx(cosines[row, others].mean(), abs=1e-3)
    assert (labels == labels[0]).sum() >= 4
    facts = room.stage.facts(room)["captions_of_copies"]
    used = unit.any(1)
    any_two = (cosines[used][:, used].sum() - used.sum()) / (used.sum() * (used.sum() - 1))
    assert facts["any_two"] == pytest.approx(any_two, abs=1e-3)
    assert facts["compared"] == compared
    contradict = [row for row in range(60) if (agreement[row] or 1) <= any_two]
    assert 3 in contradict
    assert 0 not in contradict
    assert facts["contradict"] == len(contradict)


def test_no_usable_vector(tmp_path: Path) -> None:
    data = Data(np.zeros((5, WIDTH)), [None] * 5)
    data.valid[:3] = False
    room, counts = run(tmp_path, data, Dedup(), cut(5, 2))
    assert counts["search.samples"] == 0
    assert clusters_of(room) == {uid: (uid, 1) for uid in data.uids}
    facts = room.stage.facts(room)
    assert facts["recall"] == {
        "rows": 0,
        "recall": None,
        "interval": None,
        "reached": True,
    }
    assert facts["edges"] == {"equal": 0, "semantic": 0}


def test_one_sample(tmp_path: Path) -> None:
    data = Data(np.ones((1, WIDTH)), ["0" * 64])
    room, _ = run(tmp_path, data, Dedup(), [[0]])
    assert clusters_of(room) == {data.uids[0]: (data.uids[0], 1)}
