"""URL lists against a local server: every row accounted for, whatever the servers did."""

import csv
import hashlib
import io
import json
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate import formats, storage
from curate.config import load_pipeline
from curate.engine.runner import BoundStage, _commit_manifest, bind
from curate.errors import ConfigError, InputError
from curate.stages.download_inputs import _choose_size
from curate.stages.ingest import draw_ranks
from tests import web as local
from tests.support import (
    TIMEOUT_SECONDS,
    assert_sound,
    clean_pairs,
    command,
    read_decisions,
    read_shards,
    read_summary,
    succeed,
)
from tests.web import Handler, Web

Rows = list[dict[str, Any]]


@pytest.fixture
def web() -> Iterator[Web]:
    with local.running() as one:
        yield one


@lru_cache(maxsize=1)
def pictures() -> list[tuple[bytes, str]]:
    return [(image, caption.decode()) for image, caption in clean_pairs(30)]


def write_list(path: Path, rows: Rows) -> Path:
    """Write rows as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def good_rows(web: Web, count: int) -> Rows:
    return [
        {"url": web.serve(f"/{i}.png", image), "caption": caption}
        for i, (image, caption) in enumerate(pictures()[:count])
    ]


def carry_out(source: Path, out: Path | str, **fields: Any) -> list[BoundStage]:
    """Download and index a list in this process, without a cluster."""
    recipe = source.parent.parent / "recipe.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text("ingest: {}\n", encoding="utf-8")
    given = {"allow_addresses": "127.0.0.1", "max_seconds": 10.0, "threads": 8, **fields}
    settings = [("ingest", "inputs", (str(source),))]
    settings += [
        (*name.split("__"), value) if "__" in name else ("download", name, value)
        for name, value in given.items()
    ]
    pipeline = load_pipeline(str(recipe), settings)
    stages: list[BoundStage] = []
    while len(stages) < len(pipeline.stages):
        stages = bind(pipeline, str(out))
        for bound in stages:
            if not bound.room.missing:
                continue
            for step in bound.missing_steps():
                done = bound.done_tasks(step)
                for task in step.tasks(bound.room):
                    if task not in done:
                        counts = step.run(replace(bound.room, threads=1), task)
                        mark = storage.join(bound.done_folder(step, bound.stage.name), task)
                        storage.commit_json(f"{mark}.json", counts)
            finish(bound)
    return stages


def finish(bound: BoundStage) -> None:
    for table in bound.stage.tables():
        _commit_manifest(bound, table.name, {})


def index_of(stages: list[BoundStage]) -> Rows:
    """Return what ingest made of the downloaded shards, in the order of the list."""
    room = stages[1].room
    tables = [storage.read_table(room.shard_path("ingest", shard)) for shard in room.shards()]
    rows = sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["key"])
    return [{**row, **json.loads(row["metadata"])} for row in rows]


def images_of(stages: list[BoundStage]) -> Path:
    return Path(stages[0].room.path("images"))


def images(stages: list[BoundStage]) -> dict[str, bytes | None]:
    """Return the bytes of every row's image by URL."""
    room = stages[1].room
    found: dict[str, bytes | None] = {}
    for shard in room.shards():
        table = storage.read_table(room.shard_path("ingest", shard))
        for row, image in zip(table.to_pylist(), room.open_images(table), strict=True):
            found[json.loads(row["metadata"])["url"]] = image
    return found


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_every_kind_of_list(web: Web, tmp_path: Path, suffix: str) -> None:
    rows = [
        {"TEXT": row["caption"], "URL": row["url"], "similarity": i / 7, "width": i, "note": None}
        for i, row in enumerate(good_rows(web, 5))
    ]
    found = carry_out(write_list(tmp_path / f"in/urls.{suffix}", rows), tmp_path / "out")
    index = index_of(found)
    assert [row["caption"] for row in index] == [row["TEXT"] for row in rows]
    assert [row["url"] for row in index] == [row["URL"] for row in rows]
    assert [float(row["similarity"]) for row in index] == [row["similarity"] for row in rows]
    # Names that img2dataset has a use for are kept apart from it.
    assert [int(row["list_width"]) for row in index] == list(range(5))
    assert [row["status"] for row in index] == ["success"] * 5
    by_url = {row["URL"]: image for row, (image, _) in zip(rows, pictures(), strict=False)}
    assert images(found) == by_url
    assert [row["sha256"] for row in index] == [
        hashlib.sha256(image).hexdigest() for image in by_url.values()
    ]


def test_lists_may_differ_in_their_columns(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 6)
    write_list(tmp_path / "in/a.jsonl", [{**row, "score": 1} for row in rows[:3]])
    write_list(tmp_path / "in/b.csv", [{**row, "other": "x"} for row in rows[3:]])
    index = index_of(carry_out(tmp_path / "in", tmp_path / "out"))
    assert [row["url"] for row in index] == [row["url"] for row in rows]
    assert [row["score"] for row in index] == [1, 1, 1, None, None, None]
    assert [row["other"] for row in index] == [None, None, None, "x", "x", "x"]


def faulty_rows(web: Web, image: bytes) -> list[tuple[str | None, str | None, str]]:
    """Return URL, error and reason of rows that cannot become samples."""
    buffer = io.BytesIO()
    Image.new("1", (4000, 4000)).save(buffer, "PNG")
    return [
        (None, "no URL", "failed_to_download"),
        ("", "no URL", "failed_to_download"),
        ("no url at all", "refused: neither http nor https", "url_refused"),
        ("file:///etc/passwd", "refused: neither http nor https", "url_refused"),
        (web.url("/gone"), "HTTP Error 404: Not Found", "failed_to_download"),
        (
            web.redirect("/inside", "http://10.0.0.1/"),
            "refused: address 10.0.0.1 is not public",
            "url_refused",
        ),
        (
            web.redirect("/beside", f"http://127.0.0.2:{web.port}/0.png"),
            "refused: address 127.0.0.2 is not public",
            "url_refused",
        ),
        (web.redirect("/loop", "/loop"), "more than 5 redirects", "failed_to_download"),
        (web.answer("/cut", local.truncated(image, 99)), "truncated", "failed_to_download"),
        (
            web.answer("/endless", local.endless(web)),
            "more than 200000 bytes",
            "failed_to_download",
        ),
        (
            web.serve("/noai", image, X_Robots_Tag="noai, noimageai"),
            "Use of image disallowed by X-Robots-Tag directive",
            "robots_disallowed",
        ),
        (
            web.serve("/page", b"<html>no picture</html>"),
            "Image decoding error",
            "failed_to_resize",
        ),
        (web.serve("/large", buffer.getvalue()), "image area too large", "failed_to_resize"),
        (
            web.answer("/drip", local.dripping(web, b"HTTP/1.1 200 OK\r\n\r\n", b"x")),
            "timed out",
            "failed_to_download",
        ),
    ]


def test_whatever_goes_wrong_is_a_row(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 4)
    faulty = faulty_rows(web, pictures()[0][0])
    rows += [{"url": url, "caption": f"fault {i}"} for i, (url, _, _) in enumerate(faulty)]
    rows += [{"url": rows[0]["url"], "caption": None}]
    stages = carry_out(
        write_list(tmp_path / "in/urls.jsonl", rows),
        tmp_path / "out",
        max_bytes=200_000,
        max_pixels=10_000_000,
        max_seconds=1.5,
        shard_samples=7,
    )
    index = index_of(stages)
    assert len(index) == len(rows)
    assert [row["caption"] for row in index if row["caption"]] == [
        row["caption"] for row in rows if row["caption"]
    ]
    found = [(row["url"], row["error_message"], row["ingest_reason"]) for row in index]
    assert found[:4] == [(row["url"], None, None) for row in rows[:4]]
    assert found[4:-1] == faulty
    assert found[-1] == (rows[0]["url"], None, "caption_missing")
    facts = stages[0].stage.facts(stages[0].room)
    assert facts["urls"] == len(rows)
    assert facts["images"] == 5
    assert facts["failed_at_first"] == Counter(error for _, error, _ in faulty)
    for path in images_of(stages).glob("*_stats.json"):
        stats = json.loads(path.read_text())
        table = pq.read_table(path.with_name(path.name.replace("_stats.json", ".parquet")))
        assert stats["count"] == len(table)
        assert stats["successes"] == table["status"].to_pylist().count("success")
        failed = stats["failed_to_download"] + stats["failed_to_resize"]
        assert stats["count"] == stats["successes"] + failed
        assert sum(stats["status_dict"].values()) == stats["count"]


def test_uids_are_those_of_the_rows(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 3)
    rows += [{"url": rows[0]["url"], "caption": "again"}, {"url": web.url("/gone"), "caption": "x"}]
    one = index_of(carry_out(write_list(tmp_path / "in/l.csv", rows), tmp_path / "one"))
    # Neither order nor shards nor what the servers answer make a difference.
    web.serve("/gone", pictures()[9][0])
    again = [*rows[4:], *rows[:4]]
    other = index_of(
        carry_out(write_list(tmp_path / "again/l.csv", again), tmp_path / "two", shard_samples=2)
    )
    uids = {(row["url"], row["caption"]): row["uid"] for row in one}
    assert len(set(uids.values())) == 5
    assert {(row["url"], row["caption"]): row["uid"] for row in other} == uids
    # The name of the data set is part of it, and a list's own uids are kept.
    apart = carry_out(tmp_path / "in/l.csv", tmp_path / "three", ingest__dataset="b")
    assert not {row["uid"] for row in index_of(apart)} & set(uids.values())
    own = [{**row, "uid": f"{i:032x}"} for i, row in enumerate(rows)]
    kept = index_of(carry_out(write_list(tmp_path / "own/l.parquet", own), tmp_path / "four"))
    assert [row["uid"] for row in kept] == [row["uid"] for row in own]
    named = [{**row, "id": f"sample {i}"} for i, row in enumerate(rows)]
    path = write_list(tmp_path / "named/l.parquet", named)
    found = index_of(carry_out(path, tmp_path / "five", ingest__uid_column="id"))
    assert len({row["uid"] for row in found}) == 5
    assert [row["id"] for row in found] == [row["id"] for row in named]


def test_hashes_are_verified(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 3)
    for i, row in enumerate(rows):
        row["md5"] = hashlib.md5(pictures()[i][0]).hexdigest().upper()
    rows[1]["md5"] = "0" * 32
    rows[2]["md5"] = None
    path = write_list(tmp_path / "in/urls.jsonl", rows)
    index = index_of(carry_out(path, tmp_path / "out", verify_hash="md5"))
    assert [row["ingest_reason"] for row in index] == [None, "hash_mismatch", "hash_mismatch"]
    assert [row["error_message"] for row in index] == [None, "hash mismatch", "hash mismatch"]
    assert index[0]["md5"] == rows[0]["md5"].lower()


def test_metadata_of_a_datacomp_pool_is_a_list(web: Web, tmp_path: Path) -> None:
    """Without the npz files that hold its vectors, its rows are URLs."""
    rows = []
    for i, row in enumerate(good_rows(web, 3)):
        image = pictures()[i][0]
        rows.append(
            {
                "uid": f"{i + 1:032x}", "url": row["url"], "text": row["caption"],
                "original_width": 10 + i, "original_height": 20,
                "face_bboxes": [[0.1, 0.2, 0.3, 1]],
                "clip_l14_similarity_score": 0.25, "sha256": hashlib.sha256(image).hexdigest(),
            }
        )  # fmt: skip
    path = write_list(tmp_path / "in/00000000.parquet", rows)
    index = index_of(carry_out(path, tmp_path / "out", verify_hash="sha256"))
    assert [row["ingest_reason"] for row in index] == [None] * 3
    for name in ("uid", "clip_l14_similarity_score", "face_bboxes", "sha256"):
        assert [row[name] for row in index] == [row[name] for row in rows]
    assert [row["caption"] for row in index] == [row["text"] for row in rows]
    assert [row["list_original_width"] for row in index] == [10, 11, 12]


def test_sizes_are_limited_and_images_resized_on_request(web: Web, tmp_path: Path) -> None:
    def picture(*size: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, "PNG")
        return buffer.getvalue()

    sizes = [(60, 50), (300, 20), (10, 10), (400, 200)]
    rows = [
        {"url": web.serve(f"/{i}.png", picture(*size)), "caption": "red"}
        for i, size in enumerate(sizes)
    ]
    path = write_list(tmp_path / "in/urls.csv", rows)
    stages = carry_out(
        path, tmp_path / "out", min_side_px=12, max_aspect=3.0, resize="keep_ratio",
        image_side_px=100,
    )  # fmt: skip
    index = index_of(stages)
    assert [row["error_message"] for row in index] == [
        None, "aspect ratio too large", "image too small", None,
    ]  # fmt: skip
    assert (index[3]["width"], index[3]["original_width"]) == (200, 400)
    data = images(stages)[rows[3]["url"]]
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (200, 100)


def test_the_same_answers_give_the_same_files(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 12)
    path = write_list(tmp_path / "in/urls.csv", rows)
    one = carry_out(path, tmp_path / "one", threads=8)
    # The first image now comes last.
    slow = threading.Event()
    first = pictures()[0][0]

    def late(handler: Handler) -> None:
        slow.wait(5)
        handler.reply(first)

    def release(handler: Handler) -> None:
        handler.reply(pictures()[11][0])
        slow.set()

    web.answer("/0.png", late)
    web.answer("/11.png", release)
    two = carry_out(path, tmp_path / "two", threads=3)
    for stage, again in zip(one, two, strict=True):
        assert stage.fingerprints == again.fingerprints
    for suffix in (".tar", ".parquet"):
        here, there = (images_of(run) / f"00000{suffix}" for run in (one, two))
        assert here.read_bytes() == there.read_bytes()


def test_failed_urls_are_tried_again_on_request(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 6)
    rows += [{"url": web.url(f"/late{i}.png"), "caption": f"late {i}"} for i in range(4)]
    path, out = write_list(tmp_path / "in/urls.csv", rows), tmp_path / "out"
    first = carry_out(path, out, shard_samples=4)
    before = {row["url"]: row["uid"] for row in index_of(first)}
    assert [row["ingest_reason"] for row in index_of(first)][6:] == ["failed_to_download"] * 4
    web.asked.clear()
    # Nothing is asked for again by itself, however the fetching would be done now.
    assert carry_out(path, out, shard_samples=4, retries=2, max_seconds=9.0)[1].fingerprints == (
        first[1].fingerprints
    )
    assert not web.asked
    # A round that brings nothing changes nothing.
    useless = carry_out(path, out, shard_samples=4, retry_failed=1)
    assert web.asked == {f"/late{i}.png": 1 for i in range(4)}
    assert useless[1].fingerprints == first[1].fingerprints
    web.serve("/late1.png", pictures()[20][0])
    web.serve("/late3.png", pictures()[21][0])
    web.asked.clear()
    second = carry_out(path, out, shard_samples=4, retry_failed=2)
    assert web.asked == {f"/late{i}.png": 1 for i in range(4)}
    assert second[0].fingerprints == first[0].fingerprints
    assert second[1].fingerprints != first[1].fingerprints
    index = index_of(second)
    assert {row["url"]: row["uid"] for row in index} == before
    assert [row["caption"] for row in index] == [row["caption"] for row in rows]
    assert [row["ingest_reason"] for row in index][6:] == [
        "failed_to_download", None, "failed_to_download", None,
    ]  # fmt: skip
    had = images(second)
    assert had[web.url("/late1.png")] == pictures()[20][0]
    assert had[web.url("/0.png")] == pictures()[0][0]
    assert second[0].stage.facts(second[0].room)["recovered"] == 2
    stats = json.loads((images_of(second) / "00001_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (4, 3)
    # Asked again without rounds, what was found stays.
    web.asked.clear()
    assert carry_out(path, out, shard_samples=4)[1].fingerprints == second[1].fingerprints
    assert not web.asked


def test_an_object_store_takes_what_is_downloaded(web: Web, tmp_path: Path) -> None:
    rows = [*good_rows(web, 3), {"url": web.url("/late.png"), "caption": "late"}]
    path, out = write_list(tmp_path / "in/urls.csv", rows), f"memory://{tmp_path.name}/out"
    first = index_of(carry_out(path, out))
    assert [row["ingest_reason"] for row in first] == [None] * 3 + ["failed_to_download"]
    web.serve("/late.png", pictures()[20][0])
    second = carry_out(path, out, retry_failed=1)
    assert [row["ingest_reason"] for row in index_of(second)] == [None] * 4
    assert images(second)[web.url("/late.png")] == pictures()[20][0]
    assert not [name for name in storage.walk_files(out) if "/.tmp-" in name]


def test_a_retry_that_was_killed_between_two_files(web: Web, tmp_path: Path) -> None:
    rows = [*good_rows(web, 3), {"url": web.url("/late.png"), "caption": "late"}]
    path, out = write_list(tmp_path / "in/urls.csv", rows), tmp_path / "out"
    first = carry_out(path, out)
    old = {p.name: p.read_bytes() for p in images_of(first).iterdir()}
    web.serve("/late.png", pictures()[20][0])
    folder = images_of(carry_out(path, out, retry_failed=1))
    for name in ("00000.parquet", "00000_stats.json"):  # as if these had not been written
        (folder / name).write_bytes(old[name])
    found = formats.FORMATS["webdataset"].scan(
        formats.list_sources((str(folder),), str(folder))[1][0], None, None
    )
    assert found.table["ingest_reason"].null_count == 4
    assert found.counts == {"stats_disagree": 1}
    # Tried once more, what was had is kept even if the server no longer has it.
    web.pages.pop("/late.png")
    shutil.rmtree(folder.parent / "done" / "retry1")
    manifest = folder.parent / "manifest.json"
    told = json.loads(manifest.read_text())
    del told["steps"]["retry1"]
    manifest.write_text(json.dumps(told))
    last = carry_out(path, out, retry_failed=1)
    assert images(last)[web.url("/late.png")] == pictures()[20][0]
    stats = json.loads((folder / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (4, 4)


def test_a_list_that_grew_costs_what_is_new(web: Web, tmp_path: Path) -> None:
    rows = [*good_rows(web, 7), {"url": web.url("/none.png"), "caption": "gone"}]
    path, out = write_list(tmp_path / "in/1.csv", rows), tmp_path / "out"
    first = carry_out(path, out, shard_samples=4)
    more = [{"url": web.serve(f"/more{i}.png", pictures()[i][0]), "caption": "x"} for i in range(3)]
    write_list(path, [*rows, *more])
    write_list(tmp_path / "in/2.csv", [{**more[0], "similarity": 1}])
    web.asked.clear()
    second = carry_out(path.parent, out, shard_samples=4)
    assert second[0].fingerprints != first[0].fingerprints
    assert web.asked == {"/more0.png": 2, "/more1.png": 1, "/more2.png": 1}
    marks = second[0].room.path("done", "fetch")
    taken = {name: storage.read_json(f"{marks}/{name}").get("taken_over") for name in
             storage.list_names(marks)}  # fmt: skip
    assert taken == {"00000.json": 4, "00001.json": 4, "00002.json": None}
    # The same as if nothing had been there before.
    whole = carry_out(path.parent, tmp_path / "anew", shard_samples=4)
    assert index_of(second) == index_of(whole)
    assert images(second) == images(whole)
    assert second[1].fingerprints == whole[1].fingerprints
    # Another wish is another download, and what is tried again leaves the earlier one as it was.
    web.asked.clear()
    carry_out(path.parent, out, shard_samples=4, max_bytes=15_000_000)
    assert web.asked.total() == 12
    web.serve("/none.png", pictures()[9][0])
    third = carry_out(path.parent, out, shard_samples=4, retry_failed=1)
    assert [row["ingest_reason"] for row in index_of(third)][7] is None
    assert [row["ingest_reason"] for row in index_of(first)][7] == "failed_to_download"
    stats = storage.read_json(first[0].room.path("images", "00001_stats.json"))
    assert (stats["count"], stats["successes"]) == (4, 3)


@pytest.mark.parametrize(
    ("total", "size"),
    [(1, 256), (4096, 256), (4097, 512), (8192, 512), (90_000, 8192), (10**6, 10_000)],
)
def test_sizes_of_shards_change_in_steps(total: int, size: int) -> None:
    assert _choose_size(total) == size


def test_what_is_wanted_makes_another_download_and_how_it_is_had_does_not(
    web: Web, tmp_path: Path
) -> None:
    path = write_list(tmp_path / "in/urls.csv", good_rows(web, 2))
    elsewhere = tmp_path / "elsewhere" / "urls.csv"
    elsewhere.parent.mkdir()
    shutil.copy(path, elsewhere)

    def fingerprint(source: Path = path, **fields: Any) -> str:
        settings = [("ingest", "inputs", (str(source),))]
        settings += [("download", name, value) for name, value in fields.items()]
        found = bind(load_pipeline("dedup", settings), str(tmp_path / "out"))
        assert [bound.stage.name for bound in found] == ["download"]
        return found[0].fingerprints["download"]

    same = {
        "allow_addresses": ["10.0.0.0/8"], "threads": 3, "retries": 1, "retry_failed": 2,
        "stall_seconds": 3, "max_seconds": 4, "max_redirects": 1, "user_agent_token": "bot",
    }  # fmt: skip
    assert {fingerprint(**{name: value}) for name, value in same.items()} == {fingerprint()}
    assert fingerprint(elsewhere) == fingerprint()
    other = {
        "url_column": "url", "caption_column": "caption", "verify_hash": "md5", "max_bytes": 9,
        "min_side_px": 3, "max_pixels": 9, "max_aspect": 3, "resize": "border", "shard_samples": 3,
        "image_side_px": 99, "disallowed_directives": [],
    }  # fmt: skip
    changed = {fingerprint(**{"resize": "keep_ratio", name: v}) for name, v in other.items()}
    assert len({fingerprint(), fingerprint(resize="keep_ratio"), *changed}) == len(other) + 2
    assert fingerprint(image_side_px=99) == fingerprint()
    elsewhere.write_text(elsewhere.read_text() + "http://example.com/,more\n")
    assert fingerprint(elsewhere) != fingerprint()


def test_a_limit_is_a_limit_of_downloads(web: Web, tmp_path: Path) -> None:
    path = write_list(tmp_path / "in/urls.csv", good_rows(web, 12))
    found = index_of(carry_out(path, tmp_path / "out", ingest__limit=5))
    assert len(found) == sum(web.asked.values()) == 5
    every = index_of(carry_out(path, tmp_path / "all"))
    ranks = draw_ranks([row["uid"] for row in every], 0)
    expected = sorted(zip(ranks.tolist(), [row["uid"] for row in every], strict=True))[:5]
    assert {row["uid"] for row in found} == {uid for _, uid in expected}


def test_user_agent_and_opt_out_as_img2dataset_has_them(web: Web, tmp_path: Path) -> None:
    image = pictures()[0][0]
    tags = ["noai", "all", "otherbot: noai", "mybot: noindex"]
    rows = [
        {"url": web.serve(f"/{i}.png", image, X_Robots_Tag=tag), "caption": tag}
        for i, tag in enumerate(tags)
    ]
    path = write_list(tmp_path / "in/urls.csv", rows)
    found = index_of(carry_out(path, tmp_path / "one", user_agent_token="MyBot"))
    assert [row["ingest_reason"] for row in found] == [
        "robots_disallowed", None, None, "robots_disallowed",
    ]  # fmt: skip
    (agent,) = web.agents
    assert "(compatible; mybot; +https://github.com/rom1504/img2dataset)" in agent
    found = index_of(carry_out(path, tmp_path / "two", disallowed_directives=[]))
    assert [row["ingest_reason"] for row in found] == [None] * 4


@pytest.mark.parametrize(
    ("name", "rows", "settings", "parts"),
    [
        ("a.csv", [{"link": "x", "words": "y"}], {}, ["a.csv", "one of URLs", "found link, words"]),
        ("a.parquet", [{"link": "x"}], {}, ["a.parquet", "one of URLs", "found link"]),
        (
            "a.csv", [{"url": "x", "words": "y"}], {"caption_column": "text"},
            ["a.csv", "the column text (download.caption_column)", "found url, words"],
        ),
        (
            "a.jsonl", [{"url": "x", "caption": "y"}], {"verify_hash": "sha256"},
            ["a.jsonl", "the column sha256", "found url, caption"],
        ),
    ],
)  # fmt: skip
def test_missing_columns_are_told_with_those_found(
    tmp_path: Path, name: str, rows: Rows, settings: dict[str, Any], parts: list[str]
) -> None:
    path = write_list(tmp_path / "in" / name, rows)
    with pytest.raises(InputError) as caught:
        carry_out(path, tmp_path / "out", **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_names_of_columns_can_be_chosen(web: Web, tmp_path: Path) -> None:
    rows = [{"link": r["url"], "words": r["caption"], "url": "x"} for r in good_rows(web, 2)]
    path = write_list(tmp_path / "in/urls.csv", rows)
    found = index_of(carry_out(path, tmp_path / "out", url_column="link", caption_column="words"))
    assert [row["url"] for row in found] == [row["link"] for row in rows]
    assert [row["caption"] for row in found] == [row["words"] for row in rows]
    assert [row["list_url"] for row in found] == ["x", "x"]


def test_wrong_parameters_are_told(tmp_path: Path) -> None:
    path = write_list(tmp_path / "in/urls.csv", [{"url": "x", "caption": "y"}])
    with pytest.raises(ConfigError, match=r"download.allow_addresses must be .*got 'intranet'"):
        carry_out(path, tmp_path / "out", allow_addresses=["intranet"])
    (tmp_path / "late.yaml").write_text("ingest: {}\ndownload: {}\n")
    with pytest.raises(ConfigError, match=r"download must come before ingest\. Move it up"):
        load_pipeline(str(tmp_path / "late.yaml"))
    (tmp_path / "alone.yaml").write_text("download: {}\n")
    with pytest.raises(ConfigError, match=r"must be a stage ingest"):
        load_pipeline(str(tmp_path / "alone.yaml"))


def test_other_inputs_are_not_downloaded(tmp_path: Path) -> None:
    """A pipeline with `download` serves inputs that have images, too."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(pictures()[0][0])
    write_list(tmp_path / "in/names.csv", [{"file_name": "a.png", "url": "u", "caption": "c"}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("download: {threads: 2}\ningest: {}\n")
    pipeline = load_pipeline(str(recipe), [("ingest", "inputs", (str(tmp_path / "in"),))])
    assert [stage.name for stage in pipeline.stages] == ["ingest"]
    assert "threads: 2" in pipeline.text


def test_a_whole_run_that_is_killed_fetches_no_shard_twice(web: Web, tmp_path: Path) -> None:
    rows = good_rows(web, 24)
    rows += [{"url": web.url("/gone"), "caption": "gone"}]
    path, out = write_list(tmp_path / "in/urls.parquet", rows), tmp_path / "out"
    (tmp_path / "short.yaml").write_text("ingest: {}\n", encoding="utf-8")
    arguments = [
        "--input", path, "--output", out, "--workers", 1,
        "--set", "download.allow_addresses=127.0.0.1", "--set", "download.shard_samples=6",
        "--set", "download.max_seconds=300", "--set", "download.stall_seconds=300",
    ]  # fmt: skip
    reached, image = threading.Event(), pictures()[13][0]

    def hang(handler: Handler) -> None:
        reached.set()
        web.over.wait(TIMEOUT_SECONDS)

    web.answer("/13.png", hang)  # in the third of five shards
    process = subprocess.Popen(
        command("run", tmp_path / "short.yaml", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert reached.wait(TIMEOUT_SECONDS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_SECONDS)
    assert {p.name for p in out.glob("stages/download-*/images/*_stats.json")} == {
        "00000_stats.json", "00001_stats.json",
    }  # fmt: skip
    web.serve("/13.png", image)
    succeed("run", "dedup", *arguments)
    assert_sound(out)
    assert all(web.asked[f"/{i}.png"] == 1 for i in range(12)), web.asked
    decisions = read_decisions(out).to_pylist()
    assert len(decisions) == len(rows)
    assert [row["reason"] for row in decisions if not row["keep"]] == ["failed_to_download"]
    kept = {row["caption"]: row["image"] for row in read_shards(out).to_pylist()}
    assert kept == {caption: image for image, caption in pictures()[:24]}
    facts = read_summary(out)["facts"]["download"]
    assert (facts["urls"], facts["images"]) == (25, 24)
    web.asked.clear()
    done = succeed("run", "dedup", *arguments)
    assert "Nothing to do" in done.stdout
    assert "Downloaded 24 of 25 URLs" in done.stdout
    assert not web.asked
