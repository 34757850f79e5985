"""report: a static page with pictures of what was kept, what was dropped, and why."""

import json
from dataclasses import replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curate import storage
from curate.report.page import Chart, Overview, read_assets, render_data, render_page
from curate.report.words import SPAN, describe_facts, stage_times
from curate.schema import REASONS
from curate.stages.base import Room, Stage, Step, Table, one_task
from curate.stages.report_draw import FURTHER, SHOWN, Drawn, draw

__all__ = ["Report", "RunFacts", "read_thumbnails", "write_pictures", "write_report"]

#: Bytes of all thumbnails together: with the rest the page stays below 30 MB whatever the run.
_THUMBNAIL_BYTES = 18_000_000


class Report(Stage):
    """Draw samples of every reason and show them."""

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 5
    publishes: ClassVar[tuple[str, ...]] = ("report",)
    reads_further: ClassVar[bool] = True

    pictures: int = Field(24, description="samples shown for each reason", ge=1, le=200)
    seed: int = Field(0, description="draws which samples are shown")

    def reads(self) -> tuple[str, ...]:
        return (*SHOWN, "thumbnail")

    def wants(self) -> tuple[str, ...]:
        return (*FURTHER, "image_emb")

    def tables(self) -> tuple[Table, ...]:
        return (Table("report", ()),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("page", _write_page, one_task),)

    def facts(self, room: Room) -> dict[str, Any]:
        path = storage.join(room.path("report"), "curves.json")
        return {"warnings": storage.read_json(path)["warnings"]}


class RunFacts:
    """What `run.json` tells of the stages before the report.

    Parameters
    ----------
    facts : dict
        By stage.
    tables : dict
        By table: `parameters`, `steps`, `versions` and `fingerprint`.
    """

    def __init__(self, facts: dict[str, Any], tables: dict[str, Any]) -> None:
        self.facts = {name: told for name, told in facts.items() if name != "report"}
        self.tables = {name: table for name, table in tables.items() if name != "report"}

    @classmethod
    def of(cls, room: Room) -> "RunFacts":
        """Read them where the stages left them: `run.json` is written when all are done."""
        facts, tables = {}, {}
        for stage in room.pipeline:
            if stage.name == "report":
                continue
            found = stage.facts(replace(room, stage=stage))
            if found:
                facts[stage.name] = found
            for table in stage.tables():
                path = storage.join(room.folders[table.name], "manifest.json")
                if storage.exists(path):
                    mark = room.folders[table.name].rpartition("-")[2]
                    tables[table.name] = {**storage.read_json(path), "fingerprint": mark}
        return cls(facts, tables)

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameters by stage."""
        found: dict[str, dict[str, Any]] = {}
        for name, table in self.tables.items():
            found.setdefault(name.partition(".")[0], {}).update(table["parameters"])
        return found


def _write_page(room: Room, task: str) -> dict[str, float]:
    target = room.path("report")
    return {"samples": write_report(room, RunFacts.of(room), target)}


def write_report(room: Room, run: RunFacts, target: str) -> int:
    """Write the page into a folder; return how many samples it tells of.

    Parameters
    ----------
    room : Room
        Of the stage `report`, behind finished stages.
    run : RunFacts
    target : str
    """
    stage = room.stage
    assert isinstance(stage, Report)
    rate = run.parameters().get("select", {}).get("max_mismatch_rate")
    drawn = draw(room, stage.pictures, stage.seed, run.facts, rate)
    pictures = write_pictures(read_thumbnails(room, list(drawn.rows)), target)
    curve = None
    if drawn.curve:
        curve = {
            "points": drawn.curve,
            "current": rate,
            "ladder": drawn.ladder,
            "note": _note(drawn, run.parameters()),
            "ingested": sum(drawn.totals.values()),
        }
    overview = _overview(drawn, run)
    curves = {
        "threshold": drawn.curve,
        "min_cosine": overview.what_if,
        "histograms": {chart.name: _numbers(chart) for chart in drawn.charts},
        # Those of earlier stages' facts are told from these facts.
        "warnings": drawn.warnings,
    }
    files = {
        **read_assets(),
        "curves.json": json.dumps(curves, indent=1).encode(),
        "data.js": render_data(
            drawn.rows,
            pictures,
            drawn.scores,
            drawn.galleries,
            curve,
            drawn.places,
            drawn.density,
        ),
        "index.html": render_page(overview, drawn.charts, curve, drawn.density, drawn.places),
    }
    for name, data in files.items():
        storage.commit_bytes(storage.join(target, name), data)
    return sum(drawn.totals.values())


def _numbers(chart: Chart) -> dict[str, Any]:
    return {
        "low": chart.low,
        "high": chart.high,
        "axis": "log" if chart.is_log else "linear",
        "kept": chart.kept,
        "dropped": chart.dropped,
    }


def write_pictures(thumbnails: dict[str, bytes], target: str) -> dict[str, str]:
    """Write thumbnails below a page's folder; return their places relative to it by uid."""
    pictures = {uid: f"thumbnails/{number:04d}.webp" for number, uid in enumerate(thumbnails)}
    for uid, name in pictures.items():
        storage.commit_bytes(storage.join(target, name), thumbnails[uid])
    return pictures


def read_thumbnails(room: Room, uids: list[str]) -> dict[str, bytes]:
    """Return thumbnails of samples in the order given, as many as a page has room for."""
    if not room.has("thumbnail"):
        return {}
    names = pa.array(uids, pa.string())
    found: dict[str, bytes | None] = {}
    for shard in room.shards():
        table = room.read(shard, ["thumbnail"])
        hits = table.filter(pc.is_in(table["uid"], value_set=names))
        found.update(zip(hits["uid"].to_pylist(), hits["thumbnail"].to_pylist(), strict=True))
    fitting: dict[str, bytes] = {}
    size_bytes = 0
    for uid in uids:
        thumbnail = found.get(uid)
        size_bytes += len(thumbnail or b"")
        if thumbnail is not None and size_bytes <= _THUMBNAIL_BYTES:
            fitting[uid] = thumbnail
    return fitting


def _note(drawn: Drawn, parameters: dict[str, dict[str, Any]]) -> str:
    """Tell how far the slider's counts are to be trusted."""
    prefer = parameters.get("select", {}).get("prefer") or ["mismatch"]
    text = "Each stop says what a run with that rate keeps."
    if prefer[0] != "mismatch":
        text += " Counts are near what it would be: copies are chosen among anew, not by mismatch."
    elif any(point["wider"] for point in drawn.curve):
        text += (
            " Rates looser than this run's are estimates: one more sample is counted for each "
            "cluster of copies of which none is kept yet."
        )
    return text


def _overview(drawn: Drawn, run: RunFacts) -> Overview:
    dropped = (
        (code, drawn.totals[code], REASONS[code]) for code in REASONS if code in drawn.totals
    )
    scanned = run.tables.get("ingest", {}).get("steps", {}).get("scan", {})
    said = [
        line.removeprefix("Warning: ")
        for line in describe_facts(run.facts, scanned)
        if line.startswith("Warning: ")
    ]
    parameters = [
        (f"{stage}.{name}", value if isinstance(value, str) else json.dumps(value))
        for stage, fields in run.parameters().items()
        for name, value in fields.items()
    ]
    versions = [table["versions"] for table in run.tables.values()]
    kept = drawn.totals.get(None, 0)
    selected = run.facts.get("select", {})
    what_if = [(row["min_cosine"], row["kept"]) for row in selected.get("what_if", [])]
    own = run.parameters().get("dedup", {}).get("min_cosine")
    return Overview(
        tuple(dropped),
        sum(drawn.totals.values()),
        kept,
        tuple(_tiles(run)),
        (*said, *drawn.warnings),
        tuple(stage_times(run.tables)),
        tuple(parameters),
        tuple(versions[-1].items()) if versions else (),
        tuple((name, t["fingerprint"]) for name, t in run.tables.items() if "fingerprint" in t),
        ((own, kept), *what_if) if own is not None and what_if else (),
        any("bound" in row for row in selected.get("what_if", [])),
    )


def _tiles(run: RunFacts) -> list[tuple[str, str, str]]:
    """Figure, what it is, what stands behind it."""
    facts, tiles = run.facts, []
    detector = facts.get("score", {}).get("mismatch", {})
    if detector.get("share") is not None:
        within = SPAN * detector["share_stderr"]
        low, high = max(detector["share"] - within, 0), min(detector["share"] + within, 1)
        behind = f"of all captions, estimated: {low:.1%} to {high:.1%}"
        tiles.append((f"{detector['share']:.1%}", "mismatched", behind))
    mismatch = facts.get("select", {}).get("mismatch") or {}
    if mismatch.get("expected_rate") is not None:
        asked = run.parameters().get("select", {}).get("max_mismatch_rate")
        behind = "expected" if asked is None else f"expected; at most {asked:.2%} was asked for"
        tiles.append((f"{mismatch['expected_rate']:.2%}", "mismatched among the kept", behind))
    recall = facts.get("dedup", {}).get("recall", {})
    if recall.get("recall") is not None:
        behind = f"of pairs that brute force finds, by {recall['rows']} samples"
        if recall.get("interval"):
            low, high = recall["interval"]
            behind += f": {low:.2%} to {high:.2%}"
        tiles.append((f"{recall['recall']:.2%}", "duplicate pairs found", behind))
    caught = mismatch.get("phantoms_caught") or {}
    if caught.get("random") is not None:
        near = caught.get("near_image")
        behind = "" if near is None else f"and {near:.0%} of captions of look-alikes"
        tiles.append((f"{caught['random']:.0%}", "of planted captions caught", behind))
    lost = [mismatch.get(name) for name in ("rare_dropped", "common_dropped")]
    if lost[0] is not None and lost[1] is not None:
        tiles.append((f"{lost[0]:.0%}", "of rare samples lost", f"and {lost[1]:.0%} of the common"))
    return tiles
