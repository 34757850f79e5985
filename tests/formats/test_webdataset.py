import gzip
import io
import json
import logging
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import InputError, SourceChangedError
from curate.formats import webdataset
from curate.formats.index import Scan
from curate.formats.sources import File, Source

JPEG = b"\xff\xd8\xff" + b"x" * 700


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def pair(key: str, caption: str = "a cat", image: bytes = JPEG) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]


def source_of(path: Path, *companions: str) -> Source:
    return Source(path.name, str(path), "webdataset", path.stat().st_size, companions)


def scan(path: Path, *companions: str) -> Scan:
    return webdataset.scan(source_of(path, *companions))


def rows_of(found: Scan) -> list[dict[str, object]]:
    return list(found.table.to_pylist())


def reasons(found: Scan) -> dict[str, object]:
    return {str(row["key"]): row["ingest_reason"] for row in rows_of(found)}


def test_finds_every_sample_and_its_bytes(tmp_path: Path) -> None:
    images = {f"{i:05d}": JPEG + bytes([i]) * i for i in range(40)}
    members = [m for key, image in images.items() for m in pair(key, f"caption {key}", image)]
    path = make_tar(tmp_path / "0.tar", members)
    found = scan(path)
    assert found.table["key"].to_pylist() == list(images)
    assert found.table["caption"].to_pylist() == [f"caption {key}" for key in images]
    assert found.table["ingest_reason"].null_count == 40
    assert found.counts == {}
    read = list(webdataset.read_images(source_of(path), found.table))
    assert read == list(images.values())
    some = found.table.take(pa.array([30, 2, 39, 2]))
    expected = [images[key] for key in ("00030", "00002", "00039", "00002")]
    assert list(webdataset.read_images(source_of(path), some)) == expected


def test_agrees_with_webdataset(tmp_path: Path) -> None:
    members = [m for i in range(5) for m in pair(f"dir.x/{i:03d}", f"c{i}", JPEG + bytes([i]))]
    path = make_tar(tmp_path / "0.tar", [("dir.x/.hidden", b"1"), ("README", b"2"), *members])
    iterators = pytest.importorskip("webdataset.tariterators")
    with path.open("rb") as file:
        opened = [{"url": "0.tar", "stream": file}]
        theirs = list(iterators.group_by_keys(iterators.tar_file_expander(opened)))
    found = scan(path)
    assert found.table["key"].to_pylist() == [sample["__key__"] for sample in theirs]
    read = list(webdataset.read_images(source_of(path), found.table))
    assert read == [sample["jpg"] for sample in theirs]
    assert found.counts == {"ignored_members": 2}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    key = "ордер/" + "k" * 180
    path = make_tar(tmp_path / "0.tar", pair(key) + pair("next"), format=form)
    found = scan(path)
    assert found.table["key"].to_pylist() == [key, "next"]
    assert list(webdataset.read_images(source_of(path), found.table)) == [JPEG, JPEG]


def test_what_is_missing_is_a_row_with_a_reason(tmp_path: Path) -> None:
    members = [
        *pair("good"),
        ("noimage.txt", b"a dog"),
        ("notext.png", JPEG),
        ("empty.jpg", b""),
        ("empty.txt", b"nothing to see"),
        *pair("blank", " \n"),
        ("onlyjson.json", b'{"caption": "a tree"}'),
        ("vectors.npy", b"123"),
        ("vectors.txt", b"has vectors but no image"),
    ]
    assert reasons(scan(make_tar(tmp_path / "0.tar", members))) == {
        "good": None,
        "noimage": "image_missing",
        "notext": "caption_missing",
        "empty": "image_empty",
        "blank": "caption_missing",
        "onlyjson": "image_missing",
        "vectors": "image_missing",
    }


def test_images_of_unknown_kind_are_left_to_embed(tmp_path: Path) -> None:
    members = [
        ("a.svg", b"<svg/>"),
        ("a.txt", b"drawn"),
        ("b.xyz", b"??"),
        ("b.txt", b"what"),
        ("c.avif", b"avif"),
        ("c.png", JPEG),
        ("c.txt", b"both"),
    ]
    path = make_tar(tmp_path / "0.tar", members)
    found = scan(path)
    assert reasons(found) == {"a": None, "b": None, "c": None}
    read = list(webdataset.read_images(source_of(path), found.table))
    assert read == [b"<svg/>", b"??", JPEG]


def test_captions_that_are_not_clean_text(tmp_path: Path) -> None:
    long = "word " * 200_000
    members = [
        ("nul.jpg", JPEG),
        ("nul.txt", b"a\0b"),
        ("latin.jpg", JPEG),
        ("latin.txt", "café".encode("latin-1")),
        *pair("long", long),
        ("half.jpg", JPEG),
        ("half.json", b'{"caption": "lone \\ud800 half"}'),
    ]
    captions = {
        row["key"]: (row["caption"], row["ingest_reason"])
        for row in rows_of(scan(make_tar(tmp_path / "0.tar", members)))
    }
    assert captions["nul"] == ("ab", "caption_invalid")
    assert captions["latin"] == ("caf\ufffd", "caption_invalid")
    assert captions["long"] == (long, None)
    assert captions["half"][1] == "caption_invalid"


def test_caption_above_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.formats.index.MAX_CAPTION_BYTES", 100)
    found = scan(make_tar(tmp_path / "0.tar", pair("big", "x" * 101) + pair("fits", "x" * 100)))
    assert reasons(found) == {"big": "caption_invalid", "fits": None}
    assert found.table["caption"].to_pylist() == [None, "x" * 100]


def test_caption_metadata_and_uid_from_json(tmp_path: Path) -> None:
    uid = "0123456789abcdef" * 2
    fields = {"caption": "from json", "uid": uid, "key": "a", "url": "u", "width": 3, "bad": 1e400}
    members = [
        ("a.jpg", JPEG),
        ("a.json", json.dumps(fields).encode()),
        ("b.jpg", JPEG),
        ("b.json", b'{"TEXT": "shouted", "uid": "short"}'),
        ("c.jpg", JPEG),
        ("c.txt", b"text wins"),
        ("c.json", b'{"caption": "loses", "id": 7}'),
        ("d.jpg", JPEG),
        ("d.txt", b"json is broken"),
        ("d.json", b"[" * 100_000),
        ("e.jpg", JPEG),
        ("e.json", b'{"caption": [null, " ", "first", "second"], "text": "not asked"}'),
    ]
    path = make_tar(tmp_path / "0.tar", members)
    rows = rows_of(scan(path))
    captions = ["from json", "shouted", "text wins", "json is broken", "first"]
    assert [row["caption"] for row in rows] == captions
    assert [row["own_uid"] for row in rows] == [uid, None, None, None, None]
    assert json.loads(str(rows[4]["metadata"])) == {"caption": [None, " ", "first", "second"]}
    assert json.loads(str(rows[0]["metadata"])) == {"url": "u", "width": 3, "bad": None}
    assert [row["ingest_reason"] for row in rows] == [None] * 5
    named = webdataset.scan(source_of(path), "id").table["own_uid"].to_pylist()
    assert named == [None, None, "7", None, None]


def test_repeated_keys_are_rows_of_their_own(tmp_path: Path) -> None:
    members = [*pair("a", "first"), *pair("b"), *pair("a", "second"), *pair("a", "third")]
    rows = rows_of(scan(make_tar(tmp_path / "0.tar", members)))
    assert [(row["key"], row["ordinal"], row["caption"]) for row in rows] == [
        ("a", 0, "first"),
        ("b", 0, "a cat"),
        ("a", 1, "second"),
        ("a", 2, "third"),
    ]
    expected = [None, None, "duplicate_key", "duplicate_key"]
    assert [row["ingest_reason"] for row in rows] == expected


def test_keys_with_dots_lose_nothing(tmp_path: Path) -> None:
    members = [*pair("img.1", "one"), *pair("img.2", "two", JPEG + b"2"), *pair("x.input", "three")]
    path = make_tar(tmp_path / "0.tar", members)
    found = scan(path)
    assert [(row["key"], row["caption"], row["ingest_reason"]) for row in rows_of(found)] == [
        ("img", "one", None),
        ("img", "two", "duplicate_key"),
        ("x", "three", None),
    ]
    read = list(webdataset.read_images(source_of(path), found.table))
    assert read == [JPEG, JPEG + b"2", JPEG]


@pytest.mark.parametrize("cut", range(0, 9 * 1024, 256))
def test_cut_tars_yield_what_is_readable_and_say_so(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tar(tmp_path / "0.tar", [m for i in range(3) for m in pair(f"k{i}", f"c{i}")])
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with caplog.at_level(logging.WARNING):
        found = scan(path)
    end = 3 * (512 + 1024 + 512 + 512)
    is_cut = cut < end + 512
    assert found.counts.get("truncated_files", 0) == is_cut
    assert ("damaged" in caplog.text) == is_cut
    whole = sum(2560 * i + 2050 <= cut for i in range(3))
    assert found.table["ingest_reason"].to_pylist()[:whole] == [None] * whole
    assert found.table.num_rows - whole <= 1
    assert all(found.table["ingest_reason"].to_pylist()[whole:])
    read = list(webdataset.read_images(source_of(path), found.table))
    assert read[:whole] == [JPEG] * whole


def test_damaged_header_ends_the_walk(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", [m for i in range(3) for m in pair(f"k{i}")])
    data = bytearray(path.read_bytes())
    data[2560 : 2560 + 512] = b"\x80" * 512
    path.write_bytes(data)
    found = scan(path)
    assert reasons(found) == {"k0": None}
    assert found.counts == {"truncated_files": 1}


def test_negative_size_does_not_loop(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 10
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(block) + b"\0" * 1024)
    assert scan(path).counts == {"truncated_files": 1}


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    one, two = make_tar(tmp_path / "1.tar", pair("a")), make_tar(tmp_path / "2.tar", pair("b"))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    found = scan(both)
    assert reasons(found) == {"a": None, "b": None}
    assert found.counts == {}


def test_links_and_devices_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "b.jpg")):
            link = tarfile.TarInfo("a.jpg")
            link.type, link.linkname = kind, target
            tar.addfile(link)
        device = tarfile.TarInfo("a.png")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
        text = tarfile.TarInfo("a.txt")
        text.size = 2
        tar.addfile(text, io.BytesIO(b"hi"))
    found = scan(path)
    assert reasons(found) == {"a": "image_missing"}
    assert found.counts == {}


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    plain = make_tar(tmp_path / "0.tar", pair("a"))
    packed = tmp_path / "1.tar"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(InputError, match=r"1\.tar: must be a plain tar; got .* gzip") as error:
        scan(packed)
    assert "\n" not in str(error.value)
    zstd = tmp_path / "2.tar"
    zstd.write_bytes(pa.compress(plain.read_bytes(), codec="zstd", asbytes=True))
    with pytest.raises(InputError, match="zstd"):
        scan(zstd)


def img2dataset_table(path: Path, keys: list[str], **columns: list[object]) -> None:
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(len(keys))],
            "caption": [f"table {key}" for key in keys],
            "url": ["u"] * len(keys),
            "key": keys,
            "status": ["success"] * len(keys),
            **columns,
        }
    )
    pq.write_table(table, path)


def test_table_of_img2dataset_is_joined_by_key(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", [*pair("k1", "one"), ("k2.jpg", JPEG)])
    keys = ["k4", "k2", "k3", "k1", "k5"]
    status = ["failed_to_download", "success", "success", "success", "failed_to_resize"]
    img2dataset_table(tmp_path / "0.parquet", keys, status=list(status))
    (tmp_path / "0_stats.json").write_text('{"count": 5, "successes": 2}')
    found = scan(tar, "0.parquet", "0_stats.json")
    got = [(r["key"], r["caption"], r["own_uid"], r["ingest_reason"]) for r in rows_of(found)]
    assert got == [
        ("k1", "one", f"{3:032x}", None),
        ("k2", "table k2", f"{1:032x}", None),
        ("k3", "table k3", f"{2:032x}", "image_missing"),
        ("k4", "table k4", f"{0:032x}", "failed_to_download"),
        ("k5", "table k5", f"{4:032x}", "failed_to_resize"),
    ]
    assert found.counts == {}
    assert json.loads(str(rows_of(found)[3]["metadata"]))["status"] == "failed_to_download"


def test_rows_of_one_key_are_all_there(tmp_path: Path) -> None:
    """The table's second row of a key is that of the tar's second sample, or one without image."""
    tar = make_tar(tmp_path / "0.tar", [*pair("a"), *pair("b"), *pair("b")])
    keys = ["b", "a", "b", "a", "c", "c"]
    status = ["success"] * 3 + ["failed_to_download"] * 2 + ["success"]
    img2dataset_table(tmp_path / "0.parquet", keys, status=list(status))
    (tmp_path / "0_stats.json").write_text('{"count": 6, "successes": 3}')
    found = scan(tar, "0.parquet", "0_stats.json")
    got = [(r["key"], r["ordinal"], r["own_uid"], r["ingest_reason"]) for r in rows_of(found)]
    assert got == [
        ("a", 0, f"{1:032x}", None),
        ("b", 0, f"{0:032x}", None),
        ("b", 1, f"{2:032x}", "duplicate_key"),
        ("a", 1, f"{3:032x}", "duplicate_key"),
        ("c", 0, f"{4:032x}", "failed_to_download"),
        ("c", 1, f"{5:032x}", "image_missing"),
    ]
    assert found.counts == {}


def test_unfinished_shard_and_broken_table_are_counted(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", pair("k1"))
    img2dataset_table(tmp_path / "0.parquet", ["k1"])
    assert scan(tar, "0.parquet").counts == {"incomplete_shards": 1}
    (tmp_path / "0.parquet").write_bytes(b"PAR1 cut")
    found = scan(tar, "0.parquet")
    assert found.counts == {"unreadable_tables": 1}
    assert reasons(found) == {"k1": None}


def test_group_takes_files_of_the_same_name(tmp_path: Path) -> None:
    names = ["a/0.parquet", "a/0.tar", "a/0_stats.json", "a/1.tar", "b/1.parquet", "sizes.json"]
    sources = webdataset.group([File(name, f"/in/{name}", 1) for name in names])
    assert [(s.name, s.companions) for s in sources] == [
        ("a/0.tar", ("0.parquet", "0_stats.json")),
        ("a/1.tar", ()),
    ]


def test_source_that_shrank_or_vanished(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", pair("a") + pair("b"))
    source, table = source_of(path), scan(path).table
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(SourceChangedError, match=r"0\.tar: must hold \d+ bytes") as error:
        list(webdataset.read_images(source, table))
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(SourceChangedError, match="No such file"):
        list(webdataset.read_images(source, table))


def test_written_tars_are_equal_and_read_back(tmp_path: Path) -> None:
    samples = [
        webdataset.Sample(f"k{i}", "jpg", JPEG + bytes([i]), f"café {i}", '{"weight":1.0}')
        for i in range(3)
    ]
    one, two = tmp_path / "1.tar", tmp_path / "2.tar"
    assert webdataset.write(str(one), samples) == webdataset.write(str(two), samples) == 3
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    found = scan(one)
    assert found.table["caption"].to_pylist() == ["café 0", "café 1", "café 2"]
    assert found.table["metadata"].to_pylist() == ['{"weight":1.0}'] * 3
    images = list(webdataset.read_images(source_of(one), found.table))
    assert images == [sample.image for sample in samples]


@pytest.mark.parametrize("keys", [["a.b"], ["a", "a"]])
def test_keys_that_readers_would_join_are_refused(tmp_path: Path, keys: list[str]) -> None:
    samples = [webdataset.Sample(key, "jpg", JPEG, "c", "{}") for key in keys]
    with pytest.raises(ValueError, match="without dots"):
        webdataset.write(str(tmp_path / "0.tar"), samples)
