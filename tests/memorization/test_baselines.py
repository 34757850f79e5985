import numpy as np
import pytest

from curate.memorization import checks
from curate.memorization.baselines import (
    LEMON_FIXED,
    LemonWeights,
    deja_vu,
    lemon,
    neg_clip_loss,
)

RNG = np.random.default_rng(0)


def _unit(*shape: int, dtype=np.float64) -> np.ndarray:
    rows = RNG.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)


def test_neg_clip_loss_does_not_overflow_at_small_temperatures() -> None:
    image = _unit(5, 4, dtype=np.float32)
    assert np.isfinite(neg_clip_loss(image, -image, temperature=1e-4)).all()


@pytest.mark.parametrize("width", [1, 5, 300])
def test_neg_clip_loss_of_one_batch_is_the_formula(width: int) -> None:
    image, text = _unit(30, width), _unit(30, width)
    cosines = image @ text.T
    for temperature in (0.01, 0.5):
        powers = np.exp(cosines / temperature)
        sums = np.log(powers.sum(1)) + np.log(powers.sum(0))
        expected = np.diag(cosines) - temperature / 2 * sums
        for settings in ({}, {"batch_size": 30, "rounds": 1}):
            found = neg_clip_loss(image, text, temperature, **settings)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert (found <= 0).all()


def test_neg_clip_loss_over_batches_is_the_mean_over_partners() -> None:
    image, text = _unit(11, 4), _unit(11, 4)
    settings = {"temperature": 0.3, "batch_size": 2}
    found = neg_clip_loss(image, text, rounds=1500, seed=1, **settings)
    expected = [
        np.mean(
            [
                neg_clip_loss(image[[row, other]], text[[row, other]], 0.3)[0]
                for other in range(11)
                if other != row
            ]
        )
        for row in range(11)
    ]
    np.testing.assert_allclose(found, expected, atol=0.02)
    first = neg_clip_loss(image, text, rounds=2, seed=1, **settings)
    assert np.array_equal(first, neg_clip_loss(image, text, rounds=2, seed=1, **settings))
    assert not np.allclose(first, neg_clip_loss(image, text, rounds=2, seed=2, **settings))
    # A batch of 2 leaves one of 11 over: it too is compared with somebody.
    assert (found < 0).all()


def _lemon_oracle(image, text, k, weights, apart, clusters) -> np.ndarray:
    result = []
    for row in range(len(image)):
        others = [o for o in range(len(image)) if clusters[o] != clusters[row]]
        score = apart[row]
        for near, far, weight in ((image, text, weights.beta), (text, image, weights.gamma)):
            nearest = sorted(others, key=lambda o, near=near, row=row: 1 - near[row] @ near[o])[:k]
            terms = [
                (1 - far[row] @ far[o])
                * np.exp(-weights.tau1 * (1 - near[row] @ near[o]))
                * np.exp(-weights.tau2 * apart[o])
                for o in nearest
            ]
            score += weight * np.mean(terms)
        result.append(score)
    return np.array(result)


@pytest.mark.parametrize("count", [2, 4, 60, 700])
@pytest.mark.parametrize(
    "weights", [LEMON_FIXED, LemonWeights(2.0, 0.5, 0.0, 0.0), LemonWeights(0.0, 0.0, 1.0, 1.0)]
)
def test_lemon_is_the_loop(
    count: int, weights: LemonWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = _unit(count, 6), _unit(count, 6)
    monkeypatch.setattr(checks, "_BLOCK_BYTES", 4 * count * 50)
    apart = 1 - (image * text).sum(1)
    expected = _lemon_oracle(image, text, 5, weights, apart, np.arange(count))
    np.testing.assert_allclose(lemon(image, text, weights=weights), expected, atol=1e-5)


def test_lemon_with_given_distances_and_without_ones_own_cluster() -> None:
    image, text, apart = _unit(80, 7), _unit(80, 3), RNG.random(80)
    clusters = RNG.integers(4, size=80)
    for k in (1, 5, 75):
        found = lemon(image, text, k, pair_distance=apart, clusters=clusters)
        expected = _lemon_oracle(image, text, k, LEMON_FIXED, apart, clusters)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    names = np.array(["a", "b", "c", "d"])[clusters]
    again = lemon(image, text, 75, pair_distance=apart, clusters=names)
    assert np.array_equal(again, found)
    mixed = np.array([*clusters[:40].tolist(), *names[40:]], object)  # as a table's column may be
    assert np.isfinite(lemon(image, text, pair_distance=apart, clusters=mixed)).all()


def test_lemon_finds_swapped_captions() -> None:
    centres = _unit(8, 20)
    labels = np.repeat(np.arange(8), 25)
    vectors = [centres[labels] + 0.1 * RNG.normal(size=(200, 20)) for _ in range(2)]
    image, text = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    text[:10] = text[100:110]
    score = lemon(image, text)
    assert set(np.argsort(-score)[:10]) == set(range(10))


def test_deja_vu_by_hand() -> None:
    public = np.eye(4, dtype=np.float32)
    #        cat dog car
    shows = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    own = [[1, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    in_captions, out_captions = public[[1, 2, 3, 0]], public[[0, 2, 1, 0]]
    found = deja_vu(
        (in_captions, public), (out_captions, public), np.array(own, bool), np.array(shows, bool), 1
    )
    # Sample 0: both right, f finds both objects, g one of two. Sample 1: equal. Sample 2: f finds
    # nothing, g a dog and a cat of one dog. Sample 3 shows nothing and does not count.
    np.testing.assert_allclose(found.in_precision, [1, 1, 0, np.nan])
    np.testing.assert_allclose(found.out_precision, [1, 1, 0.5, np.nan])
    np.testing.assert_allclose(found.in_recall, [1, 1, 0, np.nan])
    np.testing.assert_allclose(found.out_recall, [0.5, 1, 1, np.nan])
    assert found.ppg == pytest.approx((0 - 1) / 3)
    assert found.prg == pytest.approx((1 - 1) / 3)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_deja_vu_is_the_loop(k: int) -> None:
    objects, public_objects = RNG.random((15, 6)) < 0.4, RNG.random((20, 6)) < 0.3
    objects[4] = False
    models = [(_unit(15, width), _unit(20, width)) for width in (5, 8)]
    gaps = np.zeros(2)
    for row in np.flatnonzero(objects.any(1)):
        found = []
        for captions, images in models:
            nearest = np.argsort(-(images @ captions[row]))[:k]
            seen = {o for n in nearest for o in np.flatnonzero(public_objects[n])}
            truth = set(np.flatnonzero(objects[row]))
            hits = len(seen & truth)
            found.append((hits / len(seen) if seen else 0, hits / len(truth)))
        gaps += np.sign(np.subtract(*found))
    gaps /= objects.any(1).sum()
    result = deja_vu(*models, objects, public_objects, k)
    assert (result.ppg, result.prg) == pytest.approx(tuple(gaps))
    same = deja_vu(models[0], models[0], objects, public_objects, k)
    assert (same.ppg, same.prg) == (0, 0)


GOOD, HELD = _unit(4, 3), _unit(2, 3)
ZERO_ROW = GOOD * (np.arange(4) != 1)[:, None]


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        (neg_clip_loss, {"image": GOOD[:1], "text": GOOD[:1]}, "at least 2"),
        (neg_clip_loss, {"text": ZERO_ROW}, "text: rows must be of norm 1"),
        (neg_clip_loss, {"temperature": -1.0}, "temperature"),
        (neg_clip_loss, {"batch_size": 1}, "batch_size: must be at least 2; got 1"),
        (neg_clip_loss, {"rounds": 0}, "rounds: must be at least 1"),
        (lemon, {"image": GOOD[:1], "text": GOOD[:1]}, "at least 2"),
        (lemon, {"text": _unit(4, 5)}, "pair_distance"),
        (lemon, {"k": 0}, "k: must be at least 1"),
        (lemon, {"k": 2.5}, "k: must be a whole number; got 2.5"),
        (lemon, {"pair_distance": np.zeros(3)}, "pair_distance: must be 4 numbers"),
        (lemon, {"pair_distance": -np.ones(4)}, "the smallest -1"),
        (lemon, {"pair_distance": np.full(4, np.nan)}, "pair_distance: .* finite"),
        (lemon, {"clusters": np.arange(3)}, "clusters: must be .4,."),
        (lemon, {"clusters": np.zeros(4)}, "clusters: must be at least two"),
        (lemon, {"clusters": np.array(["a", None, "b", "b"])}, "texts; got None in row 1; give"),
        (lemon, {"clusters": np.array([0, 1, np.nan, np.nan])}, "texts; got nan in row 2"),
        (lemon, {"clusters": ["a", "b", "c", np.nan]}, "texts; got nan in row 3"),
        (lemon, {"clusters": np.ma.masked_equal(np.arange(4), 2)}, "clusters: must not be masked"),
    ],
)
def test_wrong_settings_are_refused(measure, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**{"image": GOOD, "text": GOOD, **arguments})


@pytest.mark.parametrize("name", ["beta", "gamma", "tau1", "tau2"])
def test_wrong_lemon_weights_are_refused(name: str) -> None:
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{name}: must be finite and at least 0"):
            LemonWeights(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objects": np.ones((4, 2))}, "objects: must be a 2-d bool array; got .* float64"),
        ({"objects": np.ones((4, 3), bool)}, "public_objects: must have the 3 columns"),
        ({"objects": np.zeros((4, 2), bool)}, "objects: must hold an object"),
        ({"objects": np.ones((5, 2), bool)}, r"in_model\[0\]: must hold 5 rows; got 4"),
        ({"public_objects": np.ones((3, 2), bool)}, r"in_model\[1\]: must hold 3 rows; got 2"),
        ({"in_model": (GOOD, _unit(2, 4))}, r"in_model\[1\]: must have width 3; got 4"),
        ({"out_model": (GOOD, HELD * 2)}, r"out_model\[1\]: rows must be of norm 1"),
        ({"k": 0}, r"k: must be in \[1, 2\]; got 0"),
        ({"k": 3}, r"k: must be in \[1, 2\]; got 3"),
    ],
)
def test_wrong_objects_are_refused(arguments: dict, message: str) -> None:
    right = {
        "in_model": (GOOD, HELD),
        "out_model": (GOOD, HELD),
        "objects": np.ones((4, 2), bool),
        "public_objects": np.ones((2, 2), bool),
        "k": 1,
    }
    with pytest.raises(ValueError, match=message):
        deja_vu(**{**right, **arguments})
