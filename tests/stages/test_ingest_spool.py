"""Remote tars are read once: what ingest reads is there for embed, and nobody's disk is filled."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curate import storage
from curate.config import load_pipeline
from curate.engine.runner import BoundStage, bind
from curate.errors import ConfigError
from curate.formats.sources import Source
from curate.stages import ingest_spool
from curate.stages.ingest import Ingest
from curate.stages.ingest_spool import open_spool
from tests.servers import Server, serve_files, use_s3
from tests.support import write_subset

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("aiohttp")

TARS = 3


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subset(tmp_path_factory.mktemp("disk") / "pool", 60, TARS)


@pytest.fixture(scope="module")
def s3(disk: Path) -> Iterator[Server]:
    with use_s3() as (server, fs):
        fs.put(f"{disk}/", "bucket/pool/", recursive=True)
        yield server


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give temporary files a folder of their own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def bound(source: object, out: object, **fields: Any) -> list[BoundStage]:
    settings = [("ingest", name, value) for name, value in fields.items()]
    inputs = ("ingest", "inputs", tuple(map(str, source if isinstance(source, list) else [source])))
    # Shards of 7 that begin in one tar and end in the next.
    size = ("ingest", "shard_samples", 7)
    return bind(load_pipeline("dedup", [inputs, size, *settings]), str(out))


def work(stages: list[BoundStage], name: str) -> None:
    (found,) = (one for one in stages if one.stage.name == name)
    # Without vectors, which take longest and see no more of the tars.
    room = replace(found.room, missing=found.room.missing - {"embed.vectors"})
    for step in found.stage.steps():
        for task in step.tasks(room) if step.tables is None else ():
            step.run(room, task)


def hashes(stages: list[BoundStage]) -> pa.Table:
    """Return what embed found in the bytes."""
    room = next(one.room for one in stages if one.stage.name == "embed")
    paths = [room.shard_path("embed.pixels", shard) for shard in room.shards()]
    return pa.concat_tables([storage.read_table(path) for path in paths])


def index_and_embed(server: Server, *arguments: Any, **fields: Any) -> tuple[pa.Table, list[int]]:
    """Return what embed found, and the bytes of tars that it and ingest before it were sent."""
    stages, sent = bound(*arguments, **fields), {}
    for name in ("ingest", "remove", "embed"):
        server.gate.sent_bytes.clear()
        work(stages, name)
        tars = [n for path, n in server.gate.sent_bytes.items() if path.endswith(".tar")]
        sent[name] = sum(tars)
    return hashes(stages), [sent["ingest"], sent["embed"]]


@pytest.fixture(scope="module")
def truth(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What embed finds in the tars on a disk."""
    out = tmp_path_factory.mktemp("truth")
    stages = bound(disk, out)
    for name in ("ingest", "remove", "embed"):
        work(stages, name)
    assert not (out / ".spool").exists()
    return hashes(stages)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.tar"))


@pytest.mark.parametrize("remote", [False, True], ids=["out on a disk", "out on the store"])
def test_an_object_store_is_read_once(
    s3: Server, disk: Path, truth: pa.Table, tmp_path: Path, temporary: Path, remote: bool
) -> None:
    out = f"s3://bucket/{tmp_path.name}" if remote else str(tmp_path / "out")
    found, sent = index_and_embed(s3, "s3://bucket/pool", out)
    assert found.equals(truth)
    assert sum(sent) <= 1.05 * size_of(disk)
    assert sent[1] == 0
    kept = temporary if remote else tmp_path / "out" / ".spool"
    assert len(copies(kept)) == TARS
    embed = bound("s3://bucket/pool", out)[2]
    embed.stage.release(embed.room)
    assert copies(tmp_path) == []
    assert list(temporary.iterdir()) == []


def test_without_room_the_answer_is_the_same(
    s3: Server, disk: Path, truth: pa.Table, tmp_path: Path
) -> None:
    """None is kept, or all but one."""
    whole = size_of(disk)
    least = min(path.stat().st_size for path in disk.glob("*.tar"))
    for kept, spool_gb in ((0, 0), (TARS - 1, (whole - least / 2) / 1e9)):
        out = tmp_path / f"{kept}"
        found, sent = index_and_embed(s3, "s3://bucket/pool", out, spool_gb=spool_gb)
        assert found.equals(truth)
        assert whole <= sent[0] <= 1.05 * whole
        assert len(copies(out)) == kept
        # Of each tar less its last captions.
        assert 0.8 * (TARS - kept) / TARS < sent[1] / whole < 1.1 * (TARS - kept) / TARS


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_an_http_server_is_read_once(
    disk: Path, truth: pa.Table, tmp_path: Path, ranges: bool
) -> None:
    with serve_files(disk, ranges) as server:
        inputs = [f"{server.url}/{path.name}" for path in sorted(disk.glob("*.tar"))]
        found, sent = index_and_embed(server, inputs, tmp_path / "out")
    assert found.equals(truth)
    assert sum(sent) <= 1.05 * size_of(disk)


def test_a_run_that_goes_on_finds_its_copies_and_another_does_not(
    s3: Server, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_spool, "_BLOCK_BYTES", 10_000)
    work(bound("s3://bucket/pool", tmp_path / "out"), "ingest")
    again, other = (
        bound("s3://bucket/pool", tmp_path / "out", dataset=name)[0] for name in ("", "x")
    )
    for one, is_there in ((again, True), (other, False)):
        assert isinstance(one.stage, Ingest)
        copied = one.stage.copies(one.room.path()).find("00000.tar")
        assert (copied is not None) == is_there
        if copied:
            assert Path(copied).read_bytes() == (disk / "00000.tar").read_bytes()


def test_a_disk_keeps_three_quarters_of_what_is_free(
    tmp_path: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = storage.walk_files("s3://bucket/pool")["00000.tar"]
    source = Source("00000.tar", "s3://bucket/pool/00000.tar", "webdataset", size_bytes)
    for free, is_kept in ((4 * size_bytes - 8, False), (5 * size_bytes, True)):
        usage = shutil._ntuple_diskusage(10 * size_bytes, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        spool = open_spool(f"{tmp_path}/out/stages/ingest-0", None, 32)
        assert (spool.fetch(source) is not None) == is_kept
        assert len(list(Path(spool.folder).iterdir())) == is_kept


def test_a_disk_that_fails_is_done_without(s3: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    source = Source("00000.tar", "s3://bucket/pool/00000.tar", "webdataset", 1)
    spool = open_spool("s3://bucket/out/stages/ingest-0", str(tmp_path / "file" / "x"), 32)
    assert spool.fetch(source) is None
    assert spool.find(source.name) is None
    spool.clear()


def test_among_temporary_files_none_stay_and_nobody_elses_are_read(
    s3: Server, tmp_path: Path, temporary: Path
) -> None:
    index = "s3://bucket/out/stages/ingest-0"
    left, new = temporary / "curate-spool-left", temporary / "curate-spool-new"
    for folder in (left, new):
        folder.mkdir()
        (folder / "x.tar").write_bytes(b"x")
    os.utime(left, (0, 0))
    source = Source("00000.tar", "s3://bucket/pool/00000.tar", "webdataset", 1)
    spool = open_spool(index, None, 32)
    copied = spool.fetch(source)
    assert copied is not None
    assert Path(spool.folder).stat().st_mode & 0o77 == 0
    assert not left.exists()
    assert new.exists()
    # What lies where a copy would lie, but in a folder that somebody else may write to.
    elsewhere = tmp_path / "elsewhere"
    Path(spool.folder).rename(elsewhere)
    Path(spool.folder).symlink_to(elsewhere)
    assert spool.find(source.name) is None
    assert spool.fetch(source) is None


def test_copies_are_kept_on_disks_alone() -> None:
    with pytest.raises(ConfigError, match=r"ingest\.spool must be a folder on a disk; got s3://b"):
        load_pipeline("dedup", [("ingest", "spool", "s3://b/x")])
    assert ingest_spool.Spool("x", "y", 0).find("z") is None
