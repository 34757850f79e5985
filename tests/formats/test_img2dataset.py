"""What img2dataset itself writes, in its three formats, read back by key."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import formats
from curate.download import shards  # imports img2dataset as it should be
from curate.formats.img2dataset import find_incomplete, shard_of
from tests import web as local
from tests.support import clean_pairs

KINDS = {"webdataset": "webdataset", "parquet": "parquet", "files": "folder"}
PER_SHARD = 5


@dataclass(frozen=True)
class Made:
    """A folder that img2dataset wrote, and what it was asked for.

    Parameters
    ----------
    rows : dict
        Expected reason, caption and image by URL.
    """

    folder: Path
    rows: dict[str, tuple[str | None, str | None, bytes | None]]


def run_img2dataset(kind: str, table: Path, out: Path) -> None:
    """Let img2dataset's reader, downloader and writer do what its command would."""
    from img2dataset.reader import Reader

    writers = {
        "webdataset": shards.writer.WebDatasetSampleWriter,
        "parquet": shards.writer.ParquetSampleWriter,
        "files": shards.writer.FilesSampleWriter,
    }
    (out / "_tmp").mkdir(parents=True)
    reader = Reader(
        str(table), "parquet", "url", "caption", "md5", "md5", ["uid"], PER_SHARD, set(),
        str(out / "_tmp"),
    )  # fmt: skip
    loader = shards.downloader.Downloader(
        sample_writer_class=writers[kind], resizer=shards.make_resizer("no", 256), thread_count=4,
        save_caption=True, extract_exif=True, output_folder=str(out),
        column_list=reader.column_list, timeout=10, number_sample_per_shard=PER_SHARD,
        oom_shard_count=5, compute_hash="md5", verify_hash_type="md5", encode_format="jpg",
        retries=0, user_agent_token=None, disallowed_header_directives=["noai"],
    )  # fmt: skip
    for shard in list(reader):
        assert loader(shard) == (True, shard)
    (out / "_tmp").rmdir()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    folder = tmp_path_factory.mktemp("img2dataset")
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str | None] = {}
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "*"
    with local.running() as web:
        for i, (image, caption) in enumerate(clean_pairs(12)):
            md5 = hashlib.md5(image).hexdigest()
            url = web.serve(f"/{i}.png", image)
            rows.append({"url": url, "caption": caption.decode(), "md5": md5})
            reasons[url] = None
        faults = {
            "/gone": ("failed_to_download", rows[0]["md5"]),
            "/page": ("failed_to_resize", hashlib.md5(b"<html>").hexdigest()),
            "/other": ("hash_mismatch", "0" * 32),
            "/noai": ("robots_disallowed", rows[0]["md5"]),
        }
        web.serve("/page", b"<html>")
        web.serve("/other", b"other bytes")
        web.serve("/noai", b"x", X_Robots_Tag="noai")
        for path, (reason, md5) in faults.items():
            rows.append({"url": web.url(path), "caption": f"caption of {path}", "md5": md5})
            reasons[web.url(path)] = reason
        random.Random(0).shuffle(rows)
        # A shard of which nothing could be had.
        for i in range(4):
            rows.append({"url": web.url(f"/none{i}"), "caption": "none", "md5": "0" * 32})
            reasons[web.url(f"/none{i}")] = "failed_to_download"
        for i, row in enumerate(rows):
            row["uid"] = f"{i:032x}"
        pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
        found = {}
        for kind in KINDS:
            run_img2dataset(kind, folder / "list.parquet", folder / kind)
            expected = {row["uid"]: (reasons[row["url"]], row["caption"], None) for row in rows}
            found[kind] = Made(folder / kind, expected)
        yield found
    if before is None:
        del os.environ["no_proxy"]
    else:
        os.environ["no_proxy"] = before


def scan_all(
    folder: Path,
) -> tuple[str, list[dict[str, Any]], list[bytes | None], dict[str, float]]:
    """Return layout, rows, images and counts of everything in a folder."""
    layout, sources = formats.list_sources((str(folder),), str(folder))
    rows: list[dict[str, Any]] = []
    images: list[bytes | None] = []
    counts: dict[str, float] = {}
    for source in sources:
        found = formats.FORMATS[source.kind].scan(source, None)
        rows += found.table.to_pylist()
        images += formats.read_images(str(folder), found.table)
        for name, count in found.counts.items():
            counts[name] = counts.get(name, 0) + count
    return layout, rows, images, counts


def tables_of(folder: Path) -> list[dict[str, Any]]:
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_comes_back_by_its_key(made: dict[str, Made], kind: str) -> None:
    one = made[kind]
    layout, rows, images, counts = scan_all(one.folder)
    assert layout == KINDS[kind]
    assert counts == {}
    assert {
        row["own_uid"]: (row["ingest_reason"], row["caption"], None) for row in rows
    } == one.rows
    assert len(rows) == len(one.rows)
    told = {row["uid"]: row for row in tables_of(one.folder)}
    for row, image in zip(rows, images, strict=True):
        record = told[row["own_uid"]]
        assert row["key"] == record["key"]
        metadata = json.loads(row["metadata"])
        assert metadata["url"] == record["url"]
        assert metadata["error_message"] == record["error_message"]
        assert (image is not None) == (record["status"] == "success")
        if image is not None and kind == "parquet":
            assert image == record["jpg"]


def test_all_formats_hold_the_same_images(made: dict[str, Made]) -> None:
    by_format = []
    for one in made.values():
        _, rows, images, _ = scan_all(one.folder)
        by_format.append({row["own_uid"]: image for row, image in zip(rows, images, strict=True)})
    assert by_format[0] == by_format[1] == by_format[2]
    assert sum(image is not None for image in by_format[0].values()) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_change_nothing(
    made: dict[str, Made], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made[kind].folder, folder)
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    _, rows, images, _ = scan_all(made[kind].folder)
    _, again, other, _ = scan_all(folder)
    assert {
        r["own_uid"]: (r["key"], r["caption"], i) for r, i in zip(rows, images, strict=True)
    } == {r["own_uid"]: (r["key"], r["caption"], i) for r, i in zip(again, other, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_disagree_are_told_in_one_line(
    made: dict[str, Made], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made[kind].folder, folder)
    path = folder / "00001_stats.json"
    stats = json.loads(path.read_text())
    held = stats["successes"]
    path.write_text(json.dumps({**stats, "successes": held + 3, "count": 99}))
    _, rows, _, counts = scan_all(folder)
    assert len(rows) == len(made[kind].rows)
    assert counts == {"stats_disagree": 1}
    (line,) = caplog.messages
    assert "00001" in line
    assert f"00001_stats.json disagrees with it: successes {held + 3}, found {held}; " in line
    assert line.endswith("count 99, found 5")
    path.write_text("no JSON")
    assert scan_all(folder)[3] == {"stats_disagree": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_shard_is_left_out_whole(
    made: dict[str, Made], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made[kind].folder, folder)
    left_out = set(pq.read_table(folder / "00001.parquet")["uid"].to_pylist())
    (folder / "00001_stats.json").unlink()
    assert formats.find_incomplete((str(folder),), str(folder)) == ["00001"]
    _, sources = formats.list_sources((str(folder),), str(folder), skip_incomplete=True)
    tables = [formats.FORMATS[source.kind].scan(source, None).table for source in sources]
    found = {uid for table in tables for uid in table["own_uid"].to_pylist()}
    assert found == made[kind].rows.keys() - left_out


def test_names_of_shards() -> None:
    assert shard_of("a/00003/000030001.jpg") == "a/00003"
    assert [shard_of(name) for name in ("a/b.tar", "sizes.json", "a/x_stats.json")] == [None] * 3


@pytest.mark.parametrize(
    ("names", "incomplete"),
    [
        (["0.tar", "0.parquet", "1.tar"], []),  # nobody has statistics
        (["0.tar", "0_stats.json", "1.tar", "1.parquet"], ["1"]),
        (["a/0.tar", "a/0_stats.json", "b/1.tar"], []),  # of another folder
        (["0.parquet", "0_stats.json", "1.parquet", "metadata.parquet", "extra.tar"], ["1"]),
        (["0/0.jpg", "0.parquet", "0_stats.json", "1/1.jpg", "1.parquet"], ["1"]),
        (["0.tar", "0_stats.json", "_tmp/0.feather", "_tmp/1.feather"], ["_tmp/1.feather"]),
        (["00.tar", "00_stats.json", "01.tar", "_tmp/1.feather", "_tmp/x.feather"], ["01"]),
        (["d/0.tar", "d/0_stats.json", "d/_tmp/7.feather"], ["d/_tmp/7.feather"]),
    ],
)
def test_incomplete_shards(names: list[str], incomplete: list[str]) -> None:
    assert find_incomplete(names) == incomplete
