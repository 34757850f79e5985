"""Removal lists: what they name is counted, and neither decoded nor shown."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import storage
from curate.config import load_pipeline
from curate.engine.runner import BoundStage, bind
from curate.errors import InputError
from curate.formats import lookup, parquet
from curate.stages import embed
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp
from tests.support import (
    assert_sound,
    carry_out,
    clean_pairs,
    decisions_of,
    read_decisions,
    read_report,
    read_shards,
    read_summary,
    succeed,
)

COUNT = 24
#: Row -> what removes it. Row 13 has the picture of row 12, and 15 that of 14.
BY_LIST = {
    0: ("takedown.txt", "removed_by_uid"),
    1: ("takedown.txt", "removed_by_uid"),
    2: ("opt-out", "removed_by_url"),
    3: ("md5s.csv", "removed_by_hash"),
    4: ("bytes.parquet", "removed_by_hash"),
    14: ("bytes.parquet", "removed_by_hash"),
    15: ("bytes.parquet", "removed_by_hash"),
    16: ("takedown.txt", "removed_by_uid"),
}
#: What row 12 would lend its caption to, were it not listed.
LISTED_TWIN = 12


def uid_of(row: int) -> str:
    # Row 1 claims the uid of row 0: a takedown of this uid is meant for both.
    return f"{0 if row == 1 else row:032x}"


def images() -> list[bytes]:
    found = [image for image, _ in clean_pairs(COUNT)]
    found[13], found[15] = found[12], found[14]
    return found


def caption_of(row: int) -> str:
    return f"this is what sample number {row:02d} says"


def write_input(folder: Path) -> Path:
    """Write samples as img2dataset does, with the md5 of what was downloaded."""
    folder.mkdir()
    table = pa.table(
        {
            "uid": [uid_of(row) for row in range(COUNT)],
            "caption": [caption_of(row) for row in range(COUNT)],
            "url": [f"http://x/{row}?a=1" for row in range(COUNT)],
            "key": [f"{row:05d}" for row in range(COUNT)],
            "md5": [hashlib.md5(b"downloaded %d" % row).hexdigest() for row in range(COUNT)],
            "jpg": images(),
        }
    )
    pq.write_table(table, folder / "0.parquet")
    return folder


def write_lists(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "takedown.txt").write_text(
        "\n".join([uid_of(0), "", f"  {uid_of(16)} ", "f" * 32, uid_of(LISTED_TWIN)]) + "\n"
    )
    (folder / "urls").mkdir()
    (folder / "urls/1.txt").write_text("http://y\nhttp://x/2?a=1\r\n")
    (folder / "urls/2.txt").write_text("http://x/2\n")
    (folder / "md5s.csv").write_text(
        f"name,md5\na,{hashlib.md5(b'downloaded 3').hexdigest().upper()}\n"
    )
    hashes = [hashlib.sha256(images()[row]).hexdigest() for row in (4, 14)]
    pq.write_table(pa.table({"digest": hashes}), folder / "bytes.parquet")
    return [
        {"path": str(folder / "takedown.txt"), "by": "uid"},
        {"path": str(folder / "urls"), "by": "url", "name": "opt-out"},
        {"path": str(folder / "md5s.csv"), "by": "md5"},
        {"path": str(folder / "bytes.parquet"), "by": "sha256", "column": "digest"},
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("removal")
    lists = write_lists(folder / "lists")
    succeed(
        *("run", "dedup", "--input", write_input(folder / "in"), "--output", folder / "out"),
        *("--set", f"remove.lists={json.dumps(lists)}", "--workers", 1),
        *("--set", "ingest.shard_samples=9"),
    )
    return folder / "out"


def test_each_is_a_row_with_its_reason_and_counted(out: Path) -> None:
    assert_sound(out)
    rows = read_decisions(out).to_pylist()
    expected = BY_LIST | {LISTED_TWIN: ("takedown.txt", "removed_by_uid")}
    found = {
        row: (decided["removed_by"], decided["reason"])
        for row, decided in enumerate(rows)
        if decided["reason"] is not None
    }
    assert found == expected
    assert all(row["removed_by"] is None for row in rows if row["keep"])
    assert rows[1]["failed_rules"] == ["removed_by_uid", "duplicate_uid"]
    dropped = {"removed_by_uid": 4, "removed_by_url": 1, "removed_by_hash": 4}
    assert read_summary(out)["counts"]["dropped"] == dropped


def test_neither_bytes_nor_thumbnails_nor_vectors_are_left(out: Path) -> None:
    listed = {*BY_LIST, LISTED_TWIN}
    (vectors,) = out.glob("stages/embed.vectors-*")
    stages = [vectors, *out.glob("stages/embed.pixels-*"), *out.glob("stages/embed.thumbnails-*")]
    assert len(stages) == 3
    for stage in stages:
        paths = sorted(stage.glob("shards/*.parquet"))
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        columns = {"thumbnail", "width", "sha256", "image_emb", "text_emb"}
        for name in columns & set(table.column_names):
            missing = {row for row in range(COUNT) if not table[name][row].is_valid}
            assert missing == listed, name


def test_nothing_of_them_is_shown_or_merged(out: Path) -> None:
    listed = {*BY_LIST, LISTED_TWIN}
    uids = read_decisions(out)["uid"].to_pylist()
    report = read_report(out)
    assert not {uids[row] for row in listed} & {sample["uid"] for sample in report["samples"]}
    text = "".join(
        path.read_text(errors="replace")
        for path in (out / "report").rglob("*")
        if path.suffix in (".js", ".html")
    )
    assert all((caption_of(row) in text) == (row not in listed) for row in range(COUNT))
    assert "removed_by_uid" in (out / "report/index.html").read_text()
    shards = read_shards(out)
    # The twin of a listed one stays, and its caption alone.
    kept = {row["uid"]: row["captions"] for row in shards.to_pylist()}
    assert kept[uid_of(13)] == [caption_of(13)]
    assert len(kept) == COUNT - len(listed)


def test_the_listed_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a uid or URL the bytes are left alone; of a hash they are hashed, and not decoded."""
    source = write_input(tmp_path / "in")
    lists = write_lists(tmp_path / "lists")
    settings = [("ingest", "inputs", (str(source),)), ("remove", "lists", lists)]
    stages = bind(load_pipeline("dedup", settings), str(tmp_path / "out"))
    for bound in stages[:2]:
        carry_out_stage(bound)
    asked: list[int] = []
    decoded: list[bytes] = []
    read_images = parquet.read_images

    def read(source: Any, rows: pa.Table) -> Any:
        asked.extend(rows["row"].to_pylist())
        return read_images(source, rows)

    def decode(data: bytes, *_: Any) -> Any:
        decoded.append(data)
        return embed.Decoded(None, None, None, "decode_error")

    monkeypatch.setattr(
        "curate.formats.FORMATS",
        {"parquet": type("Stub", (), {"read_images": staticmethod(read)})},
    )
    room = stages[2].room
    index = embed._read_index(room, room.shards()[0])
    monkeypatch.setattr(embed, "decode", decode)
    images_read = embed._open_images(room, index)
    samples = list(embed._decode_all(room, images_read, None, lists=embed.ByteLists(room)))
    unread = {row for row, (_, reason) in BY_LIST.items() if reason != "removed_by_hash"}
    unread |= {LISTED_TWIN, 3}  # the hash of what was downloaded is in the metadata
    assert asked == [row for row in range(COUNT) if row not in unread]
    assert len(samples) == COUNT
    assert len(decoded) == COUNT - len({*BY_LIST, LISTED_TWIN})


def carry_out_stage(bound: BoundStage) -> None:
    for step in bound.stage.steps():
        for task in step.tasks(bound.room):
            step.run(bound.room, task)


def test_a_list_changes_what_comes_after_and_not_where_it_lies(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    lists = write_lists(tmp_path / "lists")

    def fingerprints(lists: list[dict[str, Any]]) -> dict[str, str]:
        settings = [("ingest", "inputs", (str(source),)), ("remove", "lists", lists)]
        bound = bind(load_pipeline("dedup", settings), str(tmp_path / "out"))
        return {name: print for one in bound for name, print in one.fingerprints.items()}

    before = fingerprints(lists)
    (tmp_path / "lists").rename(tmp_path / "moved")
    moved = [{**one, "path": one["path"].replace("/lists/", "/moved/")} for one in lists]
    assert fingerprints(moved) == before
    path = tmp_path / "moved/takedown.txt"
    path.write_text(path.read_text().replace("f" * 32, "e" * 32))
    after = fingerprints(moved)
    assert after["ingest"] == before["ingest"]
    assert not {after[name] for name in after if name != "ingest"} & set(before.values())


def test_a_pool_without_images(tmp_path: Path) -> None:
    uids = datacomp_uids(30)
    vectors = draw_vectors(30)
    vectors[1] = vectors[0]
    write_datacomp(tmp_path / "in", "0", uids, l14_img=vectors, l14_txt=vectors)
    for name, lines in (("u", [uids[1]]), ("h", [f"{row:064x}" for row in (2, 3, 99)])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    lists = [
        {"path": str(tmp_path / "u.txt"), "by": "uid"},
        {"path": str(tmp_path / "h.txt"), "by": "sha256"},
    ]
    stages = carry_out(tmp_path / "in", tmp_path / "out", remove__lists=lists)
    rows = decisions_of(stages)
    reasons = {row: one["reason"] for row, one in enumerate(rows) if not one["keep"]}
    # The twin of a listed sample is no duplicate of anything.
    assert reasons == {1: "removed_by_uid", 2: "removed_by_hash", 3: "removed_by_hash"}
    room = stages[-1].room
    table = room.read(room.shards()[0], ["image_emb", "text_emb"])
    for name in ("image_emb", "text_emb"):
        assert [i for i in range(30) if not table[name][i].is_valid] == [1, 2, 3]


def test_a_long_list_is_looked_up_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup.sort_runs, "__defaults__", (50_000,))
    uids = datacomp_uids(30)
    write_datacomp(tmp_path / "in", "0", uids, l14_img=draw_vectors(30))
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{number:032x}\n" for number in range(25, 250_000)))
    stages = carry_out(
        tmp_path / "in", tmp_path / "out", remove__lists=[{"path": str(path), "by": "uid"}]
    )
    assert [row["keep"] for row in decisions_of(stages)] == [True] * 25 + [False] * 5
    folder = stages[1].room.path("lists")
    assert len(storage.list_names(folder)) == 4
    assert sum(storage.walk_files(folder).values()) < 16 * 250_000 + 4096


@pytest.mark.parametrize(
    ("name", "data", "by", "said"),
    [
        ("a.txt", "12345\n", "md5", "a.txt: a md5 must be 32 hex digits; got '12345'"),
        ("a.csv", "uid,x\n1,2\n", "url", "a.csv: must have the column url or URL; got uid, x"),
        ("a.parquet", "PAR1", "uid", "a.parquet: must be a whole table"),
        (None, "", "uid", "no such path"),
    ],
)
def test_lists_that_do_not_hold(
    tmp_path: Path, name: str | None, data: str, by: str, said: str
) -> None:
    write_datacomp(tmp_path / "in", "0", datacomp_uids(3), l14_img=draw_vectors(3))
    if name:
        (tmp_path / name).write_text(data)
    lists = [{"path": str(tmp_path / (name or "none.txt")), "by": by}]
    with pytest.raises(InputError) as error:
        carry_out(tmp_path / "in", tmp_path / "out", remove__lists=lists)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
