"""Two runs side by side: what changed its verdict, and samples of every change."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate import storage
from curate.memorization.folds import hash_unit
from curate.report.compare import Comparison, Pair, render_comparison
from curate.report.page import Gallery, Group, read_assets, render_data
from curate.schema import REASONS
from curate.stages.base import Room
from curate.stages.report import RunFacts, read_thumbnails, write_pictures
from curate.stages.report_curves import (
    BINS,
    LOGARITHMIC,
    bar_range,
    choose_rates,
    count_bins,
    join_judged,
    judge,
    numbers,
    trade_off,
)
from curate.stages.report_draw import FURTHER, SCORES, SHOWN, is_number

__all__ = ["Side", "write_comparison"]

Array = np.ndarray[Any, Any]

#: Samples of both runs held at once: uids are compared part by part.
_ROWS_HELD = 2_000_000
#: Samples held for the curves.
_JUDGED = 500_000
#: Samples shown of all changes together, and of one at most.
_MOST, _MOST_EACH = 1200, 48
#: Verdicts as numbers: kept, the reasons in order, and what a run does not have.
_VERDICTS = ("kept", *REASONS, "not in the run")
_ABSENT = len(_VERDICTS) - 1


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Parameters
    ----------
    out : str
    room : Room
        Behind all its stages.
    run : RunFacts
    """

    out: str
    room: Room
    run: RunFacts

    def count(self) -> int:
        return sum(shard["samples"] for shard in self.room.layout()["shards"])

    def read(self, names: tuple[str, ...]) -> Iterator[pa.Table]:
        columns = [name for name in names if self.room.has(name)]
        return (self.room.read(shard, columns) for shard in self.room.shards())


@dataclass
class _Moves:
    """How many samples went from each verdict to each, and the first few by a random rank."""

    count: int
    seed: int
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    shown: dict[tuple[int, int], list[tuple[float, str]]] = field(default_factory=dict)

    def add(self, uids: Array, was: Array, now: Array) -> None:
        pairs = was.astype(np.int64) * len(_VERDICTS) + now
        for pair, number in zip(*np.unique(pairs, return_counts=True), strict=True):
            move = divmod(int(pair), len(_VERDICTS))
            self.counts[move] += int(number)
            if move[0] == move[1]:
                continue
            names = [uid.decode() for uid in uids[pairs == pair]]
            ranks = hash_unit(names, self.seed, "compare").tolist()
            held = [*self.shown.get(move, []), *zip(ranks, names, strict=True)]
            self.shown[move] = sorted(held)[: self.count]


def write_comparison(this: Side, other: Side, target: str, seed: int = 0) -> int:
    """Write the page that compares two runs into a folder; return how many samples changed.

    Parameters
    ----------
    this, other : Side
    target : str
    seed : int
        Draws which samples are shown.
    """
    moves = _compare(this, other, seed)
    chosen = _choose(moves)
    rows, further = _fetch(this, other, moves, chosen)
    own = [uid for uid in rows if not further.get(uid, {}).get("elsewhere")]
    thumbnails = read_thumbnails(this.room, own)
    thumbnails.update(read_thumbnails(other.room, [uid for uid in rows if uid not in thumbnails]))
    pictures = write_pictures(thumbnails, target)
    galleries = _hang(moves, chosen)
    data = render_data(rows, pictures, SCORES, galleries, None, further=further, other=other.out)
    reports = [
        storage.relative(storage.join(one.out, "report/index.html"), target)
        for one in (this, other)
    ]
    files = {
        **read_assets(),
        "data.js": data,
        "index.html": render_comparison(_describe(this, other, moves, seed), *reports),
    }
    for name, content in files.items():
        storage.commit_bytes(storage.join(target, name), content)
    return sum(number for (was, now), number in moves.counts.items() if was != now)


def _compare(this: Side, other: Side, seed: int) -> _Moves:
    """Join both runs by uid, a range of uids at a time."""
    parts = min(-(-(this.count() + other.count()) // _ROWS_HELD) or 1, 256)
    moves = _Moves(_MOST_EACH, seed)
    for part in range(parts):
        uids, now = _verdicts(this, part, parts)
        others, was = _verdicts(other, part, parts)
        everything = np.union1d(uids, others)
        verdicts = np.full((2, len(everything)), _ABSENT, np.int16)
        verdicts[0, np.searchsorted(everything, others)] = was
        verdicts[1, np.searchsorted(everything, uids)] = now
        moves.add(everything, *verdicts)
    return moves


def _verdicts(side: Side, part: int, parts: int) -> tuple[Array, Array]:
    """(N,) uids as bytes and (N,) int16 verdicts of those whose first digits fall into a part."""
    found: list[tuple[Array, Array]] = [(np.zeros(0, "S32"), np.zeros(0, np.int16))]
    codes = pa.array(_VERDICTS[1:_ABSENT])
    for table in side.read(("reason",)):
        uids = table["uid"].to_numpy(zero_copy_only=False).astype("S32")
        place = pc.index_in(table["reason"], value_set=codes).fill_null(-1)
        verdict = place.to_numpy().astype(np.int16) + 1
        if parts > 1:
            digits = np.array([int(uid[:2], 16) for uid in uids.tolist()])
            own = digits * parts // 256 == part
            uids, verdict = uids[own], verdict[own]
        found.append((uids, verdict))
    uids, verdicts = (np.concatenate(column) for column in zip(*found, strict=True))
    return uids, verdicts


def _choose(moves: _Moves) -> list[tuple[int, int]]:
    """Order the changes: newly dropped, newly kept, another reason, in one run only."""

    def rank(move: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        return _kind(move), -moves.counts[move], move

    chosen = sorted(moves.shown, key=rank)
    each = max(_MOST // max(len(chosen), 1), 1)
    for move in chosen:
        moves.shown[move] = moves.shown[move][:each]
    return chosen


def _fetch(
    this: Side, other: Side, moves: _Moves, chosen: list[tuple[int, int]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows of the samples that are shown, and what the page adds to them."""
    of = {uid: move for move in chosen for _, uid in moves.shown[move]}
    rows: dict[str, dict[str, Any]] = {uid: {} for uid in of}  # keeps the order of the galleries
    further: dict[str, dict[str, Any]] = {
        uid: {"there": _VERDICTS[was]} for uid, (was, _) in of.items()
    }
    for side, is_there in ((this, False), (other, True)):
        wanted = {uid for uid, (_, now) in of.items() if (now == _ABSENT) == is_there}
        found = _rows(side, wanted)
        likes = {row["representative_uid"] for row in found.values()} - {None, *rows}
        found.update(_rows(side, likes))
        rows.update(found)
        if is_there:
            for uid in found:
                further[uid] = {"there": further.get(uid, {}).get("there"), "elsewhere": True}
    return rows, further


def _rows(side: Side, uids: set[str]) -> dict[str, dict[str, Any]]:
    if not uids:
        return {}
    names = pa.array(sorted(uids), pa.string())
    tables = side.read((*SHOWN, *FURTHER))
    hits = (table.filter(pc.is_in(table["uid"], value_set=names)) for table in tables)
    return {row["uid"]: row for table in hits for row in table.to_pylist()}


_KINDS = (
    ("newly-dropped", "Newly dropped", "Kept by the other run, dropped by this one."),
    ("newly-kept", "Newly kept", "Dropped by the other run, kept by this one."),
    ("other-reason", "Another reason", "Dropped by both runs, for different reasons."),
    ("one-run", "In one run only", "The other run's input, or its --limit, was another."),
)


def _kind(move: tuple[int, int]) -> int:
    """Return the place among `_KINDS` of a change of verdict."""
    return 3 if _ABSENT in move else 0 if move[0] == 0 else 1 if move[1] == 0 else 2


def _hang(moves: _Moves, chosen: list[tuple[int, int]]) -> list[Gallery]:
    galleries = []
    for number, group in itertools.groupby(chosen, _kind):
        name, title, meaning = _KINDS[number]
        groups = [
            Group(
                f"{_VERDICTS[was]} → {_VERDICTS[now]}",
                moves.counts[was, now],
                tuple(uid for _, uid in moves.shown[was, now]),
            )
            for was, now in group
        ]
        galleries.append(Gallery(name, title, meaning, tuple(groups)))
    return galleries


def _describe(this: Side, other: Side, moves: _Moves, seed: int) -> Comparison:
    used = sorted({0, *(verdict for move in moves.counts for verdict in move)})
    moved = [[moves.counts[was, now] for now in used] for was in used]
    rates, kept, expected = _rate_curves(this, other, seed)
    return Comparison(
        this.out, other.out, tuple(_VERDICTS[verdict] for verdict in used), moved,
        tuple(_settings(this.run, other.run)), tuple(_pairs(this, other)), rates, kept, expected,
    )  # fmt: skip


def _pairs(this: Side, other: Side) -> Iterator[Pair]:
    """Histograms of the scores that both have, over a range in common."""
    shared = set(this.room.further()) & set(other.room.further())
    names = tuple(n for n in SCORES if this.room.has(n) and other.room.has(n))
    names += tuple(n for n in this.room.further() if n in shared and _holds_numbers(n, this, other))
    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    for table in itertools.chain(this.read(names), other.read(names)):
        for name in names:
            values = numbers(table, name)
            if not np.isnan(values).all():
                low[name] = min(low[name], float(np.nanmin(values)))
                high[name] = max(high[name], float(np.nanmax(values)))
    ranges = {n: bar_range(n, low[n], high[n]) for n in names if low[n] <= high[n]}
    bins = {name: np.zeros((2, BINS), np.int64) for name in ranges}
    for place, side in enumerate((this, other)):
        for table in side.read(names):
            for name, counted in bins.items():
                counted[place] += count_bins(name, numbers(table, name), *ranges[name])
    for name, counted in bins.items():
        mine, theirs = counted.tolist()
        yield Pair(name, *ranges[name], mine, theirs, is_log=name in LOGARITHMIC)


def _holds_numbers(name: str, *sides: Side) -> bool:
    """Whether a plug-in's column is numeric in all runs."""
    return all(is_number(table[name].type) for side in sides for table in side.read((name,)))


def _rate_curves(this: Side, other: Side, seed: int) -> tuple[Any, Any, Any]:
    """Rates, and for both runs the share kept and the mismatch share expected at each."""
    sides = []
    for side in (this, other):
        if not side.room.has("mismatch_probability"):
            return (), ([], []), ([], [])
        share = min(1.0, _JUDGED / max(side.count(), 1))
        wanted = ("keep", "failed_rules", "mismatch_probability", "rarity", "cluster_id")
        judged = join_judged([judge(table, seed, share) for table in side.read(wanted)])
        if judged is None:
            return (), ([], []), ([], [])
        mismatch = side.run.facts.get("select", {}).get("mismatch") or {}
        sides.append((side, judged, mismatch.get("max_probability", np.inf)))
    everything = np.concatenate([judged.probability for _, judged, _ in sides])
    rates = choose_rates(everything, None)
    if not rates:
        return (), ([], []), ([], [])
    points = [trade_off(judged, limit, rates, {}) for _, judged, limit in sides]
    kept = [
        [point["kept"] / max(side.count(), 1) for point in found]
        for (side, _, _), found in zip(sides, points, strict=True)
    ]
    return tuple(rates), tuple(kept), tuple([p["expected"] for p in found] for found in points)


def _settings(this: RunFacts, other: RunFacts) -> Iterator[tuple[str, str, str]]:
    """Parameters and versions that differ, and whether the input does."""
    mine, theirs = _flatten(this), _flatten(other)
    for name in sorted(mine.keys() | theirs.keys()):
        values = mine.get(name, "–"), theirs.get(name, "–")
        if values[0] != values[1]:
            yield name, *values
    prints = [run.tables.get("ingest", {}).get("fingerprint") for run in (this, other)]
    ingest = [run.parameters().get("ingest") for run in (this, other)]
    if prints[0] != prints[1] and ingest[0] == ingest[1]:
        yield "input files", "differ", "differ"


def _flatten(run: RunFacts) -> dict[str, str]:
    found = {
        f"{stage}.{name}": value if isinstance(value, str) else json.dumps(value)
        for stage, fields in run.parameters().items()
        for name, value in fields.items()
    }
    for table in run.tables.values():
        found.update({f"version of {name}": version for name, version in table["versions"].items()})
    return found
