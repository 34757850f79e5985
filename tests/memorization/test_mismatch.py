import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from curate.memorization.mismatch import (
    DETECTORS,
    REAL,
    Detector,
    Keys,
    draw_donors,
    fit_detector,
    normalise_caption,
)


def _planted(count: int, share: float, apart: float, seed: int = 0):
    """Real pairs, a share of them mismatched, and phantoms: 4 noisy views of one score."""
    rng = np.random.default_rng(seed)
    wrong = np.zeros(2 * count, bool)
    wrong[:count] = rng.random(count) < share
    wrong[count:] = True
    phantom = np.arange(2 * count) >= count
    score = rng.normal(size=2 * count) + apart * wrong
    features = score[:, None] * [1, -1, 2, 0.5] + 0.1 * rng.normal(size=(2 * count, 4))
    folds = rng.integers(DETECTORS, size=(2 * count, 2))
    folds[:count, 1] = folds[:count, 0]
    truth = share * norm.pdf(score - apart)
    truth = truth / (truth + (1 - share) * norm.pdf(score))
    return features.astype(np.float32), phantom, folds, wrong, truth


def _fit(features: np.ndarray, phantom: np.ndarray, folds: np.ndarray) -> Detector | None:
    """Fit on phantoms of the first rung, captions all in one stratum."""
    return fit_detector(features, np.ones(len(features)), np.where(phantom, 0, REAL), folds)


def _probabilities(detector: Detector, features: np.ndarray, folds: np.ndarray):
    return detector.probabilities(features, np.ones(len(features)), folds)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_share_and_probability_are_recovered(share: float) -> None:
    features, phantom, folds, wrong, truth = _planted(6000, share, 3.0)
    detector = _fit(features, phantom, folds)
    assert detector is not None
    assert abs(detector.share - share) < 0.02 + 3 * detector.share_stderr
    probability, stderr = _probabilities(detector, features, folds[:, 0])
    real = ~phantom
    assert abs(probability[real].mean() - share) < 0.03
    assert abs(probability[real] - truth[real]).mean() < 0.03
    assert roc_auc_score(wrong[real], probability[real]) > 0.97
    assert (stderr >= 0).all()
    assert stderr.mean() < 0.05


def test_no_mismatch_is_found_where_there_is_none() -> None:
    features, phantom, folds, _, _ = _planted(4000, 0.0, 4.0)
    detector = _fit(features, phantom, folds)
    assert detector is not None
    probability, _ = _probabilities(detector, features[~phantom], folds[~phantom, 0])
    assert detector.share < 0.01
    assert (probability > 0.5).mean() < 0.005


def test_all_mismatched_is_found_out() -> None:
    features, phantom, folds, _, _ = _planted(2000, 1.0, 3.0)
    detector = _fit(features, phantom, folds)
    assert detector is not None
    assert detector.share > 0.85


def test_features_that_say_nothing_give_finite_numbers() -> None:
    _, phantom, folds, _, _ = _planted(500, 0.1, 3.0)
    features = np.zeros((1000, 4), np.float32)
    detector = _fit(features, phantom, folds)
    assert detector is not None
    probability, stderr = _probabilities(detector, features, folds[:, 0])
    assert np.isfinite(probability).all()
    assert np.isfinite(stderr).all()


def _fit_strata(*planted: float) -> tuple[Detector, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fit on strata of captions of so many planted; return also features, phantom, folds, bits."""
    parts = [_planted(3000, share, 3.0, seed) for seed, share in enumerate(planted)]
    features, phantom, folds, _, _ = (
        np.concatenate([part[column] for part in parts]) for column in range(5)
    )
    bits = np.repeat([1.0, 2.0, 3.0], 6000)
    detector = fit_detector(features, bits, np.where(phantom, 0, REAL), folds)
    assert detector is not None
    return detector, features, phantom, folds, bits


def test_every_stratum_of_captions_has_its_own_share() -> None:
    detector, features, phantom, folds, bits = _fit_strata(0.3, 0.02, 0.1)
    np.testing.assert_allclose(detector.shares, [0.3, 0.02, 0.1], atol=0.03)
    assert detector.share == pytest.approx(detector.shares.mean(), abs=1e-6)
    probability, _ = detector.probabilities(features, bits, folds[:, 0])
    means = [probability[~phantom & (bits == level)].mean() for level in (1, 2, 3)]
    np.testing.assert_allclose(means, [0.3, 0.02, 0.1], atol=0.03)


def test_no_stratum_is_clean_where_others_are_not() -> None:
    detector, *_ = _fit_strata(0.3, 0.0, 0.0)
    assert detector.shares[0] == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(detector.shares[1:], detector.shares[0] / 12, rtol=0.2)


def test_few_pairs_are_one_stratum() -> None:
    features, phantom, folds, _, _ = _planted(900, 0.1, 3.0)
    bits = np.random.default_rng(0).random(len(features))
    detector = fit_detector(features, bits, np.where(phantom, 0, REAL), folds)
    assert detector is not None
    assert len(detector.shares) == 1


def test_a_stratum_of_one_large_cluster_is_none() -> None:
    """Its fold left out, there would be nothing to tell a share of."""
    features, phantom, folds, _, _ = _planted(6000, 0.1, 3.0)
    rng = np.random.default_rng(0)
    bits = rng.random(len(features))
    large = np.flatnonzero(~phantom)[:2400]
    bits[large], folds[large] = bits[large] - 1, 0
    bits[phantom] = rng.choice(bits[~phantom], phantom.sum())
    detector = fit_detector(features, bits, np.where(phantom, 0, REAL), folds)
    assert detector is not None
    assert len(detector.shares) == 1
    assert detector.share == pytest.approx(0.1, abs=0.03)
    assert np.isfinite(detector.share_stderr)


def test_harder_phantoms_are_not_counted_as_mismatches() -> None:
    features, phantom, folds, _, _ = _planted(4000, 0.1, 3.0)
    rng = np.random.default_rng(1)
    # Look-alikes' captions score like sound pairs: taken for the rule they would make the share 1.
    score = rng.normal(size=4000)
    hard = score[:, None] * [1, -1, 2, 0.5] + 0.1 * rng.normal(size=(4000, 4))
    rungs = np.concatenate([np.where(phantom, 0, REAL), np.ones(4000, int)])
    every = np.concatenate([features, hard.astype(np.float32)])
    both = np.concatenate([folds, rng.integers(DETECTORS, size=(4000, 2))])
    detector = fit_detector(every, np.ones(len(every)), rungs, both)
    assert detector is not None
    assert abs(detector.share - 0.1) < 0.03


def test_too_few_phantoms_give_no_detector() -> None:
    features, phantom, folds, _, _ = _planted(50, 0.1, 3.0)
    assert _fit(features[~phantom], phantom[~phantom], folds[~phantom]) is None


def test_a_detector_survives_json() -> None:
    features, phantom, folds, _, _ = _planted(300, 0.1, 3.0)
    detector = _fit(features, phantom, folds)
    assert detector is not None
    again = Detector.from_json(json.loads(json.dumps(detector.to_json())))
    for before, after in zip(
        _probabilities(detector, features, folds[:, 0]),
        _probabilities(again, features, folds[:, 0]),
        strict=True,
    ):
        assert np.array_equal(before, after)


def test_donors_share_the_block_but_neither_cluster_nor_caption() -> None:
    rng = np.random.default_rng(0)
    bank = Keys(rng.integers(4, size=300), rng.integers(100, size=300), rng.integers(50, size=300))
    samples = Keys(*(part[:60] for part in vars(bank).values()))
    donors = draw_donors(samples, bank, rng.random((60, 20)))
    assert (donors >= 0).all()
    for row in range(60):
        assert (bank.blocks[donors[row]] == samples.blocks[row]).all()
        assert (bank.clusters[donors[row]] != samples.clusters[row]).all()
        assert (bank.captions[donors[row]] != samples.captions[row]).all()
    # Uniform draws reach every fitting partner.
    fits = (bank.blocks == samples.blocks[0]) & (bank.clusters != samples.clusters[0])
    fits &= bank.captions != samples.captions[0]
    first = Keys(*(part[:1] for part in vars(samples).values()))
    reached = draw_donors(first, bank, np.linspace(0, 1, 5000, endpoint=False)[None])
    assert set(reached[0]) == set(np.flatnonzero(fits))


def test_donors_of_the_harder_rung_are_the_most_alike() -> None:
    rng = np.random.default_rng(0)
    bank = Keys(rng.integers(4, size=300), rng.integers(100, size=300), rng.integers(50, size=300))
    samples = Keys(*(part[:40] for part in vars(bank).values()))
    likeness = rng.random((40, 300))

    def alike(rows: np.ndarray, donors: np.ndarray) -> np.ndarray:
        return likeness[rows][:, donors]

    donors = draw_donors(samples, bank, rng.random((40, 200)), alike)
    for row in range(40):
        fits = (bank.blocks == samples.blocks[row]) & (bank.clusters != samples.clusters[row])
        fits &= bank.captions != samples.captions[row]
        nearest = sorted(np.flatnonzero(fits), key=lambda other: -likeness[row, other])[:5]
        assert set(donors[row]) == set(nearest)


def test_where_all_captions_are_equal_there_are_no_donors() -> None:
    same = Keys(np.zeros(9, int), np.arange(9), np.zeros(9, int))
    assert (draw_donors(same, same, np.full((9, 2), 0.5)) == -1).all()
    nothing = draw_donors(same, same, np.full((9, 2), 0.5), lambda rows, donors: np.ones((9, 9)))
    assert (nothing == -1).all()


def test_captions_are_compared_without_case_forms_and_space() -> None:
    assert normalise_caption("  A\tＲed  Fox\n") == "a red fox"
