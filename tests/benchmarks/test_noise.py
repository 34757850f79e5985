"""What is planted in memory is what the kind's name says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noise
from benchmarks.noise import judge, plant, translate
from benchmarks.trial import embed_captions
from tests.benchmarks.corpus import make_corpus


@pytest.mark.parametrize("kind", ["swap", "category"])
def test_permuted_captions_change_and_none_becomes_more_frequent(kind: str) -> None:
    corpus = make_corpus(400)
    spoilt, planted = plant(corpus, kind, 0.2, seed=3)
    assert planted.sum() == pytest.approx(80, abs=10)
    assert (spoilt.captions[planted] != corpus.captions[planted]).all()
    assert np.array_equal(spoilt.captions[~planted], corpus.captions[~planted])
    assert sorted(spoilt.captions) == sorted(corpus.captions)
    donors = {caption: row for row, caption in enumerate(corpus.captions.tolist())}
    given = np.array([donors[caption] for caption in spoilt.captions.tolist()])
    assert np.array_equal(spoilt.text, corpus.text[given])
    assert np.array_equal(spoilt.image, corpus.image)
    if kind == "category":
        assert np.array_equal(corpus.categories[given], corpus.categories)


def test_the_nearest_kind_takes_the_caption_of_the_most_similar_picture() -> None:
    corpus = make_corpus(200)
    spoilt, planted = plant(corpus, "nearest", 0.1, seed=0)
    likeness = corpus.image @ corpus.image.T
    np.fill_diagonal(likeness, -1)
    for row in np.flatnonzero(planted):
        assert spoilt.captions[row] == corpus.captions[likeness[row].argmax()]


def test_twins_are_spoilt_alike_on_demand() -> None:
    corpus = make_corpus(300)
    pairs = np.array([f"cluster {row // 2}" for row in range(300)])
    corpus = corpus.with_clusters(pairs)
    spoilt, planted = plant(corpus, "swap", 0.2, seed=1, twins=True)
    assert planted.any()
    assert np.array_equal(planted[::2], planted[1::2])
    twins = np.flatnonzero(planted[::2])
    assert (spoilt.captions[2 * twins] == spoilt.captions[2 * twins + 1]).all()


def test_judging_counts_what_a_threshold_leaves() -> None:
    captions = np.array(["a", "b", "c", "c", "d"])
    planted = np.array([True, False, False, False, False])
    values = np.array([0.9, 0.01, 0.01, 0.6, np.nan])
    found = judge(values, np.array([0.1, 0.9, 0.5, 0.05, 0.9]), planted, captions)
    assert found["auroc"] == 1
    assert found["planted_above_half"] == 1
    assert found["rest_above_half"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["left_of_2_percent"] == 0
    # The pairs that share a caption, and the one without probability, are not asked.
    assert found["information_auroc"] == 1


def test_names_are_translated_evenly_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(400)
    points = {f"1F{row:03X}": row for row in range(400)}
    corpus = replace(corpus, sources=np.array([f"twitter/{point}.png" for point in points]))

    def names(_: Path, language: str) -> dict[str, str]:
        return {point: f"{language} {row}" for point, row in points.items() if row % 4}

    monkeypatch.setattr(noise, "emoji_names", names)
    found = translate(corpus, ("en", "de", "ru"))
    assert found.languages is not None
    unnamed = np.arange(400) % 4 == 0
    assert set(found.languages[unnamed]) == {"en"}
    for row, language in enumerate(found.languages.tolist()):
        assert found.captions[row] == (
            f"caption {row}" if language == "en" else f"{language} {row}"
        )
    for language in ("en", "de", "ru"):
        assert (found.languages[~unnamed] == language).mean() == pytest.approx(1 / 3, abs=0.08)
    foreign = found.languages != "en"
    assert np.array_equal(found.text[~foreign], corpus.text[~foreign])
    expected = embed_captions(found.captions[foreign].tolist())
    assert found.text[foreign] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(translate(corpus, ("en", "de", "ru")).languages, found.languages)
