import numpy as np
import pytest
import torch

from curate.errors import StorageError
from curate.models import train
from curate.models.proxy import (
    Heads,
    HeadsShape,
    contrastive_loss,
    embed_pairs,
    load_heads,
)
from curate.models.train import Recipe, fit_front, has_learned, train_heads
from curate.models.weights import dump_weights

SHAPE = HeadsShape(40, 24, 16, 12, hidden=32, width=8)


def _views(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two views of 6 hidden numbers, of different widths."""
    rng = np.random.default_rng(seed)
    maps = np.random.default_rng(99)
    hidden = rng.normal(size=(count, 6))
    views = []
    for width in (40, 24):
        view = np.tanh(hidden @ maps.normal(size=(6, width))) + 0.3 * rng.normal(
            size=(count, width)
        )
        views.append((view / np.linalg.norm(view, axis=1, keepdims=True)).astype(np.float16))
    return views[0], views[1]


def _train(pairs, recipe: Recipe = Recipe(), seed: int = 0, observe=None) -> train.Training:  # noqa: B008
    fronts = (fit_front(pairs[0], 16), fit_front(pairs[1], 12))
    rows = np.arange(len(pairs[0]))
    return train_heads(SHAPE, fronts, pairs, np.stack([rows, rows], 1), recipe, seed, observe)


def _recall(heads: Heads, pairs) -> float:
    image, text = embed_pairs(heads, *pairs)
    best = (image.astype(np.float32) @ text.T.astype(np.float32)).argmax(1)
    return float((best == np.arange(len(best))).mean())


def test_front_centres_and_keeps_the_strongest_directions() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(500, 6)) * [9, 5, 1, 0.1, 0.1, 0.1] + 3).astype(np.float32)
    mean, front = fit_front(vectors, 2)
    turned = (vectors - mean) @ front
    np.testing.assert_allclose(turned.mean(0), 0, atol=1e-3)
    assert abs(np.corrcoef(turned[:, 0], vectors[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(turned[:, 1], vectors[:, 1])[0, 1]) > 0.99
    assert fit_front(vectors[:3], 5)[1].shape == (6, 3)


@pytest.mark.parametrize("count", [1, 2, 20, 74, 76])
def test_front_of_few_wide_vectors_is_that_of_their_covariance(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 300)).astype(np.float16)
    mean, front = fit_front(vectors, 10)
    np.testing.assert_allclose(mean, vectors.mean(0, dtype=np.float64), atol=1e-6)
    centred = vectors - vectors.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / count)
    kept = min(10, count)
    variances, directions = variances[::-1][:kept], directions[:, ::-1][:, :kept]
    expected = directions / np.sqrt(np.maximum(variances, 0) + 30 * variances.mean() + 1e-12)
    assert front.shape == (300, kept)
    real = variances > 1e-6  # which way directions without variance lie means nothing
    # Directions have no sign, so that their products are compared.
    turned, known = (vectors @ part[:, real] for part in (front.astype(np.float64), expected))
    np.testing.assert_allclose(turned @ turned.T, known @ known.T, atol=1e-4)
    assert np.isfinite(front).all()


def test_training_finds_held_out_pairs_and_beats_its_start() -> None:
    pairs, unseen = _views(1500), _views(200, seed=1)
    start = _train(pairs, Recipe(epochs=0))
    trained = _train(pairs, Recipe(epochs=10))
    assert _recall(start.heads, unseen) > 0.1
    assert _recall(trained.heads, unseen) > _recall(start.heads, unseen)
    assert not trained.diverged
    assert trained.retries == 0
    assert trained.losses[-1] < trained.losses[0] < 1


def test_training_repeats_itself() -> None:
    pairs = _views(300)
    first, second, other = _train(pairs), _train(pairs), _train(pairs, seed=1)
    assert dump_weights(first.heads) == dump_weights(second.heads)
    assert first.losses == second.losses
    assert dump_weights(first.heads) != dump_weights(other.heads)


def test_watching_a_training_leaves_it_as_it_is() -> None:
    pairs = _views(300)
    seen: list[np.ndarray] = []
    watched = _train(pairs, Recipe(epochs=3), 0, lambda h: seen.append(embed_pairs(h, *pairs)[0]))
    assert len(seen) == 3
    assert not np.array_equal(seen[0], seen[2])
    last = embed_pairs(watched.heads, *pairs)[0]
    assert np.array_equal(seen[2], last)
    assert np.array_equal(embed_pairs(_train(pairs, Recipe(epochs=3)).heads, *pairs)[0], last)


def test_loss_is_that_of_the_definition_and_spares_those_alike() -> None:
    rng = np.random.default_rng(0)
    image, text = (
        torch.nn.functional.normalize(torch.tensor(rng.normal(size=(5, 3))), dim=1)
        for _ in range(2)
    )
    alike = torch.eye(5, dtype=torch.bool)
    alike[0, 1] = alike[1, 0] = True
    found = contrastive_loss(image, text, torch.tensor(4.0), alike).item()
    total = 0.0
    for row in range(5):
        rivals = [other for other in range(5) if other == row or not alike[row, other]]
        for a, b in ((image, text), (text, image)):
            logits = [4 * float(a[row] @ b[other]) for other in rivals]
            total -= (logits[rivals.index(row)] - np.log(np.sum(np.exp(logits)))) / 10
    assert found == pytest.approx(total, abs=1e-6)


def test_weights_survive_and_other_files_are_refused() -> None:
    pairs = _views(300)
    heads = _train(pairs).heads
    again = load_heads(dump_weights(heads), SHAPE)
    for before, after in zip(embed_pairs(heads, *pairs), embed_pairs(again, *pairs), strict=True):
        assert np.array_equal(before, after)
    with pytest.raises(StorageError, match="proxy"):
        load_heads(b"nothing of the kind", SHAPE)
    with pytest.raises(StorageError, match="proxy"):
        load_heads(dump_weights(heads), HeadsShape(40, 24, 16, 12, hidden=31, width=8))


def test_a_row_does_not_depend_on_its_batch() -> None:
    pairs = _views(1500)
    heads = _train(pairs, Recipe(epochs=1)).heads
    whole = embed_pairs(heads, *pairs)
    part = embed_pairs(heads, pairs[0][1100:1103], pairs[1][1100:1103])
    for one, other in zip(whole, part, strict=True):
        assert np.array_equal(one[1100:1103], other)
        np.testing.assert_allclose(np.linalg.norm(one.astype(np.float32), axis=1), 1, atol=2e-3)


def test_divergence_is_told() -> None:
    assert has_learned([0.9, 0.5])
    assert not has_learned([0.9, float("nan")])
    assert not has_learned([1.0, 0.999])
    assert not has_learned([])


def test_a_diverged_training_is_retried_and_then_falls_back_on_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = _views(300)
    exploding = Recipe(epochs=2, learning_rate=float("inf"))
    training = _train(pairs, exploding)
    assert training.diverged
    assert training.retries == 2
    assert np.isfinite(embed_pairs(training.heads, *pairs)[0]).all()
    start = _train(pairs, Recipe(epochs=0))
    assert _recall(training.heads, pairs) == _recall(start.heads, pairs)

    whole = train._fit
    calls = []

    def fail_once(*arguments):
        calls.append(1)
        return [float("nan")] if len(calls) == 1 else whole(*arguments)

    monkeypatch.setattr(train, "_fit", fail_once)
    training = _train(pairs)
    assert not training.diverged
    assert training.retries == 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_next_to_no_pairs_give_finite_embeddings(count: int) -> None:
    pairs = _views(300)
    fronts = (fit_front(pairs[0], 16), fit_front(pairs[1], 12))
    few = (pairs[0][:count], pairs[1][:count])
    groups = np.zeros((count, 2), np.int64)
    training = train_heads(SHAPE, fronts, few, groups, Recipe(epochs=1), 0)
    for embedded in embed_pairs(training.heads, *pairs):
        assert np.isfinite(embedded).all()
