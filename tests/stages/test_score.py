"""The score stage without the engine, on two noisy views of hidden numbers."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from curate import storage
from curate.memorization.folds import draw_masks
from curate.memorization.mismatch import RUNGS
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.score import Score
from curate.stages.score_inputs import read_phantoms
from tests.stages.noisy_views import (
    COUNT,
    Pairs,
    lay_out,
    make_pairs,
    read_column,
    run_steps,
    unit_rows,
)

#: Of what all tests look at; gone when they end.
_HOME = TemporaryDirectory()
STAGE = Score(proxies=4, epochs=3)


@cache
def _scored() -> tuple[Pairs, Room, pa.Table, dict[str, float]]:
    """The planted set, scored in one shard."""
    samples = make_pairs()
    room = lay_out(Path(_HOME.name), samples, STAGE, shards=1)
    return samples, room, *run_steps(room)


def test_swapped_captions_are_found_and_the_probability_means_what_it_says() -> None:
    samples, _, table, counts = _scored()
    assert table.drop_columns("uid").schema.equals(select_schema(STAGE.writes()))
    assert table["uid"].to_pylist() == samples.uids
    probability = read_column(table, "mismatch_probability")
    assert roc_auc_score(samples.swapped, probability) > 0.97
    assert abs(probability.mean() - samples.swapped.mean()) < 0.04
    assert (probability[samples.swapped] > 0.3).mean() > 0.8
    assert (probability[~samples.swapped] > 0.3).mean() < 0.05
    out = read_column(table, "alignment_out")
    assert out[~samples.swapped].mean() > out[samples.swapped].mean() + 0.3
    assert counts["diverged"] == 0


def test_alignments_are_means_over_the_committed_embeddings() -> None:
    samples, room, table, _ = _scored()
    projections = storage.read_table(room.path("projections", "00000.parquet"))
    masks = draw_masks(samples.clusters, 4, STAGE.seed)
    cosines = np.zeros((COUNT, 4))
    for proxy in range(4):
        image, text = (
            storage.read_vectors(projections[f"{side}_{proxy}"])[0].astype(float)
            for side in ("image", "text")
        )
        cosines[:, proxy] = (image * text).sum(1)
    for row in range(0, COUNT, 37):
        inside, outside = cosines[row, masks[row]], cosines[row, ~masks[row]]
        expected = {
            "alignment_in": inside.mean(),
            "alignment_out": outside.mean(),
            "holdout_gap": inside.mean() - outside.mean(),
            "alignment_in_stderr": inside.std(ddof=1) / 2**0.5,
            "alignment_out_stderr": outside.std(ddof=1) / 2**0.5,
        }
        for name, value in expected.items():
            assert table[name][row].as_py() == pytest.approx(value, abs=2e-3)


def test_captions_of_many_pictures_say_little_and_are_not_called_wrong(tmp_path: Path) -> None:
    samples = make_pairs(share=0.0)
    rng = np.random.default_rng(3)
    shared = np.isin(samples.clusters, rng.permutation(np.unique(samples.clusters))[:60])
    samples.captions = [
        "untitled picture" if alike else caption
        for alike, caption in zip(shared, samples.captions, strict=True)
    ]
    samples.text[shared] = unit_rows(rng.normal(size=(1, samples.text.shape[1])))
    table, _ = run_steps(lay_out(tmp_path, samples, STAGE, shards=2))
    information = read_column(table, "caption_information")
    assert ((information >= 0) & (information <= 1)).all()
    # 60 of some 400 clusters: log(400 / 60) / log(400) is about a third.
    assert information[shared].max() < 0.4
    assert np.median(information[~shared]) > 0.8
    assert (read_column(table, "mismatch_probability")[shared] > 0.5).mean() < 0.1


def test_phantoms_are_kept_beside_the_scores() -> None:
    _, room, table, _ = _scored()
    rungs, probability = read_phantoms(room)
    assert set(rungs) == set(RUNGS)
    assert ((probability >= 0) & (probability <= 1)).all()
    # They are planted anew for every run and never among the samples.
    real = read_column(table, "mismatch_probability")
    assert np.median(probability[rungs == "random"]) > np.quantile(real, 0.9)


def test_what_this_kind_of_proxy_cannot_tell_stays_null() -> None:
    _, _, table, _ = _scored()
    for name in ("memorization_score", "memorization_score_stderr", "memorization_kind"):
        assert table[name].null_count == COUNT


def test_facts_tell_share_losses_and_self_calibration() -> None:
    samples, room, _, _ = _scored()
    facts = room.stage.facts(room)
    assert facts["usable"] == COUNT
    assert abs(facts["mismatch"]["share"] - samples.swapped.mean()) < 0.04
    caught = facts["mismatch"]["phantoms_above_half"]
    assert caught["random"] > 0.5
    assert caught["random"] >= caught["near_image"]
    assert len(facts["proxies"]) == 4
    sizes = [proxy["samples"] for proxy in facts["proxies"]]
    assert sizes[0] + sizes[1] == sizes[2] + sizes[3] == COUNT
    for proxy in facts["proxies"]:
        assert proxy["last_loss"] < proxy["first_loss"]


def test_order_and_shards_change_nothing(tmp_path: Path) -> None:
    samples, _, expected, _ = _scored()
    order = np.random.default_rng(1).permutation(COUNT)
    table, _ = run_steps(lay_out(tmp_path, samples.take(order), STAGE, shards=8))
    assert table.sort_by("uid").equals(expected.sort_by("uid"))


def test_rows_without_vectors_or_caption_are_null_and_change_nothing_else(tmp_path: Path) -> None:
    _, _, expected, _ = _scored()
    spoilt = make_pairs()
    more = spoilt.take(np.arange(6))
    spoilt.uids += [f"f{number:031x}" for number in range(6)]
    spoilt.clusters += spoilt.uids[-6:]
    more.image[0], more.text[1], more.image[2] = np.nan, 0, np.inf
    spoilt.image = np.concatenate([spoilt.image, more.image])
    spoilt.text = np.concatenate([spoilt.text, more.text])
    spoilt.captions += ["one", "two", "three", None, " ", "six"]
    spoilt.valid = np.append(spoilt.valid, [True, True, True, True, True, False])
    spoilt.swapped = np.append(spoilt.swapped, [False] * 6)
    table, _ = run_steps(lay_out(tmp_path, spoilt, STAGE, shards=2))
    for name in STAGE.writes():
        assert table[name][COUNT:].null_count == 6
    assert table.slice(0, COUNT).equals(expected)


def test_too_few_samples_are_not_scored(tmp_path: Path) -> None:
    room = lay_out(tmp_path, make_pairs(100), STAGE, shards=2)
    table, counts = run_steps(room)
    assert counts["too_few_samples"] == 1
    assert all(table[name].null_count == 100 for name in STAGE.writes())
    assert room.stage.facts(room) == {"usable": 100, "scored": False}


def test_an_empty_shard_is_no_obstacle(tmp_path: Path) -> None:
    samples = make_pairs(30)
    stage = Score(proxies=2, epochs=1, min_samples=20)
    room = lay_out(tmp_path, samples, stage, shards=32)
    table, _ = run_steps(room)
    assert table["rarity"].null_count == 0


def test_shards_of_which_nothing_is_used_are_no_obstacle(tmp_path: Path) -> None:
    """Of the first no sample is scored, of others none is drawn to fit the detector."""
    samples = make_pairs(900)
    samples.valid[:20] = False
    stage = Score(proxies=2, epochs=1, detector_samples=100)
    room = lay_out(tmp_path, samples, stage, shards=45)
    table, _ = run_steps(room)
    for name in ("rarity", "mismatch_probability"):
        assert table[name][:20].null_count == table[name].null_count == 20


def test_any_seed_that_is_accepted_is_used(tmp_path: Path) -> None:
    stage = Score(proxies=2, epochs=1, min_samples=20, seed=2**64 - 1)
    table, _ = run_steps(lay_out(tmp_path, make_pairs(30), stage, shards=1))
    assert table["rarity"].null_count == 0


def test_equal_captions_leave_the_mismatch_unknown(tmp_path: Path) -> None:
    samples = make_pairs(200)
    samples.captions = ["the same"] * 200
    samples.text[:] = samples.text[0]
    table, counts = run_steps(
        lay_out(tmp_path, samples, Score(proxies=2, epochs=1, min_samples=100), 1)
    )
    assert counts["no_phantoms"] == 1
    assert table["mismatch_probability"].null_count == 200
    assert np.isfinite(read_column(table, "alignment_out")).all()
    assert np.isfinite(read_column(table, "rarity")).all()
    assert table["alignment_out_stderr"].null_count == 200


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_clean_and_hopeless_sets_are_told_apart(tmp_path: Path, share: float) -> None:
    stage = Score(proxies=2, epochs=2)
    table, _ = run_steps(lay_out(tmp_path, make_pairs(700, share), stage, 1))
    probability = read_column(table, "mismatch_probability")
    if share == 0:
        assert (probability > 0.5).mean() < 0.02
    else:
        assert probability.mean() > 0.6


def test_one_cluster_of_more_than_half_is_survived(tmp_path: Path) -> None:
    samples = make_pairs(300)
    samples.clusters[:200] = [samples.clusters[0]] * 200
    table, _ = run_steps(lay_out(tmp_path, samples, Score(proxies=2, epochs=1, min_samples=100), 1))
    for name in ("alignment_in", "alignment_out", "mismatch_probability", "rarity"):
        assert np.isfinite(read_column(table, name)).all()


@pytest.mark.parametrize("widths", [(1, 1), (1, 700)])
def test_narrow_and_wide_vectors_are_survived(tmp_path: Path, widths: tuple[int, int]) -> None:
    samples = make_pairs(200, widths=widths)
    table, _ = run_steps(lay_out(tmp_path, samples, Score(proxies=2, epochs=1, min_samples=100), 1))
    for name in ("alignment_in", "alignment_out", "mismatch_probability", "rarity"):
        assert np.isfinite(read_column(table, name)).all()


def test_a_shared_space_is_used_where_there_is_one(tmp_path: Path) -> None:
    samples = make_pairs(600, widths=(32, 32))
    hidden = samples.image[~samples.swapped].astype("f4")
    noise = np.random.default_rng(0).normal(size=hidden.shape)
    samples.text[~samples.swapped] = unit_rows(hidden + 0.1 * noise)
    samples.clip_score = True
    room = lay_out(tmp_path, samples, Score(proxies=2, epochs=1), 1)
    table, _ = run_steps(room)
    assert storage.read_json(room.path("bank.json"))["shared"] == "vectors"
    evidence = storage.read_table(room.path("evidence", "00000.parquet"))
    cosines = (samples.image.astype("f4") * samples.text.astype("f4")).sum(1)
    np.testing.assert_allclose(read_column(evidence, "shared_cosine"), cosines, atol=2e-3)
    assert roc_auc_score(samples.swapped, read_column(table, "mismatch_probability")) > 0.97


def test_names_of_what_the_image_tower_sees_are_used_where_it_has_some(tmp_path: Path) -> None:
    samples = make_pairs(300)
    room = lay_out(tmp_path, samples, Score(proxies=2, epochs=1, min_samples=100), 1)
    rng = np.random.default_rng(0)
    folder = room.folders["score"]
    storage.commit_array(
        f"{folder}/concepts/classifier.npy", rng.normal(size=(20, 48)).astype("f4")
    )
    storage.commit_array(f"{folder}/concepts/names.npy", rng.normal(size=(20, 32)).astype("f4"))
    table, _ = run_steps(room)
    assert storage.read_json(room.path("bank.json"))["shared"] == "concepts"
    evidence = storage.read_table(room.path("evidence", "00000.parquet"))
    assert np.unique(read_column(evidence, "shared_cosine")).size > 200
    assert table["mismatch_probability"].null_count == 0


def test_caps_keep_every_sample_scored(tmp_path: Path) -> None:
    stage = Score(proxies=4, epochs=2, max_train_samples=150, bank_size=300, detector_samples=200)
    samples = make_pairs()
    room = lay_out(tmp_path, samples, stage, 3)
    table, _ = run_steps(room)
    for proxy in stage.facts(room)["proxies"]:
        assert proxy["samples"] < 200
    trained = table["alignment_in"].is_valid().to_numpy().mean()
    assert 0.2 < trained < 0.45
    for name in ("alignment_out", "mismatch_probability", "rarity"):
        assert table[name].null_count == 0
    assert roc_auc_score(samples.swapped, read_column(table, "mismatch_probability")) > 0.9


def test_an_odd_number_of_proxies_is_refused() -> None:
    with pytest.raises(ValidationError, match="even"):
        Score(proxies=3)
