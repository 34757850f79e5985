"""What the report draws equals the decisions it is drawn of, and stays small."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate import storage
from curate.memorization.folds import hash_unit
from curate.schema import REASONS, select_schema
from curate.stages.base import Room
from curate.stages.remove import REMOVALS
from curate.stages.report import Report, RunFacts, write_report
from curate.stages.report_curves import (
    Judged,
    choose_rates,
    join_judged,
    judge,
    needed_rate,
    trade_off,
)
from curate.stages.report_draw import FURTHER, SHOWN, draw
from tests.stages.test_select import run, sample
from tests.support import read_report

Array = np.ndarray[Any, Any]


def uid(number: int) -> str:
    return hashlib.md5(f"report {number}".encode()).hexdigest()


def decisions(count: int, seed: int = 0) -> pa.Table:
    """Draw a table as `select` might leave it: every reason, clusters of many sizes, odd text.

    Every one but those of removal lists: of their samples nothing is shown.
    """
    rng = np.random.default_rng(seed)
    codes = [code for code in REASONS if code not in REMOVALS]
    uids = [uid(number) for number in range(count)]
    reasons = rng.choice([None, *codes], count, p=[0.5] + [0.5 / len(codes)] * len(codes))
    kept = [number for number in range(count) if reasons[number] is None]
    cluster = np.minimum(rng.zipf(1.6, count), count) - 1
    duplicate = [str(reason).startswith("duplicate_") for reason in reasons]
    probability = rng.beta(0.4, 4, count)
    missing = rng.random(count) < 0.1
    captions = [f"caption {number % 997} 😀<b>" * (1 + number % 40) for number in range(count)]
    sizes = Counter(cluster.tolist())
    other = [
        uids[kept[number % len(kept)]] if duplicate[number] else None for number in range(count)
    ]
    columns = {
        "uid": uids,
        "key": [f"{number:08d}" for number in range(count)],
        "source_file": ["0.tar"] * count,
        "caption": captions,
        "width": [100] * count,
        "height": [80] * count,
        "keep": [reason is None for reason in reasons],
        "reason": reasons.tolist(),
        "failed_rules": [[] if reason is None else [reason] for reason in reasons],
        "weight": [1.0 if reason is None else 0.0 for reason in reasons],
        "representative_uid": other,
        "representative_cosine": [0.9 if found else None for found in other],
        "duplicate_level": [None] * count,
        "captions": [
            [text] if reason is None else None
            for text, reason in zip(captions, reasons, strict=True)
        ],
        "cluster_id": [uids[number] for number in cluster],
        "cluster_size": [sizes[number] for number in cluster.tolist()],
        "contaminated_by": [None] * count,
        "memorization_kind": rng.choice(["none", "beneficial", "harmful"], count).tolist(),
        "mismatch_probability": pa.array(probability, pa.float32(), mask=missing),
        "rarity": rng.random(count),
        "memorization_score": rng.normal(0, 1, count),
        "holdout_gap": rng.normal(0, 0.1, count),
        "caption_information": rng.random(count),
    }
    schema = select_schema(columns)
    arrays = [pa.array(columns[f.name]).cast(f.type) for f in schema]
    return pa.table(arrays, schema=schema)


def lay_out(
    folder: Path, table: pa.Table, thumbnail: bytes | None, shards: int, pictured: float = 1
) -> Room:
    """Put a table where the stage `report` looks for it; a share of the samples has pictures."""
    origins = {name: "select" for name in table.column_names if name != "uid"}
    origins["thumbnail"] = "embed.thumbnails"
    names = ("ingest", "select", "embed.thumbnails", "score", "report")
    folders = {name: str(folder / name) for name in names}
    room = Room(Report(), folders, origins, frozenset({"report"}))
    layout = []
    for number, rows in enumerate(np.array_split(np.arange(len(table)), shards)):
        name = f"{number:05d}"
        part = table.take(pa.array(rows))
        room.commit_shard("ingest", name, part.select(["uid"]))
        room.commit_shard("select", name, part)
        # Those that are drawn first are those of low rank.
        ranks = hash_unit(part["uid"].to_pylist(), 0, "report")
        pictures = pa.array(
            [thumbnail if rank <= pictured else None for rank in ranks], pa.binary()
        )
        both = part.select(["uid"]).append_column("thumbnail", pictures)
        room.commit_shard("embed.thumbnails", name, both)
        layout.append({"name": name, "samples": len(part)})
    storage.commit_json(room.path("layout.json", table="ingest"), {"shards": layout})
    return room


FACTS = {
    "select": {
        "mismatch": {"max_probability": 0.2, "expected_rate": 0.05, "unscored": 0},
        "failed": {"mismatched": 1},
    }
}


def test_everything_drawn_is_counted_right(tmp_path: Path) -> None:
    table = decisions(3000)
    drawn = draw(lay_out(tmp_path, table, b"x", 4), 10, 0, FACTS, 0.05)
    rows = {row["uid"]: row for row in table.to_pylist()}
    assert drawn.totals == Counter(row["reason"] for row in rows.values())
    for name, row in drawn.rows.items():
        assert row == {**rows[name], **row}
        other = row["representative_uid"]
        assert other is None or other in drawn.rows
    for chart in drawn.charts:
        have = [row for row in rows.values() if row[chart.name] is not None]
        assert sum(chart.kept) == sum(row["keep"] for row in have)
        assert sum(chart.dropped) == sum(not row["keep"] for row in have)
        assert chart.high == pytest.approx(max(row[chart.name] for row in have))
    assert {chart.name for chart in drawn.charts} == {
        "mismatch_probability", "rarity", "memorization_score", "holdout_gap",
        "caption_information", "representative_cosine",
    }  # fmt: skip
    assert drawn.density is not None
    assert drawn.density["column"] == "memorization_score"
    assert np.sum(drawn.density["counts"]) == len(table)
    regions = np.array(drawn.density["regions"])
    assert regions.sum(axis=0).tolist() == [
        len(table),
        sum(not row["keep"] for row in rows.values()),
    ]
    low, high = drawn.density["low"], drawn.density["high"]
    for number, uids in enumerate(drawn.density["shown"]):
        assert len(uids) == min(regions[number, 0], 6)
        for one in uids:
            up = (rows[one]["memorization_score"] - low) / (high - low)
            assert min(int(rows[one]["rarity"] * 6), 5) == number // 6
            assert min(int(up * 6), 5) == number % 6


def test_galleries_hold_what_they_say(tmp_path: Path) -> None:
    table = decisions(3000)
    drawn = draw(lay_out(tmp_path, table, b"x", 4), 10, 0, FACTS, 0.05)
    everything = table.to_pylist()
    rows = {row["uid"]: row for row in everything}
    groups = {gallery.name: gallery.groups for gallery in drawn.galleries}
    scored = [row for row in everything if row["mismatch_probability"] is not None]
    scored.sort(key=lambda row: -row["mismatch_probability"])
    found = [rows[uid]["mismatch_probability"] for uid in groups["doubtful"][0].uids]
    assert found == [row["mismatch_probability"] for row in scored[:10]]
    below, above = groups["threshold"]
    limits = [[rows[uid]["mismatch_probability"] for uid in side.uids] for side in (below, above)]
    assert limits[0] == sorted(limits[0], reverse=True)
    assert limits[1] == sorted(limits[1])
    assert limits[0][0] <= 0.2 < limits[1][0]
    sizes = Counter(row["cluster_id"] for row in everything)
    largest = [size for _, size in sizes.most_common(12)]
    for group, size in zip(groups["clusters"], largest, strict=True):
        assert group.total == size
        kept = [rows[uid]["keep"] for uid in group.uids]
        assert kept == sorted(kept, reverse=True)
        assert len({rows[uid]["cluster_id"] for uid in group.uids}) == 1
    tail = sorted(everything, key=lambda row: -row["rarity"])
    for group, side in zip(groups["rare"], (True, False), strict=True):
        of_side = [row for row in tail if row["keep"] == side]
        of_side = [row for row in of_side if not (row["reason"] or "").startswith("duplicate_")]
        assert list(group.uids) == [row["uid"] for row in of_side[:10]]
        assert group.total == len(of_side)
    beneficial, harmful = groups["memorized"]
    assert all(
        rows[u]["memorization_kind"] == "beneficial" and rows[u]["keep"] for u in beneficial.uids
    )
    assert not any(rows[uid]["keep"] for uid in harmful.uids)
    for code in ("mismatched", "caption_too_short"):
        assert {rows[uid]["reason"] for uid in groups[code][0].uids} == {code}
        assert groups[code][0].total == drawn.totals[code]


def test_shards_do_not_matter(tmp_path: Path) -> None:
    table = decisions(600)
    one, many = (
        draw(lay_out(tmp_path / str(n), table, b"x", n), 5, 0, FACTS, 0.05) for n in (1, 7)
    )
    assert one == many


def test_a_hundred_thousand_rows_stay_small(tmp_path: Path) -> None:
    table = decisions(100_000)
    room = lay_out(tmp_path, table, b"R" * 16_000, 20, 0.05)
    room = replace(room, stage=Report(pictures=200))
    out = tmp_path / "out"
    assert write_report(room, RunFacts(FACTS, {}), str(out / "report")) == 100_000
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30_000_000
    assert len(files) < 3000
    shown = read_report(out)
    assert 1000 < len(shown["samples"]) < 3000
    pictured = [sample["picture"] for sample in shown["samples"] if "picture" in sample]
    assert 17_900_000 < 16_000 * len(pictured) <= 18_000_000
    assert all((out / "report" / name).exists() for name in pictured)
    assert sum(gallery["groups"][0]["total"] for gallery in shown["galleries"]) > 0


def test_repeated_captions_are_told(tmp_path: Path) -> None:
    table = decisions(1000)
    captions = [
        "Buy <now>\x1b!" if number % 25 == 0 else f"caption {number}" for number in range(1000)
    ]
    place = table.column_names.index("caption")
    table = table.set_column(place, "caption", pa.array(captions))
    warnings = draw(lay_out(tmp_path, table, None, 2), 5, 0, {}, None).warnings
    assert warnings[0] == "4.0% of captions are one and the same: “Buy <now>\x1b!”"


def test_without_scores_or_copies(tmp_path: Path) -> None:
    table = decisions(200).select(["uid", *SHOWN])
    room = lay_out(tmp_path, table, None, 2)
    assert not set(FURTHER) & room.origins.keys()
    out = tmp_path / "out"
    write_report(room, RunFacts({}, {}), str(out / "report"))
    assert read_report(out)["curve"] is None
    page = (out / "report" / "index.html").read_text("utf-8")
    assert "no threshold to move" in page


def judged_of(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> Judged:
    both = [{**row, **decided} for row, decided in zip(rows, found, strict=True)]
    names = ("uid", "keep", "failed_rules", "mismatch_probability", "rarity", "cluster_id")
    table = pa.Table.from_pylist(
        [{name: row[name] for name in names} for row in both], select_schema(names)
    )
    result = join_judged([judge(table, 0)])
    assert result is not None
    return result


@pytest.mark.parametrize("seed", range(3))
def test_rates_keep_what_a_run_with_them_keeps(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 60
    probability = rng.beta(0.5, 3, count)
    edges = [(a, a + 1, 0.9) for a in range(0, count - 1, 3)] + [(0, 5, 0.95), (9, 11, 0.8)]
    parent = list(range(count))
    for left, right, _ in edges:
        old, new = parent[right], parent[left]
        parent = [new if one == old else one for one in parent]
    rows = [
        sample(n, mismatch_probability=float(p), rarity=float(r), cluster_id=str(parent[n]))
        for n, (p, r) in enumerate(zip(probability, rng.random(count), strict=True))
    ]
    current = 0.08
    found, facts = run(tmp_path, rows, edges, max_mismatch_rate=current)
    judged, limit = judged_of(rows, found), facts["mismatch"]["max_probability"]
    for rate in (0.01, 0.03, 0.06, current):
        (point,) = trade_off(judged, limit, [rate], {})
        _, other = run(tmp_path, rows, edges, max_mismatch_rate=rate)
        assert point["kept"] == other["counts"]["kept"]
        assert point["limit"] == pytest.approx(other["mismatch"]["max_probability"], abs=1e-5)
        assert point["expected"] == pytest.approx(other["mismatch"]["expected_rate"], abs=1e-5)
        assert not point["wider"]
    (loose,) = trade_off(judged, limit, [0.15], {})
    _, other = run(tmp_path, rows, edges, max_mismatch_rate=0.15)
    assert loose["kept"] == pytest.approx(other["counts"]["kept"], abs=2)
    # What `curate show` advises does what it says.
    dropped = [n for n, row in enumerate(found) if row["reason"] == "mismatched"]
    number = min(dropped, key=lambda n: probability[n])
    rate = needed_rate(judged, limit, rows[number]["mismatch_probability"])
    again, _ = run(tmp_path, rows, edges, max_mismatch_rate=rate)
    assert again[number]["reason"] != "mismatched"


def test_rates_are_such_as_one_types() -> None:
    values = np.random.default_rng(0).beta(0.5, 3, 500)
    rates = choose_rates(values, 0.0142)
    assert rates == sorted(rates)
    assert 0.0142 in rates
    assert rates[-1] >= values.mean()
    assert all(len(f"{rate:g}".lstrip("0.")) <= 3 for rate in rates)
    assert choose_rates(np.full(4, np.nan), 0.1) == []
    assert choose_rates(np.zeros(4), 0.1) == []
    everything = Judged(np.array([b"a"] * 500), values, values, np.ones(500, bool), values)
    assert trade_off(everything, math.inf, rates, {})[-1]["kept"] == 500


def test_finds_what_a_run_left(tmp_path: Path) -> None:
    parameters = {"max_mismatch_rate": 0.05}
    manifest = {"parameters": parameters, "steps": {}, "versions": {"curate": "1"}}
    facts = RunFacts({}, {"select": manifest, "report": manifest})
    assert facts.parameters() == {"select": parameters}
    table = decisions(50)
    out = tmp_path / "out"
    write_report(
        lay_out(tmp_path, table, None, 1),
        RunFacts(FACTS, {"select": manifest}),
        str(out / "report"),
    )
    assert json.dumps(read_report(out)["curve"]["current"]) == "0.05"
