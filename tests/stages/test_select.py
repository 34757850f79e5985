import hashlib
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from curate import storage
from curate.schema import COLUMNS, REASONS, select_schema
from curate.stages.base import Room
from curate.stages.select import Select, mismatch_limit

#: Table in which each column lies, as the earlier stages have it.
ORIGINS = {
    "caption": "ingest",
    "source_file": "ingest",
    "ingest_reason": "ingest",
    "decode_reason": "embed.pixels",
    "width": "embed.pixels",
    "height": "embed.pixels",
    "sha256": "embed.pixels",
    "clip_score": "embed.vectors",
    "nsfw_probability": "embed.nsfw",
    "text_area": "embed.text",
    "text_overlap": "embed.text",
    "caption_language": "embed.language",
    "caption_language_probability": "embed.language",
    "cluster_id": "dedup",
    "mismatch_probability": "score",
    "rarity": "score",
    "caption_information": "score",
}
Edges = list[tuple[int, int, float]]
Rows = list[dict[str, Any]]


def uid(number: int) -> str:
    return hashlib.md5(f"select {number}".encode()).hexdigest()


def sample(number: int, **columns: Any) -> dict[str, Any]:
    """Return a sample that no rule objects to."""
    return {
        "uid": uid(number),
        "caption": f"a fine caption {number}",
        "ingest_reason": None,
        "decode_reason": None,
        "width": 100,
        "height": 80,
        "sha256": hashlib.sha256(f"{number}".encode()).hexdigest(),
        **columns,
    }


def run(
    folder: Path,
    rows: Rows,
    edges: Edges | None = None,
    shards: int = 2,
    phantoms: tuple[list[str], list[float]] | None = None,
    pixels: list[bool] | None = None,
    **fields: Any,
) -> tuple[Rows, dict[str, Any]]:
    """Lay rows out as the earlier stages do, run the stage; return decisions and its facts."""
    stage = Select(**fields)
    present = [name for name in ORIGINS if name in rows[0]]
    origins = {name: ORIGINS[name] for name in present}
    if edges is not None and "cluster_id" not in origins:
        origins["cluster_id"] = "dedup"
        rows = [{**row, "cluster_id": row["uid"]} for row in rows]
    tables = {"ingest", "dedup", "select", *origins.values()}
    number = len(list(folder.glob("out-*")))
    folders = {name: str(folder / f"out-{number}" / name) for name in tables}
    room = Room(stage, folders, origins, frozenset({"select"}))
    layout = []
    parts = np.array_split(np.arange(len(rows)), shards)
    for name, part in ((f"{i:05d}", part) for i, part in enumerate(parts) if len(part)):
        layout.append({"name": name, "samples": len(part)})
        for table in {"ingest", *origins.values()}:
            names = ["uid", *(column for column, home in origins.items() if home == table)]
            content = [{column: rows[row][column] for column in names} for row in part]
            room.commit_shard(table, name, pa.Table.from_pylist(content, select_schema(names)))
    storage.commit_json(room.path("layout.json", table="ingest"), {"shards": layout})
    if edges is not None:
        hashes = [row.get("sha256") or row["uid"] for row in rows]
        nodes = np.array([hashes.index(value) for value in hashes])
        storage.commit_array(room.path("nodes.npy", table="dedup"), nodes)
        seen = np.array(pixels or [False] * len(rows))
        storage.commit_array(room.path("pixels.npy", table="dedup"), seen)
        joined = [(nodes[a], nodes[b], c) for a, b, c in edges if nodes[a] != nodes[b]]
        left, right, cosines = zip(*joined, strict=True) if joined else ((), (), ())
        content = pa.table(
            {
                "left_row": pa.array(left, pa.int64()),
                "right_row": pa.array(right, pa.int64()),
                "cosine": pa.array(cosines, pa.float32()),
            }
        )
        storage.commit_table(room.path("edges", "0.parquet", table="dedup"), content)
    if phantoms is not None:
        columns = pa.table({"rung": phantoms[0], "mismatch_probability": phantoms[1]})
        storage.commit_table(room.path("phantoms.parquet", table="score"), columns)
    for step in stage.steps():
        for task in step.tasks(room):
            step.run(room, task)
    decided = [storage.read_table(room.shard_path("select", s["name"])) for s in layout]
    whole = pa.concat_tables(decided)
    assert whole.schema.remove_metadata() == select_schema(["uid", *stage.writes()])
    assert whole["uid"].to_pylist() == [row["uid"] for row in rows]
    found = whole.to_pylist()
    facts = stage.facts(room)
    check(found, facts)
    return found, facts


def check(decisions: Rows, facts: dict[str, Any]) -> None:
    """Check what holds for every set of decisions."""
    kept = [row for row in decisions if row["keep"]]
    by_uid = {row["uid"]: row for row in decisions}
    for row in decisions:
        assert row["keep"] == (row["reason"] is None)
        assert row["failed_rules"] == [code for code in REASONS if code in row["failed_rules"]]
        assert (row["failed_rules"] or [None])[0] == row["reason"]
        assert (row["weight"] > 0) <= row["keep"]
        level = (row["reason"] or "").removeprefix("duplicate_")
        duplicate = level in ("bytes", "perceptual", "semantic")
        assert (row["representative_uid"] is not None) == duplicate
        assert (row["representative_cosine"] is not None) == duplicate
        assert row["duplicate_level"] == (level if duplicate else None)
        if duplicate:
            assert by_uid[row["representative_uid"]]["keep"]
            assert row["failed_rules"] == [row["reason"]]
        assert row["keep"] or row["captions"] is None
    if kept:
        assert np.mean([row["weight"] for row in kept]) == pytest.approx(1, abs=1e-6)
    counts = facts["counts"]
    assert counts["ingested"] == len(decisions)
    assert counts["kept"] == len(kept)
    assert counts["dropped"] == Counter(row["reason"] for row in decisions if not row["keep"])
    assert [code for code in REASONS if code in counts["dropped"]] == list(counts["dropped"])


def reasons(decisions: Rows) -> list[str | None]:
    return [row["reason"] for row in decisions]


def test_without_rules_all_are_kept_with_equal_weight(tmp_path: Path) -> None:
    decisions, facts = run(tmp_path, [sample(i) for i in range(5)])
    assert reasons(decisions) == [None] * 5
    assert [row["weight"] for row in decisions] == [1.0] * 5
    assert decisions[3]["captions"] == ["a fine caption 3"]
    assert facts == {
        "counts": {"ingested": 5, "kept": 5, "dropped": {}},
        "failed": {},
        "merged_captions": 0,
    }


@pytest.mark.parametrize(
    ("fields", "columns", "reason"),
    [
        ({"min_caption_chars": 3}, {"caption": "ab"}, "caption_too_short"),
        ({"min_caption_chars": 3}, {"caption": "  ab  "}, "caption_too_short"),
        ({"min_caption_chars": 3}, {"caption": "abc"}, None),
        ({"max_caption_chars": 5}, {"caption": "abcdef"}, "caption_too_long"),
        ({"max_caption_chars": 5}, {"caption": " abcde "}, None),
        ({"min_side_px": 16}, {"width": 15}, "image_too_small"),
        ({"min_side_px": 16}, {"height": 15}, "image_too_small"),
        ({"min_side_px": 16}, {"width": 16, "height": 16}, None),
        ({"max_aspect": 8.0}, {"width": 801, "height": 100}, "aspect_too_extreme"),
        ({"max_aspect": 8.0}, {"width": 100, "height": 801}, "aspect_too_extreme"),
        ({"max_aspect": 8.0}, {"width": 800, "height": 100}, None),
        ({}, {"ingest_reason": "duplicate_key"}, "duplicate_key"),
        ({}, {"decode_reason": "too_many_pixels"}, "too_many_pixels"),
        ({"thresholds": [{"column": "width", "min": 101}]}, {}, "outside_threshold"),
        ({"thresholds": [{"column": "width", "max": 99}]}, {}, "outside_threshold"),
        ({"thresholds": [{"column": "width", "min": 100, "max": 100}]}, {}, None),
        (
            {"thresholds": [{"column": "width", "min": 1}]},
            {"width": None},
            "outside_threshold",
        ),
        (
            {"thresholds": [{"column": "width"}, {"column": "height", "max": 79}]},
            {},
            "outside_threshold",
        ),
    ],
)
def test_rules(
    tmp_path: Path, fields: dict[str, Any], columns: dict[str, Any], reason: str | None
) -> None:
    decisions, _ = run(tmp_path, [sample(0, **columns)], **fields)
    assert reasons(decisions) == [reason]
    assert decisions[0]["failed_rules"] == ([reason] if reason else [])


def test_no_image_and_no_caption_fail_only_what_they_must(tmp_path: Path) -> None:
    unknown = {"width": None, "height": None, "sha256": None}
    rows = [
        sample(0, decode_reason="decode_error", **unknown),
        sample(1, ingest_reason="image_missing", **unknown),
        sample(2, ingest_reason="caption_missing", caption=None),
        sample(3, ingest_reason="caption_missing", caption="  "),
    ]
    limits = {"min_caption_chars": 3, "max_caption_chars": 99, "min_side_px": 9, "max_aspect": 2}
    decisions, _ = run(tmp_path, rows, edges=[], **limits)
    assert [row["failed_rules"] for row in decisions] == [
        ["decode_error"],
        ["image_missing"],
        ["caption_missing"],
        ["caption_missing"],
    ]


def test_the_reason_is_the_first_rule_in_order_and_all_are_listed(tmp_path: Path) -> None:
    row = sample(
        0,
        ingest_reason="caption_invalid",
        caption="x",
        width=10,
        height=1000,
        mismatch_probability=0.99,
        rarity=0.1,
    )
    decisions, facts = run(
        tmp_path,
        [row, sample(1, mismatch_probability=0.0, rarity=0.9)],
        edges=[(0, 1, 1.0)],
        min_caption_chars=2,
        min_side_px=16,
        max_aspect=3,
        max_mismatch_rate=0.1,
        thresholds=[{"column": "mismatch_probability", "max": 0.5}],
        keep_fraction={"column": "rarity", "fraction": 0.5},
    )
    expected = [
        "caption_invalid",
        "caption_too_short",
        "image_too_small",
        "aspect_too_extreme",
        "mismatched",
        "outside_threshold",
        "outside_fraction",
    ]
    assert decisions[0]["failed_rules"] == expected
    assert decisions[0]["reason"] == "caption_invalid"
    assert reasons(decisions)[1] is None
    assert facts["failed"] == {**dict.fromkeys(expected, 1), **_no_duplicates()}


def _no_duplicates() -> dict[str, int]:
    return {"duplicate_bytes": 0, "duplicate_perceptual": 0, "duplicate_semantic": 0}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_rate", [0.0, 0.02, 0.2, 1.0])
def test_mismatch_limit_against_trying_every_value(seed: int, max_rate: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.round(rng.beta(0.4, 1.5, 60), 1 if seed % 2 else 3)  # one decimal: many ties
    probability = np.where(rng.random(60) < 0.1, np.nan, values)
    limit, expected = mismatch_limit(probability, max_rate)
    known = probability[~np.isnan(probability)]
    fitting = [v for v in known if known[known <= v].mean() <= max_rate]
    if not fitting:
        assert (limit, expected) == (-1.0, None)
        return
    assert limit == max(fitting)
    assert expected == pytest.approx(known[known <= limit].mean())
    assert expected is not None
    assert expected <= max_rate


def test_mismatch_limit_of_nothing() -> None:
    assert mismatch_limit(np.zeros(0), 0.1) == (-1.0, None)
    assert mismatch_limit(np.full(3, np.nan), 0.1) == (-1.0, None)
    assert mismatch_limit(np.array([0.5, 0.5]), 0.4) == (-1.0, None)


def test_mismatch_rule(tmp_path: Path) -> None:
    probabilities = [0.0, 0.125, 0.25, 0.25, 0.875, None, 0.9375]  # exact in float32
    rows = [sample(i, mismatch_probability=p) for i, p in enumerate(probabilities)]
    rows[6]["caption"] = ""  # fails another rule: its probability has no say
    rows[6]["ingest_reason"] = "caption_missing"
    decisions, facts = run(tmp_path, rows, max_mismatch_rate=0.15625)
    expected = [None, None, None, None, "mismatched", None, "caption_missing"]
    assert reasons(decisions) == expected
    assert decisions[6]["failed_rules"] == ["caption_missing", "mismatched"]
    assert facts["mismatch"] == {
        "max_probability": 0.25,
        "expected_rate": 0.15625,
        "unscored": 1,
    }
    # Two equal probabilities stay or go together, even where one alone would fit.
    decisions, _ = run(tmp_path, rows[:6], max_mismatch_rate=0.15)
    assert reasons(decisions) == [None, None, "mismatched", "mismatched", "mismatched", None]


def test_the_threshold_is_told_by_phantoms_and_by_rarity(tmp_path: Path) -> None:
    probabilities = [0.0, 0.0, 0.0, 0.25, 0.5, None, 0.0, 0.75]
    rarities = [0.1, 0.2, 0.3, 0.9, 0.5, None, 0.8, 0.95]
    rows = [
        sample(i, mismatch_probability=p, rarity=r)
        for i, (p, r) in enumerate(zip(probabilities, rarities, strict=True))
    ]
    rows[7]["ingest_reason"] = "caption_missing"  # fails another rule: it has no say
    phantoms = (["random"] * 4 + ["near_image"] * 2, [0.1, 0.3, 0.9, 1.0, 0.2, 0.26])
    _, facts = run(tmp_path, rows, phantoms=phantoms, max_mismatch_rate=0.0625)
    assert facts["mismatch"]["max_probability"] == 0.25
    assert facts["mismatch"]["phantoms_caught"] == {"random": 0.75, "near_image": 0.5}
    assert facts["mismatch"]["rare_dropped"] == 0
    assert facts["mismatch"]["common_dropped"] == 0.25


def test_captions_that_say_little_are_dropped_on_demand(tmp_path: Path) -> None:
    rows = [sample(i, caption_information=v) for i, v in enumerate([0.0, 0.25, 0.5, None, 1.0])]
    decisions, _ = run(tmp_path, rows, min_caption_information=0.5)
    low = "caption_uninformative"
    assert reasons(decisions) == [low, low, None, None, None]
    decisions, _ = run(tmp_path, rows)
    assert reasons(decisions) == [None] * 5


def test_all_above_the_rate_are_dropped_except_the_unscored(tmp_path: Path) -> None:
    rows = [sample(i, mismatch_probability=p) for i, p in enumerate([0.5, 0.6, None])]
    decisions, facts = run(tmp_path, rows, max_mismatch_rate=0.1)
    assert reasons(decisions) == ["mismatched", "mismatched", None]
    assert facts["mismatch"]["expected_rate"] is None


@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_keep_fraction_against_sorting(tmp_path: Path, fraction: float, highest: bool) -> None:
    rng = np.random.default_rng(0)
    values = [None if rng.random() < 0.2 else int(v) / 4 for v in rng.integers(0, 5, 30)]
    rows = [sample(i, clip_score=value) for i, value in enumerate(values)]
    rule = {"column": "clip_score", "fraction": fraction, "highest": highest}
    decisions, _ = run(tmp_path, rows, keep_fraction=rule)
    known = [row for row in rows if row["clip_score"] is not None]
    # Ties are cut by uid, so that the share is met and the order of rows says nothing.
    known.sort(key=lambda r: (-r["clip_score"] if highest else r["clip_score"], r["uid"]))
    best = {row["uid"] for row in known[: round(fraction * len(known))]}
    assert {row["uid"] for row in decisions if row["keep"]} == best
    assert {row["reason"] for row in decisions if not row["keep"]} == {"outside_fraction"}
    again, _ = run(tmp_path, rows[::-1], keep_fraction=rule)
    assert {row["uid"] for row in again if row["keep"]} == best


@pytest.mark.parametrize(
    ("prefer", "winner"),
    [
        (("mismatch", "resolution"), 1),
        (("resolution", "mismatch"), 3),
        (("resolution",), 3),
        (("clip_score",), 0),
        (("clip_score", "resolution"), 2),
        ((), None),
    ],
)
def test_preference_decides_which_copy_stays(
    tmp_path: Path, prefer: tuple[str, ...], winner: int | None
) -> None:
    #          mismatch, width, clip_score
    facts = [(0.3, 50, 0.9), (0.1, 60, 0.1), (0.3, 70, 0.9), (0.2, 90, 0.2), (None, 10, None)]
    rows = [
        sample(i, mismatch_probability=m, width=w, height=w, clip_score=c)
        for i, (m, w, c) in enumerate(facts)
    ]
    edges = [(a, b, 0.9) for a in range(5) for b in range(a + 1, 5)]
    decisions, _ = run(tmp_path, rows, edges=edges, prefer=prefer)
    ties = {(): range(5), ("clip_score",): (0, 2)}.get(prefer)
    if ties is not None:
        winner = min(ties, key=uid)
    assert [i for i, row in enumerate(decisions) if row["keep"]] == [winner]
    assert {row["representative_uid"] for row in decisions if not row["keep"]} == {
        uid(winner) if winner is not None else None
    }


def test_the_good_twin_of_a_mismatched_sample_survives(tmp_path: Path) -> None:
    rows = [
        sample(0, mismatch_probability=0.9, width=1000, height=1000, sha256="1" * 64),
        sample(1, mismatch_probability=0.01, sha256="1" * 64),
        sample(2, mismatch_probability=0.02),
        sample(3, mismatch_probability=0.03, sha256="1" * 64),
    ]
    decisions, _ = run(
        tmp_path,
        rows,
        edges=[(0, 1, 1.0), (1, 2, 0.97), (0, 3, 1.0), (1, 3, 1.0)],
        max_mismatch_rate=0.1,
        prefer=("resolution", "mismatch"),
    )
    survivor, semantic, exact = (row for row in decisions[1:])
    # Rows 1, 2 and 3 are of one size: the least mismatched stays.
    assert reasons(decisions) == ["mismatched", None, "duplicate_semantic", "duplicate_bytes"]
    assert semantic["representative_uid"] == exact["representative_uid"] == survivor["uid"]
    assert semantic["representative_cosine"] == pytest.approx(0.97)
    assert exact["representative_cosine"] == 1
    # The caption of the mismatched one is not merged.
    assert survivor["captions"] == ["a fine caption 1", "a fine caption 2", "a fine caption 3"]


def test_pixels_on_both_sides_make_a_perceptual_copy(tmp_path: Path) -> None:
    rows = [sample(i, width=100 - i) for i in range(4)]
    rows[1]["sha256"] = rows[0]["sha256"] = "0" * 64
    edges = [(0, 2, 0.9), (0, 3, 0.96)]
    pixels = [True, True, True, False]
    decisions, _ = run(tmp_path, rows, edges=edges, pixels=pixels, prefer=("resolution",))
    levels = ["duplicate_bytes", "duplicate_perceptual", "duplicate_semantic"]
    assert reasons(decisions) == [None, *levels]


def test_sources_and_chance_may_decide_which_copy_stays(tmp_path: Path) -> None:
    files = ["crawl/1.tar", "museum/b.tar", "museum/a.tar", "other.tar"]
    rows = [sample(i, width=100 - i, source_file=file) for i, file in enumerate(files)]
    edges = [(a, b, 0.99) for a in range(4) for b in range(a)]

    def kept(**fields: Any) -> int:
        decisions, _ = run(tmp_path, rows, edges=edges, **fields)
        (place,) = (i for i, row in enumerate(decisions) if row["keep"])
        return place

    assert kept(prefer=("resolution",)) == 0
    by_source = {"prefer": ("source", "resolution")}
    assert kept(**by_source, source_priority=("museum/*",)) == 1
    assert kept(**by_source, source_priority=("museum/a*", "museum/*")) == 2
    assert kept(**by_source, source_priority=("*.zip", "other.*")) == 3
    assert kept(**by_source) == 0
    drawn = [kept(prefer=("random",), seed=seed) for seed in range(12)]
    assert drawn == [kept(prefer=("random",), seed=seed) for seed in range(12)]
    assert len(set(drawn)) > 1


def test_captions_need_not_be_there(tmp_path: Path) -> None:
    rows = [sample(0), sample(1, caption=None, ingest_reason="caption_missing")]
    rows.append(sample(2, caption=None, ingest_reason="image_missing"))
    decisions, _ = run(tmp_path, rows)
    assert reasons(decisions) == [None, "caption_missing", "image_missing"]
    decisions, _ = run(tmp_path, rows, require_caption=False)
    assert reasons(decisions) == [None, None, "image_missing"]
    assert decisions[1]["captions"] is None


def test_a_caption_may_be_capped(tmp_path: Path) -> None:
    captions = ["Icon", " icon", "ICON", "icon", "a dog", None]
    rows = [sample(i, caption=c, width=100 - i) for i, c in enumerate(captions)]
    rows[5] |= {"ingest_reason": "caption_missing"}
    # Row 1 is a copy of row 0, and takes no place; row 4 is one of row 3, which came too late.
    fields: dict[str, Any] = {"edges": [(0, 1, 0.9), (3, 4, 0.9)], "prefer": ("resolution",)}
    decisions, facts = run(tmp_path, rows, max_caption_repeats=2, **fields)
    late = "caption_repeated"
    assert reasons(decisions) == [None, "duplicate_semantic", None, late, None, "caption_missing"]
    assert facts["counts"]["dropped"][late] == 1
    decisions, _ = run(tmp_path, rows, **fields)
    assert reasons(decisions)[3:5] == [None, "duplicate_semantic"]
    with pytest.raises(ValidationError):
        Select(max_caption_repeats=0)


def test_what_stricter_thresholds_would_keep(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(6)]
    edges = [(0, 1, 0.87), (1, 2, 0.92), (3, 4, 0.985)]
    decisions, facts = run(tmp_path, rows, edges=edges)
    assert sum(row["keep"] for row in decisions) == 4 - (reasons(decisions)[1] is None)
    kept = {row["min_cosine"]: row["kept"] for row in facts["what_if"]}
    assert list(kept) == [0.9, 0.95, 0.98, 0.99]
    assert kept[0.95] == kept[0.98] == 5
    assert kept[0.9] == 4
    assert kept[0.99] == 6
    again, _ = run(tmp_path, rows, edges=[edge for edge in edges if edge[2] >= 0.9])
    assert sum(row["keep"] for row in again) == kept[0.9]


def test_merged_captions_are_different_and_few(tmp_path: Path) -> None:
    captions = ["A  Dog", "a dog", "the dog", " A DOG ", "dog 3", "dog 4", "dog 5", "dog 6"]
    rows = [sample(i, caption=c, width=100 - i) for i, c in enumerate(captions)]
    rows.append(sample(8, caption=None, ingest_reason="caption_missing"))
    edges = [(0, i, 0.99) for i in range(1, 9)]
    decisions, facts = run(tmp_path, rows, edges=edges, max_captions=4, prefer=("resolution",))
    assert decisions[0]["captions"] == ["A  Dog", "the dog", "dog 3", "dog 4"]
    assert facts["merged_captions"] == 3
    decisions, facts = run(tmp_path, rows, edges=edges, max_captions=1, prefer=("resolution",))
    assert decisions[0]["captions"] == ["A  Dog"]
    assert facts["merged_captions"] == 0


def test_weights(tmp_path: Path) -> None:
    probabilities = [0.0, 0.5, 0.75, None, 1.0]
    rows = [sample(i, mismatch_probability=p) for i, p in enumerate(probabilities)]
    decisions, _ = run(tmp_path, rows)
    raw = np.array([1, 0.5, 0.25, 1, 0])
    np.testing.assert_allclose([row["weight"] for row in decisions], raw / raw.mean(), rtol=1e-6)
    # Where all kept are surely mismatched nothing tells them apart.
    decisions, _ = run(tmp_path, [sample(i, mismatch_probability=1.0) for i in range(3)])
    assert [row["weight"] for row in decisions] == [1, 1, 1]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_density_power_weighs_by_kept_samples_of_the_cluster(tmp_path: Path, power: float) -> None:
    clusters = [0, 0, 0, 0, 4, 5, 5]
    rows = [
        sample(i, cluster_id=uid(c), mismatch_probability=0.1 * i) for i, c in enumerate(clusters)
    ]
    # A chain 0-1, 2-3 of one cluster: two of its four samples stay.
    decisions, _ = run(tmp_path, rows, edges=[(0, 1, 0.9), (2, 3, 0.9)], density_power=power)
    kept = np.array([row["keep"] for row in decisions])
    assert kept.tolist() == [True, False, True, False, True, True, True]
    of_cluster = np.array([2, 2, 2, 2, 1, 2, 2])
    raw = kept * (1 - 0.1 * np.arange(7)) / of_cluster**power
    expected = raw * kept.sum() / raw.sum()
    np.testing.assert_allclose([row["weight"] for row in decisions], expected, rtol=1e-5)


def test_nothing_kept(tmp_path: Path) -> None:
    rows = [sample(i, decode_reason="decode_error", width=None, height=None) for i in range(4)]
    decisions, facts = run(tmp_path, rows, edges=[])
    assert facts["counts"] == {"ingested": 4, "kept": 0, "dropped": {"decode_error": 4}}
    assert [row["weight"] for row in decisions] == [0] * 4


@pytest.mark.parametrize("seed", range(3))
def test_decisions_do_not_depend_on_the_order_of_rows(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 60
    rows = [
        sample(
            i,
            mismatch_probability=round(float(rng.beta(0.5, 3)), 1),
            width=int(rng.integers(10, 14)),
            sha256=f"{int(rng.integers(0, 50)):064x}",
            cluster_id=uid(i // 6),
        )
        for i in range(count)
    ]
    pairs = {tuple(sorted(pair)) for pair in rng.integers(0, count, (90, 2)).tolist()}
    edges = [(a, b, round(float(rng.uniform(0.9, 1)), 2)) for a, b in sorted(pairs) if a != b]
    fields: dict[str, Any] = {
        "min_side_px": 11,
        "max_mismatch_rate": 0.1,
        "density_power": 0.5,
        "max_captions": 99,
    }
    decided, facts = run(tmp_path, rows, edges=edges, **fields)
    place = rng.permutation(count)
    moved = [rows[int(row)] for row in np.argsort(place)]
    moved_edges = [(int(place[b]), int(place[a]), cosine) for a, b, cosine in edges]
    again, moved_facts = run(tmp_path, moved, edges=moved_edges, shards=7, **fields)
    assert moved_facts == facts

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        # The own caption comes first; the rest is a set.
        found = row["captions"]
        merged = found and (found[0], sorted(found[1:]))
        return {**row, "captions": merged, "weight": round(row["weight"], 5)}

    by_uid = {row["uid"]: plain(row) for row in again}
    assert [plain(row) for row in decided] == [by_uid[row["uid"]] for row in decided]
    # No two kept samples share an edge or their bytes.
    kept = [row["keep"] for row in decided]
    assert not any(kept[a] and kept[b] for a, b, _ in edges)
    digests = sorted(row["sha256"] for row, stays in zip(rows, kept, strict=True) if stays)
    assert all(a != b for a, b in pairwise(digests))


def scored(number: int, **columns: Any) -> dict[str, Any]:
    """Return a sample with scores of plug-ins, none of which any rule objects to."""
    scores = {
        "nsfw_probability": 0.1,
        "text_area": 0.05,
        "text_overlap": 0.0,
        "caption_language": "en",
        "caption_language_probability": 0.9,
    }
    return sample(number, **{**scores, **columns})


def test_rules_on_the_scores_of_plugins(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"nsfw_probability": 0.79}, []),
        ({"nsfw_probability": 0.81}, ["nsfw"]),
        ({"nsfw_probability": None}, []),
        ({"text_overlap": 1.0}, []),  # a caption printed on a photograph
        ({"text_area": 0.3}, []),
        ({"text_overlap": 0.6, "text_area": 0.1}, ["caption_in_picture"]),
        ({"text_overlap": 0.5, "text_area": 0.1}, []),
        ({"text_overlap": None, "text_area": 0.4}, []),
        ({"caption_language": "de"}, []),
        ({"caption_language": "fr"}, ["caption_language"]),
        ({"caption_language": "fr", "caption_language_probability": 0.59}, []),
        ({"caption_language": None, "caption_language_probability": None}, []),
        (
            {"nsfw_probability": 0.9, "text_overlap": 1.0, "text_area": 0.9, "caption": ""},
            ["nsfw", "caption_in_picture"],
        ),
    ]
    rows = [scored(number, **columns) for number, (columns, _) in enumerate(changes)]
    decided, facts = run(
        tmp_path,
        rows,
        max_nsfw_probability=0.8,
        max_text_overlap=0.5,
        min_overlap_area=0.1,
        languages=["en", "de"],
        min_language_probability=0.6,
    )
    assert [row["failed_rules"] for row in decided] == [failed for _, failed in changes]
    unjudged = {"nsfw": 1, "caption_in_picture": 1, "caption_language": 2}
    assert facts["unjudged"] == unjudged
    # Bounds on any column drop what has no value, and say so.
    bounds = [{"column": "nsfw_probability", "max": 0.8}]
    decided, facts = run(tmp_path, rows, thresholds=bounds)
    failed = [row["reason"] == "outside_threshold" for row in decided]
    assert failed == [
        columns.get("nsfw_probability", 0.1) in (0.81, 0.9, None) for columns, _ in changes
    ]
    assert "unjudged" not in facts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": [{"column": "caption", "min": 1}]}, "numeric column"),
        ({"thresholds": [{"column": "widht", "min": 1}]}, "numeric column"),
        ({"thresholds": [{"column": "image_emb"}]}, "numeric column"),
        ({"keep_fraction": {"column": "width", "fraction": 0}}, "greater than 0"),
        ({"keep_fraction": {"column": "width", "fraction": 1.1}}, "less than or equal to 1"),
        ({"thresholds": [{"column": "width", "minimum": 1}]}, "Extra inputs"),
        ({"thresholds": [{"column": "width", "min": math.nan}]}, "finite"),
        ({"max_aspect": math.inf}, "finite"),
        ({"max_mismatch_rate": 1.5}, "less than or equal to 1"),
        ({"prefer": ["size"]}, "mismatch"),
    ],
)
def test_fields_that_cannot_hold(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Select(**fields)


def test_reads_what_its_rules_need() -> None:
    assert "mismatch_probability" not in Select().reads()
    assert "mismatch_probability" in Select(max_mismatch_rate=0.1).reads()
    ruled = Select(
        keep_fraction={"column": "rarity", "fraction": 0.5},
        thresholds=[{"column": "clip_score", "min": 0.2}],
    )
    assert {"rarity", "clip_score"} <= set(ruled.reads())
    assert {"text_overlap", "text_area"} <= set(Select(max_text_overlap=0.5).reads())
    assert "caption_language_probability" in Select(languages="en").reads()
    assert set(ruled.reads()) | set(ruled.wants()) <= COLUMNS.keys()
