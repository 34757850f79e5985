"""Two runs compared: counts equal those of a plain join, and samples of every change are shown."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.schema import REASONS
from curate.stages import report_compare
from curate.stages.report import RunFacts
from curate.stages.report_compare import Side, write_comparison
from tests.stages.test_report import FACTS, decisions, lay_out
from tests.support import read_data

Array = np.ndarray[Any, Any]


def manifest(**parameters: Any) -> dict[str, Any]:
    return {"parameters": parameters, "steps": {}, "versions": {"curate": "1"}}


def make_sides(folder: Path, tables: list[pa.Table]) -> list[Side]:
    """Lay out one run per table, each with its own number of shards and threshold."""
    sides = []
    for number, table in enumerate(tables):
        out = folder / f"out {number}"
        room = lay_out(out / "stages", table, b"RIFF", 2 + number)
        select = manifest(max_mismatch_rate=0.05 + number, seed=1)
        sides.append(Side(str(out), room, RunFacts(FACTS, {"select": select})))
    return sides


def change(table: pa.Table, share: float) -> pa.Table:
    """Give a share of the samples another verdict, and leave the first fifty out."""
    rng = np.random.default_rng(1)
    rows = table.to_pylist()
    for row in rows:
        if rng.random() < share:
            row["reason"] = rng.choice([None, *REASONS])
            row["keep"] = row["reason"] is None
    return pa.Table.from_pylist(rows[50:], table.schema)


@pytest.mark.parametrize("held", [2_000_000, 700])
def test_counts_are_those_of_a_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(report_compare, "_ROWS_HELD", held)
    this, other = decisions(2000), change(decisions(2000), 0.2)
    sides = make_sides(tmp_path, [this, other])
    target = tmp_path / "out 0/compare"
    changed = write_comparison(*sides, str(target))
    before, after = ({r["uid"]: r for r in table.to_pylist()} for table in (other, this))
    moves = Counter(
        tuple(
            "not in the run" if uid not in run else run[uid]["reason"] or "kept"
            for run in (before, after)
        )
        for uid in before.keys() | after.keys()
    )
    assert changed == sum(n for (was, now), n in moves.items() if was != now) > 300
    shown = read_data(target)
    told = {group["label"]: group for gallery in shown["galleries"] for group in gallery["groups"]}
    assert {label: group["total"] for label, group in told.items()} == {
        f"{was} → {now}": number for (was, now), number in moves.items() if was != now
    }
    for label, group in told.items():
        was, _, now = label.partition(" → ")
        for item in group["items"]:
            sample = shown["samples"][item]
            assert sample["there"] == was
            assert (sample.get("reason") or "kept") == now
    names = [gallery["name"] for gallery in shown["galleries"]]
    assert names == ["newly-dropped", "newly-kept", "other-reason", "one-run"]
    page = (target / "index.html").read_text("utf-8")
    assert "select.max_mismatch_rate" in page
    assert "select.seed" not in page
    assert 'href="../report/index.html"' in page
    assert 'href="../../out%201/report/index.html"' in page
    moved = [number for (was, now), number in moves.items() if was != now]
    for number in moved:
        assert f'<td class="number moved">{number:,}</td>' in page


def test_a_sample_of_the_other_run_alone_is_looked_up_there(tmp_path: Path) -> None:
    table = decisions(300)
    sides = make_sides(tmp_path, [table.slice(100), table])
    target = tmp_path / "out 0/compare"
    assert write_comparison(*sides, str(target)) == 100
    shown = read_data(target)
    assert shown["other"] == sides[1].out
    (gallery,) = shown["galleries"]
    items = [item for group in gallery["groups"] for item in group["items"]]
    assert all(shown["samples"][item]["elsewhere"] for item in items)
    assert {shown["samples"][item]["uid"] for item in items} <= set(
        table["uid"].slice(0, 100).to_pylist()
    )


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    table = decisions(200)
    this, other = make_sides(tmp_path, [table, table])
    other = Side(other.out, other.room, this.run)
    assert write_comparison(this, other, str(tmp_path / "page")) == 0
    assert read_data(tmp_path / "page")["galleries"] == []
    assert "are the same" in (tmp_path / "page/index.html").read_text("utf-8")


def test_the_smaller_page_is_kept_small(tmp_path: Path) -> None:
    sides = make_sides(tmp_path, [decisions(20_000), change(decisions(20_000), 1.0)])
    write_comparison(*sides, str(tmp_path / "page"))
    assert 500 < len(read_data(tmp_path / "page")["samples"]) < 3000


def test_numbers_of_plugins_are_compared(tmp_path: Path) -> None:
    sides = make_sides(tmp_path, [decisions(60), decisions(60)])
    for side in sides:
        room = side.room
        room.folders["embed.plugins"] = room.folders["select"].replace("select", "embed.plugins")
        room.origins.update(sharpness="embed.plugins", alphabet="embed.plugins")
        for shard in room.shards():
            uids = room.read(shard, [])["uid"]
            sharpness = pa.array([int(uid[:4], 16) for uid in uids.to_pylist()], pa.int32())
            alphabet = pa.array(["latin"] * len(uids))
            columns = {"uid": uids, "sharpness": sharpness, "alphabet": alphabet}
            room.commit_shard("embed.plugins", shard, pa.table(columns))
    write_comparison(*sides, str(tmp_path / "compare"))
    page = (tmp_path / "compare/index.html").read_text("utf-8")
    assert "sharpness" in page
    assert "alphabet" not in page
