"""What is planted in memory is what the kind's name says."""

import numpy as np
import pytest

from benchmarks.noise import judge, plant
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
