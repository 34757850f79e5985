"""Measures over planted embeddings, of two and of three modalities."""

from pathlib import Path

import numpy as np
import pytest

from curate.audit.measures import FEW_CLUSTERS, Embeddings, estimate, measure
from curate.audit.models import embed, list_checkpoints, number_steps
from curate.errors import InputError
from curate.memorization.metrics import cmc

NAMES = ("image", "text", "sound")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def planted(pull: float, modalities: int = 2, count: int = 80, seed: int = 0) -> Embeddings:
    """Modalities that agree by .5, of candidates by `pull` more."""
    rng = np.random.default_rng(seed)

    def side(strength: float) -> dict[str, np.ndarray]:
        core = rng.standard_normal((count, 24))
        return {
            name: unit(strength * core + rng.standard_normal(core.shape))
            for name in NAMES[:modalities]
        }

    return Embeddings(side(0.5 + pull), side(0.5))


@pytest.mark.parametrize("modalities", [2, 3])
def test_what_only_the_model_has_seen_is_memorized(modalities: int) -> None:
    found = measure(planted(1, modalities), planted(0, modalities, seed=1))
    mean = found.estimates["memorization"]
    assert mean.low > 0
    assert mean.p_value < 1e-6
    assert mean.share_positive > 0.9
    assert found.auc > 0.85
    assert found.memorized.mean() > 0.3
    assert found.warnings == []
    assert ("clipmem" in found.scores) == (modalities == 2)
    held_out = found.estimates["multimem_held_out"]
    assert held_out.low < 0 < held_out.high


@pytest.mark.parametrize("with_reference", [True, False])
def test_nothing_is_found_where_nothing_was_memorized(with_reference: bool) -> None:
    means = []
    for seed in range(20):
        reference = planted(0, seed=100 + seed) if with_reference else None
        found = measure(planted(0, seed=seed), reference)
        means.append(found.estimates["memorization"])
        assert found.memorized.mean() < 0.15
    # Of twenty intervals of 95 % one misses; four do by chance once in sixty times.
    assert sum(not one.low < 0 < one.high for one in means) < 4
    assert abs(np.mean([one.mean for one in means])) < 0.02


def test_without_a_reference_held_out_samples_say_what_is_nothing() -> None:
    found = measure(planted(1))
    assert found.estimates["memorization"].low > 0
    assert set(found.scores) == {"memorization", "alignment", "p_value"}
    assert abs(found.held_out.mean()) < 1e-12
    assert np.median(found.scores["p_value"]) < 0.05
    assert found.scores["p_value"].min() >= 1 / 81


def test_held_out_samples_are_compared_with_the_others_of_them() -> None:
    given = planted(0, count=9)
    held = list(given.held_out.values())
    expected = [
        cmc([one[[row]] for one in held], [np.delete(one, row, 0) for one in held])[0]
        for row in range(9)
    ]
    found = measure(given).held_out
    np.testing.assert_allclose(found, np.array(expected) - np.mean(expected), atol=1e-12)


def test_clusters_widen_the_interval() -> None:
    given = planted(1)
    doubled = Embeddings(
        {name: np.repeat(rows, 2, axis=0) for name, rows in given.candidates.items()},
        given.held_out,
    )
    names = [str(row // 2) for row in range(160)]
    apart = measure(doubled).estimates["memorization"]
    joined = measure(doubled, clusters=names).estimates["memorization"]
    assert joined.mean == apart.mean
    assert joined.clusters == 80
    assert joined.stderr > apart.stderr


def test_a_reference_that_has_seen_the_candidates_is_told() -> None:
    found = measure(planted(1), planted(1, seed=1))
    assert len(found.warnings) == 1
    assert "probably seen them" in found.warnings[0]
    assert "sign test" in found.warnings[0]


def test_a_small_panel_is_told() -> None:
    found = measure(planted(1, count=FEW_CLUSTERS - 1))
    assert [line.partition(":")[0] for line in found.warnings] == [
        "29 clusters of candidates",
        "29 held-out samples",
    ]


def test_parts() -> None:
    given = planted(1)
    found = measure(given)
    ids = np.arange(80)
    parts = {"all": ids >= 0, "one": ids == 3, "none": ids < 0}
    split = found.split(ids, parts)
    assert split["all"]["memorization"]["mean"] == found.estimates["memorization"].mean
    assert split["one"] == {"samples": 1, "memorized": found.memorized[3], "memorization": None}
    assert split["none"] == {"samples": 0, "memorized": None, "memorization": None}


def test_unknown_values_are_left_out() -> None:
    values = np.array([1.0, 2.0, np.nan, 3.0])
    found = estimate(values, np.arange(4))
    assert found is not None
    assert (found.samples, found.mean) == (3, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, h: (c | {"text": c["text"][:, :9]}, h),
            "candidates text: must be 24 numbers wide",
        ),
        (lambda c, h: (c, {n: r[:, :9] for n, r in h.items()}), "held-out image: must be 24"),
        (lambda c, h: (c, {"image": h["image"]}), "must hold the modalities image, text"),
        (lambda c, h: ({"image": c["image"]}, {"image": h["image"]}), "at least 2 modalities"),
        (lambda c, h: (c, {n: r[:1] for n, r in h.items()}), "at least 2 samples"),
        (lambda c, h: (c | {"text": c["text"] * 2}, h), "of norm 1"),
        (lambda c, h: (c | {"text": c["text"][1:]}, h), "candidates text: must fit"),
    ],
)
def test_what_does_not_fit(change, message: str) -> None:  # type: ignore[no-untyped-def]
    given = planted(0)
    with pytest.raises(InputError, match=message):
        Embeddings(*change(dict(given.candidates), dict(given.held_out)))


def test_models_must_hold_the_same_samples() -> None:
    with pytest.raises(InputError, match="of the model's 80 candidates and 80 held-out"):
        measure(planted(0), planted(0, count=70))
    with pytest.raises(InputError, match="2 duplicate clusters"):
        measure(planted(0), clusters=["same"] * 80)


def test_callables_embed() -> None:
    given = planted(1)
    calls = {"image": lambda rows: 3 * rows, "text": lambda rows: rows}
    found = embed(calls, given.candidates, given.held_out, batch=7)
    np.testing.assert_allclose(found.candidates["image"], given.candidates["image"], rtol=1e-6)
    with pytest.raises(InputError, match="text is missing"):
        embed(calls, {"image": given.candidates["image"]}, given.held_out)
    calls["text"] = lambda rows: 0 * rows
    with pytest.raises(InputError, match="must be finite and not zero; row 0"):
        embed(calls, given.candidates, given.held_out)


def test_checkpoints_in_the_order_of_their_numbers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for number in (10, 9, 1):
        (tmp_path / f"epoch_{number}.pt").touch()
    found = list_checkpoints([str(tmp_path / "*.pt")])
    assert [path.rpartition("_")[2] for path in found] == ["1.pt", "9.pt", "10.pt"]
    with pytest.raises(InputError, match="matches none"):
        list_checkpoints([str(tmp_path / "*.safetensors")])


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch_5.pt", "epoch_10.pt"], [5, 10]),
        (["epoch_5.pt", "epoch_10.pt", "epoch_latest.pt"], [0, 1, 2]),
        (["one/epoch_1.pt", "one/epoch_2.pt", "two/epoch_1.pt"], [0, 1, 2]),
        (["a.pt"], [0]),
    ],
)
def test_steps_rise_as_trackers_want_them(
    names: list[str], steps: list[int], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert number_steps([str(tmp_path / name) for name in names]) == steps


def test_intervals_of_many_candidates_allow_for_few_held_out_samples() -> None:
    def drawn(seed: int) -> Embeddings:
        """Modalities in a cone each, as those of trained models are."""
        rng = np.random.default_rng(seed)
        sides = []
        for count in (600, 40):
            core = rng.standard_normal((count, 24))
            rows = (unit(2 + core + rng.standard_normal(core.shape)) for _ in range(2))
            sides.append(dict(zip(NAMES, rows, strict=False)))
        return Embeddings(*sides)

    inside = dict.fromkeys(("multimem", "clipmem"), 0)
    for seed in range(40):
        estimates = measure(drawn(seed), drawn(1000 + seed)).estimates
        for name in inside:
            inside[name] += estimates[name].low < 0 < estimates[name].high
    # Without it half of them miss; of 40 intervals of 95 % seven miss once in 400 times.
    assert min(inside.values()) > 33


def test_copies_among_candidates_make_nothing_surer() -> None:
    low = 0
    for seed in range(40):
        found = planted(0, count=100, seed=seed)
        copied = {name: np.repeat(rows[:20], 5, axis=0) for name, rows in found.candidates.items()}
        clusters = np.repeat(np.arange(20), 5).astype(str).tolist()
        low += measure(Embeddings(copied, found.held_out), None, clusters).auc_p_value < 0.05
    assert low < 7  # counted one by one, a third are
