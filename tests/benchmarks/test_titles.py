"""Titles are what names the picture, and ranks are judged as the draw demands."""

import numpy as np
import pytest

from benchmarks.labels import rank_quality
from benchmarks.noise import plant
from benchmarks.parts import find_titles, split_parts
from tests.benchmarks.corpus import make_corpus


def test_captions_are_split_at_punctuation_and_not_within_words() -> None:
    parts = split_parts("Clipart by A. Painter - baloon1_04. holiday, flower-pot (v2.0)")
    assert parts == ["Clipart by A", "Painter", "baloon1_04", "holiday", "flower-pot", "v2.0"]
    assert split_parts("a red kite") == ["a red kite"]
    assert split_parts("...") == ["..."]


def test_the_name_of_a_collection_is_no_title() -> None:
    captions = [f"Road Signs - sign {row}. transport" for row in range(40)]
    captions += ["Road Signs. Transport", "boat. transport"]
    titles = find_titles(captions, [f"cluster {row}" for row in range(42)])
    assert titles[:40] == [f"sign {row}" for row in range(40)]
    assert titles[40:] == ["Road Signs", "boat"]


@pytest.mark.parametrize(("kind", "series"), [("title", False), ("series", True)])
def test_a_series_gets_a_foreign_title_and_keeps_its_tags(kind: str, series: bool) -> None:
    corpus = make_corpus(400)
    tagged = np.array([f"{caption}. tag {row}" for row, caption in enumerate(corpus.captions)])
    corpus = corpus.with_captions(np.arange(400), tagged, corpus.text)
    spoilt, planted = plant(corpus, kind, 0.3, seed=2)
    assert planted.sum() == pytest.approx(120, abs=20)
    titles, tags = (
        np.array([split_parts(caption)[place] for caption in spoilt.captions]) for place in (0, 1)
    )
    assert tags.tolist() == [f"tag {row}" for row in range(400)]
    names = np.array([split_parts(caption)[0] for caption in corpus.captions])
    assert (titles[planted] != names[planted]).all()
    assert np.array_equal(titles[~planted], names[~planted])
    donors = [names.tolist().index(title) for title in titles[planted]]
    assert np.array_equal(corpus.categories[donors], corpus.categories[planted])
    _, counts = np.unique(titles[planted], return_counts=True)
    assert (counts.mean() > 2) == series


def test_a_pair_counts_for_all_those_that_it_stands_for() -> None:
    kind, values = np.array([1.0, 0, 0, 1]), np.array([0.9, 0.5, 0.4, 0.1])
    groups = np.arange(4)
    found = rank_quality(kind, values, np.array([1.0, 1, 1, 3]), groups)
    assert found["auroc"] == pytest.approx(1 / 4)
    assert found["effective"] == pytest.approx(16 / 10)
    assert found["interval"][0] <= 1 / 4 <= found["interval"][1]
    undecided = rank_quality(np.full(4, 0.5), values, np.ones(4), groups)
    assert undecided["auroc"] == pytest.approx(1 / 2)


def test_pairs_of_one_group_are_one_observation() -> None:
    rng = np.random.default_rng(0)
    kind, values = np.repeat(rng.random(40) < 0.3, 10), np.repeat(rng.random(40), 10)
    alone, together = (
        np.ptp(rank_quality(kind.astype(float), values, np.ones(400), groups)["interval"])
        for groups in (np.arange(400), np.arange(400) // 10)
    )
    assert together > 2 * alone
