import json
from pathlib import Path

import numpy as np
import pytest

from curate import formats
from curate.errors import InputError, SourceChangedError
from curate.formats import datacomp
from curate.formats.sources import find_root, identify
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp

WIDTHS = {"b32_img": 8, "b32_txt": 8, "l14_img": 12, "l14_txt": 12, "dedup": 6}


def arrays(count: int, *names: str) -> dict[str, np.ndarray]:
    return {name: draw_vectors(count, WIDTHS[name], seed=WIDTHS[name]) for name in names}


def sources_of(*inputs: Path, layout: str = "auto") -> list[formats.Source]:
    given = tuple(map(str, inputs))
    found, sources = formats.list_sources(given, find_root(given), layout)
    assert found == "datacomp"
    return sources


def test_metadata_and_identity(tmp_path: Path) -> None:
    uids = datacomp_uids(3)
    write_datacomp(tmp_path / "in", "0000", uids, **arrays(3, *WIDTHS))
    write_datacomp(tmp_path / "in", "0001", datacomp_uids(2, 3), **arrays(2, *WIDTHS))
    sources = sources_of(tmp_path / "in")
    assert [source.name for source in sources] == ["0000.parquet", "0001.parquet"]
    rows = datacomp.scan(sources[0]).table.to_pylist()
    assert [row["own_uid"] for row in rows] == uids
    assert [row["key"] for row in rows] == uids
    assert [row["caption"] for row in rows] == ["caption 0000", "caption 0001", "caption 0002"]
    assert {row["ingest_reason"] for row in rows} == {None}
    assert json.loads(rows[1]["metadata"]) == {
        "url": "http://x/1",
        "original_width": 641,
        "original_height": 480,
        "clip_b32_similarity_score": 0.25,
        "clip_l14_similarity_score": 0.5,
        "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
        "sha256": f"{1:064x}",
    }
    # Other vectors, same table: another source.
    before = identify(sources[0])
    np.savez(tmp_path / "in/0000.npz", **(arrays(3, *WIDTHS) | {"l14_img": draw_vectors(3, 12)}))
    after = identify(sources_of(tmp_path / "in")[0])
    assert before["size_bytes"] == after["size_bytes"]
    assert before["digest"] != after["digest"]


@pytest.mark.parametrize(
    ("held", "choice", "image", "text"),
    [
        (tuple(WIDTHS), None, "l14_img", "l14_txt"),
        (tuple(WIDTHS), "b32", "b32_img", "b32_txt"),
        (tuple(WIDTHS), "dedup", "dedup", None),
        (("b32_img", "b32_txt"), None, "b32_img", "b32_txt"),
        (("l14_img",), "l14", "l14_img", None),
    ],
)
def test_which_vectors_are_taken(
    tmp_path: Path, held: tuple[str, ...], choice: str | None, image: str, text: str | None
) -> None:
    write_datacomp(tmp_path, "0", datacomp_uids(4), **arrays(4, *held))
    (source,) = sources_of(tmp_path)
    pair = datacomp.open_vectors(source, choice)
    assert pair.image.member == image
    assert (pair.text.member if pair.text else None) == text
    widths = {"image": WIDTHS[image], "text": WIDTHS[text] if text else None}
    assert formats.measure_vectors(source, choice, 4) == widths
    index = datacomp.scan(source).table
    found = formats.read_vectors(str(tmp_path), index, "datacomp", choice, widths)
    np.testing.assert_allclose(found.images, arrays(4, image)[image], atol=1e-3)
    assert found.has_text.all() == (text is not None)
    if text:
        np.testing.assert_allclose(found.texts, arrays(4, text)[text], atol=1e-3)
    with pytest.raises(SourceChangedError, match="must hold vectors of 99 numbers"):
        formats.read_vectors(str(tmp_path), index, "datacomp", choice, {**widths, "image": 99})


def test_what_is_not_there(tmp_path: Path) -> None:
    write_datacomp(tmp_path, "0", datacomp_uids(2), **arrays(2, "b32_img"), other=np.zeros(3))
    (source,) = sources_of(tmp_path)
    message = r"^0\.npz: must hold l14_img; got b32_img, other\. Set vectors to b32\.$"
    with pytest.raises(InputError, match=message):
        datacomp.open_vectors(source, "l14")
    np.savez(tmp_path / "0.npz", other=np.zeros(3))
    with pytest.raises(InputError, match="must hold l14_img or b32_img or dedup; got other"):
        datacomp.open_vectors(source)
    np.savez(tmp_path / "0.npz", **arrays(3, "b32_img"))
    with pytest.raises(InputError, match=r"0\.npz: b32_img has 3, its metadata 2"):
        formats.measure_vectors(source, None, 2)


def test_ways_to_name_it(tmp_path: Path) -> None:
    write_datacomp(tmp_path, "0", datacomp_uids(2), **arrays(2, "b32_img"))
    for given in (tmp_path, tmp_path / "*.parquet", tmp_path / "0.parquet"):
        (source,) = sources_of(given)
        assert len(source.files) == 2
    write_datacomp(tmp_path, "1", datacomp_uids(2, 2), **arrays(2, "b32_img"))
    (tmp_path / "1.npz").unlink()
    for layout in ("auto", "datacomp"):
        with pytest.raises(InputError, match=r"^1\.parquet: must have 1\.npz beside it"):
            sources_of(tmp_path, layout=layout)
