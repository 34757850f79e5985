import numpy as np
import pytest

from curate.memorization.folds import draw_halves, draw_masks
from curate.memorization.metrics import cmc, multimem
from curate.memorization.verdict import (
    coherence,
    mean_of_others,
    measure_memorization,
    tell_kinds,
)


def _unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _stored(image: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a proxy leaves of K views: mean cosine, mean image vector, text vector."""
    cosines = [[float(view @ words) for view, words in zip(k, text, strict=True)] for k in image]
    return np.mean(cosines, 0), image.mean(0), text


@pytest.mark.parametrize("views", [1, 2, 4])
def test_coherence_is_that_of_the_definition(views: int) -> None:
    rng = np.random.default_rng(views)
    image, text = _unit(rng, views, 9, 6), _unit(rng, 9, 6)
    others = _unit(rng, 5, 6), _unit(rng, 5, 6)
    mean = sum(others).mean(0)
    expected = []
    for row in range(9):
        terms = []
        for view in range(views):
            u = image[view, row] + text[row]
            crossed = [u @ (others[0][h] + others[1][h]) for h in range(5)]
            terms.append(u @ u / 2 - np.mean(crossed) / 2)
        expected.append(np.mean(terms))
    found = coherence(*_stored(image, text), mean)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found, cmc((image, text), others), atol=1e-12)


def test_coherence_survives_being_stored_in_half_precision() -> None:
    rng = np.random.default_rng(0)
    image, text = _unit(rng, 3, 50, 128), _unit(rng, 50, 128)
    others = _unit(rng, 30, 128), _unit(rng, 30, 128)
    alignment, mean_image, words = _stored(image, text)
    found = coherence(
        alignment.astype(np.float32),
        mean_image.astype(np.float16),
        words.astype(np.float16),
        sum(others).mean(0).astype(np.float32),
    )
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, cmc((image, text), others), atol=1e-3)


def test_parts_that_agree_are_coherent_and_unrelated_ones_are_at_one() -> None:
    both = np.eye(4)[:2]
    assert coherence(np.ones(2), both, both, np.zeros(4)).tolist() == [2, 2]
    assert coherence(np.zeros(2), both, both[::-1], np.zeros(4)).tolist() == [1, 1]
    # What lies where everything lies agrees with all alike.
    assert coherence(np.ones(2), both, both, 2 * both[0]).tolist() == [0, 2]
    unknown = coherence(np.array([np.nan, 1]), both, both, np.zeros(4))
    assert np.isnan(unknown).tolist() == [True, False]


def test_what_is_held_out_of_a_samples_own_cluster_is_no_other() -> None:
    rng = np.random.default_rng(0)
    vectors, held = rng.normal(size=(12, 5)), np.array([7, 7, -3, 9, 9, 9, 7, -3, 2, 2, 2, 2])
    clusters = np.array([9, 8, -3, 2, 10, -9])
    found = mean_of_others(vectors, held, clusters)
    for row, cluster in enumerate(clusters):
        assert found[row] == pytest.approx(vectors[held != cluster].mean(0))
    alone = mean_of_others(vectors[:2], held[:2], np.array([7]))
    assert alone[0] == pytest.approx(vectors[:2].mean(0))
    nothing = mean_of_others(vectors[:0], held[:0], clusters)
    assert not nothing.any()
    assert nothing.shape == (6, 5)


def test_proxies_that_are_all_alike_have_memorized_nothing() -> None:
    """However many copies there are, which are held out along with a left-out sample."""
    rng = np.random.default_rng(1)
    clusters = np.where(np.arange(400) < 60, 0, np.arange(400))
    image, text = (_unit(rng, 400, 16)[clusters] + 0.3 * _unit(rng, 400, 16) for _ in range(2))
    image, text = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (image, text))
    inside = draw_halves([str(one) for one in clusters], 8, 0)
    values = []
    for within in inside.T:
        others = mean_of_others((image + text)[~within], clusters[~within], clusters)
        values.append(coherence((image * text).sum(1), image, text, others))
    score, error = measure_memorization(np.stack(values, axis=1), inside)
    for part in (clusters == 0, clusters > 0):
        assert abs(score[part].mean()) < 2 * error[part].mean()
        assert abs(score[part].mean()) < 0.01


@pytest.mark.parametrize("proxies", [2, 4, 8, 12])
def test_memorization_is_the_mean_gap_between_complementary_proxies(proxies: int) -> None:
    rng = np.random.default_rng(proxies)
    inside = draw_masks([f"{row}" for row in range(40)], proxies, 3)
    values = rng.normal(size=(40, proxies))
    values[[3, 17]] = np.nan
    score, error = measure_memorization(values, inside)
    for row in range(40):
        gaps = []
        for first in range(0, proxies, 2):
            pair = [first, first + 1]
            assert inside[row, pair].sum() == 1
            within = pair[int(inside[row, pair].argmax())]
            gaps.append(values[row, within] - values[row, 2 * first + 1 - within])
        assert score[row] == pytest.approx(np.mean(gaps), nan_ok=True)
        means = values[row, inside[row]].mean() - values[row, ~inside[row]].mean()
        assert score[row] == pytest.approx(means, nan_ok=True)
        if proxies > 2:
            expected = np.std(gaps, ddof=1) / len(gaps) ** 0.5
            assert error[row] == pytest.approx(expected, nan_ok=True)
    assert np.flatnonzero(np.isnan(score)).tolist() == [3, 17]
    unknown = range(40) if proxies == 2 else [3, 17]
    assert np.flatnonzero(np.isnan(error)).tolist() == [*unknown]


def test_what_does_not_depend_on_training_is_not_memorized() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1)).repeat(4, 1)
    score, error = measure_memorization(values, draw_masks([f"{row}" for row in range(30)], 4, 0))
    assert not score.any()
    assert not error.any()


def test_no_samples_have_no_scores() -> None:
    for proxies in (2, 4):
        empty = np.zeros((0, proxies))
        score, error = measure_memorization(empty, empty.astype(bool))
        assert score.shape == error.shape == (0,)
    assert tell_kinds(*np.zeros((4, 0))) == []


def test_memorization_under_two_proxies_is_multimem() -> None:
    rng = np.random.default_rng(5)
    models = [(_unit(rng, 3, 12, 7), _unit(rng, 12, 7)) for _ in range(2)]
    others = [(_unit(rng, 6, 7), _unit(rng, 6, 7)) for _ in range(2)]
    values = np.stack(
        [
            coherence(*_stored(*model), sum(held).mean(0))
            for model, held in zip(models, others, strict=True)
        ],
        axis=1,
    )
    inside = np.tile([True, False], (12, 1))
    expected = multimem(models[0], models[1], others[0], others[1])
    np.testing.assert_allclose(measure_memorization(values, inside)[0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("score", "error", "within", "mismatch", "expected"),
    [
        (0.5, 0.1, 1.8, 0.1, "beneficial"),
        (0.5, 0.1, 1.8, 0.9, "harmful"),
        (0.5, 0.1, 1.8, 0.5, "harmful"),
        (0.5, 0.1, 1.8, 0.49, "beneficial"),
        (0.39, 0.1, 1.8, 0.9, "none"),  # most of the coherence is there without training on it
        (0.41, 0.1, 1.8, 0.9, "harmful"),
        (0.5, 0.26, 1.8, 0.9, "none"),  # may be chance
        (0.5, 0.24, 1.8, 0.9, "harmful"),
        (0.5, np.nan, 1.8, 0.9, None),  # one pair of proxies has no error: nothing is sure
        (0.0, np.nan, 1.0, 0.9, None),
        (0.0, 0.0, 0.5, 0.9, "none"),
        (0.1, 0.01, 0.5, 0.1, "beneficial"),  # below unrelated parts even inside
        (-0.5, 0.1, 1.8, 0.9, "none"),
        (-0.5, np.nan, 0.5, 0.1, None),
        (np.nan, np.nan, np.nan, 0.9, None),
        (np.nan, np.nan, 0.0, 0.1, None),
        (0.5, 0.1, 1.8, np.nan, None),
        (0.0, 0.1, 1.8, np.nan, None),
    ],
)
def test_kinds(
    score: float, error: float, within: float, mismatch: float, expected: str | None
) -> None:
    arguments = [np.array([value]) for value in (score, error, within, mismatch)]
    assert tell_kinds(*arguments) == [expected]
