"""New data compared with what earlier runs kept."""

import shutil
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster
from PIL import Image, ImageDraw

from benchmarks.mixture import write_mixture
from curate.config import load_pipeline
from curate.engine import runner
from curate.engine.progress import PlainProgress
from curate.engine.workers import ClusterOptions
from curate.errors import InputError
from tests.support import read_decisions

Array = np.ndarray[Any, Any]

STEPS = 10
COUNT = 3000


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """Ten folders of 300 vectors, and all of them."""
    folder = tmp_path_factory.mktemp("increments")
    write_mixture(folder / "all", COUNT, 32, seed=3)
    rows = np.load(folder / "all" / "00000.npy", allow_pickle=False)
    for step, part in enumerate(np.array_split(rows, STEPS)):
        (folder / f"in{step}").mkdir()
        np.save(folder / f"in{step}" / f"{step}.npy", part)
    return folder, rows


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOptions]:
    """One worker for all runs, which need not wait for it to start."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as found:
        yield ClusterOptions(scheduler=found.scheduler_address)


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(cluster: ClusterOptions) -> Run:
    def dedup(source: Path, out: Path, *against: Path) -> dict[str, Any]:
        outs = [("dedup", "against", [str(one) for one in against])] if against else []
        pipeline = load_pipeline("dedup", [("ingest", "inputs", [str(source)]), *outs])
        return runner.run(pipeline, str(out), cluster, PlainProgress(StringIO()))

    return dedup


def test_a_chain_of_ten(union: tuple[Path, Array], run: Run, tmp_path: Path) -> None:
    folder, rows = union
    whole = run(folder / "all", tmp_path / "whole")
    decisions: list[dict[str, Any]] = []
    for step in range(STEPS):
        # The last run alone is named: what it was compared with is known to it.
        against = [tmp_path / f"out{step - 1}"] if step else []
        before = sorted((tmp_path / f"out{step - 1}").rglob("*")) if step else []
        summary = run(folder / f"in{step}", tmp_path / f"out{step}", *against)
        if step:
            assert sorted((tmp_path / f"out{step - 1}").rglob("*")) == before
            facts = summary["facts"]["dedup"]
            assert len(facts["against"]) == step
            assert facts["recall_against"]["recall"] >= 0.999
            assert facts["recall_against"]["rows"] > 0
        decisions += read_decisions(tmp_path / f"out{step}").to_pylist()
    kept = np.array([row["keep"] for row in decisions])
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    # Nothing is missed: half a thousandth of what a few hundred queries show is less than one.
    assert cosines[np.ix_(kept, kept)].max() < 0.95 + 1e-6
    place = {row["uid"]: i for i, row in enumerate(decisions)}
    assert len(place) == COUNT
    reasons = [row["reason"] for row in decisions]
    assert {"duplicate_earlier", "duplicate_semantic"} <= set(reasons)
    for i, row in enumerate(decisions):
        earlier = row["reason"] == "duplicate_earlier"
        assert (row["earlier_uid"] is not None) == earlier
        if row["keep"]:
            continue
        target = place[row["earlier_uid" if earlier else "representative_uid"]]
        assert kept[target]
        assert cosines[i, target] >= 0.95 - 1e-6
        if earlier:
            assert target // 300 < i // 300
            assert row["earlier_cosine"] == pytest.approx(cosines[i, target], abs=1e-3)
            # The nearest of all that earlier runs kept.
            known = np.flatnonzero(kept[: i // 300 * 300])
            assert cosines[i, target] == pytest.approx(cosines[i, known].max(), abs=1e-3)
    assert kept.sum() == pytest.approx(whole["counts"]["kept"], rel=0.01)

    # A run that moved is named where it is now.
    shutil.move(tmp_path / "out0", tmp_path / "moved")
    source, out = folder / "in1", tmp_path / "again"
    with pytest.raises(InputError, match="was compared with"):
        run(source, out, tmp_path / "out1")
    again = run(source, out, tmp_path / "out1", tmp_path / "moved")
    # All of it was seen before.
    assert again["counts"]["dropped"] == {"duplicate_earlier": 300}


def draw(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (120, 120), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers(5, 60, 4).tolist()
        pen.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def test_pixels_of_an_earlier_run_are_compared(run: Run, tmp_path: Path) -> None:
    for name, seeds in (("old", range(6)), ("new", (3, 4, 20, 21))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            image = draw(seed) if name == "old" else draw(seed).resize((90, 90))
            image.save(tmp_path / name / f"{name}{seed}.png")
            (tmp_path / name / f"{name}{seed}.txt").write_text(f"noise number {seed}")
    run(tmp_path / "old", tmp_path / "out")
    summary = run(tmp_path / "new", tmp_path / "out-new", tmp_path / "out")
    earlier = {r["uid"]: r["key"] for r in read_decisions(tmp_path / "out").to_pylist()}
    found = {row["key"]: row for row in read_decisions(tmp_path / "out-new").to_pylist()}
    copies = {key: row for key, row in found.items() if row["reason"] == "duplicate_earlier"}
    assert {key: earlier[row["earlier_uid"]] for key, row in copies.items()} == {
        "new3.png": "old3.png",
        "new4.png": "old4.png",
    }
    assert summary["counts"]["kept"] == 2
    assert summary["facts"]["dedup"]["earlier"] == 2


def test_what_cannot_be_compared_is_refused(
    union: tuple[Path, Array], run: Run, tmp_path: Path
) -> None:
    folder, rows = union
    run(folder / "in0", tmp_path / "out")
    (tmp_path / "narrow").mkdir()
    np.save(tmp_path / "narrow" / "n.npy", rows[:20, :16])
    (tmp_path / "nothing").mkdir()
    refused = tmp_path / "refused"
    with pytest.raises(InputError, match="vectors as wide as this run's, 16"):
        run(tmp_path / "narrow", refused, tmp_path / "out")
    with pytest.raises(InputError, match=r"it holds no run\.json"):
        run(folder / "in1", refused, tmp_path / "nothing")
    run(folder / "all", tmp_path / "whole")  # of so many samples, it has cells of its own
    with pytest.raises(InputError, match="must share its cells"):
        run(folder / "in2", refused, tmp_path / "out", tmp_path / "whole")
