import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from curate.memorization.mismatch import (
    DETECTORS,
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


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_share_and_probability_are_recovered(share: float) -> None:
    features, phantom, folds, wrong, truth = _planted(6000, share, 3.0)
    detector = fit_detector(features, phantom, folds)
    assert detector is not None
    assert abs(detector.share - share) < 0.02 + 3 * detector.share_stderr
    probability, stderr = detector.probabilities(features, folds[:, 0])
    real = ~phantom
    assert abs(probability[real].mean() - share) < 0.03
    assert abs(probability[real] - truth[real]).mean() < 0.03
    assert roc_auc_score(wrong[real], probability[real]) > 0.97
    assert (stderr >= 0).all()
    assert stderr.mean() < 0.05


def test_no_mismatch_is_found_where_there_is_none() -> None:
    features, phantom, folds, _, _ = _planted(4000, 0.0, 4.0)
    detector = fit_detector(features, phantom, folds)
    assert detector is not None
    probability, _ = detector.probabilities(features[~phantom], folds[~phantom, 0])
    assert detector.share < 0.01
    assert (probability > 0.5).mean() < 0.005


def test_all_mismatched_is_found_out() -> None:
    features, phantom, folds, _, _ = _planted(2000, 1.0, 3.0)
    detector = fit_detector(features, phantom, folds)
    assert detector is not None
    assert detector.share > 0.85


def test_features_that_say_nothing_give_finite_numbers() -> None:
    _, phantom, folds, _, _ = _planted(500, 0.1, 3.0)
    features = np.zeros((1000, 4), np.float32)
    detector = fit_detector(features, phantom, folds)
    assert detector is not None
    probability, stderr = detector.probabilities(features, folds[:, 0])
    assert np.isfinite(probability).all()
    assert np.isfinite(stderr).all()


def test_too_few_phantoms_give_no_detector() -> None:
    features, phantom, folds, _, _ = _planted(50, 0.1, 3.0)
    assert fit_detector(features[~phantom], phantom[~phantom], folds[~phantom]) is None


def test_a_detector_survives_json() -> None:
    features, phantom, folds, _, _ = _planted(300, 0.1, 3.0)
    detector = fit_detector(features, phantom, folds)
    assert detector is not None
    again = Detector.from_json(json.loads(json.dumps(detector.to_json())))
    for before, after in zip(
        detector.probabilities(features, folds[:, 0]),
        again.probabilities(features, folds[:, 0]),
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


def test_where_all_captions_are_equal_there_are_no_donors() -> None:
    same = Keys(np.zeros(9, int), np.arange(9), np.zeros(9, int))
    assert (draw_donors(same, same, np.full((9, 2), 0.5)) == -1).all()


def test_captions_are_compared_without_case_forms_and_space() -> None:
    assert normalise_caption("  A\tＲed  Fox\n") == "a red fox"
