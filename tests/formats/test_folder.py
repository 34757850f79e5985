import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import formats
from curate.errors import InputError, SourceChangedError
from curate.formats import folder
from curate.formats.sources import Source

JPEG = b"\xff\xd8\xff" + b"x" * 50


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def sources_of(root: Path) -> list[Source]:
    layout, sources = formats.list_sources((str(root),), str(root))
    assert layout == "folder"
    return sources


def scan(root: Path) -> list[dict[str, object]]:
    return [row for source in sources_of(root) for row in folder.scan(source).table.to_pylist()]


def test_images_with_texts_beside_them_recursively(tmp_path: Path) -> None:
    files = {
        "top.jpg": JPEG,
        "top.txt": b"at the top",
        "a/one.PNG": JPEG + b"1",
        "a/one.json": b'{"caption": "from json", "width": 3}',
        "a/b/dotted.name.webp": JPEG + b"2",
        "a/b/dotted.name.txt": b"dotted",
        "a/b/alone.jpg": JPEG,
        "a/b/empty.jpg": b"",
        "a/b/empty.txt": b"x",
        "a/b/orphan.txt": b"no image",
        "a/.hidden/x.jpg": JPEG,
        "notes/readme.txt": b"no image in this folder",
    }
    sources = sources_of(put(tmp_path, files))
    assert [source.name for source in sources] == ["./", "a/", "a/b/"]
    rows = scan(tmp_path)
    found = {
        (row["source_file"], row["key"]): (row["caption"], row["ingest_reason"]) for row in rows
    }
    assert found == {
        ("./", "top.jpg"): ("at the top", None),
        ("a/", "one.PNG"): ("from json", None),
        ("a/b/", "dotted.name.webp"): ("dotted", None),
        ("a/b/", "alone.jpg"): (None, "caption_missing"),
        ("a/b/", "empty.jpg"): ("x", "image_empty"),
        ("a/b/", "orphan.txt"): ("no image", "image_missing"),
    }
    index = pa.concat_tables([folder.scan(source).table for source in sources])
    images = dict(
        zip(index["key"].to_pylist(), formats.read_images(str(tmp_path), index), strict=True)
    )
    assert images["top.jpg"] == JPEG
    assert images["one.PNG"] == JPEG + b"1"
    assert images["dotted.name.webp"] == JPEG + b"2"
    assert images["orphan.txt"] is None


@pytest.mark.parametrize("kind", ["comma", "tab", "jsonl", "parquet"])
def test_tables_that_name_images(tmp_path: Path, kind: str) -> None:
    paths = ["img/0.jpg", "img/1.jpg", "img/gone.jpg"]
    captions = ['quoted, "comma"', "two\nlines", "gone"]
    put(tmp_path, {"img/0.jpg": JPEG + b"0", "img/1.jpg": JPEG + b"1", "img/unnamed.jpg": JPEG})
    if kind == "parquet":
        pq.write_table(pa.table({"image_path": paths, "text": captions}), tmp_path / "t.parquet")
    elif kind == "jsonl":
        records = zip(paths, captions, strict=True)
        lines = [json.dumps({"file_name": p, "text": c, "n": 1}) for p, c in records]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    else:
        comma = "\t" if kind == "tab" else ","
        quoted = ['"' + c.replace('"', '""') + '"' for c in captions]
        lines = [
            f"filepath{comma}title",
            *(f"{p}{comma}{c}" for p, c in zip(paths, quoted, strict=True)),
        ]
        (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = scan(tmp_path)
    assert [row["key"] for row in rows] == paths
    assert [row["caption"] for row in rows] == captions
    assert [row["ingest_reason"] for row in rows] == [None, None, "image_missing"]
    (source,) = sources_of(tmp_path)
    index = folder.scan(source).table
    assert list(folder.read_images(source, index)) == [JPEG + b"0", JPEG + b"1", None]


def test_paths_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"secret.jpg": JPEG, "in/ok.jpg": JPEG})
    bad = ["../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "file:///x.jpg"]
    bad += ["x::file:///etc/passwd", "C:\\x.jpg", "", "~/x.jpg", "ok.jpg\0", "..", "."]
    lines = ["image,caption", *(f'"{path}",c' for path in bad), "./ok.jpg,fine", "ok.jpg,again"]
    (tmp_path / "in/list.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = scan(tmp_path / "in")
    assert [row["ingest_reason"] for row in rows] == ["image_missing"] * len(bad) + [None, None]
    assert [row["member"] for row in rows[: len(bad)]] == [None] * len(bad)
    assert [row["member"] for row in rows[len(bad) :]] == ["ok.jpg", "ok.jpg"]


def test_an_image_may_have_several_captions_in_a_table(tmp_path: Path) -> None:
    put(tmp_path, {"0.jpg": JPEG, "list.csv": b"image,caption\n0.jpg,one\n0.jpg,two\n0.jpg\n"})
    rows = scan(tmp_path)
    assert [(r["ordinal"], r["caption"], r["ingest_reason"]) for r in rows] == [
        (0, "one", None),
        (1, "two", None),
        (2, None, "caption_missing"),
    ]


def test_captions_that_are_long_or_not_utf8(tmp_path: Path) -> None:
    long = b"word " * 200_000
    table = b"image,caption\n0.jpg," + long + b"\n0.jpg,caf\xe9\n0.jpg,n\0l\n"
    put(tmp_path, {"0.jpg": JPEG, "list.csv": table})
    rows = scan(tmp_path)
    assert [row["caption"] for row in rows] == [long.decode(), "caf\ufffd", "nl"]
    reasons = [None, "caption_invalid", "caption_invalid"]
    assert [row["ingest_reason"] for row in rows] == reasons


def test_other_tables_do_not_hinder(tmp_path: Path) -> None:
    put(tmp_path, {"0.jpg": JPEG, "0.txt": b"c", "log.csv": b"time,loss\n1,2\n"})
    assert [row["key"] for row in scan(tmp_path)] == ["0.jpg"]


def test_table_without_a_path_column(tmp_path: Path) -> None:
    put(tmp_path, {"log.csv": b"time,loss\n1,2\n"})
    with pytest.raises(InputError, match=r"log\.csv: must have a column .* found time, loss\."):
        sources_of(tmp_path)


def test_names_that_are_not_utf8_are_rows(tmp_path: Path) -> None:
    put(tmp_path, {"ok.jpg": JPEG, "ok.txt": b"c"})
    try:
        Path(str(tmp_path) + "/caf\udce9.jpg").write_bytes(JPEG)
    except OSError:
        pytest.skip("this file system refuses such names")
    reasons = {row["key"]: row["ingest_reason"] for row in scan(tmp_path)}
    assert reasons.pop("ok.jpg") is None
    assert list(reasons.values()) == ["image_missing"]


@pytest.mark.parametrize("content", [None, JPEG + b"longer"])
def test_image_that_changed(tmp_path: Path, content: bytes | None) -> None:
    put(tmp_path, {"0.jpg": JPEG, "0.txt": b"c"})
    (source,) = sources_of(tmp_path)
    table = folder.scan(source).table
    (tmp_path / "0.jpg").unlink()
    if content is not None:
        (tmp_path / "0.jpg").write_bytes(content)
    with pytest.raises(SourceChangedError, match=r"0\.jpg: must stay as it was") as error:
        list(folder.read_images(source, table))
    assert "\n" not in str(error.value)
