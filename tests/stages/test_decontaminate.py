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
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp, write_part
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


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return draw_vectors(30)


@pytest.fixture(scope="module")
def embedded(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    write_part(folder, "0", vectors)
    return folder


def against(embedded: Path, out: Path, inputs: Path, *more: str) -> dict[str, str]:
    """Run `dedup` on vectors and return what contaminates which."""
    settings = (f"decontaminate.inputs={inputs}", *more)
    asked = [word for setting in settings for word in ("--set", setting)]
    succeed("run", "dedup", "--input", embedded, "--output", out, "--workers", 1, *asked)
    rows = read_decisions(out).to_pylist()
    found = {row["key"]: row["contaminated_by"] for row in rows if row["contaminated_by"]}
    assert {row["key"] for row in rows if row["reason"] == "contaminated"} == found.keys()
    return found


def test_vectors_of_the_evaluation_set(vectors: np.ndarray, embedded: Path, tmp_path: Path) -> None:
    known = draw_vectors(9, seed=5)
    known[2], known[4], known[7] = vectors[3], np.nan, 0
    row = vectors[20].astype(float) + 0.04 * known[0]  # nearly the same
    known[6] = row / np.linalg.norm(row)
    known[8] = vectors[11] + 0.6 * draw_vectors(1, seed=7)[0]  # somewhat like it
    cosine = float(known[8] @ vectors[11]) / np.linalg.norm(known[8].astype(float))
    assert 0.82 < cosine < 0.94

    np.save(tmp_path / "known.npy", known)
    found = against(embedded, tmp_path / "out", tmp_path / "known.npy")
    assert found == {"00003": "known.npy:2", "00020": "known.npy:6"}
    looser = "decontaminate.min_cosine_alone=0.8"
    found = against(embedded, tmp_path / "out", tmp_path / "known.npy", looser)
    assert found == {"00003": "known.npy:2", "00020": "known.npy:6", "00011": "known.npy:8"}

    write_part(tmp_path / "parts", "0", known, key=[f"k{i}" for i in range(9)])
    found = against(embedded, tmp_path / "out", tmp_path / "parts")
    assert found["00003"] == "img_emb/img_emb_0.npy:k2"

    uids = datacomp_uids(9)
    write_datacomp(tmp_path / "comp", "0", uids, l14_img=draw_vectors(9, 40), b32_img=known)
    chosen = "decontaminate.vectors=b32"
    found = against(embedded, tmp_path / "out", tmp_path / "comp", chosen)
    assert found["00003"] == f"0.parquet:{uids[2]}"


def test_vectors_that_say_nothing_about_the_runs(
    embedded: Path, evaluation: Path, tmp_path: Path
) -> None:
    def refuse(inputs: Path) -> str:
        done = curate(
            *("run", "dedup", "--input", embedded, "--output", tmp_path / "out", "--workers", 1),
            *("--set", f"decontaminate.inputs={inputs}"),
        )
        assert done.returncode == 2
        return only_error(done.stderr)

    np.save(tmp_path / "wide.npy", draw_vectors(3, 99))
    message = refuse(tmp_path / "wide.npy")
    assert "wide.npy: vectors must be 24 numbers wide" in message
    assert "got 99. Embed" in message
    np.save(tmp_path / "none.npy", np.zeros((3, 24), np.float16))
    assert "none can be decoded, or has a norm" in refuse(tmp_path / "none.npy")
    assert "must hold vectors (decontaminate.inputs)" in refuse(evaluation)


def test_vectors_against_pictures(source: Path, tmp_path: Path) -> None:
    """A run that embeds its own pictures compares them with vectors by the cosine."""
    run = ("run", "dedup", "--input", source, "--output", tmp_path / "out")
    succeed(*run)
    (folder,) = (tmp_path / "out/stages").glob("embed.vectors-*")
    own = storage.read_table(str(folder / "shards/00000.parquet"), ["image_emb"])
    vectors, _ = storage.read_vectors(own["image_emb"])
    np.save(tmp_path / "known.npy", vectors[[4, 17]].astype(np.float32))
    succeed(*run, "--set", f"decontaminate.inputs={tmp_path / 'known.npy'}")
    rows = read_decisions(tmp_path / "out").to_pylist()
    found = {row["key"]: row["contaminated_by"] for row in rows if row["contaminated_by"]}
    assert found["004"] == "known.npy:0"
    assert found["017"] == "known.npy:1"
