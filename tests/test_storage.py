import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import storage
from curate.errors import AlignmentError, InputError, StorageError


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Give a folder on disk and one on an object store."""
    if request.param == "local":
        yield str(tmp_path / "out")
        return
    store = fsspec.filesystem("memory")
    try:
        yield "memory://bucket/out"
    finally:
        if store.exists("/bucket"):
            store.rm("/bucket", recursive=True)


def table_of(count: int = 3) -> pa.Table:
    return pa.table({"uid": [f"{i}" for i in range(count)], "names": [["a", "b"]] * count})


def test_json_bytes_array_and_table_round_trip(folder: str) -> None:
    value = {"b": [1, 2.5, None, "ü"], "a": {}}
    storage.commit_json(storage.join(folder, "x", "value.json"), value)
    assert storage.read_json(storage.join(folder, "x/value.json")) == value
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    storage.commit_array(f"{folder}/x/array.npy", array)
    np.testing.assert_array_equal(storage.read_array(f"{folder}/x/array.npy"), array)
    storage.commit_table(f"{folder}/table.parquet", table_of(), {"curate.fingerprint": "abc"})
    found = storage.read_table(f"{folder}/table.parquet")
    assert found.equals(table_of())
    assert found.schema.metadata[b"curate.fingerprint"] == b"abc"
    storage.commit_table(f"{folder}/table.parquet", found, {"curate.fingerprint": "later"})
    found = storage.read_table(f"{folder}/table.parquet")
    assert found.schema.metadata[b"curate.fingerprint"] == b"later"
    only = storage.read_table(f"{folder}/table.parquet", ["names"])
    assert only.column_names == ["names"]
    assert storage.walk_files(folder).keys() == {"x/value.json", "x/array.npy", "table.parquet"}


def test_listing_and_removing(folder: str) -> None:
    assert storage.list_names(folder) == []
    assert storage.walk_files(folder) == {}
    for name in ("b/two", "a", "b/one"):
        storage.commit_bytes(storage.join(folder, name), name.encode())
    assert storage.list_names(folder) == ["a", "b"]
    assert storage.list_names(f"{folder}/b") == ["one", "two"]
    assert storage.walk_files(folder) == {"a": 1, "b/one": 5, "b/two": 5}
    assert storage.exists(f"{folder}/b/one")
    storage.remove(f"{folder}/b")
    storage.remove(f"{folder}/b")
    assert not storage.exists(f"{folder}/b/one")
    assert storage.list_names(folder) == ["a"]


def test_a_commit_replaces_whole_files(folder: str) -> None:
    url = storage.join(folder, "value")
    for data in (b"first and longer", b"second"):
        storage.commit_bytes(url, data)
        with fsspec.open(url, "rb") as file:
            assert file.read() == data
    assert storage.list_names(folder) == ["value"]


def stumble(url: str, error: Exception) -> None:
    """Fail in the middle of writing."""
    path = ""
    try:
        with storage.commit(url) as path:
            Path(path).write_bytes(b"half")
            raise error
    finally:
        assert not Path(path).exists()


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError(errno.EIO, "bad disk")])
def test_a_failed_commit_leaves_what_was_there(folder: str, error: Exception) -> None:
    url = storage.join(folder, "value")
    expected = StorageError if isinstance(error, OSError) else RuntimeError
    for before in ([], ["value"]):
        with pytest.raises(expected):
            stumble(url, error)
        assert storage.list_names(folder) == before
        if before:
            with fsspec.open(url, "rb") as file:
                assert file.read() == b"whole"
        storage.commit_bytes(url, b"whole")


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    url = str(tmp_path / "value")
    with storage.commit(url) as path:
        Path(path).write_bytes(b"data")
        assert os.listdir(tmp_path) == [Path(path).name]
        assert Path(path).name.startswith(storage.TEMPORARY_PREFIX)
    assert os.listdir(tmp_path) == ["value"]


def test_a_failed_table_leaves_nothing(folder: str) -> None:
    tables = [table_of(), pa.table({"uid": [b"\xff\xfe"], "names": [["a"]]})]

    def write() -> None:
        with storage.commit_batches(f"{folder}/t.parquet", tables[0].schema) as append:
            for table in tables:
                append(table)

    with pytest.raises(pa.ArrowInvalid):
        write()
    assert storage.list_names(folder) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free some space and run the same command again"),
        (errno.EACCES, "Permission denied. Make it writable or choose another folder."),
        (errno.EROFS, "Read-only file system. Choose another folder."),
        (errno.EIO, "Input/output error. Run the same command again to resume."),
    ],
)
def test_write_errors_say_what_to_do(tmp_path: Path, number: int, advice: str) -> None:
    url = str(tmp_path / "shard.parquet")
    with pytest.raises(StorageError) as caught, storage.commit(url):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{url}: cannot be written: {advice}")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_really_full_device(tmp_path: Path) -> None:

    def write() -> None:
        with storage.commit(str(tmp_path / "a")) as path:
            os.symlink("/dev/full", path)
            Path(path).write_bytes(b"x" * 100_000)

    with pytest.raises(StorageError, match="No space left"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.commit_bytes(str(tmp_path / "file/value"), b"")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.make_folder(str(tmp_path / "file/folder"))


def test_temporaries_of_killed_processes_are_cleared(tmp_path: Path) -> None:
    deep = tmp_path / "a/b"
    deep.mkdir(parents=True)
    (deep / f"{storage.TEMPORARY_PREFIX}12345678").write_text("half")
    (deep / "kept").write_text("whole")
    storage.clear_temporaries(str(tmp_path))
    assert os.listdir(deep) == ["kept"]
    storage.clear_temporaries(str(tmp_path / "missing"))
    storage.clear_temporaries("memory://nowhere")


def test_json_refuses_what_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.commit_json(str(tmp_path / "x.json"), {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_files_are_missing(folder: str) -> None:
    for read in (storage.read_json, storage.read_table, storage.read_array):
        with pytest.raises(FileNotFoundError):
            read(storage.join(folder, "none.parquet"))


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(InputError, match="must be a path or a URL that fsspec knows"):
        storage.filesystem("nonsense://bucket/x")


def test_pickled_arrays_are_refused(folder: str, tmp_path: Path) -> None:
    hostile = np.array([{"a": 1}], object)
    with pytest.raises(ValueError, match="pickle"):
        storage.commit_array(f"{folder}/a.npy", hostile)
    assert storage.list_names(folder) == []
    path = tmp_path / "b.npy"
    np.save(path, hostile, allow_pickle=True)
    storage.commit_bytes(f"{folder}/b.npy", path.read_bytes())
    with pytest.raises(ValueError, match=r"pickle|Python objects"):
        storage.read_array(f"{folder}/b.npy")


def vectors_with_nulls(count: int, width: int = 5) -> tuple[np.ndarray[Any, Any], Any]:
    rng = np.random.default_rng(count)
    vectors = rng.standard_normal((count, width)).astype(np.float16)
    valid = rng.random(count) > 0.3
    vectors[~valid] = 0
    return vectors, valid


@pytest.mark.parametrize("count", [0, 1, 9, 2500])
def test_vectors_round_trip(folder: str, count: int) -> None:
    vectors, valid = vectors_with_nulls(count)
    column = storage.vector_column(vectors, valid)
    assert column.null_count == count - valid.sum()
    url = storage.join(folder, "v.parquet")
    storage.commit_table(url, pa.table({"image_emb": column}))
    found, found_valid = storage.read_vectors(storage.read_table(url)["image_emb"])
    assert found.dtype == np.float16
    assert found.shape == (count, 5)
    np.testing.assert_array_equal(found, vectors)
    np.testing.assert_array_equal(found_valid, valid)


def test_vectors_of_sliced_and_chunked_columns() -> None:
    vectors, valid = vectors_with_nulls(40)
    whole = storage.vector_column(vectors, valid)
    chunks = [whole[0:0], whole[0:7], whole[7:8], whole[8:29], whole[29:40]]
    for column, first, end in (
        (pa.chunked_array([whole]), 0, 40),
        (pa.chunked_array([whole[3:17]]), 3, 17),
        (pa.chunked_array(chunks), 0, 40),
        (pa.chunked_array(chunks).slice(5, 30), 5, 35),
        (pa.chunked_array([whole]).slice(40), 40, 40),
    ):
        found, found_valid = storage.read_vectors(column)
        np.testing.assert_array_equal(found, vectors[first:end])
        np.testing.assert_array_equal(found_valid, valid[first:end])


def test_what_null_rows_hold_is_not_shown() -> None:
    column = storage.vector_column(np.full((2, 3), np.nan, np.float16), np.array([False, True]))
    found, _ = storage.read_vectors(pa.chunked_array([column]))
    assert found[0].tolist() == [0, 0, 0]
    assert np.isnan(found[1]).all()


def test_vectors_and_images_are_stored_plain_in_small_groups(tmp_path: Path) -> None:
    vectors, valid = vectors_with_nulls(2500)
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(2500)],
            "image_emb": storage.vector_column(vectors, valid),
            "thumbnail": pa.array([b"x"] * 2500),
            "tags": pa.array([["a"]] * 2500),
        }
    )
    url = str(tmp_path / "t.parquet")
    storage.commit_table(url, table)
    facts = pq.ParquetFile(url).metadata
    assert facts.num_row_groups == 3
    columns = {facts.row_group(0).column(i).path_in_schema: i for i in range(4)}
    for name in ("image_emb", "thumbnail"):
        stored = facts.row_group(0).column(columns[name])
        assert stored.compression == "UNCOMPRESSED"
        assert "PLAIN" in stored.encodings
        assert not stored.has_dictionary_page
        assert not stored.is_stats_set
    for name in ("uid", "tags.list.element"):
        assert facts.row_group(0).column(columns[name]).compression == "ZSTD"
    assert storage.read_table(url).equals(table)


def test_batches_are_appended_in_order(folder: str) -> None:
    url = storage.join(folder, "t.parquet")
    with storage.commit_batches(url, table_of().schema) as append:
        for count in (2, 0, 3):
            append(table_of(count))
    assert storage.read_table(url)["uid"].to_pylist() == ["0", "1", "0", "1", "2"]
    with storage.commit_batches(url, table_of().schema):
        pass
    assert len(storage.read_table(url)) == 0


def test_join_aligned() -> None:
    one = pa.table({"uid": ["a", "b"], "x": [1, 2]})
    two = pa.table({"uid": pa.chunked_array([["a"], ["b"]]), "y": [3, 4], "x": [9, 9]})
    joined = storage.join_aligned([("one", one), ("two", two)])
    assert joined.to_pydict() == {"uid": ["a", "b"], "x": [1, 2], "y": [3, 4]}


@pytest.mark.parametrize("uids", [["b", "a"], ["a"], ["a", "b", "c"], ["a", "x"]])
def test_join_refuses_other_uids(uids: list[str]) -> None:
    one = pa.table({"uid": ["a", "b"]})
    other = pa.table({"uid": uids})
    with pytest.raises(AlignmentError, match=r"^stages/x/00000\.parquet: must hold the same uids"):
        storage.join_aligned([("index", one), ("stages/x/00000.parquet", other)])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{0..3}.tar", ["0.tar", "1.tar", "2.tar", "3.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{1..003}", ["001", "002", "003"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,{b,c}d}", ["a", "bd", "cd"]),
        ("x{a{1,2},b}", ["xa1", "xa2", "xb"]),
        ("{p,q{0..1},}z", ["pz", "q0z", "q1z", "z"]),
        ("s3://b/{x,y}/{00..01}", ["s3://b/x/00", "s3://b/x/01", "s3://b/y/00", "s3://b/y/01"]),
        ("{a}", ["{a}"]),
        ("{}", ["{}"]),
        ("a{b", ["a{b"]),
        ("a}b{", ["a}b{"]),
    ],
)  # fmt: skip
def test_braces_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert storage.expand_braces(pattern) == expected


def test_mirror_follows_its_source(folder: str) -> None:
    source, target = storage.join(folder, "source"), storage.join(folder, "target")
    storage.commit_bytes(f"{source}/a", b"one")
    storage.commit_bytes(f"{source}/deep/b", b"two")
    assert storage.mirror(source, target)
    assert storage.walk_files(target) == {"a": 3, "deep/b": 3}
    assert not storage.mirror(source, target, trust_sizes=True)
    storage.commit_bytes(f"{source}/a", b"longer")
    storage.commit_bytes(f"{source}/c", b"new")
    storage.remove(f"{source}/deep/b")
    assert storage.mirror(source, target)
    assert storage.walk_files(target) == {"a": 6, "c": 3}
    with fsspec.open(f"{target}/a", "rb") as file:
        assert file.read() == b"longer"
    assert not storage.mirror(source, target, trust_sizes=True)
    assert storage.mirror(storage.join(folder, "no such"), target)
    assert storage.walk_files(target) == {}
    assert not storage.mirror(storage.join(folder, "no such"), target)


def test_mirror_sees_changes_that_keep_the_size(tmp_path: Path) -> None:
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    storage.commit_bytes(f"{source}/a", b"one")
    storage.mirror(source, target)
    storage.commit_bytes(f"{source}/a", b"two")
    assert storage.mirror(source, target)
    assert Path(f"{target}/a").read_bytes() == b"two"


def test_mirror_stores_nothing_twice_on_disk(tmp_path: Path) -> None:
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    storage.commit_bytes(f"{source}/a", b"one")
    storage.mirror(source, target)
    assert os.path.samefile(f"{source}/a", f"{target}/a")
    # A user's own change of a published file does not last, and never reaches the source.
    storage.commit_bytes(f"{target}/a", b"two")
    assert storage.mirror(source, target)
    assert Path(f"{target}/a").read_bytes() == b"one"
    assert storage.list_names(target) == ["a"]


@pytest.mark.parametrize("rows", [[0], [4], [2, 3, 9], [0, 1, 5, 6, 9], list(range(10)), []])
def test_some_rows_of_a_table_are_read_by_their_row_groups(tmp_path: Path, rows: list[int]) -> None:
    table = pa.table({"a": range(10), "b": [f"{i}" for i in range(10)]})
    with pq.ParquetWriter(tmp_path / "t.parquet", table.schema) as writer:
        for start, stop in ((0, 3), (3, 4), (4, 9), (9, 10)):
            writer.write_table(table.slice(start, stop - start))
    found = storage.read_rows(str(tmp_path / "t.parquet"), np.array(rows, np.int64))
    assert found.equals(table.take(pa.array(rows, pa.int64())))
