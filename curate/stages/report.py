"""report: one page with pictures of what was kept, what was dropped, and why."""

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curate import storage
from curate.memorization.folds import hash_unit
from curate.report.page import Gallery, Picture, render_page
from curate.schema import REASONS
from curate.stages.base import Room, Stage, Step, Table, one_task

__all__ = ["Report"]

_SHOWN = ("caption", "keep", "reason", "weight", "representative_uid", "representative_cosine")
_SCORES = ("mismatch_probability", "rarity")
#: What goes into the galleries of the kept.
_KEPT = "kept"


class Report(Stage):
    """Draw samples of every reason and show them."""

    name: ClassVar[str] = "report"
    publishes: ClassVar[tuple[str, ...]] = ("report",)

    pictures: int = Field(24, description="samples shown for each reason", ge=1, le=200)
    seed: int = Field(0, description="draws which samples are shown")

    def reads(self) -> tuple[str, ...]:
        return (*_SHOWN, "thumbnail")

    def wants(self) -> tuple[str, ...]:
        return _SCORES

    def tables(self) -> tuple[Table, ...]:
        return (Table("report", ()),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("page", _write_page, one_task),)


def _write_page(room: Room, task: str) -> dict[str, float]:
    assert isinstance(room.stage, Report)
    drawn, totals = _draw(room, room.stage.pictures, room.stage.seed)
    wanted = {row[key] for rows in drawn.values() for row in rows for key in _UIDS if row[key]}
    thumbnails = _read_thumbnails(room, wanted)
    meanings = {_KEPT: "a random draw of what is in shards/", **REASONS}
    galleries = [
        Gallery(title, meanings[title], totals[title], _pictures(drawn[title], thumbnails))
        for title in sorted(drawn, key=_gallery_rank)
    ]
    counts = [("ingested", sum(totals.values())), (_KEPT, totals.get(_KEPT, 0))]
    counts += [(code, totals[code]) for code in REASONS if code in totals]
    page = render_page(counts, galleries)
    storage.commit_bytes(room.path("report", "index.html"), page.encode())
    return {"samples": sum(totals.values())}


_UIDS = ("uid", "representative_uid")
#: What is worth a look before all else: decisions that are matters of judgement.
_FIRST = ("mismatched", "duplicate_perceptual", "duplicate_semantic", "duplicate_bytes", _KEPT)


def _gallery_rank(title: str) -> int:
    order = (*_FIRST, *(code for code in REASONS if code not in _FIRST))
    return order.index(title)


def _draw(
    room: Room, count: int, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Return up to `count` rows per reason and of the kept, by hash, and how many there are."""
    columns = [*_SHOWN, *(name for name in _SCORES if room.has(name))]
    drawn: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    totals: dict[str, int] = {}
    for shard in room.shards():
        table = room.read(shard, columns)
        ranks = hash_unit(table["uid"].to_pylist(), seed, "report")
        reasons = np.array([reason or _KEPT for reason in table["reason"].to_pylist()])
        for title in sorted(set(reasons)):
            rows = np.flatnonzero(reasons == title)
            totals[title] = totals.get(title, 0) + len(rows)
            best = rows[np.argsort(ranks[rows], kind="stable")[:count]]
            found = table.take(pa.array(best)).to_pylist()
            ranked = [*drawn.get(title, []), *zip(ranks[best].tolist(), found, strict=True)]
            drawn[title] = sorted(ranked, key=lambda pair: pair[0])[:count]
    return {title: [row for _, row in rows] for title, rows in drawn.items()}, totals


def _read_thumbnails(room: Room, wanted: set[str]) -> dict[str, bytes | None]:
    names = pa.array(sorted(wanted), pa.string())
    found: dict[str, bytes | None] = {}
    for shard in room.shards():
        table = room.read(shard, ["thumbnail"])
        hits = table.filter(pc.is_in(table["uid"], value_set=names))
        found.update(zip(hits["uid"].to_pylist(), hits["thumbnail"].to_pylist(), strict=True))
    return found


def _pictures(
    rows: list[dict[str, Any]], thumbnails: dict[str, bytes | None]
) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            row["uid"],
            thumbnails[row["uid"]],
            row["caption"],
            _notes(row),
            thumbnails.get(row["representative_uid"]),
        )
        for row in rows
    )


def _notes(row: dict[str, Any]) -> tuple[str, ...]:
    labels = {
        "mismatch_probability": "mismatch",
        "rarity": "rarity",
        "weight": "weight",
        "representative_cosine": "cosine",
    }
    known = [(label, row.get(name)) for name, label in labels.items()]
    if not row["keep"]:
        known = [(label, value) for label, value in known if label != "weight"]
    return tuple(f"{label} {value:.3f}" for label, value in known if value is not None)
