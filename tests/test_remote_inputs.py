"""Everything that can be read from outside, on an S3 endpoint: the same as on a disk."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import storage
from curate.config import load_pipeline
from curate.engine.runner import bind
from curate.stages.base import Room
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp
from tests.servers import use_s3
from tests.stages import test_download as downloads
from tests.support import carry_out, clean_pairs, decisions_of, pair, write_tar
from tests.test_layouts import OF_IMAGES, OF_VECTORS
from tests.web import running

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with use_s3() as (_, fs):
        yield fs


def put(store: Any, folder: Path, name: str) -> str:
    """Copy a folder to the store; return where it lies there."""
    store.put(f"{folder}/", f"bucket/{name}/", recursive=True)
    return f"s3://bucket/{name}"


def index(source: object, out: Path) -> tuple[Room, pa.Table]:
    inputs = ("ingest", "inputs", (str(source),))
    bound = bind(load_pipeline("dedup", [inputs]), str(out))[0]
    for step in bound.stage.steps():
        for task in step.tasks(bound.room):
            step.run(bound.room, task)
    (shard,) = bound.room.shards()
    return bound.room, storage.read_table(bound.room.shard_path("ingest", shard))


def name_of(write: Callable[[Path], int]) -> str:
    return write.__name__.removeprefix("write_")


@pytest.mark.parametrize("write", OF_IMAGES, ids=name_of)
def test_layouts_of_images(store: Any, tmp_path: Path, write: Callable[[Path], int]) -> None:
    (tmp_path / "in").mkdir()
    count = write(tmp_path / "in")
    here, expected = index(tmp_path / "in", tmp_path / "here")
    there, found = index(put(store, tmp_path / "in", name_of(write)), tmp_path / "there")
    assert found.equals(expected)
    assert len(found) == count
    images = list(there.open_images(found))
    assert images == list(here.open_images(expected))
    assert sum(image is not None for image in images) >= 10


@pytest.mark.parametrize("write", OF_VECTORS, ids=name_of)
def test_layouts_of_vectors(store: Any, tmp_path: Path, write: Callable[[Path], int]) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    here, expected = index(tmp_path / "in", tmp_path / "here")
    there, found = index(put(store, tmp_path / "in", name_of(write)), tmp_path / "there")
    assert found.equals(expected)
    vectors, others = there.read_source_vectors(found), here.read_source_vectors(expected)
    assert vectors.has_image.all()
    assert vectors.images.tobytes() == others.images.tobytes()
    assert vectors.texts.tobytes() == others.texts.tobytes()


def _write_lists(folder: Path) -> None:
    """Write lists by uid (one file), URL (a folder) and hash, and scores by uid and by URL."""
    (folder / "urls").mkdir(parents=True)
    (folder / "takedown.txt").write_text(f"{1:032x}\n{2:032x}\n")
    (folder / "urls/1.txt").write_text("http://x/3\n")
    (folder / "urls/2.csv").write_text("name,url\na,http://x/4\n")
    pq.write_table(pa.table({"sha256": [f"{5:064x}"]}), folder / "bytes.parquet")
    uids = [f"{row:032x}" for row in range(30)]
    pq.write_table(pa.table({"uid": uids, "nsfw": [row / 30 for row in range(30)]}),
                   folder / "scores.parquet")  # fmt: skip
    (folder / "aesthetic").mkdir()
    for part in range(2):
        lines = [f"http://x/{row},{row}" for row in range(part, 30, 2)]
        (folder / f"aesthetic/{part}.csv").write_text("\n".join(["url,score", *lines]))


def _lists(folder: object) -> dict[str, Any]:
    return {
        "remove__lists": [
            {"path": f"{folder}/takedown.txt", "by": "uid"},
            {"path": f"{folder}/urls", "by": "url", "name": "opt-out"},
            {"path": f"{folder}/bytes.parquet", "by": "sha256"},
        ],
        "select__score_tables": [
            {"path": f"{folder}/scores.parquet", "on": "uid", "name": "safety"},
            {"path": f"{folder}/aesthetic", "on": "url"},
        ],
        "select__thresholds": [
            {"column": "safety.nsfw", "max": 0.9},
            {"column": "aesthetic.score", "min": 8},
        ],
    }


def test_lists_score_tables_and_a_pool_to_keep_out(store: Any, tmp_path: Path) -> None:
    vectors = draw_vectors(30)
    vectors[29] = vectors[28]
    write_datacomp(tmp_path / "in", "0", datacomp_uids(30), l14_img=vectors, l14_txt=vectors)
    write_datacomp(tmp_path / "held", "0", datacomp_uids(3, 100), l14_img=vectors[10:13])
    _write_lists(tmp_path / "lists")
    decided = []
    for place in (str(tmp_path), "s3://bucket/outside"):
        if place.startswith("s3:"):
            put(store, tmp_path / "in", "outside/in")
            put(store, tmp_path / "held", "outside/held")
            put(store, tmp_path / "lists", "outside/lists")
        fields = {**_lists(f"{place}/lists"), "decontaminate__inputs": [f"{place}/held"]}
        stages = carry_out(f"{place}/in", tmp_path / f"out{len(decided)}", **fields)
        decided.append(decisions_of(stages))
    assert decided[0] == decided[1]
    reasons = [row["reason"] for row in decided[1]]
    assert reasons[1:6] == ["removed_by_uid"] * 2 + ["removed_by_url"] * 2 + ["removed_by_hash"]
    assert reasons[6:8] == ["outside_threshold"] * 2
    assert reasons[10:13] == ["contaminated"] * 3
    assert reasons[8] is reasons[9] is reasons[13] is None
    assert reasons[28:] == ["outside_threshold"] * 2


def test_hashes_of_bytes_and_pictures_to_keep_out(store: Any, tmp_path: Path) -> None:
    pairs = clean_pairs(8)
    members = [m for i, (image, text) in enumerate(pairs) for m in pair(f"{i}", image, text)]
    source = write_tar(tmp_path / "in/0.tar", members)
    (tmp_path / "outside/held").mkdir(parents=True)
    (tmp_path / "outside/held/five.jpg").write_bytes(pairs[5][0])
    digest = hashlib.sha256(pairs[2][0]).hexdigest()
    (tmp_path / "outside/hashes.txt").write_text(f"{digest}\n")
    there = put(store, tmp_path / "outside", "pictures")
    stages = carry_out(
        source,
        tmp_path / "out",
        remove__lists=[{"path": f"{there}/hashes.txt", "by": "sha256"}],
        decontaminate__inputs=[f"{there}/held"],
    )
    reasons = [row["reason"] for row in decisions_of(stages)]
    assert reasons[2] == "removed_by_hash"
    assert reasons[5] == "contaminated"
    assert reasons.count(None) == 6


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_lists_of_urls(store: Any, tmp_path: Path, suffix: str) -> None:
    with running() as web:
        rows = [*downloads.good_rows(web, 3), {"url": web.url("/none.png"), "caption": "gone"}]
        path = downloads.write_list(tmp_path / f"lists/in/urls.{suffix}", rows)
        there = put(store, path.parent, f"urls-{suffix}")
        here = downloads.index_of(downloads.carry_out(path, tmp_path / "here"))
        given = {"ingest__inputs": (f"{there}/urls.{suffix}",)}
        stages = downloads.carry_out(path, tmp_path / "there", **given)
        found = downloads.index_of(stages)
    assert [json.dumps(row) for row in found] == [json.dumps(row) for row in here]
    assert [row["ingest_reason"] for row in found] == [None] * 3 + ["failed_to_download"]
    assert [row["caption"] for row in found] == [row["caption"] for row in rows]
