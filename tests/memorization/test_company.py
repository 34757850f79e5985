"""Scores of few proxies, on outcomes whose company is planted."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from curate.memorization.company import (
    COVARIATES,
    Company,
    adjust_values,
    fit_slopes,
    regression_sums,
)
from curate.memorization.folds import draw_halves
from curate.memorization.verdict import measure_memorization

COUNT, WIDTH = 1500, 24


def draw(seed: int, proxies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples in families of like vectors, and coherence that depends on who else is trained."""
    rng = np.random.default_rng(seed)
    families = rng.integers(0, COUNT // 6, COUNT)
    vectors = rng.normal(size=(COUNT // 6, WIDTH))[families] + 0.3 * rng.normal(size=(COUNT, WIDTH))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    clusters = np.arange(COUNT)
    inside = draw_halves([f"{seed} {one}" for one in clusters], proxies, seed)
    memorized = rng.gamma(2, 0.1, COUNT)
    shares = Company(vectors, clusters, inside).shares(vectors, clusters)
    alike = (families[:, None] == families) & ~np.eye(COUNT, dtype=bool)
    trained = alike.astype(float) @ inside / np.maximum(alike.sum(1), 1)[:, None]
    values = 1.5 + memorized[:, None] * inside + 0.05 * rng.normal(size=inside.shape)
    values += np.where(inside, 0.1, 0.4) * np.where(alike.any(1)[:, None], trained - 0.5, 0)
    return values, inside, memorized, shares


def adjust(values: np.ndarray, inside: np.ndarray, shares: np.ndarray) -> np.ndarray:
    slopes = fit_slopes(regression_sums(values, inside, shares))
    return adjust_values(values, inside, shares, slopes)


@pytest.mark.parametrize("proxies", [4, 8])
def test_scores_of_few_proxies_come_closer_to_the_truth(proxies: int) -> None:
    values, inside, truth, shares = draw(0, proxies)
    adjusted = adjust(values, inside, shares)
    before, spread = measure_memorization(values, inside)
    after, error = measure_memorization(adjusted, inside)
    assert ((after - truth) ** 2).mean() < 0.5 * ((before - truth) ** 2).mean()
    assert spearmanr(after, truth)[0] > spearmanr(before, truth)[0] + 0.03
    # What is left is told as truly as what was there before.
    assert np.mean(error**2) == pytest.approx(((after - truth) ** 2).mean(), rel=0.25)
    assert np.mean(error) < 0.8 * np.mean(spread)


def test_the_expectation_of_a_score_stays() -> None:
    """Over many draws of who is trained, the same sample has the same mean score."""
    found = []
    for seed in range(12):
        values, inside, truth, shares = draw(seed, 8)
        adjusted = adjust(values, inside, shares)
        found.append((measure_memorization(adjusted, inside)[0] - truth).mean())
    assert abs(np.mean(found)) < 0.003


def test_shares_are_of_neighbours_in_other_clusters() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2]]
    clusters = np.array([7, 7, 8, 9, 10])
    inside = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [1, 0]], bool)
    company = Company(vectors, clusters, inside)
    found = company.shares(vectors, clusters)
    assert found.shape == (5, 2, COVARIATES)
    assert found[2, :, 0] == pytest.approx([0, 1], abs=1e-6)  # its like in another cluster
    assert found[0, :, 0] == pytest.approx([2 / 3, 1 / 3], abs=1e-6)  # not its twin; no like
    assert found.sum(1) == pytest.approx(1)
    alone = Company(vectors[:2], clusters[:2], inside[:2]).shares(vectors[:1], clusters[:1])
    assert (alone == 0.5).all()
    nobody = Company(vectors[:0], clusters[:0], inside[:0]).shares(vectors[:1], clusters[:1])
    assert (nobody == 0.5).all()


def test_no_bit_of_a_share_depends_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(300, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters, inside = np.arange(300), rng.random((300, 8)) < 0.5
    order = rng.permutation(300)
    whole = Company(vectors, clusters, inside).shares(vectors, clusters)
    mixed = Company(vectors[order], clusters[order], inside[order])
    assert (mixed.shares(vectors[order[:70]], clusters[order[:70]]) == whole[order[:70]]).all()


def test_sums_of_parts_add_up_and_what_is_unknown_stays_so() -> None:
    values, inside, _, shares = draw(1, 6)
    values[5] = np.nan
    whole = regression_sums(values, inside, shares)
    parts = [
        regression_sums(values[rows], inside[rows], shares[rows])
        for rows in (slice(0, 700), slice(700, None))
    ]
    assert sum(parts) == pytest.approx(whole)
    adjusted = adjust(values, inside, shares)
    assert np.isnan(adjusted[5]).all()
    assert np.isfinite(np.delete(adjusted, 5, axis=0)).all()


def test_two_proxies_are_left_as_they_are() -> None:
    values, inside, _, shares = draw(2, 2)
    assert (adjust(values, inside, shares) == values).all()
