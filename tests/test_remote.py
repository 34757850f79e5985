"""A run whose inputs and OUT are on an S3 endpoint, with two workers: the same as on a disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import curate as package
from curate import storage
from curate.engine import export as exports
from curate.engine import runner
from curate.stages.ingest_spool import open_spool
from tests.exports import Here, InProcess, Silent
from tests.servers import Server, use_s3
from tests.support import (
    assert_equal_decisions,
    assert_sound,
    call,
    curate,
    only_error,
    succeed,
    write_subset,
)

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

#: Small shards, so that both workers have something to do.
_SETTINGS = ("--set", "ingest.shard_samples=8", "--set", "write.shard_samples=8")


@dataclass
class Store:
    """An endpoint, reached by this process and by those that it starts."""

    server: Server
    fs: Any

    def fetch(self, url: str, folder: Path) -> Path:
        """Copy what lies below `url` to a disk."""
        for name in storage.walk_files(url):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(storage.join(url, name)))
        return folder


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with use_s3() as (server, fs):
        yield Store(server, fs)


@dataclass(frozen=True)
class Both:
    """One run on a disk, and the same on the store; bytes that were sent of its tars, by name."""

    disk: Path
    remote: str
    copied: Path
    sent_bytes: dict[str, int]


@pytest.fixture(scope="module")
def both(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    source = write_subset(folder / "in", 30, 3)
    out, remote = folder / "out", "s3://bucket/out"
    run = ("run", "dedup", *_SETTINGS)
    succeed(*run, "--workers", 1, "--input", source, "--output", out)
    store.fs.put(f"{source}/", "bucket/in/", recursive=True)
    succeed(*run, "--workers", 2, "--input", "s3://bucket/in", "--output", remote)
    names = [path.name for path in source.iterdir()]
    sent = {name: store.server.gate.sent_bytes[f"/bucket/in/{name}"] for name in names}
    return Both(out, remote, store.fetch(remote, folder / "copied"), sent)


def _vanish_at(store: Store, bucket: str, method: str, part: str) -> dict[str, bytes]:
    """Remove a bucket at a request; return what will have been in it."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    held: dict[str, bytes] = {}

    def rule(asked: str, path: str) -> None:
        if asked == method and part in path and not held:
            backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
            keys = backend.buckets[bucket].keys
            held.update({f"{bucket}/{name}": key.value for name, key in keys.items()})
            keys.clear()
            backend.delete_bucket(bucket)

    store.server.gate.rule = rule
    return held


def test_the_same_is_decided_and_written(both: Both) -> None:
    assert_sound(both.copied)
    assert_equal_decisions(both.disk, both.copied)
    shards = pa.concat_tables(
        storage.read_table(str(path)) for path in sorted((both.copied / "shards").iterdir())
    )
    assert len(shards) > 15
    # stages/ names the tars by digest on a disk and by checksum on a store.
    names = {path.name for path in both.disk.iterdir()} - {".lock"}
    assert {path.name for path in both.copied.iterdir()} == names
    assert "ingest.list: 1 tasks, 0 done before" in (both.copied / "run.log").read_text("utf-8")


def test_tars_are_sent_once_and_once_more_to_write(both: Both) -> None:
    source = both.disk.parent / "in"
    for name, sent_bytes in both.sent_bytes.items():
        assert 1 < sent_bytes / (source / name).stat().st_size < 2.05
    index = f"{both.remote}/stages/ingest-0"
    assert not Path(open_spool(index, None, 1).folder).exists()


def test_a_finished_run_is_not_repeated(store: Store, both: Both) -> None:
    before = storage.walk_files(both.remote)
    del before["run.log"]
    # A run that was killed after it had read all of its copies of tars.
    left = Path(open_spool(f"{both.remote}/stages/ingest-0", None, 1).folder)
    left.mkdir()
    (left / "copy.tar").write_bytes(b"x")
    store.server.gate.seen.clear()
    call("run", "dedup", *_SETTINGS, "--input", "s3://bucket/in", "--output", both.remote)
    written = {path for method, path, _ in store.server.gate.seen if method == "PUT"}
    assert written == {"/bucket/out/.lock", "/bucket/out/run.log"}
    assert not left.exists()
    after = storage.walk_files(both.remote)
    del after["run.log"]
    assert after == before


def test_what_can_be_asked_of_it(store: Store, both: Both) -> None:
    uid = storage.read_table(str(next((both.disk / "decisions").iterdir())))["uid"][0].as_py()
    here, there = (json.loads(call("show", out, uid, "--json")) for out in (both.disk, both.remote))
    assert here == there
    assert json.loads(call("stats", both.remote, "--json"))["status"] == "finished"
    page = storage.read_bytes(f"{both.remote}/report/index.html")
    storage.remove(f"{both.remote}/report")
    assert call("report", both.remote) == f"{both.remote}/report/index.html\n"
    assert storage.read_bytes(f"{both.remote}/report/index.html") == page
    storage.commit_bytes(f"{both.remote}/stages/dedup-000000000000/x", b"")
    assert "1 folder removed" in call("clean", both.remote)
    samples = [
        {sample["uid"]: sample["image"] for sample in package.load(str(out), image="bytes")}
        for out in (both.disk, both.remote)
    ]
    assert samples[0] == samples[1]
    assert len(samples[0]) > 15


def test_exports(store: Store, both: Both, tmp_path: Path) -> None:
    for out, target in ((both.disk, tmp_path / "here"), (both.remote, "s3://bucket/tars")):
        request = exports.Request(str(out), str(target), "groups", shard_samples=10)
        exports.export(request, Here(), Silent())
    copied = store.fetch("s3://bucket/tars", tmp_path / "there")
    names = {path.name for path in (tmp_path / "here").iterdir()} - {".lock"}
    assert {path.name for path in copied.iterdir()} == names
    tars = [name for name in names if name.endswith(".tar")]
    assert tars
    for name in tars:
        assert (copied / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert "DATA=s3://bucket/tars\n" in (copied / "TRAINING.md").read_text("utf-8")


def test_a_bucket_that_vanishes_and_what_else_is_named_by_url(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Vectors, evaluation images, and an earlier run, whose bucket was gone for a while."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 16)).astype(np.float16)
    vectors[50:] = vectors[:10]
    store.fs.mkdir("vectors")
    for name, rows in (("one", vectors[:30]), ("two", vectors), ("held", vectors[20:25])):
        storage.commit_array(f"s3://vectors/{name}/{name}.npy", rows)
    run = ("run", "dedup", "--set", "select.require_caption=false", "--workers", 1)
    earlier = (*run, "-i", "s3://vectors/one", "-o", "s3://earlier/out")
    store.fs.mkdir("earlier")
    held = _vanish_at(store, "earlier", "PUT", "/done/search/")
    failed = curate(*earlier)
    store.server.gate.rule = lambda method, path: None
    assert failed.returncode == 1
    said = only_error(failed.stderr)
    assert said.startswith("Error: s3://earlier/out/stages/dedup-")
    assert "The specified bucket does not exist. Create it and run the same command again" in said
    assert held
    store.fs.mkdir("earlier")
    for path, data in held.items():
        store.fs.pipe_file(path, data)
    monkeypatch.setattr(runner, "Workers", InProcess)
    call(*earlier)
    log = storage.read_bytes("s3://earlier/out/run.log").decode()
    assert "had been left locked by a run that ended early" in caplog.text
    assert "ingest.scan" not in log
    later = (
        *run, "-i", "s3://vectors/two", "-o", "s3://bucket/later",
        "--set", "dedup.against=s3://earlier/out", "--set", "ingest.dataset=two",
        "--set", "decontaminate.inputs=s3://vectors/held",
    )  # fmt: skip
    held = _vanish_at(store, "vectors", "GET", "/two.npy")
    told = call(*later, exit_code=1)
    store.server.gate.rule = lambda method, path: None
    assert told.startswith("Error: s3://vectors/two/two.npy: must stay where it is"), told
    assert "The specified bucket does not exist. Put it back and run the same" in told
    assert held
    store.fs.mkdir("vectors")
    for path, data in held.items():
        store.fs.pipe_file(path, data)
    call(*later)
    counts = storage.read_json("s3://bucket/later/run.json")["counts"]
    dropped = {"contaminated": 5, "duplicate_earlier": 35}
    assert counts == {"ingested": 60, "kept": 20, "dropped": dropped}


def test_bad_stores(
    store: Store, both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = both.disk.parent / "in"
    storage.commit_bytes("s3://bucket/theirs/notes.txt", b"x")
    for out, code, said in (
        ("s3://bucket/theirs", 2, "must be empty or hold an earlier run; found 'notes.txt'"),
        ("s3://no-such/out", 1, "The specified bucket does not exist. Create it"),
        ("http://127.0.0.1/out", 2, "an HTTP server cannot be written"),
        ("s3://bucket/o[1]", 2, "must hold none of"),
    ):
        told = call("run", "dedup", "-i", source, "-o", out, exit_code=code)
        assert told.startswith(f"Error: {out}")
        assert said in told
    assert storage.walk_files("s3://bucket/theirs") == {"notes.txt": 1}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    for given, out in (("s3://bucket/in", tmp_path / "o"), (source, "s3://bucket/x")):
        told = call("run", "dedup", "-i", given, "-o", out, exit_code=1)
        assert "must be given credentials; got none" in told
    s3fs.S3FileSystem.clear_instance_cache()
