import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from curate import formats
from curate.errors import InputError
from curate.formats import clip_retrieval
from curate.formats.sources import find_root
from tests.formats.vectors import draw_vectors, write_part


def sources_of(*inputs: Path, layout: str = "auto") -> list[formats.Source]:
    given = tuple(map(str, inputs))
    found, sources = formats.list_sources(given, find_root(given), layout)
    assert found == "clip_retrieval"
    return sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts 00 and 02, the first without text vectors; statistics as the writer leaves them."""
    write_part(
        tmp_path / "out",
        "00",
        draw_vectors(3),
        uid=[f"{row:032x}" for row in range(2)] + ["none"],
        caption=["one", None, "three"],
        width=pa.array([10, 20, None], pa.int64()),
        error_message=pa.nulls(3),
    )
    write_part(tmp_path / "out", "02", draw_vectors(2, seed=1), draw_vectors(2, seed=2))
    (tmp_path / "out/stats").mkdir()
    (tmp_path / "out/stats/0.json").write_text("{}")
    return tmp_path / "out"


def test_parts_with_gaps(folder: Path) -> None:
    sources = sources_of(folder)
    assert [source.name for source in sources] == [
        "img_emb/img_emb_00.npy",
        "img_emb/img_emb_02.npy",
    ]
    assert [len(source.files) for source in sources] == [2, 3]
    assert sources[0].size_bytes == sum(file.size_bytes for file in sources[0].files)
    rows = clip_retrieval.scan(sources[0]).table.to_pylist()
    assert [row["key"] for row in rows] == ["000000", "000001", "000002"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [row["caption"] for row in rows] == ["one", None, "three"]
    assert [row["ingest_reason"] for row in rows] == [None, "caption_missing", None]
    assert [row["own_uid"] for row in rows] == [f"{0:032x}", f"{1:032x}", None]
    assert json.loads(rows[1]["metadata"]) == {"width": 20, "error_message": None}
    # A table without captions has none to miss.
    rows = clip_retrieval.scan(sources[1]).table.to_pylist()
    assert [(row["caption"], row["ingest_reason"]) for row in rows] == [(None, None)] * 2
    assert [formats.measure_vectors(s, None, n) for s, n in zip(sources, (3, 2), strict=True)] == [
        {"image": 24, "text": None},
        {"image": 24, "text": 24},
    ]


def test_key_goes_before_path_and_may_repeat(tmp_path: Path) -> None:
    write_part(tmp_path, "0", draw_vectors(3), key=[7, 7, 8])
    (source,) = sources_of(tmp_path)
    rows = clip_retrieval.scan(source).table.to_pylist()
    assert [(row["key"], row["ordinal"]) for row in rows] == [("7", 0), ("7", 1), ("8", 0)]
    assert {row["ingest_reason"] for row in rows} == {None}
    assert json.loads(rows[2]["metadata"]) == {"image_path": "00002"}


def test_ways_to_name_it(folder: Path) -> None:
    whole = sources_of(folder)
    for given in (folder / "img_emb", folder / "img_emb/*.npy", folder / "img_emb/img_emb_02.npy"):
        for source in sources_of(given):
            (same,) = (one for one in whole if one.url == source.url)
            assert len(source.files) == len(same.files)
            assert clip_retrieval.scan(source).table.num_rows
            assert clip_retrieval.open_vectors(source).image.width == 24
    two = sources_of(folder.parent)  # an output among others
    assert [source.name for source in two] == [
        "out/img_emb/img_emb_00.npy",
        "out/img_emb/img_emb_02.npy",
    ]


def test_vectors_in_order(folder: Path) -> None:
    root = str(folder)
    table = pa.concat_tables(clip_retrieval.scan(source).table for source in sources_of(folder))
    some = table.take(pa.array([4, 1, 2, 3]))
    widths = {"image": 24, "text": 24}
    found = formats.read_vectors(root, some, "clip_retrieval", None, widths)
    images = np.concatenate([draw_vectors(3), draw_vectors(2, seed=1)])
    np.testing.assert_allclose(found.images, images[[4, 1, 2, 3]], atol=1e-3)
    assert found.has_image.all()
    assert found.has_text.tolist() == [True, False, False, True]
    np.testing.assert_allclose(found.texts[[0, 3]], draw_vectors(2, seed=2)[[1, 0]], atol=1e-3)
    assert list(formats.read_images(root, some)) == [None] * 4


def test_in_another_store(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/vectors", recursive=True)
    root = "memory://vectors"
    layout, sources = formats.list_sources((root,), find_root((root,)))
    assert layout == "clip_retrieval"
    table = clip_retrieval.scan(sources[1]).table
    assert formats.measure_vectors(sources[1], None, len(table)) == {"image": 24, "text": 24}
    found = formats.read_vectors(root, table, layout, None, {"image": 24, "text": 24})
    np.testing.assert_allclose(found.texts, draw_vectors(2, seed=2), atol=1e-3)
    memory.rm("/vectors", recursive=True)


@pytest.mark.parametrize("file", ["img_emb/img_emb_02.npy", "text_emb/text_emb_02.npy"])
def test_rows_that_do_not_belong_together(folder: Path, file: str) -> None:
    np.save(folder / file, draw_vectors(5))
    source = sources_of(folder)[1]
    message = rf"^img_emb/img_emb_02\.npy: .* {file} has 5, its metadata 2\."
    with pytest.raises(InputError, match=message):
        formats.measure_vectors(source, None, 2)


def test_files_that_lack_their_part(folder: Path) -> None:
    (folder / "img_emb/img_emb_00.npy").unlink()
    with pytest.raises(InputError, match=r"metadata_00\.parquet: must have img_emb/img_emb_00"):
        sources_of(folder)
    (folder / "metadata/metadata_00.parquet").unlink()
    assert len(sources_of(folder)) == 1
    (folder / "metadata/metadata_02.parquet").unlink()
    with pytest.raises(InputError, match=r"img_emb_02\.npy: must have metadata/metadata_02"):
        sources_of(folder)


def test_beside_tars_it_must_be_chosen(folder: Path) -> None:
    (folder / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match="found webdataset and clip_retrieval"):
        sources_of(folder)
    assert len(sources_of(folder, layout="clip_retrieval")) == 2
