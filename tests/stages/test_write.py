import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate import storage
from curate.config import Pipeline
from curate.engine.runner import bind
from curate.errors import SourceChangedError
from curate.formats.index import UID
from curate.schema import public_columns, select_schema
from curate.stages.base import Room, Stage, Table
from curate.stages.ingest import Ingest
from curate.stages.write import Write
from tests.servers import use_s3

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff\xe0"


class Facts(Stage):
    """Stands for the stages between: their columns, as the test sets them."""

    name = "facts"

    def tables(self) -> tuple[Table, ...]:
        columns = ("sha256", "width", "keep", "reason", "failed_rules", "weight", "captions")
        return (Table("facts", (*columns, "rarity")),)


@dataclass
class Written:
    """What a run wrote, and what went in."""

    room: Room
    images: dict[str, bytes]
    kept: list[str]

    def shards(self, folder: str = "shards") -> list[pa.Table]:
        names = storage.list_names(self.room.path(folder))
        return [storage.read_table(self.room.path(folder, name)) for name in names]


def image_of(key: str, least_bytes: int = 10) -> bytes:
    # Sizes differ widely, and every third is a JPEG.
    number = int(key)
    size_bytes = least_bytes + 37 * number % 500
    return (JPEG if number % 3 == 0 else PNG) + bytes([number % 256]) * size_bytes


def write_tar(path: Path, images: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image in images.items():
            for suffix, content in (("png", image), ("txt", f"caption {key}".encode())):
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def prepare(
    folder: Path,
    keep: list[bool],
    per_shard: int,
    least_bytes: int = 10,
    place: Callable[[Path], str] = str,
    **fields: Any,
) -> Written:
    """Ingest a tar in shards of `per_shard` and lay decisions beside it.

    `place` puts the tar where it is read from.
    """
    keys = [f"{number:04d}" for number in range(len(keep))]
    images = {key: image_of(key, least_bytes) for key in keys}
    write_tar(folder / "in/0.tar", images)
    ingest = Ingest(inputs=(place(folder / "in/0.tar"),), shard_samples=per_shard, spool_gb=0)
    stages = (ingest, Facts(), Write(**fields))
    first, facts, last = bind(Pipeline("test", "", stages), str(folder / "out"))
    for step in first.stage.steps():
        for task in step.tasks(first.room):
            step.run(first.room, task)
    keeps = dict(zip(keys, keep, strict=True))
    for shard in facts.room.shards():
        index = facts.room.read(shard, ["key", "caption"])
        rows = []
        for row in index.to_pylist():
            kept = keeps[row["key"]]
            rows.append(
                {
                    "uid": row["uid"],
                    "sha256": hashlib.sha256(images[row["key"]]).hexdigest(),
                    "width": 40,
                    "keep": kept,
                    "reason": None if kept else "mismatched",
                    "failed_rules": [] if kept else ["mismatched"],
                    "weight": float(kept),
                    "captions": [row["caption"], "merged"] if kept else None,
                    "rarity": 0.25,
                }
            )
        names = ["uid", *facts.stage.writes()]
        content = pa.Table.from_pylist(rows, select_schema(names))
        facts.room.commit_shard("facts", shard, content)
    return Written(last.room, images, [key for key in keys if keeps[key]])


def run(written: Written) -> Written:
    for step in written.room.stage.steps():
        for task in step.tasks(written.room):
            step.run(written.room, task)
    return written


@pytest.mark.parametrize(
    ("count", "shard_samples", "expected"),
    [
        (0, 5, []),
        (1, 5, [1]),
        (5, 5, [5]),
        (6, 5, [3, 3]),
        (23, 5, [4, 5, 4, 5, 5]),
        (23, 1, [1] * 23),
        (23, 1000, [23]),
    ],
)
def test_shards_are_of_even_size(
    tmp_path: Path, count: int, shard_samples: int, expected: list[int]
) -> None:
    keep = [i % 3 != 1 for i in range(35)]
    left = [i for i, kept in enumerate(keep) if kept][count:]
    keep = [kept and i not in left for i, kept in enumerate(keep)]
    assert sum(keep) == count
    done = run(prepare(tmp_path, keep, 4, shard_samples=shard_samples))
    sizes = [len(shard) for shard in done.shards()]
    assert sorted(sizes) == sorted(expected)
    assert not sizes or max(sizes) - min(sizes) <= 1
    keys = [key for shard in done.shards() for key in shard["key"].to_pylist()]
    assert keys == done.kept


def test_kept_samples_have_their_original_bytes(tmp_path: Path) -> None:
    done = run(prepare(tmp_path, [i % 4 != 0 for i in range(30)], 7, shard_samples=10))
    whole = pa.concat_tables(done.shards()).replace_schema_metadata()
    assert whole.schema == select_schema(public_columns("shards"))
    assert len(set(whole["uid"].to_pylist())) == len(done.kept)
    for row in whole.to_pylist():
        assert row["image"] == done.images[row["key"]]
        assert hashlib.sha256(row["image"]).hexdigest() == row["sha256"]
        assert row["caption"] == f"caption {row['key']}"
        assert row["captions"] == [row["caption"], "merged"]
        assert (row["width"], row["weight"], row["rarity"]) == (40, 1, 0.25)
        # What no stage wrote is null.
        assert row["height"] is None
        assert row["alignment_in"] is None


def test_there_is_a_decision_on_every_sample(tmp_path: Path) -> None:
    keep = [i % 4 != 0 for i in range(30)]
    done = run(prepare(tmp_path, keep, 7))
    parts = done.shards("decisions")
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]
    whole = pa.concat_tables(parts).replace_schema_metadata()
    assert whole.schema == select_schema(public_columns("decisions"))
    assert whole["key"].to_pylist() == list(done.images)
    assert whole["keep"].to_pylist() == keep
    assert whole["reason"].to_pylist() == [None if kept else "mismatched" for kept in keep]
    assert whole["failed_rules"].to_pylist() == [[] if kept else ["mismatched"] for kept in keep]
    assert set(whole["source_file"].to_pylist()) == {"0.tar"}
    for name in ("cluster_id", "representative_uid", "clip_score", "mismatch_probability"):
        assert whole[name].null_count == 30
        assert whole.schema.field(name).type == select_schema([name]).field(0).type


def test_shards_carry_their_fingerprint(tmp_path: Path) -> None:
    done = run(prepare(tmp_path, [True] * 3, 5))
    mark = done.shards()[0].schema.metadata[b"curate.fingerprint"].decode()
    assert done.room.folders["write"].endswith(f"write-{mark}")


def test_nothing_kept(tmp_path: Path) -> None:
    done = run(prepare(tmp_path, [False] * 5, 2, webdataset=True))
    assert done.shards() == []
    assert storage.list_names(done.room.path("webdataset")) == []
    assert sum(len(part) for part in done.shards("decisions")) == 5


def test_webdataset(tmp_path: Path) -> None:
    done = run(prepare(tmp_path, [i != 4 for i in range(9)], 5, shard_samples=4, webdataset=True))
    shards = done.shards()
    names = storage.list_names(done.room.path("webdataset"))
    assert names == ["00000.tar", "00001.tar", "sizes.json"]
    sizes = storage.read_json(done.room.path("webdataset", names.pop()))
    assert sizes == {name: len(shard) for name, shard in zip(names, shards, strict=True)}
    for name, shard in zip(names, shards, strict=True):
        with tarfile.open(done.room.path("webdataset", name)) as tar:
            members = {m.name: tar.extractfile(m) for m in tar}
            content = {name: file.read() for name, file in members.items() if file is not None}
        rows = shard.to_pylist()
        assert len(content) == 3 * len(rows)
        for row in rows:
            assert UID.fullmatch(row["uid"])
            suffix = "jpg" if row["image"].startswith(JPEG) else "png"
            assert content[f"{row['uid']}.{suffix}"] == row["image"]
            assert content[f"{row['uid']}.txt"].decode() == row["caption"]
            fields = json.loads(content[f"{row['uid']}.json"])
            assert fields["key"] == row["key"]
            assert fields["weight"] == 1
            assert fields["captions"] == row["captions"]
            assert "height" not in fields  # null: loaders infer types from the first sample
    assert run(prepare(tmp_path / "b", [True] * 3, 5)).room.stage == Write()
    assert not (tmp_path / "b/out/webdataset").exists()


def flip_last_byte(source: Path, member: str) -> None:
    with tarfile.open(source) as tar:
        found = tar.getmember(member)
        place = found.offset_data + found.size - 1
    data = bytearray(source.read_bytes())
    data[place] ^= 1
    source.write_bytes(data)


def test_a_source_that_changed_under_the_run(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, [i != 2 for i in range(6)], 3)
    flip_last_byte(tmp_path / "in/0.tar", "0002.png")
    run(prepared)  # a dropped sample's bytes are not read
    prepared = prepare(tmp_path / "b", [True] * 6, 3)
    flip_last_byte(tmp_path / "b/in/0.tar", "0004.png")
    with pytest.raises(SourceChangedError, match=r"0\.tar, key 0004: must hold the bytes"):
        run(prepared)
    assert storage.list_names(prepared.room.path("shards")) == []


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, [True] * 6, 3)
    (tmp_path / "in/0.tar").unlink()
    with pytest.raises(SourceChangedError, match=r"0\.tar"):
        run(prepared)


def test_more_images_than_are_held_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keep = (rng.random(700) < 0.9).tolist()
    done = run(prepare(tmp_path, keep, 300))
    (shard,) = done.shards()
    assert shard["key"].to_pylist() == done.kept
    assert shard["image"].to_pylist() == [done.images[key] for key in done.kept]


@pytest.mark.parametrize(
    ("in_a_row", "is_streamed"), [(20, True), (10, False)], ids=["a third", "a fifth"]
)
def test_a_remote_source_is_streamed_where_much_of_it_is_kept(
    tmp_path: Path, in_a_row: int, is_streamed: bool
) -> None:
    """Kept in runs with 40 dropped between, 1.7 MB: more than is read over for its own sake."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    keep = [i % (40 + in_a_row) < in_a_row for i in range(400)]
    with use_s3() as (server, fs):

        def upload(path: Path) -> str:
            fs.put_file(str(path), "bucket/0.tar")
            return "s3://bucket/0.tar"

        prepared = prepare(tmp_path, keep, 1000, 40_000, upload)
        server.gate.seen.clear()
        server.gate.sent_bytes.clear()
        (shard,) = run(prepared).shards()
        requests = server.gate.count("GET", "/bucket/0.tar")
        sent_bytes = server.gate.sent_bytes["/bucket/0.tar"]
    assert shard["image"].to_pylist() == [prepared.images[key] for key in prepared.kept]
    whole, runs = (tmp_path / "in/0.tar").stat().st_size, -(-400 // (40 + in_a_row))
    kept = sum(len(prepared.images[key]) for key in prepared.kept)
    if is_streamed:
        assert requests <= 2 < runs
        assert 0.85 * whole < sent_bytes < whole
    else:
        assert requests == runs
        assert kept < sent_bytes < 1.1 * kept
