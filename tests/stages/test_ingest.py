import gzip
import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import formats, storage
from curate.errors import InputError, SourceChangedError
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.ingest import Ingest

JPEG = b"\xff\xd8\xff" + b"x" * 90


def make_tar(path: Path, keys: list[str], fields: list[dict[str, Any]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, key in enumerate(keys):
            members = [("jpg", JPEG + key.encode()), ("txt", f"caption {key}".encode())]
            if fields is not None:
                members.append(("json", json.dumps(fields[i]).encode()))
            for suffix, content in members:
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def keys_of(first: int, count: int) -> list[str]:
    return [f"{i:05d}" for i in range(first, first + count)]


def run(tmp_path: Path, **fields: Any) -> tuple[pa.Table, dict[str, dict[str, float]], Room]:
    """Run every step of the stage in a new folder."""
    stage = Ingest(**fields)
    number = len(list(tmp_path.glob("ingest-*")))
    folder = str(tmp_path / f"ingest-{number:04d}")
    room = Room(stage=stage, folders={"ingest": folder}, origins={}, missing=frozenset({"ingest"}))
    stats: dict[str, dict[str, float]] = {}
    for step in stage.steps():
        stats[step.name] = {}
        for task in step.tasks(room):
            for name, count in step.run(room, task).items():
                stats[step.name][name] = stats[step.name].get(name, 0) + count
    shards = [storage.read_table(room.shard_path("ingest", shard)) for shard in room.shards()]
    for shard in shards:
        assert shard.schema.remove_metadata() == select_schema(stage.writes())
    return pa.concat_tables(shards), stats, room


def uid_by_key(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    make_tar(folder / "0.tar", keys_of(0, 700))
    make_tar(folder / "1.tar", keys_of(700, 3))
    make_tar(folder / "sub/2.tar", keys_of(703, 97))
    return folder


def test_index_of_uneven_tars(tmp_path: Path, data: Path) -> None:
    table, stats, room = run(tmp_path, inputs=(str(data),))
    assert table["key"].to_pylist() == keys_of(0, 800)
    assert len(set(table["uid"].to_pylist())) == 800
    assert set(table["source_file"].to_pylist()) == {"0.tar", "1.tar", "sub/2.tar"}
    assert table["ingest_reason"].null_count == 800
    layout = storage.read_json(room.path("layout.json"))
    assert [shard["samples"] for shard in layout["shards"]] == [256, 256, 256, 32]
    assert layout["shards"][2]["parts"] == [[0, 512, 700], [1, 0, 3], [2, 0, 65]]
    assert (layout["samples"], layout["format"]) == (800, "webdataset")
    assert stats["shards"] == {"samples": 800}
    stage = room.stage
    assert isinstance(stage, Ingest)
    assert list(stage.open(table, room.path())) == [JPEG + key.encode() for key in keys_of(0, 800)]
    some = table.take(pa.array([701, 5, 720]))
    assert list(stage.open(some, room.path())) == [
        JPEG + k.encode() for k in ("00701", "00005", "00720")
    ]


def test_three_samples(tmp_path: Path) -> None:
    make_tar(tmp_path / "in/0.tar", ["a", "b", "c"])
    table, _, room = run(tmp_path, inputs=(str(tmp_path / "in/0.tar"),))
    assert table["key"].to_pylist() == ["a", "b", "c"]
    assert room.shards() == ["00000"]


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        (("{data}/*.tar",), 703),
        (("{data}/**/*.tar",), 800),
        (("{data}/{{0..1}}.tar",), 703),
        (("{data}/1.tar", "{data}/0.tar", "{data}/1.tar"), 703),
        (("{data}", "{data}/0.tar"), 800),
        (("{data}/{{1,sub/2}}.tar",), 100),
    ],
)
def test_ways_to_name_inputs(
    tmp_path: Path, data: Path, inputs: tuple[str, ...], count: int
) -> None:
    whole, _, _ = run(tmp_path, inputs=(str(data),))
    table, _, _ = run(tmp_path, inputs=tuple(text.format(data=data) for text in inputs))
    assert table.num_rows == count
    expected = uid_by_key(whole)
    assert uid_by_key(table).items() <= expected.items()


def test_names_with_braces_and_wildcards_are_taken_as_they_are(tmp_path: Path) -> None:
    odd = make_tar(tmp_path / "in{1}[x]/0{a,b}*.tar", ["a"])
    for text in (odd, odd.parent):
        table, _, _ = run(tmp_path, inputs=(str(text),))
        assert table["source_file"].to_pylist() == ["0{a,b}*.tar"]


def test_other_stores(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    local = make_tar(tmp_path / "0.tar", keys_of(0, 50))
    store.pipe_file("/bucket/tars/0.tar", local.read_bytes())
    store.pipe_file("/bucket/tars/1.tar", local.read_bytes())
    try:
        for text in ("memory://bucket/tars", "memory://bucket/tars/{0..1}.tar"):
            table, _, room = run(tmp_path, inputs=(text,))
            assert table["source_file"].to_pylist() == ["0.tar"] * 50 + ["1.tar"] * 50
            assert isinstance(room.stage, Ingest)
            images = list(room.stage.open(table, room.path()))
            assert images == [JPEG + key.encode() for key in keys_of(0, 50)] * 2
            stage = room.stage
        remote = Ingest(inputs=("memory://bucket/tars/0.tar",)).sources()
        assert remote == Ingest(inputs=(str(local),)).sources()
        store.rm("/bucket/tars/1.tar")
        with pytest.raises(SourceChangedError):
            list(stage.open(table, room.path()))
    finally:
        store.rm("/bucket", recursive=True)


def test_uids_and_identity_do_not_depend_on_where_the_data_lies(tmp_path: Path, data: Path) -> None:
    before, _, _ = run(tmp_path, inputs=(str(data),))
    sources = Ingest(inputs=(str(data),)).sources()
    moved = tmp_path / "elsewhere/deep"
    shutil.copytree(data, moved)
    after, _, room = run(tmp_path, inputs=(str(moved),))
    assert after.equals(before)
    assert Ingest(inputs=(str(moved),)).sources() == sources
    written = [path.read_bytes() for path in Path(room.path()).rglob("*") if path.is_file()]
    assert not any(str(tmp_path).encode() in content for content in written)


def test_appended_file_leaves_earlier_uids(tmp_path: Path, data: Path) -> None:
    before, _, _ = run(tmp_path, inputs=(str(data),))
    sources = Ingest(inputs=(str(data),)).sources()
    make_tar(data / "00.tar", keys_of(5000, 20))
    after, _, _ = run(tmp_path, inputs=(str(data),))
    assert after.num_rows == 820
    assert uid_by_key(before).items() <= uid_by_key(after).items()
    now = Ingest(inputs=(str(data),)).sources()
    assert [record for record in now if record["name"] != "00.tar"] == sources


def test_identity_changes_with_the_content(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "in/0.tar", keys_of(0, 3000))
    stage = Ingest(inputs=(str(tmp_path / "in"),))
    (before,) = stage.sources()
    assert before["name"] == "0.tar"
    assert before["size_bytes"] == path.stat().st_size > 1 << 20
    content = bytearray(path.read_bytes())
    content[-1] = 1
    path.write_bytes(content)
    (after,) = stage.sources()
    assert after["digest"] != before["digest"]


def test_uids_depend_on_data_set_root_and_ordinal(tmp_path: Path, data: Path) -> None:
    plain = uid_by_key(run(tmp_path, inputs=(str(data),))[0])
    named = uid_by_key(run(tmp_path, inputs=(str(data),), dataset="x")[0])
    assert not set(plain.values()) & set(named.values())
    rooted, _, _ = run(tmp_path, inputs=(str(data / "sub"),), root=str(data))
    assert uid_by_key(rooted).items() <= plain.items()
    assert set(rooted["source_file"].to_pylist()) == {"sub/2.tar"}
    make_tar(tmp_path / "twice/0.tar", ["a", "b", "a"])
    twice, stats, _ = run(tmp_path, inputs=(str(tmp_path / "twice"),))
    assert len(set(twice["uid"].to_pylist())) == 3
    assert twice["ingest_reason"].to_pylist() == [None, None, "duplicate_key"]
    assert stats["shards"] == {"samples": 3, "reason.duplicate_key": 1}


def test_the_sources_own_uid(tmp_path: Path) -> None:
    uids = [f"{i:032x}" for i in (1, 2, 1, 3)]
    fields = [{"uid": uid, "id": i % 3} for i, uid in enumerate(uids)]
    make_tar(tmp_path / "in/0.tar", keys_of(0, 2), fields[:2])
    make_tar(tmp_path / "in/1.tar", keys_of(2, 2), fields[2:])
    inputs = (str(tmp_path / "in"),)
    table, stats, _ = run(tmp_path, inputs=inputs)
    got = table["uid"].to_pylist()
    assert [got[0], got[1], got[3]] == [uids[0], uids[1], uids[3]]
    assert got[2] not in uids
    assert table["ingest_reason"].to_pylist() == [None, None, "duplicate_uid", None]
    assert stats["layout"]["repeated_uids"] == 1
    named, _, _ = run(tmp_path, inputs=inputs, uid_column="id")
    assert named["ingest_reason"].to_pylist() == [None, None, None, "duplicate_uid"]
    assert len(set(named["uid"].to_pylist())) == 4
    for column in ("uid_column", "caption_column"):
        said = f"ingest.{column}: must name a field that samples have; got hash, .* found id[.]"
        with pytest.raises(InputError, match=said):
            run(tmp_path, inputs=inputs, **{column: "hash"})


def test_repeated_uids_are_found_in_several_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [{"uid": f"{i % 150:032x}"} for i in range(200)]
    make_tar(tmp_path / "in/0.tar", keys_of(0, 200), fields)
    inputs = (str(tmp_path / "in"),)
    one, _, _ = run(tmp_path, inputs=inputs)
    monkeypatch.setattr("curate.stages.ingest._MAX_ROWS_IN_MEMORY", 30)
    several, _, _ = run(tmp_path, inputs=inputs)
    assert several.equals(one)
    assert one["ingest_reason"].to_pylist() == [None] * 150 + ["duplicate_uid"] * 50


def test_limit_knows_no_order(tmp_path: Path, data: Path) -> None:
    whole, _, _ = run(tmp_path, inputs=(str(data),))
    one, stats, room = run(tmp_path, inputs=(str(data),), limit=100)
    assert stats["layout"]["samples"] == one.num_rows == 100
    kept = set(one["key"].to_pylist())
    assert one["key"].to_pylist() == [k for k in whole["key"].to_pylist() if k in kept]
    assert uid_by_key(one).items() <= uid_by_key(whole).items()
    again, _, _ = run(
        tmp_path, inputs=(f"{data}/sub/2.tar", f"{data}/1.tar", f"{data}/0.tar"), limit=100
    )
    assert again.equals(one)
    more, _, _ = run(tmp_path, inputs=(str(data),), limit=101)
    assert kept < set(more["key"].to_pylist())
    other, _, _ = run(tmp_path, inputs=(str(data),), limit=100, seed=1)
    assert set(other["key"].to_pylist()) != kept
    assert isinstance(room.stage, Ingest)
    assert list(room.stage.open(one, room.path())) == [
        JPEG + k.encode() for k in one["key"].to_pylist()
    ]
    everything, _, _ = run(tmp_path, inputs=(str(data),), limit=10_000)
    assert everything.equals(whole)


def test_limit_is_a_fair_draw(tmp_path: Path, data: Path) -> None:
    one, _, _ = run(tmp_path, inputs=(str(data),), limit=400)
    first_half = sum(int(key) < 400 for key in one["key"].to_pylist())
    assert 150 < first_half < 250  # binomial: 200 +- 10


def test_shards_of_a_given_size_cross_row_groups_of_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    whole, _, _ = run(tmp_path, inputs=(str(data),))
    monkeypatch.setattr("curate.stages.ingest._SCAN_GROUP_ROWS", 16)
    small, _, room = run(tmp_path, inputs=(str(data),), shard_samples=37)
    assert small.equals(whole)
    assert len(room.shards()) == 22


def test_truncated_tar_among_others(tmp_path: Path, data: Path) -> None:
    path = data / "0.tar"
    path.write_bytes(path.read_bytes()[: 2048 * 10 + 700])
    table, stats, _ = run(tmp_path, inputs=(str(data),))
    assert stats["scan"] == {"samples": 111, "truncated_files": 1}
    assert (
        stats["shards"]["reason.caption_missing"]
        == 1
        == table["ingest_reason"].drop_null().length()
    )


def test_parquet_and_tables_through_the_stage(tmp_path: Path) -> None:
    table = pa.table({"image": [JPEG, None], "caption": ["a", "b"]})
    (tmp_path / "p").mkdir()
    pq.write_table(table, tmp_path / "p/0.parquet")
    found, stats, room = run(tmp_path, inputs=(str(tmp_path / "p"),))
    assert isinstance(room.stage, Ingest)
    assert list(room.stage.open(found, room.path())) == [JPEG, None]
    assert stats["shards"] == {"samples": 2, "reason.image_missing": 1}
    (tmp_path / "t/img").mkdir(parents=True)
    (tmp_path / "t/img/0.jpg").write_bytes(JPEG)
    names = pa.table({"image_path": ["img/0.jpg"], "text": ["named"]})
    pq.write_table(names, tmp_path / "t/meta.parquet")
    for text in ("t", "t/meta.parquet"):
        found, _, room = run(tmp_path, inputs=(str(tmp_path / text),))
        assert isinstance(room.stage, Ingest)
        assert list(room.stage.open(found, room.path())) == [JPEG]
        assert found["caption"].to_pylist() == ["named"]
    before = room.stage.sources()
    (tmp_path / "t/img/0.jpg").write_bytes(JPEG[::-1])
    assert room.stage.sources() != before


def test_loose_images_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jpg").write_bytes(JPEG)
    (tmp_path / "in/0.txt").write_text("one")
    for text in ("in", "in/*"):
        found, _, room = run(tmp_path, inputs=(str(tmp_path / text),))
        assert isinstance(room.stage, Ingest)
        assert list(room.stage.open(found, room.path())) == [JPEG]
        assert (found["source_file"].to_pylist(), found["member"].to_pylist()) == (
            ["./"],
            ["0.jpg"],
        )


def test_all_unusable_is_fine(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": pa.nulls(4, pa.binary())}), tmp_path / "in/0.parquet")
    _, stats, _ = run(tmp_path, inputs=(str(tmp_path / "in"),))
    assert stats["shards"] == {"samples": 4, "reason.image_missing": 4}


def test_no_samples(tmp_path: Path) -> None:
    make_tar(tmp_path / "in/0.tar", [])
    with pytest.raises(InputError, match="must hold image–text samples; found none in 1 source"):
        run(tmp_path, inputs=(str(tmp_path / "in"),))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, r"in: must hold files; it is empty"),
        ({"a.pdf": b"", "b.doc": b"", "c.doc": b""}, {}, r"found 2 \.doc, 1 \.pdf"),
        ({"0.tar": b"", "1.parquet": b""}, {}, r"one layout; found webdataset and parquet"),
        ({"0.tar": b"", "1.jpg": b""}, {}, r"Choose with --set ingest\.format=webdataset"),
        ({"0.tar.gz": b""}, {}, r"0\.tar\.gz: must be a plain tar; .* Decompress it first"),
        ({"0.tgz": b""}, {}, r"0\.tgz: must be a plain tar"),
        ({"0.tar": b""}, {"format": "parquet"}, r"\(ingest\.format parquet\); found 1 \.tar"),
        ({"0.jpg": b""}, {"format": "webdataset"}, r"must hold plain \.tar files .* found 1 \.jpg"),
        ({"run.json": b"{}", "shards/0.parquet": b""}, {}, r"Name its shards/ folder instead"),
        ({"0.tar": b""}, {"root": "/nowhere"}, r"must be below ingest\.root; got /nowhere"),
    ],
)
def test_inputs_that_cannot_be_used(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Ingest(inputs=(str(folder),), **options).sources()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone", "gone/*.tar", "gone/{0..3}.tar", "gone.tar"])
def test_inputs_that_do_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such path|matches none"):
        Ingest(inputs=(str(tmp_path / name),)).sources()


def test_links(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.tar").symlink_to(data / "1.tar")
    (tmp_path / "in/folder").symlink_to(data)
    (record,) = Ingest(inputs=(str(tmp_path / "in"),)).sources()
    assert (record["name"], record["size_bytes"]) == ("one.tar", (data / "1.tar").stat().st_size)
    assert "in/folder: a link to a folder is not followed" in caplog.text
    assert len(Ingest(inputs=(str(tmp_path / "in/folder"),)).sources()) == 3


def test_relative_inputs(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = run(tmp_path, inputs=(str(data),))
    for folder, text in ((tmp_path, "data"), (data, "."), (data / "sub", "..")):
        monkeypatch.chdir(folder)
        table, _, _ = run(tmp_path, inputs=(text,))
        assert table.equals(whole)


def test_inputs_in_two_stores(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match="must be in one store"):
        Ingest(inputs=(str(data), "memory://bucket/x")).sources()
    with pytest.raises(InputError, match="at least one file or folder"):
        Ingest().sources()
    with pytest.raises(InputError, match="must be a path or a URL that fsspec knows"):
        Ingest(inputs=("nosuchstore://x",)).sources()


def test_compressed_tar_under_a_plain_name(tmp_path: Path, data: Path) -> None:
    (data / "0.tar").write_bytes(gzip.compress((data / "0.tar").read_bytes()))
    with pytest.raises(InputError, match="Decompress it first"):
        run(tmp_path, inputs=(str(data),))


def test_source_that_vanished_or_shrank(tmp_path: Path, data: Path) -> None:
    table, _, room = run(tmp_path, inputs=(str(data),))
    assert isinstance(room.stage, Ingest)
    (data / "1.tar").write_bytes(b"")
    with pytest.raises(SourceChangedError, match=r"1\.tar"):
        list(room.stage.open(table, room.path()))
    (data / "0.tar").unlink()
    with pytest.raises(SourceChangedError, match=r"0\.tar"):
        list(room.stage.open(table, room.path()))


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["a/0.tar", "a/0.parquet", "a/0_stats.json", "a/README.md"], "webdataset"),
        (["0.parquet", "1.parquet", "README.md"], "parquet"),
        (["metadata.csv", "img/0.jpg"], "folder"),
        (["metadata.parquet", "img/0.JPG"], "folder"),
        (["train.jsonl"], "folder"),
    ],
)
def test_detect(names: list[str], layout: str) -> None:
    assert formats.detect(names) == layout


def test_only_what_changes_the_result_is_hashed() -> None:
    extras = {
        name: bool((field.json_schema_extra or {}).get("execution_only"))  # type: ignore[union-attr]
        for name, field in Ingest.model_fields.items()
    }
    assert [name for name, is_execution_only in extras.items() if is_execution_only] == [
        "inputs",
        "root",
        "incomplete",
        "wait_seconds",
        "spool",
        "spool_gb",
    ]


def incomplete_folder(root: Path) -> Path:
    """Three shards as img2dataset leaves them while it works on the second."""
    for number in range(3):
        make_tar(root / f"{number:05d}.tar", keys_of(number * 10, 2))
        if number != 1:
            stats = json.dumps({"count": 2, "successes": 2})
            (root / f"{number:05d}_stats.json").write_text(stats, encoding="utf-8")
    return root


def test_incomplete_shards_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    root = incomplete_folder(tmp_path / "in")
    ingest = Ingest(inputs=(str(root),))
    with pytest.raises(InputError) as caught:
        ingest.sources()
    message = str(caught.value)
    assert "shard 00001 must have its _stats.json" in message
    assert "ingest.incomplete=skip or =wait" in message
    assert "\n" not in message


def test_incomplete_shards_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = incomplete_folder(tmp_path / "in")
    ingest = Ingest(inputs=(str(root),), incomplete="skip")
    ingest.prepare()
    assert caplog.messages == ["ingest: skipped, as incomplete: 00001"]
    table, _, room = run(tmp_path, inputs=(str(root),), incomplete="skip")
    assert set(table["source_file"].to_pylist()) == {"00000.tar", "00002.tar"}
    assert ingest.facts(room) == {"skipped_shards": ["00001"]}
    before = ingest.sources()
    (root / "00001_stats.json").write_text('{"count": 2, "successes": 2}', encoding="utf-8")
    assert len(ingest.sources()) == len(before) + 1
    _, _, room = run(tmp_path, inputs=(str(root),), incomplete="skip")
    assert ingest.facts(room) == {}


def test_incomplete_shards_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = incomplete_folder(tmp_path / "in")
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            (root / "00001_stats.json").write_text('{"count": 2, "successes": 2}')

    monkeypatch.setattr(time, "sleep", sleep)
    Ingest(inputs=(str(root),), incomplete="wait").prepare()
    assert len(naps) == 2
    assert caplog.messages == ["ingest: waits for 00001"]
    assert len(run(tmp_path, inputs=(str(root),), incomplete="wait")[0]) == 6


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = incomplete_folder(tmp_path / "in")
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ingest = Ingest(inputs=(str(root),), incomplete="wait", wait_seconds=100)
    with pytest.raises(InputError, match="shard 00001 must have its _stats"):
        ingest.prepare()
