"""The score stage at the ends of its range: what cannot be told is null and said, the rest sane."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from curate import storage
from curate.engine.summary import describe_run
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.score import Score
from curate.stages.select import Select
from tests.stages import squares
from tests.stages.noisy_views import (
    Pairs,
    lay_out,
    make_pairs,
    read_column,
    run_steps,
    unit_rows,
)

COUNT = 500
STAGE = Score(proxies=4, epochs=2)
QUICK = Score(proxies=2, epochs=1)

ALIGNMENT = {"alignment_in", "alignment_out", "holdout_gap"}
ALIGNMENT_ERRORS = {f"{name}_stderr" for name in ALIGNMENT}
MISMATCH = {"mismatch_probability", "mismatch_probability_stderr"}
ALWAYS = {"rarity", "caption_information"}
EVERY = ALIGNMENT | ALIGNMENT_ERRORS | MISMATCH | ALWAYS
RANGES = {
    "alignment_in": (-1, 1),
    "alignment_out": (-1, 1),
    "holdout_gap": (-2, 2),
    "holdout_gap_stderr": (0, 2),
}

UNSURE = "captions look as if drawn at random"
NOTHING_KEPT = "no sample is sure enough for select.max_mismatch_rate"


def score(
    folder: Path, samples: Pairs, stage: Score, unknown: set[str] = frozenset(), shards: int = 1
) -> tuple[Room, pa.Table, dict[str, float]]:
    """Run the stage; check that columns are null as a whole or hold sane numbers throughout."""
    room = lay_out(folder, samples, stage, shards)
    table, counts = run_steps(room)
    assert table["uid"].to_pylist() == samples.uids
    assert table.drop_columns("uid").schema.equals(select_schema(stage.writes()))
    nulls = {name for name in EVERY if table[name].null_count == len(table)}
    assert nulls == unknown
    for name in EVERY:
        # A NaN that is no null would pass for a number in whatever reads the table.
        values = table[name].drop_null().to_numpy()
        low, high = RANGES.get(name, (0, 1))
        assert ((values >= low) & (values <= high)).all(), name
    json.dumps(stage.facts(room), allow_nan=False)
    return room, table, counts


def decide(room: Room, samples: Pairs, **fields: Any) -> tuple[int, str]:
    """Select among the scored; return how many are kept, and what the end of the run says."""
    count, stage = len(samples.uids), Select(**fields)
    folders = {**room.folders, "pixels": f"{room.folders['score']}-pixels"}
    folders["select"] = f"{room.folders['score']}-select"
    start = 0
    for shard in room.shards():
        rows = len(room.read(shard, []))
        uids = samples.uids[start : start + rows]
        columns = {
            "uid": pa.array(uids, pa.string()),
            "ingest_reason": pa.nulls(rows, pa.string()),
            "decode_reason": pa.nulls(rows, pa.string()),
            "width": pa.array([64] * rows, pa.int32()),
            "height": pa.array([64] * rows, pa.int32()),
            "sha256": pa.array([hashlib.sha256(uid.encode()).hexdigest() for uid in uids]),
        }
        storage.commit_table(f"{folders['pixels']}/shards/{shard}.parquet", pa.table(columns))
        start += rows
    assert start == count
    origins = dict.fromkeys(columns, "pixels") | {"caption": "ingest"}
    origins |= dict.fromkeys(("mismatch_probability", "rarity"), "score")
    selecting = Room(stage, folders, origins, frozenset({"select"}))
    for step in stage.steps():
        for task in step.tasks(selecting):
            step.run(selecting, task)
    facts = {"score": room.stage.facts(room), "select": stage.facts(selecting)}
    counts = facts["select"]["counts"]
    summary = {"stages": {"ingest": {"steps": {}}}, "facts": facts, "counts": counts}
    said = describe_run({**summary, "computed": False}, str(Path(folders["score"])))
    return counts["kept"], said


def judge(table: pa.Table, samples: Pairs) -> tuple[float, float]:
    """Return AUROC of the swapped ones, and the share of sound ones that are called mismatched."""
    probability = read_column(table, "mismatch_probability")
    sound = probability[~samples.swapped]
    return roc_auc_score(samples.swapped, probability), float((sound > 0.5).mean())


def shuffle_captions(samples: Pairs, seed: int = 0) -> Pairs:
    order = np.random.default_rng(seed).permutation(len(samples.uids))
    captions = [samples.captions[row] for row in order]
    return replace(samples, text=samples.text[order], captions=captions)


def gather_in_one_cluster(samples: Pairs, share: float) -> Pairs:
    inside = round(share * len(samples.uids))
    rest = samples.clusters[inside:]
    return replace(samples, clusters=[samples.clusters[0]] * inside + rest)


@pytest.mark.parametrize("one_vector", [True, False])
def test_one_caption_on_all_leaves_the_mismatch_unknown(tmp_path: Path, one_vector: bool) -> None:
    samples = replace(make_pairs(COUNT), captions=["the same"] * COUNT)
    if one_vector:
        samples.text[:] = samples.text[0]
    room, table, counts = score(tmp_path, samples, STAGE, MISMATCH)
    assert counts["no_phantoms"] == 1
    assert counts["no_rivals"] == STAGE.proxies
    assert not any(proxy["rivals"] for proxy in STAGE.facts(room)["proxies"])
    assert table["alignment_out"].null_count == 0
    assert (read_column(table, "caption_information") == 0).all()
    kept, said = decide(room, samples, max_mismatch_rate=0.05)
    assert kept == COUNT
    assert f"Warning: {COUNT} samples have no score and were not judged" in said
    assert "score.min_samples" not in said


@pytest.mark.parametrize("sides", [["image"], ["text"], ["image", "text"]])
def test_one_vector_on_all_leaves_the_mismatch_unknown(tmp_path: Path, sides: list[str]) -> None:
    samples = make_pairs(COUNT)
    for side in sides:
        getattr(samples, side)[:] = getattr(samples, side)[0]
    room, table, counts = score(tmp_path, samples, QUICK, MISMATCH | ALIGNMENT_ERRORS)
    assert counts["no_phantoms"] == 1
    assert counts["diverged"] == QUICK.proxies
    assert read_column(table, "caption_information").max() < 0.1
    assert "share" not in QUICK.facts(room)["mismatch"]


def test_within_one_category_pairs_are_still_told_apart(tmp_path: Path) -> None:
    samples, rng = make_pairs(COUNT), np.random.default_rng(4)
    for side in ("image", "text"):
        vectors = getattr(samples, side).astype("f4")
        category = unit_rows(rng.normal(size=(1, vectors.shape[1]))).astype("f4")
        setattr(samples, side, unit_rows(category + 0.02 * vectors))
    assert (samples.image.astype("f4") @ samples.image.astype("f4").T).min() > 0.99
    room, table, _ = score(tmp_path, samples, STAGE)
    auroc, called = judge(table, samples)
    assert auroc > 0.97
    assert called < 0.02
    assert abs(STAGE.facts(room)["mismatch"]["share"] - samples.swapped.mean()) < 0.05


def test_vectors_that_say_nothing_of_each_other_are_told(tmp_path: Path) -> None:
    samples, rng = make_pairs(COUNT, share=0.0), np.random.default_rng(0)
    for side in ("image", "text"):
        width = getattr(samples, side).shape[1]
        noise = rng.normal(size=(1, width)) + 0.3 * rng.normal(size=(COUNT, width))
        setattr(samples, side, unit_rows(noise))
    room, table, _ = score(tmp_path, samples, QUICK, ALIGNMENT_ERRORS)
    # No pair is told from any other: all are as likely wrong as the whole set may be.
    assert np.ptp(read_column(table, "mismatch_probability")) < 0.3
    assert UNSURE in decide(room, samples)[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_corpus_of_noise_nothing_is_kept(tmp_path: Path, seed: int) -> None:
    samples = shuffle_captions(make_pairs(COUNT, share=0.0), seed)
    stage = QUICK.model_copy(update={"seed": seed})
    room, table, _ = score(tmp_path, samples, stage, ALIGNMENT_ERRORS, shards=2)
    assert stage.facts(room)["mismatch"]["share"] > 0.9
    assert (read_column(table, "mismatch_probability") > 0.5).mean() > 0.9
    kept, said = decide(room, samples, max_mismatch_rate=0.05)
    assert kept <= 0.01 * COUNT
    assert UNSURE in said
    assert (NOTHING_KEPT in said) == (kept == 0)
    assert f"{'  mismatched':<26}{COUNT - kept:>10}" in said


@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_clean_corpus_next_to_nothing_is_dropped(tmp_path: Path, seed: int) -> None:
    samples = make_pairs(COUNT, share=0.0)
    stage = QUICK.model_copy(update={"seed": seed})
    room, table, _ = score(tmp_path, samples, stage, ALIGNMENT_ERRORS)
    facts = stage.facts(room)["mismatch"]
    assert facts["share"] < 0.03
    # One pair more or less among the likeliest half would be twice its share of the set.
    assert facts["share_stderr"] >= 2 / COUNT
    assert (read_column(table, "mismatch_probability") >= 0.5).mean() < 0.01
    kept, said = decide(room, samples, max_mismatch_rate=0.05)
    assert kept == COUNT
    assert UNSURE not in said
    assert NOTHING_KEPT not in said


def test_two_samples_are_not_scored_and_the_run_says_so(tmp_path: Path) -> None:
    samples = make_pairs(2)
    room, _, counts = score(tmp_path, samples, Score(), EVERY)
    assert counts["too_few_samples"] == 1
    assert room.stage.facts(room) == {"usable": 2, "scored": False}
    kept, said = decide(room, samples, max_mismatch_rate=0.05)
    assert kept == 2
    assert "Warning: 2 samples have no score and were not judged" in said
    assert "not judged: 2 usable samples are fewer than score.min_samples" in said


@pytest.mark.parametrize("proxies", [2, 4, 16])
def test_the_fewest_that_are_scored_are_too_few_to_judge(tmp_path: Path, proxies: int) -> None:
    samples = make_pairs(20)
    samples.clusters = [f"{number:032x}" for number in range(20)]
    stage = Score(proxies=proxies, epochs=1, min_samples=20)
    unknown = MISMATCH | (ALIGNMENT_ERRORS if proxies == 2 else set())
    room, _, counts = score(tmp_path, samples, stage, unknown)
    assert counts["no_phantoms"] == 1
    assert stage.facts(room)["scored"]
    with pytest.raises(ValidationError, match="greater than or equal to 20"):
        Score(min_samples=19)


@pytest.mark.parametrize("seed", range(3))
def test_a_few_dozen_are_judged_within_the_error_that_is_told(tmp_path: Path, seed: int) -> None:
    samples = make_pairs(80)
    stage = Score(proxies=2, epochs=2, min_samples=20, seed=seed)
    room, table, _ = score(tmp_path, samples, stage, ALIGNMENT_ERRORS)
    auroc, called = judge(table, samples)
    assert auroc > 0.97
    assert called < 0.02
    facts = stage.facts(room)["mismatch"]
    assert facts["share_stderr"] >= 2 / 80
    assert abs(facts["share"] - samples.swapped.mean()) < 3 * facts["share_stderr"]


def test_two_proxies_judge_without_standard_errors_over_proxies(tmp_path: Path) -> None:
    samples = make_pairs(COUNT)
    room, table, _ = score(tmp_path, samples, QUICK, ALIGNMENT_ERRORS)
    assert all(table[name].null_count == 0 for name in EVERY - ALIGNMENT_ERRORS)
    auroc, called = judge(table, samples)
    assert auroc > 0.97
    assert called < 0.02
    # Every pair is left out of one proxy only: there is no spread, not even by rounding.
    evidence = storage.read_table(room.path("evidence", "00000.parquet"))
    assert (read_column(evidence, "out_cosine_spread") == 0).all()


@pytest.mark.parametrize("proxies", [2, 4])
def test_a_cluster_of_more_than_half_is_judged_like_others(tmp_path: Path, proxies: int) -> None:
    samples = gather_in_one_cluster(make_pairs(COUNT), 0.6)
    stage = Score(proxies=proxies, epochs=2)
    room, table, _ = score(tmp_path, samples, stage, ALIGNMENT_ERRORS if proxies == 2 else set())
    auroc, called = judge(table, samples)
    assert auroc > 0.95
    assert called < 0.02
    sizes = [proxy["samples"] for proxy in stage.facts(room)["proxies"]]
    assert max(sizes) > 0.6 * COUNT
    assert sum(sizes) == COUNT * proxies / 2


def test_what_a_handful_of_others_would_have_to_judge_is_unknown(tmp_path: Path) -> None:
    # The detector that judges the cluster could train on ten pairs. From this seed it called a
    # fifth of the sound ones mismatched.
    samples = gather_in_one_cluster(make_pairs(COUNT), 0.98)
    stage = Score(proxies=2, epochs=2, seed=2)
    _, _, counts = score(tmp_path, samples, stage, MISMATCH | ALIGNMENT_ERRORS)
    assert counts["no_phantoms"] == 1


@pytest.mark.parametrize("proxies", [2, 4])
def test_one_cluster_of_all_leaves_nothing_to_compare_with(tmp_path: Path, proxies: int) -> None:
    samples = gather_in_one_cluster(make_pairs(COUNT), 1.0)
    stage = Score(proxies=proxies, epochs=1)
    unknown = MISMATCH | (ALIGNMENT | ALIGNMENT_ERRORS) - {"alignment_in", "alignment_in_stderr"}
    if proxies == 2:
        unknown |= ALIGNMENT_ERRORS
    room, table, counts = score(tmp_path, samples, stage, unknown)
    assert table["alignment_in"].null_count == 0
    assert (read_column(table, "rarity") == 0.5).all()
    assert counts["no_phantoms"] == 1
    assert counts["no_rivals"] == proxies
    empty = [proxy for proxy in stage.facts(room)["proxies"] if proxy["samples"] == 0]
    assert len(empty) == proxies // 2
    assert all(proxy["diverged"] and proxy["last_loss"] is None for proxy in empty)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_broken_vectors_are_null_and_no_others(tmp_path: Path, shared: bool) -> None:
    samples = make_pairs(COUNT + 9, widths=(32, 32))
    samples.clip_score = shared
    samples.image[0], samples.text[1], samples.image[2], samples.text[3] = np.nan, np.inf, 0, 0
    samples.image[4, 0], samples.text[5, 3] = np.nan, -np.inf
    samples.image[6] = samples.text[6] = 0
    samples.image[7], samples.text[7] = -np.inf, np.nan
    samples.valid[8] = False
    room, table, _ = score(tmp_path, samples, STAGE, shards=3)
    for name in EVERY:
        present = table[name].is_valid().to_numpy()
        assert not present[:9].any()
        assert present[9:].all()
    assert STAGE.facts(room)["usable"] == COUNT
    assert storage.read_json(room.path("bank.json"))["shared"] == ("vectors" if shared else "")
    rest = samples.take(np.arange(9, COUNT + 9))
    auroc, called = judge(table.slice(9), rest)
    assert auroc > 0.9
    assert called < 0.03


def test_a_sharp_space_in_which_all_is_far_is_measured_without_underflow(tmp_path: Path) -> None:
    samples = make_pairs(COUNT, widths=(32, 32))
    samples.clip_score = True
    apart = np.zeros(32)
    apart[0] = 1
    samples.image = unit_rows(apart + 0.2 * samples.image.astype("f4"))
    samples.text = unit_rows(-apart + 0.2 * samples.text.astype("f4"))
    image, text = (unit_rows(side.astype("f8")) for side in (samples.image, samples.text))
    cosines = image.astype("f8") @ text.astype("f8").T
    assert cosines.max() < -0.5  # exp(100 x -1.5) is nothing in float32
    room, _, _ = score(tmp_path, samples, QUICK, ALIGNMENT_ERRORS)
    evidence = storage.read_table(room.path("evidence", "00000.parquet"))
    found = {side: read_column(evidence, f"shared_loss_{side}") for side in ("image", "text")}
    clusters, captions = np.array(samples.clusters), np.array(samples.captions)
    for row in range(0, COUNT, 50):
        others = (clusters != clusters[row]) & (captions != captions[row])
        for side, logits in (("image", 100 * cosines[row]), ("text", 100 * cosines[:, row])):
            own = logits[row]
            total = np.exp(logits[others] - own).sum() + 1
            expected = np.log(total / (others.sum() + 1))
            assert found[side][row] == pytest.approx(expected, abs=0.2)  # vectors are of float16


@pytest.mark.parametrize("widths", [(1, 1), (1, 4096), (4096, 1)])
def test_vectors_of_one_number_are_survived(tmp_path: Path, widths: tuple[int, int]) -> None:
    samples = make_pairs(COUNT, widths=widths)
    room, table, _ = score(tmp_path, samples, QUICK, ALIGNMENT_ERRORS)
    assert all(table[name].null_count == 0 for name in EVERY - ALIGNMENT_ERRORS)
    # Of one number the sign is left: less than a detector wants, but more than nothing.
    assert roc_auc_score(samples.swapped, read_column(table, "mismatch_probability")) > 0.55
    for proxy in QUICK.facts(room)["proxies"]:
        assert proxy["diverged"] == (proxy["last_loss"] >= 0.99)


@pytest.fixture
def quickly() -> Iterator[None]:
    with squares.small_work():
        yield


#: Two small CLIPs, whose standard errors are null.
CLIPS = Score(
    proxy="clip", proxies=2, epochs=1, clip_proxies=2, clip_epochs=2, clip_views=1, min_samples=20
)


def measure(
    folder: Path, samples: squares.Squares, stage: Score = CLIPS
) -> tuple[np.ndarray, pa.Table, list[dict[str, Any]]]:
    """Return the scores, the table, and what is known of the proxies.

    All scores are null where a proxy had nothing to train on, and none elsewhere.
    """
    room = squares.lay_out(folder, samples, stage, [np.arange(len(samples.uids))])
    table = squares.measure(room)
    records = json.loads(json.dumps(room.stage.facts(room), allow_nan=False))["clips"]
    unknown = min(record["samples"] for record in records) < 2
    values = table["memorization_score"].to_numpy()
    assert table["memorization_score"].null_count == (len(table) if unknown else 0)
    assert unknown or np.abs(values).max() <= 4.5
    errors = table["memorization_score_stderr"]
    assert errors.null_count == (len(table) if unknown or stage.clip_proxies == 2 else 0)
    return values, table, records


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("proxies", [2, 4])
def test_clips_on_one_caption_learn_nothing_and_it_is_recorded(
    tmp_path: Path, proxies: int
) -> None:
    samples = replace(squares.make_squares(), captions=["the same"] * squares.COUNT)
    stage = CLIPS.model_copy(update={"clip_proxies": proxies})
    values, table, records = measure(tmp_path, samples, stage)
    assert len(records) == proxies
    assert not any(record["rivals"] for record in records)
    # Nothing was learned, so nothing was memorized: only first weights differ.
    assert np.abs(values).max() < 0.5
    assert table["memorization_kind"].null_count == squares.COUNT


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("inside", [40, 44, 47, 48])
def test_clips_with_hardly_any_pairs_are_survived_and_recorded(tmp_path: Path, inside: int) -> None:
    samples = squares.make_squares()
    others = [f"f{row:031x}" for row in range(squares.COUNT - inside)]
    samples = replace(samples, clusters=["0" * 32] * inside + others)
    values, table, records = measure(tmp_path, samples)
    sizes = [record["samples"] for record in records]
    assert sum(sizes) == squares.COUNT
    assert min(sizes) <= squares.COUNT - inside
    for record in records:
        assert record["held_out"] == squares.COUNT - record["samples"]
        if record["samples"] < 2:
            assert record["diverged"]
            assert record["losses"] == []
        if record["samples"] < 2 or inside == squares.COUNT:
            assert not record["rivals"]
    if inside >= squares.COUNT - 1:  # all but one are one cluster: a proxy has one pair, or none
        assert min(sizes) < 2
    else:
        assert np.median(np.abs(values)) < 0.3
    assert table["memorization_kind"].null_count == squares.COUNT
