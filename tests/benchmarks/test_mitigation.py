"""Tests of the benchmark of mitigation: its protocol, and that no work is done twice."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import mitigation
from benchmarks.mitigation import ARMS, Bench, summarize
from benchmarks.mitigation_data import Data, cut_modalities, make_data, tell_apart
from benchmarks.mitigation_training import Arm, Rows, embed_rows, score_rows, train
from benchmarks.signature import IMAGE_PX
from curate import storage
from curate.models.encoders import torch_threads

COUNT = 320


@pytest.fixture(scope="module")
def data() -> Data:
    """Squares of random colour and place, on two grounds, named by a number and a word."""
    rng = np.random.default_rng(0)
    pixels = np.full((2, COUNT, 3, IMAGE_PX, IMAGE_PX), 255, np.uint8)
    pixels[1] = 128
    for row in range(COUNT):
        top, left = rng.integers(0, IMAGE_PX - 16, 2)
        pixels[:, row, :, top : top + 16, left : left + 16] = rng.integers(0, 255, (3, 1, 1))
    names = [f"square {row} {'red' if row % 2 else 'blue'}" for row in range(COUNT)]
    captions = [[name, f"thing {row}", "square"] for row, name in enumerate(names)]
    uids = [str(row) for row in range(COUNT)]
    vectors = rng.standard_normal((2, COUNT, 8)).astype(np.float32)
    return make_data(pixels, captions, uids, uids, (vectors[0], vectors[1]))


@pytest.fixture(scope="module")
def bench(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(data, 0, {"two": 2, "three": 1}, tmp_path_factory.mktemp("work"))


def test_only_clean_candidates_are_judged_and_swaps_stay_among_training_samples(
    bench: Bench,
) -> None:
    swapped = np.flatnonzero(bench.donors != np.arange(COUNT))
    assert len(swapped) == pytest.approx(0.1 * len(bench.pool), abs=2)
    assert set(swapped) | set(bench.donors[swapped]) <= set(bench.pool)
    assert sorted(bench.donors[swapped]) == sorted(swapped)  # a permutation of what is swapped
    assert set(bench.sets[bench.clean]) == {"candidate"}
    assert not set(bench.clean) & set(swapped)
    external = np.r_[bench.unrelated, bench.test]
    assert set(bench.sets[external]) == {"external"}
    assert len(np.unique(external)) == (bench.sets == "external").sum()


def test_a_bench_depends_on_its_seed_alone(data: Data, bench: Bench, tmp_path: Path) -> None:
    again, other = (Bench(data, seed, {"two": 1, "three": 1}, tmp_path) for seed in (0, 1))
    assert (again.donors == bench.donors).all()
    assert (again.sets == bench.sets).all()
    assert (other.sets != bench.sets).any()


def test_swapped_rows_have_all_captions_of_their_donor(data: Data, bench: Bench) -> None:
    row = int(np.flatnonzero(bench.donors != np.arange(COUNT))[0])
    rows = Rows(data, np.array([row]), bench.donors, 3, 0)
    seen = set()
    for epoch in range(20):
        rows.set_epoch(epoch)
        (sample,) = rows
        assert (sample["pictures"].numpy() == data.pixels[:, row]).all()
        seen.add(sample["caption"].tobytes())
    assert seen == {caption.tobytes() for caption in data.captions[bench.donors[row]]}


def test_captions_of_a_run_are_the_whole_its_title_and_the_rest() -> None:
    assert tell_apart("Lemon. fruit, yellow", "Lemon") == [
        "Lemon. fruit, yellow", "Lemon", "fruit yellow",
    ]  # fmt: skip
    assert tell_apart("Lemon", "Lemon") == ["Lemon"]


def test_noise_goes_where_the_arm_says() -> None:
    names = ["first", "second", "name"]
    assert ARMS["raw"].sigmas(names) == dict.fromkeys(names, 0.0)
    assert Arm(noise=0.2, noisy="name").sigmas(names) == {"name": 0.2}
    assert Arm(noise=0.2, noisy="pictures").sigmas(names) == {"first": 0.2, "second": 0.2}
    assert Arm(noise=0.2, noisy="first").sigmas(names) == {"first": 0.2}


def test_models_are_trained_once_and_judged_on_the_same_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    probability = (bench.donors != np.arange(COUNT))[bench.pool].astype(float)
    storage.commit_array(str(bench.work / "mismatch-0.npy"), probability)
    assert bench.curation() == {
        "dropped": probability.mean(), "planted_dropped": 1, "clean_dropped": 0,
        "candidates_dropped": 0,
    }  # fmt: skip
    first = bench.embeddings("three", "curated and mitigated", ARMS["curated and mitigated"])
    monkeypatch.setattr(mitigation, "train", None)
    again = bench.embeddings("three", "curated and mitigated", ARMS["curated and mitigated"])
    for one, other in zip(first, again, strict=True):
        assert list(one) == ["google", "twitter", "name"]
        assert all((one[name] == other[name]).all() for name in one)
    judged = len(bench.clean) + len(bench.unrelated) + len(bench.test)
    assert first[0]["name"].shape[0] == judged
    assert (first[0]["name"] != first[1]["name"]).any()
    same = bench.judge([first[0], first[0]])
    assert same["memorization"] == 0
    assert same["memorization google x name"] == 0
    assert 0 < same["recall"] < 1


def test_arms_of_one_piece_run_from_end_to_end(
    data: Data, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six epochs are the least after which targets were chosen."""
    monkeypatch.setattr(mitigation, "read_data", lambda cache: data)
    storage.commit_array(str(tmp_path / "mismatch-0.npy"), np.zeros(len(bench.pool)))
    arms = ("raw", "targeted", "words masked")
    asked = [part for arm in arms for part in ("--arm", "two", arm)]
    done = CliRunner().invoke(
        mitigation.main, [str(tmp_path), *asked, "--epochs", "6", "1", "--seed", "0"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])["two"]
    assert list(found) == list(arms)
    assert all(np.isfinite(row["figures"]["memorization"][0]) for row in found.values())
    for model in "fg":
        names = [f"two-6-{arm.replace(' ', '_')}-0-{model}.npy" for arm in arms]
        vectors = [storage.read_array(str(tmp_path / name)) for name in names]
        assert not any(np.array_equal(*both) for both in combinations(vectors, 2))


def test_settings_of_a_run_go_with_a_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(mitigation.main, [str(tmp_path), "--arm", "run", "raw"])
    assert done.exit_code == 2
    assert "--arm run goes with --run" in done.output


def test_targets_are_chosen_by_the_model_alone(data: Data, bench: Bench) -> None:
    two = cut_modalities(data, "two")
    rows = bench.pool[:200]
    with torch_threads(1):
        model = train(two, rows, bench.donors, Arm(every=1), 8, 0, bench.unrelated)
        scores = score_rows(model, two, rows, bench.donors, bench.unrelated)
        embedded = embed_rows(model.eval(), two, rows, bench.donors)
    assert sorted(map(int, scores)) == sorted(rows.tolist())
    cosines = (embedded["google"] * embedded["name"]).sum(1)
    values = np.array([scores[str(row)] for row in rows])
    assert np.corrcoef(values, cosines)[0, 1] > 0.5
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_changes_are_relative_to_raw_of_the_same_seed() -> None:
    results = {
        (0, "raw"): {"recall": 0.2}, (1, "raw"): {"recall": 0.4},
        (0, "curated"): {"recall": 0.3}, (1, "curated"): {"recall": 0.4},
    }  # fmt: skip
    found = summarize(results)
    assert found["raw"]["changes"]["recall"] == [0, 0]
    assert found["curated"]["figures"]["recall"] == [0.35, 0.05]
    assert found["curated"]["changes"]["recall"] == [0.25, 0.25]
