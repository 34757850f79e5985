"""A pool of metadata and vectors, without an image, through the shipped pipelines and out again."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curate.engine import runner
from curate.engine.export import Request, export
from tests.exports import Here, InProcess, Silent
from tests.formats.vectors import datacomp_uids, draw_vectors, write_datacomp
from tests.support import assert_sound, call, read_decisions, read_shards, read_summary

#: Rows, in files of as many; how many of each file's are copies of the rows before them.
COUNT, PER_FILE, COPIES = 20_000, 5_000, 250
WIDTH = 32


def write_pool(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Write a pool; return the score of each row, and the uid of each copy's original."""
    rng = np.random.default_rng(0)
    scores, originals = [], {}
    for number in range(COUNT // PER_FILE):
        images = draw_vectors(PER_FILE, WIDTH, seed=number).astype(np.float32)
        noise = draw_vectors(PER_FILE, WIDTH, seed=100 + number).astype(np.float32)
        # Cosines of .976 to .999; two rows drawn alike have .95 once in a million pools.
        far = rng.uniform(0.05, 0.22, (COPIES, 1)).astype(np.float32)
        images[-COPIES:] = images[:COPIES] + far * noise[:COPIES]
        texts = images + noise * rng.uniform(0.2, 3, (PER_FILE, 1)).astype(np.float32)
        uids = datacomp_uids(PER_FILE, number * PER_FILE)
        originals.update(zip(uids[-COPIES:], uids[:COPIES], strict=True))
        arrays = {"l14_img": images.astype(np.float16), "l14_txt": texts.astype(np.float16)}
        write_datacomp(folder, f"{number:04d}", uids, **arrays)
        image, text = (part.astype(float) for part in arrays.values())
        norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
        scores.append((image * text).sum(1) / norms)
    return np.concatenate(scores), originals


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, str]]:
    folder = tmp_path_factory.mktemp("pool")
    return folder, *write_pool(folder)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Workers", InProcess)


def carry_out(name: str, folder: Path, out: Path) -> dict[str, bool]:
    """Run a pipeline on the pool; return whether it keeps a row, by uid, in the pool's order."""
    call("run", name, "--input", folder, "--output", out)
    assert_sound(out)
    assert read_summary(out)["counts"]["ingested"] == COUNT
    decisions = read_decisions(out)
    keeps = dict(zip(decisions["uid"].to_pylist(), decisions["keep"].to_pylist(), strict=True))
    assert sorted(keeps) == datacomp_uids(COUNT)
    assert read_shards(out)["image"].null_count == sum(keeps.values())
    return {uid: keeps[uid] for uid in datacomp_uids(COUNT)}


def test_clip_score_keeps_the_best_scored(
    pool: tuple[Path, np.ndarray, dict[str, str]], tmp_path: Path
) -> None:
    folder, scores, _ = pool
    kept = np.array(list(carry_out("clip-score", folder, tmp_path / "out").values()))
    assert kept.sum() == 0.3 * COUNT
    limit = np.sort(scores)[-int(0.3 * COUNT)]
    # Which of two scores that differ in the fourth digit is better is for float16 to say.
    assert kept[scores > limit + 1e-3].all()
    assert not kept[scores < limit - 1e-3].any()


def test_dedup_drops_one_of_each_planted_pair_and_no_other(
    pool: tuple[Path, np.ndarray, dict[str, str]], tmp_path: Path
) -> None:
    folder, _, originals = pool
    keeps = carry_out("dedup", folder, tmp_path / "out")
    assert all(keeps[uid] for uid in keeps.keys() - originals.keys() - set(originals.values()))
    found = [keeps[copy] + keeps[original] == 1 for copy, original in originals.items()]
    assert np.mean(found) >= 0.995
    kept = [uid for uid, keep in keeps.items() if keep]
    assert len(kept) == COUNT - sum(found)
    for layout in ("keep-list", "datacomp"):
        export(Request(str(tmp_path / "out"), str(tmp_path / layout), layout), Here(), Silent())
    listed = pq.read_table(tmp_path / "keep-list/keep.parquet")["uid"].to_pylist()
    assert sorted(listed) == kept
    subset = np.load(tmp_path / "datacomp/kept.npy")
    assert [f"{high:016x}{low:016x}" for high, low in subset.tolist()] == kept
