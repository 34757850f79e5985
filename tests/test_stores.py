"""Object stores and HTTP: what a path means there, what is tried again, what is told."""

import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from curate import storage, stores
from curate.engine import lease
from curate.errors import CurateError, InputError, OutputError, StorageError
from curate.formats import FORMATS, list_sources, read_images
from curate.formats.sources import Source, find_root, identify
from tests.servers import Server, serve_files, use_s3
from tests.support import write_tar

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with use_s3() as (server, _):
        yield server


@pytest.fixture
def out(s3: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give a folder of its own, and let nothing fail afterwards."""
    yield f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}"
    s3.gate.rule = lambda method, path: None


def test_what_is_written_is_read(s3: Server, out: str) -> None:
    value = {"a": [1, None, "ü"]}
    storage.commit_json(f"{out}/x/value.json", value)
    assert storage.read_json(f"{out}/x/value.json") == value
    rows = np.arange(60, dtype=np.float16).reshape(20, 3)
    storage.commit_array(f"{out}/rows.npy", rows)
    np.testing.assert_array_equal(storage.read_array(f"{out}/rows.npy"), rows)
    for start, end in ((0, 20), (3, 5), (18, 30), (20, 25), (7, 7)):
        found = storage.read_array_rows(f"{out}/rows.npy", start, end)
        np.testing.assert_array_equal(found, rows[start:end])
    turned = np.asfortranarray(rows)
    storage.commit_array(f"{out}/turned.npy", turned)
    np.testing.assert_array_equal(storage.read_array_rows(f"{out}/turned.npy", 2, 9), rows[2:9])
    table = pa.table({"uid": ["a", "b"], "names": [["x"], ["y", "z"]]})
    storage.commit_table(f"{out}/t.parquet", table)
    assert storage.read_table(f"{out}/t.parquet").equals(table)
    assert storage.read_table(f"{out}/t.parquet", ["names"]).column_names == ["names"]
    assert storage.list_columns(f"{out}/t.parquet") == ["uid", "names"]
    assert storage.list_names(out) == ["rows.npy", "t.parquet", "turned.npy", "x"]
    assert storage.exists(f"{out}/x")
    assert storage.mirror(out, f"{out}-copy")
    assert storage.walk_files(f"{out}-copy") == storage.walk_files(out)
    storage.remove(f"{out}-copy")
    storage.remove(f"{out}-copy")
    assert storage.walk_files(f"{out}-copy") == {}
    assert not storage.exists(f"{out}-copy/t.parquet")


def test_rows_of_an_array_are_all_that_is_read(s3: Server, out: str) -> None:
    storage.commit_array(f"{out}/rows.npy", np.zeros((100_000, 8), np.float32))
    s3.gate.seen.clear()
    storage.read_array_rows(f"{out}/rows.npy", 50_000, 50_010)
    asked = [span.removeprefix("bytes=").split("-") for _, _, span in s3.gate.seen if span]
    assert sum(int(end) - int(start) + 1 for start, end in asked) == 4096 + 10 * 8 * 4


def test_listings_are_never_stale(s3: Server, out: str) -> None:
    storage.commit_bytes(f"{out}/done/a", b"")
    assert storage.list_names(f"{out}/done") == ["a"]
    _in_other_process(f"storage.commit_bytes({out!r} + '/done/b', b'')")
    assert storage.list_names(f"{out}/done") == ["a", "b"]
    _in_other_process(f"storage.remove({out!r} + '/done')")
    assert storage.list_names(f"{out}/done") == []
    assert not storage.exists(f"{out}/done/a")


def _in_other_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"from curate import storage; {code}"], check=True)


def test_large_files_are_put_in_parts(s3: Server, out: str) -> None:
    size_bytes = 100 << 20
    with storage.commit(f"{out}/large") as path:
        Path(path).touch()
        os.truncate(path, size_bytes)
        s3.gate.seen.clear()
    assert storage.walk_files(out) == {"large": size_bytes}
    assert s3.gate.count("PUT", "large") == 2
    assert s3.gate.count("POST", "large") == 2  # begin and complete


@pytest.mark.parametrize(
    ("method", "fate"),
    [("PUT", 500), ("PUT", 503), ("GET", 500), ("GET", "cut"), ("HEAD", 503), ("POST", 503)],
)
def test_a_store_that_fails_for_a_while(s3: Server, out: str, method: str, fate: Any) -> None:
    storage.commit_bytes(f"{out}/before", b"some bytes")
    s3.gate.seen.clear()
    s3.gate.fail(2 if method == "PUT" else 1, fate, method)
    if method == "PUT":
        storage.commit_bytes(f"{out}/value", b"x" * 1000)
    elif method == "POST":
        storage.remove(f"{out}/before")
    else:
        with storage.open_binary(f"{out}/before") as file:
            assert file.read() == b"some bytes"
    names = ["before", "value"] if method == "PUT" else [] if method == "POST" else ["before"]
    assert sum(asked == method for asked, *_ in s3.gate.seen) >= 2
    assert storage.list_names(out) == names


def test_a_store_that_does_not_answer(
    s3: Server, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.commit_bytes(f"{out}/value", b"some bytes")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 2}})
    s3fs.S3FileSystem.clear_instance_cache()
    s3.gate.fail(1, "slow", "GET", "value")
    s3.gate.seen.clear()
    assert storage.read_range(f"{out}/value", 5, 10) == b"bytes"
    assert s3.gate.count("GET", "value") == 2
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_keeps_failing(s3: Server, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3fs.S3FileSystem.clear_instance_cache()
    s3.gate.fail(1000, 500, "PUT")
    s3.gate.seen.clear()
    with pytest.raises(StorageError, match=r"^s3://.*must be reachable; got .*to resume\.$"):
        storage.commit_bytes(f"{out}/value", b"")
    assert s3.gate.count("PUT", "value") == 2
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_is_not_there(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nothing listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="must be reachable; got Could not connect"):
        storage.exists("s3://bucket/x")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there(s3: Server) -> None:
    said = r"^s3://no-such/x: cannot be written: The specified bucket does not exist\. Create it"
    with pytest.raises(StorageError, match=said):
        storage.commit_bytes("s3://no-such/x", b"")
    assert storage.list_names("s3://no-such/x") == []
    with pytest.raises(InputError, match="no such path"):
        list_sources(("s3://no-such/x.tar",), "s3://no-such")
    assert not s3fs.S3FileSystem().exists("no-such")


def test_an_object_that_changes_while_it_is_read(s3: Server, out: str) -> None:
    storage.commit_bytes(f"{out}/x", b"before")
    with storage.open_binary(f"{out}/x", 0) as file:
        assert file.read(3) == b"bef"
        storage.commit_bytes(f"{out}/x", b"after!")
        with pytest.raises(StorageError, match="must stay as it is while it is read; it changed"):
            file.read(3)
    with storage.open_binary(f"{out}/x", 0) as file:
        storage.remove(f"{out}/x")
        with pytest.raises(StorageError, match="must stay where it is while it is read; got"):
            file.read(3)


def test_missing_packages_are_named() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = sys.modules['aiohttp'] = None\n"
        "from curate.cli import main\n"
        "main(['plan', 'dedup', '--input', sys.argv[1], '--output', 'out'])"
    )
    for url, extra in (("s3://bucket/x.tar", "s3"), ("https://host/x.tar", "http")):
        done = subprocess.run(
            [sys.executable, "-c", code, url], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr == (
            f"Error: {url}: needs a package that is not installed. "
            f"Run pip install 'curate[{extra}]'.\n"
        )


# A tar on a store


def _samples(count: int, image_bytes: int) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, image_bytes), np.uint8)
    return [
        (f"{i:05d}.{suffix}", content)
        for i, image in enumerate(images)
        for suffix, content in (("jpg", image.tobytes()), ("txt", f"caption {i}".encode()))
    ]


@pytest.fixture(scope="module")
def remote_tar(s3: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    write_tar(path, _samples(1000, 20_000))
    s3fs.S3FileSystem().put_file(str(path), "bucket/t.tar")
    return path


def test_a_remote_tar_is_indexed_in_one_pass(s3: Server, remote_tar: Path) -> None:
    s3.gate.seen.clear()
    found = FORMATS["webdataset"].scan(
        Source("t.tar", "s3://bucket/t.tar", "webdataset"), None, None
    )
    gets = [span for method, _, span in s3.gate.seen if method == "GET"]
    assert len(gets) == len(set(gets)) == -(-remote_tar.stat().st_size // (8 << 20))
    local = FORMATS["webdataset"].scan(Source("t.tar", str(remote_tar), "webdataset"), None, None)
    assert found.table.equals(local.table)
    assert len(found.table) == 1000


@pytest.mark.parametrize(("step", "requests"), [(1, 2), (3, 2), (10, 100)])
def test_images_are_read_in_few_requests(
    s3: Server, remote_tar: Path, step: int, requests: int
) -> None:
    """All, a third, and a tenth of the samples, with the rest in long runs between them."""
    table = (
        FORMATS["webdataset"].scan(Source("t.tar", str(remote_tar), "webdataset"), None, None).table
    )
    wanted = table.take(list(range(0, 1000, step)))
    s3.gate.seen.clear()
    found = list(read_images("s3://bucket", wanted))
    assert found == list(read_images(str(remote_tar.parent), wanted))
    assert all(image is not None and len(image) == 20_000 for image in found)
    gets = [span.removeprefix("bytes=").split("-") for m, _, span in s3.gate.seen if m == "GET"]
    assert len(gets) <= requests


def test_images_far_apart_are_read_alone(s3: Server, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "far.tar", _samples(20, 1_500_000))
    s3fs.S3FileSystem().put_file(str(path), "bucket/far.tar")
    table = FORMATS["webdataset"].scan(Source("far.tar", str(path), "webdataset"), None, None).table
    s3.gate.seen.clear()
    assert all(read_images("s3://bucket", table.take([0, 9, 18])))
    asked = [span.removeprefix("bytes=").split("-") for m, _, span in s3.gate.seen if m == "GET"]
    assert [int(end) - int(start) + 1 for start, end in asked] == [1_500_000] * 3


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/self/io on this system")
def test_a_tar_on_disk_is_indexed_without_its_images(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with path.open("wb") as file:
        for i in range(10_000):
            for suffix, content in (("jpg", None), ("txt", b"caption"), ("json", b"{}")):
                header = tarfile.TarInfo(f"{i:06d}.{suffix}")
                header.size = 50_000 if content is None else len(content)
                end = file.tell() + 512 + -(-header.size // 512) * 512
                file.write(header.tobuf(tarfile.USTAR_FORMAT) + (content or b""))
                file.seek(end)  # images are holes, which take no room
        file.write(bytes(1024))
    source = Source("t.tar", str(path), "webdataset")
    before = _bytes_read()
    found = FORMATS["webdataset"].scan(source, None, None)
    read = _bytes_read() - before
    assert len(found.table) == 10_000
    # Five blocks of 512 bytes a sample; files are read in pages.
    assert read < 10_000 * 3 * 4096 < path.stat().st_size / 4


def _bytes_read() -> int:
    facts = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(next(line.split()[1] for line in facts if line.startswith("rchar")))


# HTTP


@pytest.mark.parametrize("ranges", [True, False])
def test_inputs_by_url(tmp_path: Path, ranges: bool) -> None:
    for name in ("00000", "00001"):
        write_tar(tmp_path / f"a/{name}.tar", _samples(30, 3000))
    with serve_files(tmp_path, ranges) as server:
        inputs = (f"{server.url}/a/{{00000..00001}}.tar",)
        root = find_root(inputs)
        assert root == f"{server.url}/a"
        layout, sources = list_sources(inputs, root)
        assert (layout, [source.name for source in sources]) == (
            "webdataset", ["00000.tar", "00001.tar"],
        )  # fmt: skip
        for source in sources:
            local = Source(source.name, str(tmp_path / "a" / source.name), "webdataset")
            server.gate.fail(2, 503, "GET")
            found = FORMATS["webdataset"].scan(source, None, None).table
            assert found.equals(FORMATS["webdataset"].scan(local, None).table)
            server.gate.fail(1, "cut", "GET")
            images = list(read_images(root, found))
            assert images == list(read_images(str(tmp_path / "a"), found))
        assert len({identify(source)["digest"] for source in sources}) == 2


def test_parquet_by_url(tmp_path: Path) -> None:
    images = [bytes([i]) * 2000 for i in range(50)]
    table = pa.table({"image": images, "caption": [f"c {i}" for i in range(50)]})
    storage.commit_table(str(tmp_path / "p.parquet"), table)
    for ranges in (True, False):
        with serve_files(tmp_path, ranges) as server:
            _, (source,) = list_sources((f"{server.url}/p.parquet",), server.url)
            found = FORMATS["parquet"].scan(source, None, None).table
            assert list(read_images(server.url, found)) == images


def test_vectors_by_url(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    for ranges in (True, False):
        with serve_files(tmp_path, ranges) as server:
            layout, (source,) = list_sources((f"{server.url}/v.npy",), server.url)
            assert layout == "npy"
            opener = FORMATS["npy"].open_vectors
            assert opener is not None
            rows = np.array([400, 7, 33])
            np.testing.assert_array_equal(opener(source, None).image.take(rows), vectors[rows])


def test_what_http_cannot_do_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file_name,caption\na.jpg,x\n")
    with serve_files(tmp_path) as server:
        for url, said in (
            (f"{server.url}/", "lists none"),
            (f"{server.url}/*.tar", "lists none"),
            (f"{server.url}/t.tar?signature=1", "a query is no"),
            (f"{server.url}/none.tar", "no such path"),
            (f"{server.url}/t.csv", "must be on a disk or an object store"),
        ):
            with pytest.raises(InputError, match=said):
                list_sources((url,), find_root((url,)))
        server.gate.fail(1000, 403, "GET")
        server.gate.rule = lambda method, path: 403
        with pytest.raises(StorageError, match="must be accessible; got"):
            list_sources((f"{server.url}/t.tar",), server.url)
    with pytest.raises(InputError, match="must be on one server"):
        find_root(("http://one/a.tar", "http://other/a.tar"))


def test_a_server_that_keeps_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAUSE_SECONDS", 0)
    write_tar(tmp_path / "t.tar", _samples(2, 100))
    with serve_files(tmp_path) as server:
        server.gate.rule = lambda method, path: 503
        with pytest.raises(StorageError, match="must be reachable"):
            list_sources((f"{server.url}/t.tar",), server.url)
        assert server.gate.count("GET", "t.tar") == 5
    with pytest.raises(StorageError, match="must be reachable"):
        list_sources((f"{server.url}/t.tar",), server.url)


# The lock


def test_one_holds_the_lock(s3: Server, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "_PATIENCE", 500)
    url = f"{out}/.lock"
    with (
        lease.hold(url, out, "run"),
        pytest.raises(OutputError, match="another run holds it"),
        lease.hold(url, out, "run"),
    ):
        pytest.fail("two hold it")
    assert storage.list_names(out) == []
    with lease.hold(url, out, "run"):
        assert storage.list_names(out) == [".lock"]


def test_locks_left_behind_are_taken(s3: Server, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{out}/.lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    # That of a dead process of this machine at once, long before it could have been renewed.
    storage.commit_json(url, {"id": "x", "host": lease._host(), "pid": gone.pid, "beat": 3})
    with lease.hold(url, out, "run"):
        assert storage.read_json(url)["pid"] == os.getpid()
    # That of another machine once it has not been renewed for a while.
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.02)
    for left in ({"id": "x", "host": "elsewhere", "pid": 1, "beat": 3}, ["no lock of ours"]):
        storage.commit_json(url, left)
        with lease.hold(url, out, "run"):
            assert storage.read_json(url)["pid"] == os.getpid()
    storage.commit_bytes(url, b"{half")
    with lease.hold(url, out, "run"):
        pass
    assert not storage.exists(url)


def test_who_lost_the_lock_is_told(s3: Server, out: str) -> None:
    url = f"{out}/.lock"
    with (
        pytest.raises(OutputError, match="took it while this one hung"),
        lease.hold(url, out, "run"),
    ):
        storage.commit_json(url, {"id": "other", "host": "elsewhere", "pid": 1, "beat": 0})
    assert storage.read_json(url)["id"] == "other"


def test_of_many_one_gets_the_lock(s3: Server, out: str) -> None:
    won: list[int] = []
    start = threading.Barrier(4)

    def create(number: int) -> None:
        start.wait()
        if storage.create_json(f"{out}/lock", {"id": number}):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_json(f"{out}/lock") == {"id": won[0]}


def test_errors_are_one_line(s3: Server) -> None:
    for error in (OSError("a\nb"), RuntimeError("x")):
        found = stores._failure("s3://b/x", error, None)
        assert isinstance(found, CurateError)
        assert "\n" not in str(found)
