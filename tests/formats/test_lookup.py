import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import InputError
from curate.formats import lookup
from curate.formats.sources import TABLES, File


def file_of(path: Path) -> File:
    return File(path.name, str(path), path.stat().st_size)


def write(path: Path, keys: list[str | None], numbers: list[float | None]) -> File:
    table = pa.table({"uid": keys, "text": ["a\nb, “c”"] * len(keys), "score": numbers})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n\n")
    else:
        table.to_pandas().to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return file_of(path)


@pytest.mark.parametrize("suffix", TABLES)
def test_tables_of_all_kinds_say_the_same(tmp_path: Path, suffix: str) -> None:
    if suffix in ("csv", "tsv"):
        pytest.importorskip("pandas")
    file = write(tmp_path / f"t.{suffix}", ["a", "b", "c"], [1.5, None, 3])
    assert list(lookup.list_columns(file)) == ["uid", "text", "score"]
    assert lookup.find_key(file, ("UID", "uid"), ("score",)) == "uid"
    ((keys, numbers),) = lookup.read_batches(file, "uid", ("score",))
    assert keys == ["a", "b", "c"]
    np.testing.assert_array_equal(numbers, [[1.5], [np.nan], [3]])
    with pytest.raises(InputError, match=r"must have the column url; got uid, text, score"):
        lookup.find_key(file, ("url",))
    with pytest.raises(InputError, match="must have the column scores; got uid, text, score"):
        lookup.find_key(file, ("uid",), ("scores",))
    if suffix == "parquet":  # its types are known before anything is read
        with pytest.raises(InputError, match="text must hold numbers; got string"):
            lookup.find_key(file, ("uid",), ("text",))
    with pytest.raises(InputError, match="must be a whole table of numbers by key"):
        list(lookup.read_batches(file, "uid", ("text",)))


@pytest.mark.parametrize("run_rows", [3, 10, 10_000])
def test_what_is_put_down_is_found(tmp_path: Path, run_rows: int) -> None:
    texts = [f"http://x/{i}" for i in range(1000)]
    keys = lookup.digest(texts, "url", "here")
    numbers = np.arange(2000, dtype=float).reshape(-1, 2)
    batches = [(keys[i : i + 7], numbers[i : i + 7]) for i in range(0, 1000, 7)]
    assert lookup.sort_runs(iter(batches), str(tmp_path), "0", run_rows) == 1000
    runs = lookup.Runs.open(str(tmp_path), "0")
    assert len(runs.keys) == {3: 143, 10: 72, 10_000: 1}[run_rows]
    assert isinstance(runs.keys[0].base, np.memmap)
    wanted = lookup.digest(["http://x/5", "http://y", "http://x/999"], "url", "here")
    assert runs.holds(wanted).tolist() == [True, False, True]
    assert runs.holds(keys).all()
    found = {}
    for places, values in runs.rows(wanted):
        found.update(zip(places.tolist(), values.tolist(), strict=True))
    assert found == {0: [10, 11], 2: [1998, 1999]}


def test_repeats_are_all_given(tmp_path: Path) -> None:
    keys = lookup.digest(["a", "b", "a"], "url", "here")
    lookup.sort_runs([(keys, np.array([[1.0], [2], [3]]))], str(tmp_path), "0")
    ((places, values),) = lookup.Runs.open(str(tmp_path), "0").rows(keys[:2])
    assert places.tolist() == [0, 0, 1]
    assert values.tolist() == [[1], [3], [2]]


def test_nothing_to_look_up_in(tmp_path: Path) -> None:
    assert lookup.sort_runs([], str(tmp_path), "0") == 0
    runs = lookup.Runs.open(str(tmp_path), "0")
    assert not runs.holds(lookup.digest(["a"], "url", "here")).any()


def test_hashes_as_text_and_of_bytes() -> None:
    for kind in lookup.HASHES:
        text = hashlib.new(kind, b"image").hexdigest()
        assert lookup.digest([text.upper()], kind, "x") == lookup.hash_bytes(b"image", kind)
    for bad in ("", "12", "zz" * 16, "ab" * 32):
        with pytest.raises(InputError, match=r"list\.txt: a md5 must be 32 hex digits; got"):
            lookup.digest([bad], "md5", "list.txt")


def test_digests_sort_and_compare_to_the_last_byte() -> None:
    """Zero bytes at the end are bytes like others."""
    raw = [bytes(16), bytes(15) + b"\1", b"\xff" * 15 + b"\0", b"\xff" * 16]
    keys = np.frombuffer(b"".join(raw), lookup.DIGEST)
    assert len(np.unique(keys)) == 4
    assert (np.sort(keys[::-1]) == keys).all()
    assert np.searchsorted(keys, keys).tolist() == [0, 1, 2, 3]


def test_lists_are_lines_and_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa\r\n\nüb \n".encode())
    ((lines, _),) = lookup.read_lines(file_of(path))
    assert [line and line.strip() for line in lines] == ["a", "", "üb"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"list\.txt: .* cannot be read") as error:
        list(lookup.read_lines(file_of(path)))
    assert "\n" not in str(error.value)


def test_a_changed_line_changes_the_digest(tmp_path: Path) -> None:
    """Of a large input file samples would do; a line of a list must not change unseen."""
    path = tmp_path / "list.txt"
    data = bytearray(b"0123456789abcdef" * 300_000)
    path.write_bytes(data)
    before = lookup.hash_whole(file_of(path))
    data[2_345_678] ^= 1
    path.write_bytes(data)
    assert lookup.hash_whole(file_of(path)) != before
