"""The plot's arithmetic, and a student that must do better on sound pairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tradeoff
from benchmarks.students import judge_vectors, spell_categories
from benchmarks.tradeoff import Bench, read_pixels, summarize, write_table
from benchmarks.trial import Corpus
from tests.benchmarks.corpus import make_corpus, make_painted, paint


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    out = tmp_path_factory.mktemp("out")
    return out, make_painted(out, 800)


def test_pictures_are_found_by_uid(painted: tuple[Path, Corpus]) -> None:
    out, corpus = painted
    pixels = read_pixels(out, corpus.uids[[600, 3]], 32)
    assert pixels.shape == (2, 3, 32, 32)
    for picture, row in zip(pixels, (600, 3), strict=True):
        wanted = np.asarray(paint(row)[1], int).transpose(2, 0, 1)
        assert np.abs(picture - wanted).mean() < 12  # JPEG


def test_students_learn_more_without_the_planted(painted: tuple[Path, Corpus]) -> None:
    out, corpus = painted
    bench = Bench(out, corpus, "swap", 0.4, 0, "small", 8)
    planted = bench.trial.planting.planted
    assert planted.mean() == pytest.approx(0.4, abs=0.01)
    best = bench.student(bench.score("oracle"), 0.6)
    worst = bench.student(-bench.score("oracle"), 0.6)
    assert best["planted"] == 0
    assert worst["planted"] == pytest.approx(0.4 / 0.6, abs=0.01)
    assert best["loss"] < worst["loss"]
    assert best["all"] > worst["all"] + 0.02
    assert all(0 <= best[name] <= 1 for name in ("all", "rare", "rest", "zero_shot"))
    again = Bench(out, corpus, "swap", 0.4, 0, "small", 8)
    assert again.student(again.score("oracle"), 0.6) == best


def test_what_fits_many_pictures_can_be_removed_first(painted: tuple[Path, Corpus]) -> None:
    out, corpus = painted
    captions = corpus.captions.copy()
    captions[::10] = captions[0]
    silent = corpus.with_captions(np.arange(800), captions, corpus.text)
    bench = Bench(out, silent, "swap", 0.0, 0, "small", 8)
    assert not bench.trial.planting.planted.any()
    score = bench.score(tradeoff.INFORMATION)
    shared = bench.trial.planting.corpus.captions == captions[0]
    assert score.max() <= 0
    assert score[shared].min() > np.median(score[~shared])


def test_memorization_comes_from_small_clips(
    painted: tuple[Path, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tradeoff, "_PROXIES", 2)
    bench = Bench(*painted, "swap", 0.2, 1, "small", 8)
    score = bench.score(tradeoff.MEMORIZATION)
    assert score.shape == (len(bench.data.clusters),)
    assert np.isfinite(score).all()
    # Training on a pair raises its coherence.
    assert score.mean() > 0.01


def test_a_caption_that_many_pairs_have_can_count_once() -> None:
    corpus = make_corpus(40)
    captions = np.array(["the same"] * 20 + [f"caption {row}" for row in range(20)])
    held = corpus.with_captions(np.arange(40), captions, corpus.text)
    image = np.eye(40, dtype=np.float32)
    text = np.concatenate([image[:20], np.roll(image[20:], 1, axis=0)])  # the others' are wrong
    named = np.zeros((len(spell_categories(held)[1]), 40), np.float32)
    found = judge_vectors(image, text, named, held, np.arange(40) < 20)
    assert found["all"] == pytest.approx(0.5)
    assert found["each_caption"] == pytest.approx(1 / 21)


def test_gains_are_told_seed_by_seed() -> None:
    def row(all_: float) -> dict[str, float]:
        same = dict.fromkeys(("all", "rest", "each_caption"), all_)
        return {**same, "rare": all_ / 2, "zero_shot": 0.5, "planted": 0.1}

    results = {
        (0, "nothing", 1.0): row(0.4),
        (1, "nothing", 1.0): row(0.6),
        (0, "ours", 0.8): row(0.5),
        (1, "ours", 0.8): row(0.7),
        (0, "random", 0.8): row(0.3),
    }
    summary = summarize(results)
    ours, random = summary["0.8"]["ours"], summary["0.8"]["random"]
    assert ours["seeds"] == 2
    assert ours["all"] == [pytest.approx(0.6), pytest.approx(0.1)]
    # Seeds differ by .2, yet the gain is certain.
    assert ours["gain"] == [pytest.approx(0.1), pytest.approx(0)]
    assert ours["rare_gain"] == [pytest.approx(0.05), pytest.approx(0)]
    assert ours["behind"] == [0, 0]
    assert random["gain"][0] == pytest.approx(-0.1)
    assert random["behind"][0] == pytest.approx(0.2)
    table = write_table(summary).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| 0.8 | ours | 2 | 0.600 ± 0.100 |" in table[-2]


def test_languages_are_told_apart(painted: tuple[Path, Corpus]) -> None:
    out, corpus = painted
    corpus = replace(corpus, languages=np.array(["de", "en"])[np.arange(800) % 2])
    bench = Bench(out, corpus, "swap", 0.4, 0, "small", 2)
    planting = bench.trial.planting
    spoken = planting.corpus.languages
    assert spoken is not None
    # All that is planted or German is removed first.
    found = bench.student(1.0 * (planting.planted | (spoken == "de")), 0.25)
    assert found["kept de"] == 0
    assert found["kept en"] > 0.7
    held = bench.trial.held.languages
    parts = [(held == name).mean() * found[name] for name in ("de", "en")]
    assert sum(parts) == pytest.approx(found["all"])
    results = {(0, "nothing", 1.0): {**found, "de": 0.0}, (0, "ours", 0.25): found}
    summary = summarize(results)
    assert summary["0.25"]["ours"]["gain de"][0] == pytest.approx(found["de"], abs=1e-4)
    assert summary["0.25"]["ours"]["gain en"][0] == 0
    assert " | gain de | gain en | kept de | kept en |" in write_table(summary)
