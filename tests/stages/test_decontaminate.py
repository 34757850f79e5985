"""Pictures that one evaluates on, found among those to train on."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curate import storage
from curate.stages.base import Room
from curate.stages.decontaminate import Decontaminate
from tests.support import (
    clean_pairs,
    curate,
    only_error,
    pair,
    read_decisions,
    succeed,
    write_tar,
)


def recoded(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (round(0.03 * side) for side in image.size)
    image = image.crop((left, top, image.width - left, image.height - top))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[bytes, bytes]]:
    return clean_pairs(40)


@pytest.fixture(scope="module")
def source(pairs: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = [
        m for i, (image, text) in enumerate(pairs[:30]) for m in pair(f"{i:03d}", image, text)
    ]
    return write_tar(tmp_path_factory.mktemp("source") / "00000.tar", members)


@pytest.fixture(scope="module")
def evaluation(pairs: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write copies of pictures 3, 7 and 20, three that are no copy, and one that is no picture."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, data in (
        ("a/three.jpg", recoded(pairs[3][0])),
        ("a/seven.jpg", recoded(pairs[7][0])),
        ("b/twenty.jpg", pairs[20][0]),
        *((f"b/other{i}.jpg", pairs[i][0]) for i in (35, 36, 37)),
        ("b/broken.jpg", b"no picture"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_shows_an_evaluation_image_is_dropped(
    source: Path, evaluation: Path, tmp_path: Path
) -> None:
    run = ("run", "dedup", "--input", source, "--output", tmp_path / "out")
    asked = ("--set", f"decontaminate.inputs={evaluation}")
    succeed(*run, *asked)
    decided = {row["key"]: row for row in read_decisions(tmp_path / "out").to_pylist()}
    found = {key: row["contaminated_by"] for key, row in decided.items() if row["contaminated_by"]}
    assert found.keys() == {"003", "007", "020"}
    assert found["003"] == "a/three.jpg"
    assert found["020"] == "b/twenty.jpg"
    assert decided["020"]["contamination_cosine"] == pytest.approx(1, abs=1e-3)
    assert 0.78 <= decided["003"]["contamination_cosine"] < 1
    for key, row in decided.items():
        assert (row["reason"] == "contaminated") == (key in found)
        assert row["keep"] == (row["reason"] is None)
        assert (row["contamination_cosine"] is None) == (key not in found)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["facts"]["decontaminate"] == {"images": 6}
    assert str(evaluation) not in json.dumps(facts["pipeline"])

    # Without the images the same folder gives back what they had dropped.
    succeed(*run)
    after = {row["key"]: row for row in read_decisions(tmp_path / "out").to_pylist()}
    assert all(row["keep"] and row["contaminated_by"] is None for row in after.values())


def test_an_evaluation_set_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    run = ("run", "dedup", "--input", source, "--output", tmp_path / "out", "--set")
    missing = curate(*run, f"decontaminate.inputs={tmp_path / 'nowhere'}")
    assert missing.returncode != 0
    assert "nowhere" in only_error(missing.stderr)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "one.jpg").write_bytes(b"no picture")
    refused = curate(*run, f"decontaminate.inputs={broken}")
    assert refused.returncode == 2
    assert "none can be decoded" in only_error(refused.stderr)


def match(folder: Path, samples: np.ndarray, known: list[np.ndarray], stage: Decontaminate) -> list:
    """Run the last step on vectors alone."""
    origins = {"image_emb": "embed.vectors"}
    folders = {name: str(folder / name) for name in ("ingest", "embed.vectors", "decontaminate")}
    room = Room(stage, folders, origins, frozenset({"decontaminate"}))
    layout = {"shards": [{"name": "00000", "samples": len(samples)}]}
    storage.commit_json(room.path("layout.json", table="ingest"), layout)
    uids = pa.table({"uid": [f"{i:032x}" for i in range(len(samples))]})
    valid = np.isfinite(samples).all(1)
    vectors = storage.vector_column(samples.astype(np.float16), np.ones(len(samples), bool))
    assert not valid.all()
    room.commit_shard("ingest", "00000", uids)
    room.commit_shard("embed.vectors", "00000", uids.append_column("image_emb", vectors))
    storage.commit_json(room.path("sources.json"), [{}] * len(known))
    for number, part in enumerate(known):
        table = pa.table(
            {
                "name": [f"{number}:{row}" for row in range(len(part))],
                "image_emb": storage.vector_column(
                    part.astype(np.float16), np.ones(len(part), bool)
                ),
                "thumbnail": pa.nulls(len(part), pa.binary()),
            }
        )
        storage.commit_table(room.path("evaluation", f"{number:05d}.parquet"), table)
    (step,) = (step for step in stage.steps() if step.name == "match")
    for task in step.tasks(room):
        step.run(room, task)
    return storage.read_table(room.shard_path("decontaminate", "00000")).to_pylist()


def test_the_most_alike_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(60, 16))
    samples[5] = np.nan
    samples[6] = 0
    known = [
        samples[:20] + 0.3 * rng.normal(size=(20, 16)),
        samples[10:30].copy(),
        np.zeros((0, 16)),
    ]
    known[0][5:7] = known[0][4]
    known[1][3] = known[1][4]  # equally alike: the first
    found = match(tmp_path, samples, known, Decontaminate(min_cosine=0.8))
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in known[:2]]
    for row, one in enumerate(found):
        with np.errstate(invalid="ignore"):
            cosines = [part @ samples[row] / np.linalg.norm(samples[row]) for part in unit]
        best = max(float(np.nan_to_num(part, nan=-1).max()) for part in cosines)
        if best < 0.8:
            assert one["contaminated_by"] is None
            assert one["contamination_cosine"] is None
            continue
        assert one["contamination_cosine"] == pytest.approx(best, abs=2e-3)
        part, place = map(int, one["contaminated_by"].split(":"))
        assert cosines[part][place] == pytest.approx(best, abs=2e-3)
    assert found[14]["contaminated_by"] == "1:3"
    assert found[5]["contaminated_by"] is None
    assert found[6]["contaminated_by"] is None
    assert sum(one["contaminated_by"] is not None for one in found) >= 25
    nothing = match(tmp_path / "none", samples, [], Decontaminate(min_cosine=0.8))
    assert all(one["contaminated_by"] is None for one in nothing)
