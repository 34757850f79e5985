"""The proof's own arithmetic, on numbers that can be told by eye."""

import numpy as np
import pytest

from benchmarks.memorization import group_rows, measure, rare_rows, summarize, write_table
from benchmarks.methods import METHODS
from curate.stages.score import Score
from tests.benchmarks.corpus import make_corpus


def test_groups_grow_from_pictures_to_captions() -> None:
    corpus = make_corpus(6)
    corpus = corpus.with_captions(
        np.array([1, 2]), np.array(["Caption 0", "other"]), corpus.text[:2]
    )
    assert group_rows(corpus, "picture") is corpus
    groups = group_rows(corpus, "caption").clusters
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 5
    assert len(set(group_rows(corpus, "concept").clusters.tolist())) == 6


def test_the_rarest_fifth_lies_apart() -> None:
    corpus = make_corpus(300)
    image = corpus.image.copy()
    image[:30] = np.random.default_rng(1).normal(size=(30, 64))
    rare = rare_rows(corpus.with_pictures(np.arange(30), image[:30]))
    assert rare.mean() == pytest.approx(0.2, abs=0.01)
    assert rare[:30].mean() > 0.9


def test_every_method_beats_chance_and_ours_the_in_sample_cosine() -> None:
    result = measure(make_corpus(1000), "swap", 0.2, Score(proxies=4, seed=1), 3, curve=False)
    found = result["methods"]
    assert set(found) == {"nothing", *METHODS}
    assert result["planted"] == pytest.approx(0.2 * result["pairs"], abs=1)
    assert found["oracle"]["precision"] == 1
    assert found["oracle"]["rare_lost"] == found["oracle"]["common_lost"] == 0
    assert abs(found["random"]["auroc"] - 0.5) < 0.07
    assert all(found[name]["auroc"] > 0.6 for name in set(METHODS) - {"random"})
    assert found["ours"]["auroc"] > found["in-sample cosine"]["auroc"]
    lost = found["ours"]["rare_lost"], found["ours"]["common_lost"]
    assert min(lost) < 1 - found["ours"]["precision"]
    assert all(0 <= row["all"] <= 1 and 0 <= row["zero_shot"] <= 1 for row in found.values())


def test_the_way_to_the_oracle_is_told_from_means() -> None:
    def result(nothing: float, ours: float, oracle: float) -> dict:
        rows = {"nothing": nothing, "ours": ours, "oracle": oracle}
        methods = {name: {"all": value, "rare": 0.5} for name, value in rows.items()}
        numbers = {"pairs": 9, "planted": 2, "held_out": 3}
        measured = {"share_estimated": 0.2, "calibration_error": 0.01}
        return {**numbers, **measured, "methods": methods, "curve": {"ours": {"50": ours}}}

    summary = summarize([result(0.5, 0.6, 0.7), result(0.5, 0.7, 0.7)])
    ours = summary["methods"]["ours"]
    assert ours["all"] == [0.65, 0.05]
    assert ours["recovered_all"] == 0.75
    assert ours["gain"] == [0.15, 0.05]
    assert ours["behind"] == [0, 0]
    assert summary["methods"]["oracle"]["behind"] == [-0.05, 0.05]
    assert np.isnan(ours["recovered_rare"])  # nothing and the oracle are alike there
    assert summary["curve"]["ours"]["50"] == [0.65, 0.05]
    assert "| ours | - | - | - | - | 0.650 ± 0.050 |" in write_table("title", summary)
