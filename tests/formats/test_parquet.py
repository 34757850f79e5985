import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import storage
from curate.errors import InputError, SourceChangedError
from curate.formats import parquet
from curate.formats.index import Scan
from curate.formats.sources import Source

JPEG = b"\xff\xd8\xff" + b"x" * 50


def source_of(path: Path) -> Source:
    return Source(path.name, str(path), "parquet", path.stat().st_size)


def scan(path: Path, table: pa.Table | None = None, **options: object) -> Scan:
    if table is not None:
        pq.write_table(table, path, **options)
    return parquet.scan(source_of(path))


def images_of(path: Path, rows: pa.Table) -> list[bytes | None]:
    return list(parquet.read_images(source_of(path), rows))


def test_img2dataset_columns(tmp_path: Path) -> None:
    uid = "ab" * 16
    table = pa.table(
        {
            "uid": [uid, "not hex", None],
            "caption": ["one", "two", "three"],
            "url": ["u1", "u2", "u3"],
            "key": ["000", "001", "002"],
            "status": ["success", "failed_to_download", "failed_to_resize"],
            "width": pa.array([4, None, None], pa.int32()),
            "jpg": [JPEG, None, None],
        }
    )
    path = tmp_path / "0.parquet"
    found = scan(path, table)
    rows = found.table.to_pylist()
    assert [row["key"] for row in rows] == ["000", "001", "002"]
    assert [row["caption"] for row in rows] == ["one", "two", "three"]
    assert [row["own_uid"] for row in rows] == [uid, None, None]
    reasons = [None, "failed_to_download", "failed_to_resize"]
    assert [row["ingest_reason"] for row in rows] == reasons
    assert json.loads(rows[0]["metadata"]) == {"url": "u1", "status": "success", "width": 4}
    assert images_of(path, found.table) == [JPEG, None, None]


def test_hugging_face_struct(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    held = [
        {"bytes": JPEG, "path": None},
        {"bytes": None, "path": "elsewhere.jpg"},
        None,
        {"bytes": b"", "path": None},
    ]
    table = pa.table({"image": pa.array(held, kind), "text": ["a", "b", "c", "d"]})
    path = tmp_path / "0.parquet"
    found = scan(path, table)
    reasons = [None, "image_missing", "image_missing", "image_empty"]
    assert found.table["ingest_reason"].to_pylist() == reasons
    assert found.table["key"].to_pylist() == ["0", "1", "2", "3"]
    assert found.table["size_bytes"].to_pylist() == [len(JPEG), None, None, 0]
    assert images_of(path, found.table) == [JPEG, None, None, b""]


def test_our_own_shards_keep_their_uids(tmp_path: Path) -> None:
    uids = [f"{i:032x}" for i in range(3)]
    table = pa.table(
        {
            "uid": uids,
            "key": ["a", "b", "c"],
            "image": [JPEG + bytes([i]) for i in range(3)],
            "caption": ["one", "two", "three"],
            "captions": [["one", "uno"], ["two"], ["three"]],
            "weight": np.array([1, 2, np.nan], np.float32),
        }
    )
    path = tmp_path / "0.parquet"
    storage.commit_table(str(path), table)
    found = scan(path)
    assert found.table["own_uid"].to_pylist() == uids
    assert found.table["ingest_reason"].null_count == 3
    first, _, last = (json.loads(text) for text in found.table["metadata"].to_pylist())
    assert first == {"captions": ["one", "uno"], "weight": 1.0}
    assert last["weight"] is None
    assert images_of(path, found.table) == table["image"].to_pylist()


def test_images_are_read_by_row_group_and_row_in_any_order(tmp_path: Path) -> None:
    images = [JPEG + i.to_bytes(2, "big") for i in range(1000)]
    table = pa.table({"image": images, "caption": [f"c{i}" for i in range(1000)]})
    path = tmp_path / "0.parquet"
    found = scan(path, table, row_group_size=300)
    groups = found.table["row_group"].to_pylist()
    assert [groups.count(g) for g in range(4)] == [300, 300, 300, 100]
    assert images_of(path, found.table) == images
    picked = [999, 3, 3, 299, 300, 70, 650]
    assert images_of(path, found.table.take(pa.array(picked))) == [images[i] for i in picked]


def test_statistics_spare_reading_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": [JPEG] * 3, "caption": ["a", "b", "c"]})
    path = tmp_path / "0.parquet"
    pq.write_table(table, path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the images were read")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    found = scan(path)
    assert found.table["size_bytes"].null_count == 3
    assert found.table["ingest_reason"].null_count == 3


def test_captions_and_text_that_are_not_utf8(tmp_path: Path) -> None:
    def text(*values: bytes | None) -> pa.Array:
        raw = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())

    table = pa.table(
        {
            "image": [JPEG] * 4,
            "caption": text("café".encode("latin-1"), b"fine", None, b"n\0l"),
            "url": text(b"http://\xff", b"u", b"u", b"u"),
        }
    )
    found = scan(tmp_path / "0.parquet", table)
    assert found.table["caption"].to_pylist()[:3] == ["caf\ufffd", "fine", None]
    reasons = ["caption_invalid", None, "caption_missing", "caption_invalid"]
    assert found.table["ingest_reason"].to_pylist() == reasons
    assert "\ufffd" in json.loads(found.table["metadata"].to_pylist()[0])["url"]


def test_repeated_keys_and_dictionary_captions(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": [7, 8, 7],
            "png": [JPEG] * 3,
            "TEXT": pa.array(["same", "same", "other"]).dictionary_encode(),
        }
    )
    found = scan(tmp_path / "0.parquet", table)
    assert found.table["key"].to_pylist() == ["7", "8", "7"]
    assert found.table["ordinal"].to_pylist() == [0, 0, 1]
    assert found.table["caption"].to_pylist() == ["same", "same", "other"]
    assert found.table["ingest_reason"].to_pylist() == [None, None, "duplicate_key"]


@pytest.mark.parametrize("columns", [{"image": [JPEG] * 2}, {"image": pa.nulls(2, pa.binary())}])
def test_table_of_images_alone(tmp_path: Path, columns: dict[str, list[bytes]]) -> None:
    found = scan(tmp_path / "0.parquet", pa.table(columns))
    assert found.table["key"].to_pylist() == ["0", "1"]
    assert all(found.table["ingest_reason"].to_pylist())


def test_no_rows(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    assert scan(tmp_path / "0.parquet", table).table.num_rows == 0


def test_errors_name_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    with pytest.raises(
        InputError, match=r"must have a column of image bytes .* found url, caption"
    ):
        scan(path, pa.table({"url": ["u"], "caption": ["c"]}))
    pq.write_table(pa.table({"image": [JPEG], "caption": ["c"]}), path)
    with pytest.raises(InputError, match="uid_column must be one of image, caption; got hash"):
        parquet.scan(source_of(path), "hash")
    twice = pa.Table.from_arrays([pa.array([JPEG]), *[pa.array(["c"])] * 2], ["image", "a", "a"])
    for read in (lambda: scan(path, twice), lambda: parquet.read_schema(str(path), "0.parquet")):
        with pytest.raises(InputError, match=r"^0\.parquet: .* different names; found a twice\."):
            read()


def test_what_is_no_text_is_no_caption(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    table = pa.table({"image": [JPEG], "caption": [7], "title": [{"en": "a"}], "text": ["words"]})
    found = scan(path, table).table
    assert found["caption"].to_pylist() == ["words"]
    assert json.loads(found["metadata"][0].as_py()) == {"caption": 7, "title": {"en": "a"}}
    for column, held in (("caption", "int64"), ("title", "struct<en: string>")):
        message = f"must be text or lists of text; {column} holds {held}"
        with pytest.raises(InputError, match=message):
            parquet.scan(source_of(path), None, column)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>not found</html>"])
def test_broken_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="must be a whole Parquet file") as error:
        scan(path)
    assert "\n" not in str(error.value)


def test_damaged_pages_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    rng = np.random.default_rng(0)
    table = pa.table({"image": [JPEG] * 50, "caption": [rng.bytes(40).hex() for _ in range(50)]})
    pq.write_table(table, path, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(InputError, match="must be a whole Parquet file") as error:
        scan(path)
    assert "\n" not in str(error.value)


def test_source_that_changed(tmp_path: Path) -> None:
    table = pa.table({"image": [JPEG] * 9, "caption": ["c"] * 9})
    path = tmp_path / "0.parquet"
    found = scan(path, table, row_group_size=4)
    pq.write_table(table.slice(0, 6), path, row_group_size=4)
    with pytest.raises(SourceChangedError, match=r"0\.parquet: must hold the rows"):
        images_of(path, found.table)
    source = source_of(path)
    path.unlink()
    with pytest.raises(SourceChangedError, match="No such file"):
        list(parquet.read_images(source, found.table))


def test_which_column_holds_images_and_captions(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"noise": {"_type": "Audio"}, "scan": {"_type": "Image"}}
    table = pa.table(
        {
            "noise": pa.array([{"bytes": b"beep", "path": None}] * 3, kind),
            "scan": pa.array([{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"},
                              {"bytes": None, "path": None}], kind),
            "captions": [["", "one", "uno"], [], ["three"]],
            "note": ["n1", "n2", "n3"],
        }
    )  # fmt: skip
    path = tmp_path / "0.parquet"
    known = {"huggingface": json.dumps({"info": {"features": features}})}
    found = scan(path, table.replace_schema_metadata(known))
    assert found.table["caption"].to_pylist() == ["one", None, "three"]
    assert json.loads(found.table["metadata"][0].as_py())["captions"] == ["", "one", "uno"]
    assert found.table["ingest_reason"].to_pylist() == [None, "image_missing", "image_missing"]
    assert found.counts == {"images_elsewhere": 1}
    assert images_of(path, found.table) == [JPEG, None, None]
    named = parquet.scan(source_of(path), None, "note").table
    assert named["caption"].to_pylist() == ["n1", "n2", "n3"]
    with pytest.raises(InputError, match="caption_column must be one of noise, scan, captions"):
        parquet.scan(source_of(path), None, "text")
    # Without the metadata both structs could be it.
    with pytest.raises(InputError, match="must have a column of image bytes"):
        scan(path, table)
