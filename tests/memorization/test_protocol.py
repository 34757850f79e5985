from collections import Counter

import numpy as np
import pytest

from curate.memorization.protocol import (
    SETS,
    draw_sets,
    sign_test,
    summarize,
    training_masks,
)

RNG = np.random.default_rng(0)


def _clusters(count: int, largest: int = 5) -> list[str]:
    sizes = RNG.integers(1, largest + 1, size=count)
    return [f"c{cluster}" for cluster in np.repeat(np.arange(count), sizes)]


def test_sets_are_whole_clusters_of_the_sizes_asked_for() -> None:
    clusters = _clusters(2000)
    sets = draw_sets(clusters, 3000, 500, seed=0)
    counts = Counter(sets.tolist())
    assert counts["candidate"] == counts["independent"]
    assert 495 <= counts["candidate"] <= 500
    assert 2995 <= counts["shared"] <= 3000
    assert counts["external"] == len(clusters) - sum(counts[name] for name in SETS[:3])
    assert len({(c, s) for c, s in zip(clusters, sets, strict=True)}) == len(set(clusters))


def test_candidates_and_independents_have_clusters_of_the_same_sizes() -> None:
    clusters = np.array(_clusters(2000))
    sets = draw_sets(clusters.tolist(), 3000, 500, seed=1)
    sizes = [
        sorted(Counter(clusters[sets == name].tolist()).values())
        for name in ("candidate", "independent")
    ]
    assert sizes[0] == sizes[1]
    assert len(set(sizes[0])) == 5


def test_sets_depend_on_seed_and_cluster_alone() -> None:
    clusters = _clusters(500)
    sets = draw_sets(clusters, 600, 200, seed=3)
    assert np.array_equal(sets, draw_sets(clusters, 600, 200, seed=3))
    order = RNG.permutation(len(clusters))
    shuffled = draw_sets([clusters[row] for row in order], 600, 200, seed=3)
    assert np.array_equal(shuffled, sets[order])
    assert (draw_sets(clusters, 600, 200, seed=4) != sets).mean() > 0.3


def test_who_becomes_candidate_is_uniform_over_seeds() -> None:
    clusters = [str(number) for number in range(40)]
    drawn = np.array([draw_sets(clusters, 10, 10, seed) for seed in range(400)])
    for name in SETS:
        assert abs((drawn == name).mean(0) - 0.25).max() < 0.1


def test_a_cluster_larger_than_the_room_is_passed_over() -> None:
    clusters = ["big"] * 50 + [str(number) for number in range(100)]
    for seed in range(5):
        sets = draw_sets(clusters, 40, 20, seed)
        assert set(sets[:50]) == {"external"}
        assert Counter(sets[50:].tolist()) == dict(zip(SETS, (40, 20, 20, 20), strict=True))
        assert set(draw_sets(clusters, 60, 20, seed)[:50]) <= {"shared", "external"}


@pytest.mark.parametrize(
    ("clusters", "shared", "candidates", "message"),
    [
        (["a", "b", "c", "d"], 0, 1, "shared: must be at least 1"),
        (["a", "b", "c", "d"], 1, 0, "candidates: must be at least 1"),
        (["a", "b", "c"], 1, 1, "more than 3 samples"),
        (["a"] * 9 + ["b"] * 8 + ["c"] * 7, 2, 7, "candidates: .* got 0 in pairs"),
        (["a", "b"] + ["c"] * 9, 2, 1, "shared: .* got 0 in clusters that fit"),
        (["a", "b", "c", "c", "c"], 2, 1, "shared"),
        (["a", "a", "b", "b", "c", "c"], 2, 1, "candidates"),
    ],
)
def test_sets_that_clusters_cannot_fill_are_refused(clusters, shared, candidates, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_sets(clusters, shared, candidates, 0)


def test_both_models_train_on_the_shared_samples() -> None:
    sets = np.array(SETS)
    in_mask, out_mask = training_masks(sets)
    assert in_mask.tolist() == [True, True, False, False]
    assert out_mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("values", "p_value", "share"),
    [
        ([1, 1, 1, 1, 1], 2 / 32, 1.0),
        ([-1, -1, -1], 2 / 8, 0.0),
        ([1, 1, 1, 1, 1, 1, 1, 1, -1, -1], 2 * (1 + 10 + 45) / 1024, 0.8),
        ([3, -2], 1.0, 0.5),
        ([0, 0, 5, 0], 1.0, 1.0),
        ([0, 0], 1.0, 0.5),
    ],
)
def test_sign_test_agrees_with_the_binomial_by_hand(values, p_value, share) -> None:
    found = sign_test(np.array(values))
    assert found.p_value == pytest.approx(p_value)
    assert found.share_positive == share
    assert found.count == np.count_nonzero(values)


@pytest.mark.parametrize("values", [[1.0, np.nan], [np.inf], [[1.0]]])
def test_sign_test_refuses_what_has_no_sign(values) -> None:
    with pytest.raises(ValueError, match="finite"):
        sign_test(np.array(values))


def _measure(candidate: float, independent: float, shared: float, external: float, count=400):
    sets = np.repeat(np.array(["candidate", "independent", "shared", "external"]), count)
    centre = np.repeat([candidate, independent, shared, external], count)
    rng = np.random.default_rng(5)
    return centre + 0.1 * rng.normal(size=len(sets)), sets, [str(n) for n in range(len(sets))]


@pytest.mark.parametrize(
    ("means", "correct"),
    [
        ((0.332, -0.318, -0.005, 0.0), True),
        ((0.3, -0.3, 0.0, 0.0), True),
        ((0.0, 0.0, 0.0, 0.0), False),
        ((-0.3, 0.3, 0.0, 0.0), False),
        ((0.3, -0.1, 0.0, 0.0), False),
        ((0.3, -0.3, 0.1, 0.0), False),
        ((0.3, -0.3, 0.0, -0.1), False),
        ((0.3, 0.0, 0.0, 0.0), False),
    ],
)
def test_the_signature_is_recognised(means, correct: bool) -> None:
    assert summarize(*_measure(*means)).correct is correct


def test_a_summary_of_singletons_is_the_usual_one() -> None:
    scores, sets, clusters = _measure(0.3, -0.3, 0.0, 0.0)
    found = summarize(scores, sets, clusters).sets["candidate"]
    mine = scores[sets == "candidate"]
    assert (found.samples, found.clusters) == (400, 400)
    assert found.mean == pytest.approx(mine.mean())
    assert found.stderr == pytest.approx(mine.std(ddof=1) / 20)
    assert found.share_positive == (mine > 0).mean()
    assert found.p_value < 1e-6


def test_twins_do_not_make_the_standard_error_smaller() -> None:
    scores, sets, clusters = _measure(0.3, -0.3, 0.0, 0.0)
    once = summarize(scores, sets, clusters)
    thrice = summarize(np.tile(scores, 3), np.tile(sets, 3), clusters * 3)
    for name in SETS:
        assert thrice.sets[name].samples == 3 * once.sets[name].samples
        assert thrice.sets[name].stderr == pytest.approx(once.sets[name].stderr)
        assert thrice.sets[name].p_value == pytest.approx(once.sets[name].p_value)


def test_tolerance_and_slack_decide_what_is_about_equal() -> None:
    measured = _measure(0.3, -0.27, 0.0, 0.0)
    assert not summarize(*measured, slack=0.05, tolerance=1.0).correct
    assert summarize(*measured, slack=0.2, tolerance=1.0).correct
    assert summarize(*measured, slack=0.0, tolerance=8.0).correct


def test_summaries_of_what_does_not_fit_are_refused() -> None:
    scores, sets, clusters = _measure(0.3, -0.3, 0.0, 0.0, count=4)
    with pytest.raises(ValueError, match="scores: must be"):
        summarize(scores[:-1], sets, clusters)
    with pytest.raises(ValueError, match="finite"):
        summarize(np.where(scores > 0.2, np.nan, scores), sets, clusters)
    with pytest.raises(ValueError, match="'other'"):
        summarize(scores, np.where(sets == "shared", "other", sets), clusters)
    with pytest.raises(ValueError, match="two clusters"):
        summarize(scores, np.where(sets == "shared", "external", sets), clusters)
    with pytest.raises(ValueError, match="one in two"):
        summarize(scores, sets, [*clusters[:-1], "0"])
