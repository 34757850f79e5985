"""The steps of the score stage that train small CLIPs, without the engine, on drawn squares."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import yaml
from open_clip.model import CLIP
from PIL import Image

from curate import storage
from curate.config import load_pipeline
from curate.engine.runner import bind
from curate.errors import ConfigError
from curate.memorization.company import adjust_values, fit_slopes, regression_sums
from curate.memorization.folds import draw_halves
from curate.models import train_clip
from curate.models.clip_proxy import (
    ClipShape,
    embed_images,
    embed_texts,
    embed_views,
    fold_tokens,
    load_clip,
)
from curate.models.precision import pick_device
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.score import Score
from curate.stages.score_clips import MEMORIZATION, train_clip_proxies
from curate.stages.score_inputs import commit_plan, read_plan
from curate.stages.score_proxies import fill_bank, trained_clusters
from tests.stages.squares import (
    COLUMNS,
    COUNT,
    Squares,
    lay_out,
    make_squares,
    measure,
    small_work,
)

#: Of what all tests look at; gone when they end.
_HOME = TemporaryDirectory()
STAGE = Score(
    proxy="clip", proxies=2, epochs=1, clip_proxies=4, clip_epochs=4, clip_views=2, min_samples=20
)
#: For what does not depend on the proxies' having learned anything.
QUICK = STAGE.model_copy(update={"clip_proxies": 2, "clip_epochs": 1, "clip_views": 1})


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with small_work():
        yield


def _spoil(samples: Squares) -> Squares:
    """Add two samples without thumbnail, two without caption, one of no cluster, last."""
    rows = np.arange(5)
    more = samples.take(rows)
    return Squares(
        [*samples.uids, *(f"f{row:031x}" for row in rows)],
        [*samples.thumbnails, None, None, *more.thumbnails[2:]],
        [*samples.captions, *more.captions[:2], None, " ", more.captions[4]],
        [*samples.clusters, *(f"f{row:031x}" for row in rows[:4]), None],
        np.concatenate([samples.image, more.image]),
        np.concatenate([samples.text, more.text]),
    )


@cache
def _scored() -> tuple[Squares, Room, pa.Table]:
    """Good samples and spoilt ones, scored in one shard."""
    samples = _spoil(make_squares())
    room = lay_out(Path(_HOME.name), samples, STAGE, [np.arange(COUNT + 5)])
    return samples, room, measure(room)


def _all_null(table: pa.Table) -> bool:
    return all(table[name].null_count == len(table) for name in COLUMNS)


def test_usable_samples_are_scored_and_others_are_null() -> None:
    samples, _, table = _scored()
    assert table["uid"].to_pylist() == samples.uids
    assert table.drop_columns("uid").schema.equals(select_schema(COLUMNS))
    for name in COLUMNS:
        assert table[name][:COUNT].null_count == 0
        assert table[name][COUNT:].null_count == 5
    score, error = (table[name][:COUNT].to_numpy() for name in COLUMNS[:2])
    assert np.isfinite(score).all()
    assert np.abs(score).max() <= 4.5
    assert (error >= 0).all()
    assert np.ptp(score) > 0.01
    assert set(table["memorization_kind"].to_pylist()[:COUNT]) <= {"none", "beneficial", "harmful"}


def _pairs(room: Room) -> tuple[np.ndarray, np.ndarray, int]:
    """Pixels and tokens of the good samples as proxies see them, and the size of the vocabulary."""
    pixels, tokens, words = (
        np.array(storage.read_array(room.path(*names, table=MEMORIZATION)))
        for names in (["pairs", "00000.pixels.npy"], ["pairs", "00000.tokens.npy"], ["words.npy"])
    )
    return pixels, fold_tokens(tokens, words), len(words)


def _proxy(room: Room, proxy: int, words: int) -> tuple[CLIP, np.ndarray, np.ndarray]:
    """Return a committed proxy, vectors of what it left out, and their clusters."""
    data = Path(room.path("clips", f"{proxy}.safetensors", table=MEMORIZATION)).read_bytes()
    vectors, clusters = (
        storage.read_array(room.path("clips", f"held-out-{proxy}{name}", table=MEMORIZATION))
        for name in (".npy", ".clusters.npy")
    )
    shape = ClipShape(words, image_px=32, text_width=64, text_layers=1)
    return load_clip(data, shape, pick_device()), vectors, clusters


def test_scores_are_those_of_the_definition_by_the_committed_proxies() -> None:
    samples, room, table = _scored()
    pixels, tokens, words = _pairs(room)
    inside = draw_halves([name or "" for name in samples.clusters], 4, STAGE.seed)
    values = np.zeros((COUNT, 4))
    codes = _cluster_codes(room)
    for proxy, record in enumerate(room.stage.facts(room)["clips"]):
        model, held_out, clusters = _proxy(room, proxy, words)
        others = np.stack([held_out[clusters != code].mean(0) for code in codes])
        for view in range(2):
            image = embed_images(model, pixels, view, record["dtype"])
            u = image.astype(float) + embed_texts(model, tokens, record["dtype"])
            values[:, proxy] += ((u * u).sum(1) - (u * others).sum(1)) / 2 / 2
    committed = storage.read_array(room.path("views", "00000.values.npy", table=MEMORIZATION))
    assert committed == pytest.approx(values, abs=1e-5)
    shares = _shares(room, samples, inside[:COUNT])
    slopes = fit_slopes(regression_sums(values, inside[:COUNT], shares))
    values = adjust_values(values, inside[:COUNT], shares, slopes)
    for row in range(COUNT):
        within, without = values[row, inside[row]], values[row, ~inside[row]]
        gaps = within - without
        found = [table[name][row].as_py() for name in COLUMNS[:2]]
        assert found[0] == pytest.approx(gaps.mean(), abs=1e-3)
        assert found[1] == pytest.approx(gaps.std(ddof=1) / 2**0.5, abs=1e-3)


def _cluster_codes(room: Room) -> np.ndarray:
    table = storage.read_table(room.path("pairs", "00000.parquet", table=MEMORIZATION))
    return table["cluster_code"].to_numpy()


def _shares(room: Room, samples: Squares, inside: np.ndarray) -> np.ndarray:
    """Share of the neighbours in other clusters that each proxy trained on, (COUNT, P, 2)."""
    path = room.path("pairs", "00000.vectors.npy", table=MEMORIZATION)
    vectors = np.array(storage.read_array(path), float)
    clusters = np.array(samples.clusters[:COUNT])
    shares = np.zeros((*inside.shape, 2))
    for row in range(COUNT):
        others = clusters != clusters[row]
        for place, width in enumerate((0.03, 0.1)):
            weights = np.exp(vectors[others] @ vectors[row] / width)
            shares[row, :, place] = weights @ inside[others] / weights.sum()
    return shares


def test_what_is_left_out_are_samples_the_proxy_never_saw() -> None:
    samples, room, _ = _scored()
    pixels, folded, words = _pairs(room)
    assert pixels.shape == (COUNT, 3, 32, 32)
    inside = draw_halves([name or "" for name in samples.clusters], 4, STAGE.seed)[:COUNT]
    for proxy, record in enumerate(room.stage.facts(room)["clips"]):
        model, held_out, clusters = _proxy(room, proxy, words)
        image, text, alignment = embed_views(model, pixels, folded, 1, record["dtype"])
        out = ~inside[:, proxy]
        assert sorted(clusters) == sorted(_cluster_codes(room)[out])
        np.testing.assert_allclose(held_out.mean(0), (image + text)[out].mean(0), atol=1e-5)
        assert record["alignment_out"] == pytest.approx(alignment[out].mean(), abs=1e-4)
        assert record["alignment_in"] == pytest.approx(alignment[~out].mean(), abs=1e-4)
        captions = np.array(samples.captions)[:COUNT][out]
        nearest = np.argsort(-(text @ image.T)[out][:, out], 1)[:, :10]
        found = np.mean([captions[row] in captions[nearest[row]] for row in range(out.sum())])
        assert record["recall_at_10"] == pytest.approx(found, abs=1e-4)


def test_proxies_trained_together_are_those_trained_one_by_one() -> None:
    _, room, _ = _scored()
    folder = Path(room.path("clips", table=MEMORIZATION))
    alone = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in alone:
        (folder / name).unlink()
    counts = train_clip_proxies(room, ["0", "3", "1", "2"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == alone
    seen = [room.stage.facts(room)["clips"][proxy]["samples"] for proxy in (0, 3, 1, 2)]
    assert [count["samples"] for count in counts] == [STAGE.clip_epochs * one for one in seen]


def test_facts_hold_one_record_per_proxy() -> None:
    _, room, _ = _scored()
    records = room.stage.facts(room)["clips"]
    assert len(records) == 4
    assert records[0]["samples"] + records[1]["samples"] == COUNT
    assert records[2]["samples"] + records[3]["samples"] == COUNT
    assert len({record["seed"] for record in records}) == 4
    for record in records:
        assert len(record["losses"]) == STAGE.clip_epochs
        assert record["losses"][-1] < record["losses"][0]
        assert record["held_out"] == COUNT - record["samples"]
        assert 0 <= record["recall_at_10"] <= 1
        for name in ("alignment_in", "alignment_out"):
            assert -1 <= record[name] <= 1


def test_order_and_shards_change_nothing(tmp_path: Path) -> None:
    samples, _, expected = _scored()
    order = np.random.default_rng(1).permutation(COUNT)
    # A shard of samples without thumbnails, an empty one and the unusable ones lie between.
    shards = [np.arange(COUNT, COUNT + 2), *np.array_split(order, 2), np.zeros(0, int)]
    shards.insert(2, np.arange(COUNT + 2, COUNT + 5))
    table = measure(lay_out(tmp_path, samples, STAGE, shards))
    assert table.sort_by("uid").equals(expected.sort_by("uid"))


def test_samples_that_no_proxy_trains_on_are_null(tmp_path: Path) -> None:
    samples = make_squares()
    room = lay_out(tmp_path, samples, QUICK, [np.arange(20), np.arange(20, COUNT)])

    def train_on_some(room: Room) -> None:
        commit_plan(room, replace(read_plan(room), train_below=0.5))

    table = measure(room, {"bank": train_on_some})
    trained = [record["samples"] for record in room.stage.facts(room)["clips"]]
    assert 10 < sum(trained) < 40
    assert COUNT - table["memorization_score"].null_count == sum(trained)
    assert table["memorization_score_stderr"].null_count == COUNT  # one pair of proxies


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_a_cluster_too_large_takes_no_training_from_others(tmp_path: Path, name: str) -> None:
    samples = make_squares()
    clusters = [name if row < 30 else f"other {row}" for row in range(COUNT)]
    stage = STAGE.model_copy(update={"max_train_samples": 20})
    room = lay_out(tmp_path, replace(samples, clusters=clusters), stage, [np.arange(COUNT)])
    fill_bank(room, "bank")
    trained = trained_clusters(clusters, read_plan(room), stage.seed)
    assert trained.tolist() == [row >= 30 for row in range(COUNT)]


@pytest.mark.parametrize("missing", ["training", "thumbnails"])
def test_proxies_without_any_pair_leave_all_null(tmp_path: Path, missing: str) -> None:
    samples = make_squares()
    if missing == "thumbnails":
        samples = replace(samples, thumbnails=[None] * COUNT)
    room = lay_out(tmp_path, samples, QUICK, [np.arange(COUNT)])

    def train_on_none(room: Room) -> None:
        commit_plan(room, replace(read_plan(room), train_below=0.0))

    table = measure(room, {"proxies": train_on_none} if missing == "training" else {})
    assert _all_null(table)
    for record in room.stage.facts(room)["clips"]:
        assert record["diverged"]
        assert record["samples"] == 0
        assert record["recall_at_10"] is None


def test_proxies_that_trained_on_nothing_say_nothing(tmp_path: Path) -> None:
    """Of a cluster that is nearly all one proxy has the rest to train on: a single pair."""
    samples = replace(make_squares(), clusters=["0" * 32] * (COUNT - 1) + ["1" * 32])
    room = lay_out(tmp_path, samples, QUICK, [np.arange(COUNT)])
    assert _all_null(measure(room))
    sizes = {record["held_out"] for record in room.stage.facts(room)["clips"]}
    assert sizes <= {0, 1, COUNT - 1, COUNT}


def test_one_caption_for_all_is_survived(tmp_path: Path) -> None:
    samples = replace(make_squares(), captions=["the same"] * COUNT)
    table = measure(lay_out(tmp_path, samples, QUICK, [np.arange(COUNT)]))
    assert table["memorization_score"].null_count == 0
    assert table["memorization_kind"].null_count == COUNT  # the mismatch is unknown


def test_a_training_that_diverges_is_told_and_scores_stay_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_clip, "_MAX_LOG_SCALE", float("nan"))
    room = lay_out(tmp_path, make_squares(), QUICK, [np.arange(COUNT)])
    table = measure(room)
    assert all(record["diverged"] for record in room.stage.facts(room)["clips"])
    assert np.isfinite(table["memorization_score"].to_numpy()).all()


def test_too_few_samples_are_not_scored(tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"min_samples": COUNT + 3})
    room = lay_out(
        tmp_path, _spoil(make_squares()), stage, [np.arange(20), np.arange(20, COUNT + 5)]
    )
    assert _all_null(measure(room))
    assert "clips" not in room.stage.facts(room)
    assert not storage.exists(room.path("clips", table=MEMORIZATION))


def test_heads_alone_cannot_tell(tmp_path: Path) -> None:
    stage = Score(proxies=2, epochs=1, min_samples=20)
    room = lay_out(tmp_path, make_squares(), stage, [np.arange(COUNT)])
    table = measure(room)
    assert table["uid"].to_pylist() == make_squares().uids
    assert _all_null(table)
    assert "clips" not in room.stage.facts(room)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A pipeline over one picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square", encoding="utf-8")
    stages = {"ingest": {"inputs": [str(folder)]}, "embed": {}, "dedup": {}, "score": {}}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    return path


def test_other_proxies_leave_what_both_share(recipe: Path, tmp_path: Path) -> None:
    def prints(*settings: tuple[str, str, object]) -> dict[str, str]:
        return bind(load_pipeline(str(recipe), settings), str(tmp_path))[-1].fingerprints

    clip = ("score", "proxy", "clip")
    heads = prints()
    fields = (("clip_proxies", 4), ("clip_epochs", 9), ("clip_views", 1))
    for more in ([], *([("score", *field)] for field in fields)):
        other = prints(clip, *more)
        assert other["score"] == heads["score"]
        assert other[MEMORIZATION] != heads[MEMORIZATION]
    seeds = [prints(*some, ("score", "seed", 5)) for some in ([], [clip])]
    assert seeds[0]["score"] == seeds[1]["score"] != heads["score"]


def test_without_embed_it_is_refused_in_one_line(recipe: Path) -> None:
    stages = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del stages["embed"], stages["dedup"]
    stages["score"] = {"proxy": "clip"}
    recipe.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match="score reads the column image_emb") as caught:
        load_pipeline(str(recipe))
    assert "\n" not in str(caught.value)
    assert "Add embed before it." in str(caught.value)
