"""Which tables are lists of URLs, and what of their columns is passed on."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import InputError
from curate.formats import url_lists

IMAGE = {"url": ["http://a/1"], "caption": ["c"]}


def put(folder: Path, *names: str, **columns: list[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pq.write_table(pa.table(columns or IMAGE), folder / name)
    return folder


def lists_in(folder: Path, url_column: str | None = None) -> list[str] | None:
    found = url_lists.find_lists((str(folder),), str(folder), url_column)
    return None if found is None else [source.name for source in found]


def test_tables_of_urls_are_lists(tmp_path: Path) -> None:
    assert lists_in(put(tmp_path / "laion.v2", "b.parquet", "a.parquet")) == [
        "a.parquet", "b.parquet",
    ]  # fmt: skip
    assert lists_in(put(tmp_path / "named", "a.parquet", link=["x"])) is None
    assert lists_in(tmp_path / "named", "link") == ["a.parquet"]


@pytest.mark.parametrize(
    "beside", ["0.tar", "0.npz", "0.jpg", "img_emb/img_emb_0.npy", "0_stats.json"]
)
def test_what_belongs_to_images_or_vectors_is_none(tmp_path: Path, beside: str) -> None:
    folder = put(tmp_path / "in", "0.parquet")
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_bytes(b"{}")
    assert lists_in(folder) is None


def test_tables_with_images_or_names_of_files_are_none(tmp_path: Path) -> None:
    assert lists_in(put(tmp_path / "bytes", "0.parquet", url=["u"], jpg=[b"x"])) is None
    assert lists_in(put(tmp_path / "bytes", "0.parquet", url=["u"], jpg=[b"x"]), "url") is None
    assert lists_in(put(tmp_path / "paths", "0.parquet", url=["u"], file_name=["x.jpg"])) is None


def test_nothing_of_a_list_is_lost(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "in", "0.parquet", uid=["not hex"], key=[3], list_key=["x"],
        list_list_key=[True],
        url=["u"], text=["t"], caption=["c"], boxes=[[[0.1, 0.2]]], when=[None], sha256=["ab"],
    )  # fmt: skip
    found = url_lists.find_lists((str(folder),), str(folder))
    assert found is not None
    columns = url_lists.find_columns(found[0])
    assert (columns.url, columns.caption, columns.hash) == ("url", "caption", None)
    assert columns.sources == {
        "list_uid": "uid", "list_list_list_key": "key", "list_key": "list_key",
        "list_list_key": "list_list_key", "text": "text", "boxes": "boxes", "when": "when",
        "list_sha256": "sha256",
    }  # fmt: skip
    assert columns.others["boxes"] == pa.list_(pa.list_(pa.float64()))
    assert columns.others["list_list_list_key"] == pa.int64()


def test_columns_of_mixed_values_become_text(tmp_path: Path) -> None:
    rows = [
        {"url": "u", "n": 1, "m": 1, "f": 0.5, "deep": {"a": [1]}, "big": 1},
        {"url": "u", "n": None, "m": "x", "f": 2, "deep": None, "big": 2**70},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n\n")
    source = url_lists.find_lists((str(path),), str(tmp_path))[0]  # type: ignore[index]
    columns = url_lists.find_columns(source)
    assert [str(columns.others[n]) for n in ("n", "m", "f", "deep", "big")] == [
        "int64", "string", "double", "string", "int64",
    ]  # fmt: skip
    (read,) = url_lists.read_rows(source)
    assert len(read) == 3  # a line that is no JSON is a row without URL
    packed = {n: url_lists.to_array([r.get(n) for r in read], t) for n, t in columns.others.items()}
    assert packed["m"].to_pylist() == ["1", "x", None]
    assert packed["f"].to_pylist() == [0.5, 2.0, None]
    assert packed["deep"].to_pylist() == ['{"a": [1]}', None, None]
    assert packed["big"].to_pylist() == [1, None, None]


def test_a_cut_list_is_told(tmp_path: Path) -> None:
    path = put(tmp_path / "in", "0.parquet") / "0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"0\.parquet: must be a whole Parquet file"):
        lists_in(tmp_path / "in")
