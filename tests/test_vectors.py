"""Runs on embeddings that others made, without any image."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.mixture import write_mixture
from curate import storage
from curate.config import load_pipeline
from curate.engine.runner import bind
from curate.errors import InputError
from curate.schema import public_columns, select_schema
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp, write_part
from tests.support import (
    TIMEOUT_SECONDS,
    carry_out,
    curate,
    decisions_of,
    launch,
    only_error,
    read_decisions,
    read_report,
    read_shards,
    read_summary,
    stage_folders,
    succeed,
)

Array = np.ndarray[Any, Any]


def near(row: Array, cosine: float, seed: int) -> Array:
    """Return a unit vector at this cosine to another."""
    other = np.random.default_rng(seed).standard_normal(len(row))
    row = row.astype(float) / np.linalg.norm(row.astype(float))
    other -= (other @ row) * row
    other /= np.linalg.norm(other)
    return (cosine * row + (1 - cosine**2) ** 0.5 * other).astype(np.float16)


def planted() -> tuple[Array, Array]:
    """Image and text vectors of 60 samples, (60, 24) float16.

    0 = 1; 2 and 3 have cosine .97, 4 and 5 .9; 6 is zero, 7 and 8 hold NaN and infinity.
    """
    images = draw_vectors(60)
    images[1] = images[0]
    images[3], images[5] = near(images[2], 0.97, 1), near(images[4], 0.9, 2)
    images[6], images[7, 2], images[8, 3] = 0, np.nan, np.inf
    texts = draw_vectors(60, seed=9)
    texts[9] = images[9]
    texts[10] = np.nan
    return images, texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, texts = planted()
    for part, rows in (("00", slice(0, 41)), ("03", slice(41, 60))):
        count = len(images[rows])
        write_part(
            tmp_path / "embeddings",
            part,
            images[rows] * np.float16(3),  # not of unit norm, as other tools leave them
            texts[rows].astype(np.float32),
            caption=[f"caption {part} {row}" for row in range(count)],
            width=pa.array([None if row == 20 else 100 + row for row in range(count)], pa.int64()),
            height=pa.array([50] * count, pa.int64()),
        )
    return tmp_path / "embeddings"


def test_dedup_without_pixels(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ("run", "dedup", "--input", folder, "--output", out, "--workers", 1)
    succeed(*run, "--set", "write.webdataset=true")
    rows = read_decisions(out).to_pylist()
    assert [row["key"] for row in rows] == [
        *(f"00{i:04d}" for i in range(41)),
        *(f"03{i:04d}" for i in range(19)),
    ]
    dropped = {i: row for i, row in enumerate(rows) if not row["keep"]}
    # Of two copies the larger image stays.
    assert dropped.keys() == {0, 2}
    for twin, row in dropped.items():
        assert row["reason"] == "duplicate_semantic"
        assert row["representative_uid"] == rows[twin + 1]["uid"]
    assert dropped[0]["representative_cosine"] == 1
    assert dropped[2]["representative_cosine"] == pytest.approx(0.97, abs=2e-3)
    assert rows[4]["cluster_size"] == rows[6]["cluster_size"] == 1

    images, texts = (part.astype(float) for part in planted())
    with np.errstate(all="ignore"):
        cosines = (images * texts).sum(1)
        cosines /= np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    for cosine, row in zip(cosines, rows, strict=True):
        expected = pytest.approx(cosine, abs=2e-3) if np.isfinite(cosine) else None
        assert row["clip_score"] == expected
    assert [row["width"] for row in rows[19:22]] == [119, None, 121]
    assert [row["height"] for row in rows[19:22]] == [50, None, 50]

    shards = read_shards(out)
    assert shards.schema.equals(select_schema(public_columns("shards")))
    assert shards["uid"].to_pylist() == [row["uid"] for row in rows if row["keep"]]
    assert shards["image"].null_count == shards["sha256"].null_count == len(shards) == 58
    with tarfile.open(out / "webdataset/00000.tar") as tar:
        names = tar.getnames()
    assert sorted(names) == sorted(
        f"{row['uid']}.{suffix}" for row in rows if row["keep"] for suffix in ("txt", "json")
    )
    summary = read_summary(out)
    assert summary["counts"]["dropped"] == {"duplicate_semantic": 2}
    assert summary["facts"]["embed"]["vectors"] == {
        "from": "source",
        "image": 24,
        "text": 24,
        "shared_space": True,
    }
    assert summary["stages"]["embed.vectors"]["steps"]["shards"]["without_vector"] == 3
    assert summary["facts"]["dedup"]["edges"] == {"equal": 1, "semantic": 1}
    shown = read_report(out)["samples"]
    assert not any("picture" in sample for sample in shown)
    assert "caption 03 5" in {sample.get("caption") for sample in shown}

    # Nothing is left to do, until a file of vectors is another.
    before = stage_folders(out)
    succeed(*run, "--set", "write.webdataset=true")
    assert stage_folders(out) == before
    changed = np.load(folder / "text_emb/text_emb_03.npy", allow_pickle=False)
    changed[3] = changed[4]
    np.save(folder / "text_emb/text_emb_03.npy", changed)
    plan = succeed("plan", "dedup", "--input", folder, "--output", out, "--json")
    tables = json.loads(plan.stdout)["tables"]
    assert {row["state"] for row in tables} == {"new"}


#: Runs a pipeline up to `embed` in this process and says what that imported.
PROBE = """
import sys
from curate.config import load_pipeline
from curate.engine.runner import bind
settings = [("ingest", "inputs", (sys.argv[1],))]
for bound in bind(load_pipeline("default", settings), sys.argv[2])[:3]:
    for step in bound.stage.steps():
        for task in step.tasks(bound.room):
            step.run(bound.room, task)
    bound.stage.warm(bound.room)
print(*(name for name in ("torch", "open_clip", "timm", "faiss") if name in sys.modules))
"""


def test_no_encoder_is_loaded(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_what_identifies_the_input(folder: Path, tmp_path: Path) -> None:
    def sources() -> list[dict[str, Any]]:
        inputs = ("ingest", "inputs", (str(folder),))
        return bind(load_pipeline("dedup", [inputs]), str(tmp_path / "out"))[0].stage.sources()

    before = sources()
    assert [one["name"] for one in before] == ["img_emb/img_emb_00.npy", "img_emb/img_emb_03.npy"]
    assert {one["supplies"] for one in before} == {"vectors"}
    for name in ("img_emb/img_emb_03.npy", "text_emb/text_emb_03.npy"):
        array = np.load(folder / name, allow_pickle=False)
        array[0, 0] += 1
        np.save(folder / name, array)
        after = sources()
        assert after[0] == before[0]
        assert after[1]["size_bytes"] == before[1]["size_bytes"]
        assert after[1]["digest"] != before[1]["digest"]
        before = after


def stack(row: Array, count: int) -> Array:
    return np.repeat(row[None], count, axis=0)


@pytest.mark.parametrize(
    ("vectors", "kept"),
    [
        (draw_vectors(1), 1),
        (stack(draw_vectors(1)[0], 50), 1),
        (draw_vectors(50), 50),
        (np.zeros((5, 24), np.float16), 5),
        (np.full((5, 24), np.nan, np.float16), 5),
        (np.concatenate([draw_vectors(3), draw_vectors(3), np.zeros((2, 24))]), 5),
    ],
    ids=["one", "identical", "different", "zeros", "nans", "twins"],
)
@pytest.mark.parametrize("min_cosine", [0.78, 1.0])
def test_ends_of_the_range(tmp_path: Path, vectors: Array, kept: int, min_cosine: float) -> None:
    write_part(tmp_path / "in", "0", vectors.astype(np.float16))
    fields = {"dedup__min_cosine": min_cosine, "dedup__min_cosine_alone": max(0.95, min_cosine)}
    for name, shard_samples in (("one", 1000), ("many", 7)):
        out = tmp_path / name
        rows = decisions_of(
            carry_out(tmp_path / "in", out, ingest__shard_samples=shard_samples, **fields)
        )
        assert sum(row["keep"] for row in rows) == kept
        assert {row["reason"] for row in rows} <= {None, "duplicate_semantic"}


def test_how_alike_copies_without_pixels_must_be(tmp_path: Path) -> None:
    vectors = draw_vectors(40)
    cosines = np.linspace(0.8, 0.999, 20)
    for i, cosine in enumerate(cosines):
        vectors[20 + i] = near(vectors[i], cosine, i)
    write_part(tmp_path / "in", "0", vectors)
    for least in (0.85, 0.95, 0.99):
        stages = carry_out(
            tmp_path / "in", tmp_path / "out" / str(least), dedup__min_cosine_alone=least
        )
        rows = decisions_of(stages)
        found = np.array([not (rows[i]["keep"] and rows[20 + i]["keep"]) for i in range(20)])
        clear = np.abs(cosines - least) > 1e-3
        assert (found == (cosines >= least))[clear].all()


def test_a_crowd_of_near_copies(tmp_path: Path) -> None:
    """More copies of one picture than pixels would be asked about, none of equal vectors."""
    crowd = np.stack([near(draw_vectors(1)[0], 0.995, seed) for seed in range(400)])
    write_part(tmp_path / "in", "0", np.concatenate([crowd, draw_vectors(50, seed=1)]))
    rows = decisions_of(carry_out(tmp_path / "in", tmp_path / "out", dedup__max_candidates=20))
    assert sum(row["keep"] for row in rows[:400]) == 1
    assert all(row["keep"] for row in rows[400:])


def test_datacomp_by_choice(tmp_path: Path) -> None:
    uids = datacomp_uids(30)
    b32, l14, isc = (draw_vectors(30, width, width) for width in (16, 24, 8))
    b32[1], l14[3], isc[5] = b32[0], l14[2], isc[4]
    arrays = {"b32_img": b32, "b32_txt": b32, "l14_img": l14, "l14_txt": b32, "dedup": isc}
    write_datacomp(tmp_path / "in", "00", uids[:20], **{n: a[:20] for n, a in arrays.items()})
    write_datacomp(tmp_path / "in", "01", uids[20:], **{n: a[20:] for n, a in arrays.items()})
    prints = set()
    for choice, twin, shared in ((None, 3, False), ("l14", 3, False), ("b32", 1, True)):
        stages = carry_out(tmp_path / "in", tmp_path / "out", ingest__vectors=choice)
        rows = decisions_of(stages)
        assert [row["uid"] for row in rows] == uids
        # Later rows are larger.
        assert [i for i, row in enumerate(rows) if not row["keep"]] == [twin - 1]
        embed = next(one for one in stages if one.stage.name == "embed")
        prints.add(embed.fingerprints["embed.vectors"])
        assert embed.stage.facts(embed.room)["vectors"]["shared_space"] == shared
        room = stages[-1].room
        table = room.read(room.shards()[0], ["clip_score", "width", "thumbnail"])
        scores = table["clip_score"].to_pylist()
        assert scores == ([pytest.approx(1, abs=1e-3)] * 30 if shared else [None] * 30)
        assert table["width"].to_pylist()[:3] == [640, 641, 642]
        assert table["thumbnail"].null_count == 30
    assert len(prints) == 3
    rows = decisions_of(carry_out(tmp_path / "in", tmp_path / "out", ingest__vectors="dedup"))
    assert [i for i, row in enumerate(rows) if not row["keep"]] == [4]


def test_vectors_alone_and_a_draw(tmp_path: Path) -> None:
    vectors = draw_vectors(500)
    vectors[250:] = vectors[:250]
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/some.npy", vectors)
    rows = decisions_of(carry_out(tmp_path / "in", tmp_path / "all"))
    assert sum(row["keep"] for row in rows) == 250
    stages = carry_out(tmp_path / "in", tmp_path / "drawn", ingest__limit=40)
    room = stages[-1].room
    table = room.read(room.shards()[0], ["row", "image_emb"])
    found, _ = storage.read_vectors(table["image_emb"])
    np.testing.assert_allclose(found, vectors[table["row"].to_numpy()], atol=1e-3)
    assert len(found) == 40


def test_scores_of_vectors(folder: Path, tmp_path: Path) -> None:
    """The baseline ranks by the cosine of what the source gives."""
    rows = decisions_of(carry_out(folder, tmp_path / "out", "clip-score"))
    assert rows[9]["keep"]  # its text vector is its image vector
    unscored = {6, 7, 8, 10}
    assert {rows[i]["reason"] for i in unscored} == {"outside_fraction"}
    assert sum(row["keep"] for row in rows) == round(0.3 * (60 - len(unscored)))


def _widen(folder: Path) -> None:
    np.save(folder / "img_emb/img_emb_03.npy", draw_vectors(19, 32))


def _shorten(folder: Path) -> None:
    np.save(folder / "img_emb/img_emb_03.npy", draw_vectors(18))


def _pickle(folder: Path) -> None:
    array = np.array([["a"] * 24] * 19, object)
    np.save(folder / "img_emb/img_emb_03.npy", array, allow_pickle=True)


def _flatten(folder: Path) -> None:
    np.save(folder / "img_emb/img_emb_03.npy", draw_vectors(19).ravel())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_widen, "img_emb_03.npy: image vectors must be 24 numbers wide, as in img_emb/img_emb_00"),
        (_shorten, "img_emb/img_emb_03.npy has 18, its metadata 19"),
        (_pickle, "img_emb_03.npy: must hold floating numbers; got pickled objects"),
        (_flatten, "img_emb_03.npy: must be of shape (samples, numbers per vector); got (456,)"),
    ],
)
def test_what_cannot_be_compared(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(InputError) as caught:
        carry_out(folder, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line(folder: Path, tmp_path: Path) -> None:
    _widen(folder)
    done = curate("run", "dedup", "--input", folder, "--output", tmp_path / "out", "--workers", 1)
    assert done.returncode == 2
    assert "run them apart" in only_error(done.stderr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_keeps_what_its_cpu_twin_keeps(tmp_path: Path) -> None:
    count = 20_000
    write_mixture(tmp_path / "in", count, 64)
    kept = []
    for name, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        out = tmp_path / name
        run = ("run", "dedup", "--input", tmp_path / "in", "--output", out, "--workers", 1)
        done = launch(*run, **hidden)
        assert done.returncode == 0, done.stderr
        recall = read_summary(out)["facts"]["dedup"]["recall"]
        assert recall["recall"] >= 0.999
        decisions = read_decisions(out)
        kept.append(set(decisions.filter(decisions["keep"])["uid"].to_pylist()))
    # Cells differ, and with them which few pairs are missed.
    assert len(kept[1]) < 0.9 * count
    assert len(kept[0] ^ kept[1]) <= 0.002 * len(kept[1])
