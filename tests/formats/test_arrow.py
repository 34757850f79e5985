"""Folders of `datasets.save_to_disk`, written by pyarrow alone and by the real library."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from curate import formats
from curate.errors import InputError, SourceChangedError
from curate.formats import arrow
from curate.formats.sources import Source, find_root, list_files
from tests.exports import need, run_python

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "huggingface": json.dumps(
        {"info": {"features": {"sound": {"_type": "Audio"}, "photo": {"_type": "Image"}}}}
    )
}


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), (number, 0, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_stream(path: Path, table: pa.Table, rows_a_batch: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        for batch in table.to_batches(max_chunksize=rows_a_batch):
            stream.write_batch(batch)
    return path


def write_folder(folder: Path, table: pa.Table) -> Path:
    name = "data-00000-of-00001.arrow"
    write_stream(folder / name, table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def make_table(count: int) -> pa.Table:
    photos = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]
    photos[1] = {"bytes": None, "path": "/elsewhere/1.png"}
    sounds = [{"bytes": b"noise", "path": None}] * count
    columns = {
        "sound": pa.array(sounds, IMAGE),
        "photo": pa.array(photos, IMAGE),
        "caption": [[f"first {i}", "second"] for i in range(count)],
        "alt": pa.array([f"alt {i % 2}" for i in range(count)]).dictionary_encode(),
        "likes": list(range(count)),
    }
    return pa.table(columns).replace_schema_metadata(FEATURES)


def sources_of(*inputs: Path, layout: str = "auto") -> list[Source]:
    given = tuple(map(str, inputs))
    found, sources = formats.list_sources(given, find_root(given), layout)
    assert found == "arrow"
    return sources


def test_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "d", make_table(8))
    write_stream(folder / "cache-123.arrow", make_table(2))
    (source,) = sources_of(folder)
    found = arrow.scan(source)
    rows = found.table.to_pylist()
    assert [row["caption"] for row in rows] == [f"first {i}" for i in range(8)]
    assert json.loads(rows[2]["metadata"]) == {
        "caption": ["first 2", "second"],
        "alt": "alt 0",
        "likes": 2,
    }
    assert [row["ingest_reason"] for row in rows] == [None, "image_missing", *[None] * 6]
    assert found.counts == {"images_elsewhere": 1}
    assert "1 images are named by path and not stored" in caplog.text
    expected = [None if i == 1 else picture(i) for i in range(8)]
    assert [row["size_bytes"] for row in rows] == [x and len(x) for x in expected]
    for order in (list(range(8)), [7, 0, 5, 5, 2, 1]):
        rows_read = found.table.take(pa.array(order))
        assert list(formats.read_images(str(folder), rows_read)) == [expected[i] for i in order]
    named = arrow.scan(source, "likes", "alt").table
    assert named["own_uid"].to_pylist() == [str(i) for i in range(8)]
    assert named["caption"].to_pylist() == [f"alt {i % 2}" for i in range(8)]


def test_splits_and_ways_to_name_them(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "d" / split, make_table(3))
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    names = [f"{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
    assert [source.name for source in sources_of(tmp_path / "d")] == names
    assert len(sources_of(tmp_path / "d/train")) == 1
    assert len(sources_of(tmp_path / "d/train/data-00000-of-00001.arrow")) == 1


def test_no_rows(tmp_path: Path) -> None:
    (source,) = sources_of(write_folder(tmp_path / "d", make_table(3).slice(0, 0)))
    assert len(arrow.scan(source).table) == 0


def test_what_is_not_whole(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", make_table(8))
    path = folder / "data-00000-of-00001.arrow"
    (source,) = sources_of(folder)
    table = arrow.scan(source).table
    data = path.read_bytes()
    for damaged, said in (
        (data[: len(data) // 2], "must be a whole Arrow stream"),
        (b"", "it is empty"),
        (b"ARROW1\0\0" + data, "must be a whole Arrow stream"),
        (b"<html>", "must be a whole Arrow stream"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=said) as error:
            arrow.scan(source)
        assert str(error.value).startswith("data-00000-of-00001.arrow: ")
        assert "\n" not in str(error.value)
        with pytest.raises(SourceChangedError, match="must hold the rows that were indexed"):
            list(arrow.read_images(source, table))
    path.unlink()
    (folder / "data-00001-of-00002.arrow").write_bytes(data)
    message = r"^state\.json: must name .* data-00000-of-00001\.arrow is not there"
    with pytest.raises(InputError, match=message):
        arrow.group(list(list_files((str(folder),), str(folder))))
    (folder / "state.json").write_text(
        json.dumps(
            {
                "_data_files": [{"filename": "data-00001-of-00002.arrow"}],
                "_indices_data_files": [{"filename": "indices.arrow"}],
            }
        )
    )
    with pytest.raises(InputError, match=r"Call flatten_indices\(\) before"):
        arrow.group(list(list_files((str(folder),), str(folder))))


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    (source,) = sources_of(write_folder(tmp_path / "d", pa.table({"a": [1], "b": ["x"]})))
    with pytest.raises(InputError, match=r"must have a column of image bytes .* found a, b"):
        arrow.scan(source)
    (source,) = sources_of(write_folder(tmp_path / "e", make_table(2)))
    message = "caption_column must be one of sound, photo, caption, alt, likes; got text"
    with pytest.raises(InputError, match=message):
        arrow.scan(source, None, "text")


SAVE = """
import io, sys
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
folder = sys.argv[1]
def picture(number):
    buffer = io.BytesIO()
    Pillow.new("RGB", (9, 8), (number, 0, 99)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
def rows(start, end):
    numbers = range(start, end)
    rows = {"photo": [picture(i) for i in numbers], "text": [f"caption {i}" for i in numbers]}
    return Dataset.from_dict(rows, kinds)
kinds = Features({"photo": Image(), "text": Value("string")})
whole = DatasetDict(train=rows(0, 20), test=rows(20, 25))
whole.save_to_disk(folder + "/dict", num_shards={"train": 3, "test": 1})
whole["train"].select([5, 3]).save_to_disk(folder + "/picked")
whole["test"].to_parquet(folder + "/table/test.parquet")
"""


def test_what_datasets_itself_writes(tmp_path: Path) -> None:
    need("datasets")
    run_python(SAVE, tmp_path, folder=tmp_path)
    found = {}
    for source in sources_of(tmp_path / "dict"):
        table = arrow.scan(source).table
        images = formats.read_images(str(tmp_path / "dict"), table)
        found.update(zip(table["caption"].to_pylist(), images, strict=True))
    assert found == {f"caption {i}": picture(i) for i in range(25)}
    (source,) = sources_of(tmp_path / "picked")
    table = arrow.scan(source).table
    assert table["caption"].to_pylist() == ["caption 5", "caption 3"]
    assert list(formats.read_images(str(tmp_path / "picked"), table)) == [picture(5), picture(3)]
    given = (str(tmp_path / "table"),)
    layout, (source,) = formats.list_sources(given, given[0])
    assert layout == "parquet"
    table = formats.FORMATS[layout].scan(source, None, None).table
    assert list(formats.read_images(given[0], table)) == [picture(i) for i in range(20, 25)]


def test_the_library_is_not_needed(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", make_table(3))
    code = (
        "import sys\nfrom curate import formats\n"
        "source = formats.list_sources((sys.argv[1],), sys.argv[1])[1][0]\n"
        "formats.FORMATS['arrow'].scan(source, None, None)\nprint('datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"]
