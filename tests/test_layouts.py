"""Whatever layout data comes in: nothing is lost, and what is kept are the bytes that came."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate import storage
from curate.engine.runner import BoundStage
from curate.models import precision
from tests.formats.test_arrow import write_folder
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp, write_part
from tests.support import carry_out, clean_pairs, decisions_of, write_tar

COUNT = 10
#: Rows that have something wrong with them, in every layout that can say so.
BROKEN, SILENT, TWIN = 3, 5, 9


def samples() -> list[tuple[bytes, str | None]]:
    pairs = [(image, text.decode()) for image, text in clean_pairs(COUNT)]
    found: list[tuple[bytes, str | None]] = list(pairs)
    found[BROKEN] = b"no image", pairs[BROKEN][1]
    found[SILENT] = pairs[SILENT][0], None
    found[TWIN] = pairs[0]
    return found


def columns() -> dict[str, list[object]]:
    images, texts = zip(*samples(), strict=True)
    return {"key": [f"{i:05d}" for i in range(COUNT)], "caption": list(texts), "jpg": list(images)}


def write_webdataset(folder: Path) -> int:
    members = []
    for i, (image, text) in enumerate(samples()):
        members.append((f"{i:05d}.jpg", image))
        if text is not None:
            members.append((f"{i:05d}.txt", text.encode()))
    write_tar(folder / "0.tar", members)
    return COUNT


def write_img2dataset(folder: Path) -> int:
    """Rows in order of completion, one of them a failed download, and the tar of the others."""
    write_webdataset(folder)
    rows = [{"key": f"{i:05d}", "status": "success", "caption": text} for i, (_, text) in
            enumerate(samples())]  # fmt: skip
    rows.insert(4, {"key": "00099", "status": "failed_to_download", "caption": "lost"})
    pq.write_table(pa.Table.from_pylist(rows[::-1]), folder / "0.parquet")
    (folder / "0_stats.json").write_text("{}")
    return COUNT + 1


def write_parquet(folder: Path) -> int:
    pq.write_table(pa.table(columns()), folder / "0.parquet", row_group_size=4)
    return COUNT


def hugging_face() -> pa.Table:
    held = columns()
    images = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(held["jpg"])]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"photo": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}}
    table = pa.table({"photo": pa.array(images, kind), "text": held["caption"]})
    known = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(known)


def write_hugging_face(folder: Path) -> int:
    pq.write_table(hugging_face(), folder / "train-00000-of-00001.parquet")
    return COUNT


def write_saved_to_disk(folder: Path) -> int:
    write_folder(folder / "train", hugging_face())
    return COUNT


def write_files(folder: Path) -> int:
    for i, (image, text) in enumerate(samples()):
        (folder / f"{i:05d}.jpg").write_bytes(image)
        if text is not None:
            (folder / f"{i:05d}.txt").write_text(text)
    return COUNT


def write_jsonl(folder: Path) -> int:
    rows = []
    for i, (image, text) in enumerate(samples()):
        (folder / f"{i:05d}.jpg").write_bytes(image)
        rows.append({"file_name": f"{i:05d}.jpg", "caption": text})
    rows.append({"file_name": "gone.jpg", "caption": "not there"})
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return COUNT + 1


def vectors() -> np.ndarray:
    rows = draw_vectors(COUNT)
    rows[TWIN] = rows[0]
    return rows


def write_clip_retrieval(folder: Path) -> int:
    captions = [text for _, text in samples()]
    write_part(folder, "0", vectors(), draw_vectors(COUNT, seed=1), caption=captions)
    return COUNT


def write_pool(folder: Path) -> int:
    write_datacomp(folder, "0", datacomp_uids(COUNT), l14_img=vectors())
    return COUNT


def write_npy(folder: Path) -> int:
    np.save(folder / "0.npy", vectors())
    return COUNT


OF_IMAGES = (
    write_webdataset, write_img2dataset, write_parquet, write_hugging_face, write_saved_to_disk,
    write_files, write_jsonl,
)  # fmt: skip
OF_VECTORS = (write_clip_retrieval, write_pool, write_npy)


@pytest.fixture(scope="module", autouse=True)
def _choose_once() -> Iterator[None]:
    """Measure number formats for the first run alone: it takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "choose_precision", _remember(precision.choose_precision))
        yield


def _remember(choose: Callable[..., Any]) -> Callable[..., Any]:
    known: list[Any] = []

    def chosen(*arguments: Any) -> Any:
        if not known:
            known.append(choose(*arguments))
        return known[0]

    return chosen


def stage(stages: list[BoundStage], name: str) -> BoundStage:
    return next(one for one in stages if one.stage.name == name)


def written(stages: list[BoundStage]) -> pa.Table:
    folder = stage(stages, "write").room.path("shards")
    paths = [storage.join(folder, name) for name in storage.list_names(folder)]
    return pa.concat_tables(map(storage.read_table, paths))


def check_counts(stages: list[BoundStage], count: int) -> dict[str, int]:
    """Demand that kept and dropped are what was ingested; return what was dropped why."""
    select = stage(stages, "select")
    counts = select.stage.facts(select.room)["counts"]
    assert counts["ingested"] == count == len(decisions_of(stages))
    assert counts["kept"] + sum(counts["dropped"].values()) == count
    assert len(written(stages)) == counts["kept"]
    dropped: dict[str, int] = counts["dropped"]
    return dropped


@pytest.mark.parametrize(
    "write", OF_IMAGES, ids=lambda write: write.__name__.removeprefix("write_")
)
def test_images(write: Callable[[Path], int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = write(tmp_path / "in")
    stages = carry_out(tmp_path / "in", tmp_path / "out")
    dropped = check_counts(stages, count)
    lost = {"write_img2dataset": "failed_to_download", "write_jsonl": "image_missing"}
    further = {lost[write.__name__]: 1} if write.__name__ in lost else {}
    assert dropped == {"caption_missing": 1, "decode_error": 1, "duplicate_bytes": 1, **further}
    table = written(stages)
    texts = {text: image for image, text in samples()}
    for row in table.to_pylist():
        assert row["image"] == texts[row["caption"]]
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
    assert len(table) == COUNT - 3


@pytest.mark.parametrize(
    "write", OF_VECTORS, ids=lambda write: write.__name__.removeprefix("write_")
)
def test_vectors(write: Callable[[Path], int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = write(tmp_path / "in")
    stages = carry_out(tmp_path / "in", tmp_path / "out", select__require_caption=False)
    assert check_counts(stages, count) == {"duplicate_semantic": 1}


def encode_again(image: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def test_round_trip(tmp_path: Path) -> None:
    """What was curated is input again; what is dropped as a copy then was missed before."""
    members = []
    for i, (image, text) in enumerate(clean_pairs(20)):
        for part in ("a", "b", "c") if i % 4 == 0 else ("a",):
            data = encode_again(image) if part == "c" else image
            members += [(f"{i:03d}{part}.jpg", data), (f"{i:03d}{part}.txt", text + part.encode())]
    write_tar(tmp_path / "in/0.tar", members)
    first = carry_out(tmp_path / "in", tmp_path / "first", write__webdataset=True)
    facts = stage(first, "dedup").stage.facts(stage(first, "dedup").room)
    recall = facts["recall"]["recall"]
    missed = sum(facts["edges"].values()) * (1 / recall - 1)
    table = written(first)
    assert len(table) == 20
    assert sum(len(captions) == 3 for captions in table["captions"].to_pylist()) == 5
    room = stage(first, "write").room
    for name in ("shards", "webdataset"):
        again = carry_out(room.path(name), tmp_path / name)
        dropped = check_counts(again, 20)
        assert dropped.keys() <= {"duplicate_perceptual", "duplicate_semantic"}
        assert sum(dropped.values()) <= missed
        for column in ("uid", "image", "caption", "sha256"):
            assert sorted(written(again)[column].to_pylist()) == sorted(table[column].to_pylist())
