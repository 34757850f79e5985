"""Which samples the report shows: passes over the shards that hold a bounded number of rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.memorization.folds import hash_unit
from curate.report.page import Chart, Gallery, Group
from curate.schema import COLUMNS, REASONS, public_columns
from curate.stages.base import Room
from curate.stages.remove import REMOVALS
from curate.stages.report_captions import Captions
from curate.stages.report_curves import (
    BINS,
    LOGARITHMIC,
    Judged,
    bar_range,
    choose_rates,
    column,
    count_bins,
    eligible,
    join_judged,
    judge,
    numbers,
    trade_off,
)
from curate.stages.report_map import MAPPED, draw_map, read_vectors
from curate.stages.score_inputs import read_phantoms

__all__ = ["FURTHER", "SCORES", "SHOWN", "Drawn", "draw", "is_number"]

Array = np.ndarray[Any, Any]

#: Columns that every run has.
SHOWN = (
    "key", "source_file", "caption", "width", "height", "keep", "reason", "failed_rules", "weight",
    "representative_uid", "representative_cosine", "duplicate_level", "captions",
)  # fmt: skip
#: Numeric scores: each gets a histogram, and stands beside a sample.
SCORES = tuple(
    name
    for name in public_columns("decisions")
    if COLUMNS[name].type == pa.float32() and not name.endswith("_stderr") and name != "weight"
)
#: Columns that some have.
FURTHER = (
    "cluster_id", "cluster_size", "contaminated_by", "earlier_uid", "memorization_kind",
    *(name for name in SCORES if name not in SHOWN),
)  # fmt: skip

#: Samples of all reasons together, whatever `report.pictures` says: the page stays small.
_MOST_BY_REASON = 1500
_MOST_PICKED = 48
_CLUSTERS = 12
_CLUSTER_MEMBERS = 8
_CLUSTER_KEPT = 3
#: Samples along the slider: at 8 a side, one in ten is new with every stop.
_LADDER = 160
#: Rows held for curves and for the search of repeated captions.
_ROWS_HELD = 500_000
#: Rows whose captions are taken apart into titles and what stands behind them.
_ROWS_PARTED = 50_000

#: Reasons why a sample could not even be looked at.
_UNREADABLE = tuple(
    code
    for code in list(REASONS)[: list(REASONS).index("caption_too_short")]
    if code not in REMOVALS
)
#: What is worth a look before all else: decisions that are matters of judgement.
_FIRST = ("mismatched", "duplicate_perceptual", "duplicate_semantic", "duplicate_bytes")


@dataclass
class _Best:
    """The rows of lowest key in a stream; ties go by a random rank, not by place."""

    count: int
    total: int = 0
    rows: list[tuple[float, float, dict[str, Any]]] = field(default_factory=list)

    def add(self, table: pa.Table, keys: Array, ranks: Array, chosen: Array) -> None:
        """Take part in the choice with the rows that `chosen` (N,) bool marks."""
        places = np.flatnonzero(chosen)
        self.total += len(places)
        if len(self.rows) == self.count and self.count:
            places = places[keys[places] <= self.rows[-1][0]]
        places = places[np.lexsort((ranks[places], keys[places]))[: self.count]]
        if len(places) == 0:
            return
        found = table.take(pa.array(places)).to_pylist()
        new = zip(keys[places].tolist(), ranks[places].tolist(), found, strict=True)
        self.rows = sorted([*self.rows, *new], key=lambda row: row[:2])[: self.count]

    def samples(self) -> list[dict[str, Any]]:
        return [row for _, _, row in self.rows]


@dataclass
class Drawn:
    """Everything of the samples that the page shows.

    Parameters
    ----------
    totals : dict of str to int
        Samples by reason; None for the kept.
    galleries : list of Gallery
    rows : dict of str to dict
        Shown samples by uid, in the order in which they are first shown.
    charts : list of Chart
    curve : list of dict
        See `report_curves.trade_off`.
    current : float or None
        The rate that the run was given.
    ladder : list of str
        uids along the slider, by rising probability.
    density : dict or None
        Counts over rarity and memorization, see `report.page.render_page`.
    warnings : list of str
    scores : tuple of str
        Numeric columns of which the page speaks, those of plug-ins included.
    places : dict or None
        Of a random draw, see `report_map.draw_map`.
    """

    totals: dict[str | None, int]
    galleries: list[Gallery]
    rows: dict[str, dict[str, Any]]
    charts: list[Chart]
    curve: list[dict[str, Any]]
    current: float | None
    ladder: list[str]
    density: dict[str, Any] | None
    warnings: list[str]
    scores: tuple[str, ...]
    places: dict[str, Any] | None = None


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type gets a histogram."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


class _Pass:
    """The first pass: counts, ranges, and the rows that can be chosen by themselves."""

    def __init__(self, room: Room, count: int, seed: int, facts: dict[str, Any]) -> None:
        self.room, self.count, self.seed = room, count, seed
        samples = max(sum(shard["samples"] for shard in room.layout()["shards"]), 1)
        self.share = min(1.0, _ROWS_HELD / samples)
        mismatch = facts.get("select", {}).get("mismatch") or {}
        self.limit: float = mismatch.get("max_probability", np.inf)
        self.by_reason: dict[str | None, _Best] = {}
        self.best = {name: _Best(min(count, _MOST_PICKED)) for name in _PICKED}
        self.mapped = _Best(MAPPED)
        self.clusters: dict[str, int] = {}
        self.scores = SCORES
        self.ranges: dict[str, tuple[float, float]] = {}
        self.captions = Captions(self.share, _ROWS_PARTED / samples)
        self.silent = 0
        self.judged: list[Judged] = []

    def read(self, shard: str) -> tuple[pa.Table, Array]:
        columns = [name for name in (*SHOWN, *FURTHER) if self.room.has(name)]
        further = self.room.further()
        table = self.room.read(shard, [*columns, *further])
        self.scores = (*SCORES, *(name for name in further if is_number(table[name].type)))
        return table, hash_unit(table["uid"].to_pylist(), self.seed, "report")

    def look(self, table: pa.Table, ranks: Array) -> None:
        for name in self.scores:
            values = numbers(table, name)
            if not np.isnan(values).all():
                low, high = self.ranges.get(name, (np.inf, -np.inf))
                self.ranges[name] = min(low, np.nanmin(values)), max(high, np.nanmax(values))
        reasons = np.array(table["reason"].to_pylist(), object)
        # Samples on a removal list are counted, and nothing of them is shown.
        removed = np.isin(reasons, REMOVALS)
        for reason in dict.fromkeys(reasons[removed].tolist()):
            self.by_reason.setdefault(reason, _Best(0)).total += int((reasons == reason).sum())
        table, ranks = table.filter(pa.array(~removed)), ranks[~removed]
        reasons, kept = reasons[~removed], table["keep"].to_numpy()
        for reason in dict.fromkeys(reasons.tolist()):
            best = self.by_reason.setdefault(reason, _Best(self.count))
            mask = kept if reason is None else reasons == reason
            best.add(table, ranks, ranks, mask)
        if self.room.has("image_emb"):
            self.mapped.add(table, ranks, ranks, ~np.isnan(numbers(table, "width")))
        self._pick(table, ranks, kept)
        self._find_clusters(table)
        self._judge(table)
        self.captions.count(table, ranks)
        if self.room.has("caption_information"):
            with np.errstate(invalid="ignore"):
                self.silent += int((numbers(table, "caption_information") < _SILENT).sum())

    def _pick(self, table: pa.Table, ranks: Array, kept: Array) -> None:
        self.best["dropped"].add(table, ranks, ranks, ~kept)
        probability, memorized = (
            numbers(table, name) for name in ("mismatch_probability", "memorization_score")
        )
        scored, can = ~np.isnan(probability), eligible(table)
        self.best["doubtful"].add(table, -probability, ranks, scored)
        if np.isfinite(self.limit):
            with np.errstate(invalid="ignore"):
                below, above = can & (probability <= self.limit), can & (probability > self.limit)
            self.best["below"].add(table, self.limit - probability, ranks, below)
            self.best["above"].add(table, probability - self.limit, ranks, above)
        rarity = numbers(table, "rarity")
        rare = ~np.isnan(rarity) & ~np.isnan(numbers(table, "width"))
        # Of a copy nothing is lost.
        copies = pc.starts_with(table["reason"], "duplicate_").fill_null(False).to_numpy()
        self.best["rare_kept"].add(table, -rarity, ranks, rare & kept)
        self.best["rare_dropped"].add(table, -rarity, ranks, rare & ~kept & ~copies)
        kinds = np.array(column(table, "memorization_kind"), object)
        self.best["beneficial"].add(table, -memorized, ranks, (kinds == "beneficial") & kept)
        self.best["harmful"].add(table, -memorized, ranks, (kinds == "harmful") & ~kept)

    def _find_clusters(self, table: pa.Table) -> None:
        sizes = numbers(table, "cluster_size")
        with np.errstate(invalid="ignore"):
            rows = np.flatnonzero(sizes > 1)
        if len(rows) == 0:
            return
        names = table["cluster_id"].take(pa.array(rows)).to_pylist()
        self.clusters.update(zip(names, sizes[rows].astype(int).tolist(), strict=True))
        largest = sorted(self.clusters.items(), key=lambda one: (-one[1], one[0]))
        self.clusters = dict(largest[:_CLUSTERS])

    def _judge(self, table: pa.Table) -> None:
        if self.room.has("mismatch_probability"):
            self.judged.append(judge(table, self.seed, self.share))


_PICKED = (
    "dropped", "doubtful", "below", "above", "rare_kept", "rare_dropped", "beneficial", "harmful",
)  # fmt: skip
#: Two judges found that captions of less information mostly say nothing about their picture.
_SILENT = 0.3


def draw(room: Room, count: int, seed: int, facts: dict[str, Any], rate: float | None) -> Drawn:
    """Choose the samples to show and count what is drawn of all of them.

    Parameters
    ----------
    room : Room
    count : int
        Samples per gallery.
    seed : int
    facts : dict
        By stage, as `run.json` holds them.
    rate : float or None
        `select.max_mismatch_rate`.
    """
    first = _Pass(room, count, seed, facts)
    for shard in room.shards():
        first.look(*first.read(shard))
    share = max(_MOST_BY_REASON // max(len(first.by_reason), 1), 1)
    for best in first.by_reason.values():
        best.rows = best.rows[:share]
    judged = join_judged(first.judged)
    curve: list[dict[str, Any]] = []
    ladder: list[str] = []
    if judged is not None:
        rates = choose_rates(judged.probability, rate)
        curve = trade_off(judged, first.limit, rates, _phantoms(room))
        ladder = _climb(judged, curve)
    first.ranges = {n: bar_range(n, *ends) for n, ends in first.ranges.items()}
    found = _second_pass(first, ladder)
    galleries, rows = _hang(first, found)
    rows.update({uid: found.rows[uid] for uid in ladder if uid not in rows})
    for best in found.density.best if found.density else ():
        rows.update({row["uid"]: row for row in best.samples() if row["uid"] not in rows})
    mapped = {row["uid"]: row for row in first.mapped.samples()}
    vectors = read_vectors(room, [*mapped, *first.captions.uids()])
    places = draw_map(vectors, list(mapped))
    if places is not None:
        rows.update({uid: mapped[uid] for uid, _, _ in places["points"] if uid not in rows})
    others = {row["representative_uid"] for row in rows.values()} - {None, *rows}
    _fetch(first, others - found.rows.keys(), found.rows)
    rows.update({uid: found.rows[uid] for uid in sorted(others) if uid in found.rows})
    totals = {reason: best.total for reason, best in first.by_reason.items()}
    warnings = [*first.captions.warnings(vectors, list(mapped)), *_warn(first, totals)]
    return Drawn(
        totals, galleries, rows, found.charts, curve, rate, ladder,
        found.density.told() if found.density else None, warnings, first.scores, places,
    )  # fmt: skip


def _phantoms(room: Room) -> dict[str, Array]:
    found = read_phantoms(room)
    if found is None:
        return {}
    rungs, planted = found
    return {rung: planted[rungs == rung] for rung in dict.fromkeys(rungs.tolist())}


def _climb(judged: Judged, curve: list[dict[str, Any]]) -> list[str]:
    """Samples spread evenly over the ranks that the slider's thresholds pass."""
    if not curve:
        return []
    low, high = min(p["limit"] for p in curve), max(p["limit"] for p in curve)
    order = np.lexsort((judged.uid, judged.probability))
    ordered = judged.probability[order]
    start = max(int(np.searchsorted(ordered, low)) - 8, 0)
    end = int(np.searchsorted(ordered, high, "right"))
    places = np.unique(np.linspace(start, max(end - 1, start), _LADDER).astype(int))
    return [uid.decode() for uid in judged.uid[order[places]] if uid]


@dataclass
class _Cluster:
    """Members to show: some who represent it, then its nearest copies."""

    kept: _Best = field(default_factory=lambda: _Best(_CLUSTER_KEPT))
    dropped: _Best = field(default_factory=lambda: _Best(_CLUSTER_MEMBERS))

    def samples(self) -> list[dict[str, Any]]:
        return [*self.kept.samples(), *self.dropped.samples()][:_CLUSTER_MEMBERS]


@dataclass
class _Found:
    """What the second pass finds once the first has said what to look for."""

    rows: dict[str, dict[str, Any]]
    clusters: dict[str, "_Cluster"]
    charts: list[Chart]
    density: "_Density | None"


def _second_pass(first: _Pass, ladder: list[str]) -> _Found:
    chosen = [*first.by_reason.values(), *first.best.values()]
    wanted = {row["representative_uid"] for best in chosen for row in best.samples()}
    names = pa.array(sorted((wanted - {None}) | set(ladder)), pa.string())
    bins = {name: np.zeros((2, BINS), np.int64) for name in first.ranges}
    clusters = {name: _Cluster() for name in first.clusters}
    rows: dict[str, dict[str, Any]] = {}
    memory = next((n for n in ("memorization_score", "holdout_gap") if n in first.ranges), None)
    density = _Density(first.ranges[memory], memory) if memory is not None else None
    for shard in first.room.shards():
        table, ranks = first.read(shard)
        kept = table["keep"].to_numpy()
        for name, (low, high) in first.ranges.items():
            values = numbers(table, name)
            bins[name] += [count_bins(name, values[side], low, high) for side in (kept, ~kept)]
        hits = table.filter(pc.is_in(table["uid"], value_set=names))
        rows.update({row["uid"]: row for row in hits.to_pylist()})
        _gather_members(table, ranks, kept, clusters)
        first.captions.choose(table, ranks)
        if density is not None:
            density.add(table, ranks, kept)
    charts = [
        Chart(name, *first.ranges[name], kept_bins, dropped_bins, is_log=name in LOGARITHMIC)
        for name in first.scores
        if name in bins
        for kept_bins, dropped_bins in [bins[name].tolist()]
    ]
    return _Found(rows, clusters, charts, density)


def _fetch(first: _Pass, uids: set[str], rows: dict[str, dict[str, Any]]) -> None:
    """Add the rows of those that only a member of a cluster names."""
    if not uids:
        return
    names = pa.array(sorted(uids), pa.string())
    for shard in first.room.shards():
        table, _ = first.read(shard)
        hits = table.filter(pc.is_in(table["uid"], value_set=names))
        rows.update({row["uid"]: row for row in hits.to_pylist()})


#: Cells of the density, a side.
_CELLS = 24


def _gather_members(
    table: pa.Table, ranks: Array, kept: Array, clusters: dict[str, _Cluster]
) -> None:
    if not clusters:
        return
    held = pa.array(list(clusters), pa.string())
    rows = np.flatnonzero(pc.is_in(table["cluster_id"], value_set=held).to_numpy())
    part, ranks, kept = table.take(pa.array(rows)), ranks[rows], kept[rows]
    names = np.array(part["cluster_id"].to_pylist(), object)
    cosines = np.nan_to_num(numbers(part, "representative_cosine"), nan=-1.0)
    for name in dict.fromkeys(names.tolist()):
        clusters[name].kept.add(part, ranks, ranks, (names == name) & kept)
        clusters[name].dropped.add(part, -cosines, ranks, (names == name) & ~kept)


#: Regions of the density that can be chosen, a side, and samples shown of each.
_REGIONS, _REGION_SAMPLES = 6, 6


class _Density:
    """Counts over rarity and a measure of memorization, and some samples of every region."""

    def __init__(self, span: tuple[float, float], column: str) -> None:
        self.span, self.column = span, column
        self.counts = np.zeros((_CELLS, _CELLS), np.int64)
        self.best = [_Best(_REGION_SAMPLES) for _ in range(_REGIONS**2)]
        self.dropped = np.zeros(_REGIONS**2, np.int64)

    def add(self, table: pa.Table, ranks: Array, kept: Array) -> None:
        across, up = numbers(table, "rarity"), numbers(table, self.column)
        known = ~np.isnan(across) & ~np.isnan(up)
        places = self._places(across, 0.0, 1.0), self._places(up, *self.span)
        np.add.at(self.counts, tuple(place[known] for place in places), 1)
        wide = _CELLS // _REGIONS
        region = np.where(known, places[0] // wide * _REGIONS + places[1] // wide, -1)
        self.dropped += np.bincount(region[known & ~kept], minlength=_REGIONS**2)
        for number in np.unique(region[known]).tolist():
            self.best[number].add(table, ranks, ranks, region == number)

    def _places(self, values: Array, low: float, high: float) -> Array:
        shares = (np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0)
        return np.clip((shares * _CELLS).astype(np.int64), 0, _CELLS - 1)

    def told(self) -> dict[str, Any] | None:
        """See `report.page.render_page`; None if no sample has both."""
        if not self.counts.any():
            return None
        low, high = self.span
        totals = [best.total for best in self.best]
        return {
            "column": self.column,
            "low": low,
            "high": high,
            "counts": self.counts.tolist(),
            "regions": [list(pair) for pair in zip(totals, self.dropped.tolist(), strict=True)],
            "shown": [[row["uid"] for row in best.samples()] for best in self.best],
        }


def _hang(first: _Pass, found: _Found) -> tuple[list[Gallery], dict[str, dict[str, Any]]]:
    """Put the chosen into galleries, the telling ones first."""
    best, rows = first.best, {}
    galleries: list[Gallery] = []

    def hang(name: str, title: str, *groups: tuple[str, list[dict[str, Any]], int]) -> None:
        shown = []
        for label, samples, total in groups:
            if samples:
                rows.update({row["uid"]: row for row in samples if row["uid"] not in rows})
                shown.append(Group(label, total, tuple(row["uid"] for row in samples)))
        if shown:
            meaning = _MEANINGS.get(name) or REASONS[name]
            galleries.append(Gallery(name, title, meaning, tuple(shown)))

    def pick(label: str, choice: _Best | None) -> tuple[str, list[dict[str, Any]], int]:
        return (label, choice.samples(), choice.total) if choice else (label, [], 0)

    near = (pick("just below", best["below"]), pick("just above: dropped", best["above"]))
    kinds = (
        pick("beneficial and kept", best["beneficial"]),
        pick("harmful and dropped", best["harmful"]),
    )
    rare = (pick("kept", best["rare_kept"]), pick("dropped, copies aside", best["rare_dropped"]))
    reasons = first.by_reason
    broken = [pick(f"{code}: {REASONS[code]}", reasons.get(code)) for code in _UNREADABLE]
    hang("threshold", "At the threshold", *near)
    hang("clusters", "Largest clusters of copies", *_clusters(first, found))
    hang("doubtful", "Most probably mismatched", pick("", best["doubtful"]))
    hang("rare", "Rarest", *rare)
    hang("memorized", "Memorized", *kinds)
    hang("kept", "Kept, at random", pick("", reasons.get(None)))
    hang("dropped", "Dropped, at random", pick("", best["dropped"]))
    hang("unreadable", "Unreadable", *broken)
    for code in (*_FIRST, *(code for code in REASONS if code not in (*_FIRST, *_UNREADABLE))):
        hang(code, code, pick("", reasons.get(code)))
    return galleries, rows


_MEANINGS = {
    "threshold": "Samples whose mismatch probability is nearest to where the run drew its line.",
    "clusters": "Samples joined by duplicate edges: who represents them first, then the nearest.",
    "doubtful": "Highest mismatch probability, whatever became of the sample.",
    "rare": "Farthest from all others: the long tail as it was kept, and what filtering cost.",
    "memorized": "Memorized means learned only by having been trained on. What is rare and right "
    "is worth it; a wrong caption is not.",
    "kept": "A random draw of what is in shards/.",
    "dropped": "A random draw of everything that was dropped.",
    "unreadable": "Samples that could not be looked at, and captions that are not there.",
}


def _clusters(first: _Pass, found: _Found) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    for name, size in first.clusters.items():
        cluster = found.clusters[name]
        yield f"{size:,} samples, {cluster.kept.total:,} kept", cluster.samples(), size


def _warn(first: _Pass, totals: dict[str | None, int]) -> list[str]:
    """Say in words what somebody who only skims should not miss."""
    samples = max(sum(totals.values()), 1)
    lines = []
    unreadable = sum(totals.get(code, 0) for code in _UNREADABLE)
    if unreadable > 0.05 * samples:
        lines.append(
            f"{unreadable / samples:.1%} of samples could not be used: unreadable, or without a "
            "caption"
        )
    if first.silent > 0.2 * samples:
        lines.append(
            f"{first.silent / samples:.1%} of captions say next to nothing about their picture "
            f"(caption_information below {_SILENT}); "
            f"--set select.min_caption_information={_SILENT} drops them"
        )
    largest = max(first.clusters.values(), default=0)
    if largest > max(0.01 * samples, 10):
        lines.append(f"One cluster of copies holds {largest / samples:.1%} of samples")
    if totals.get(None, 0) < 0.1 * samples:
        lines.append(f"Only {totals.get(None, 0) / samples:.1%} of samples were kept")
    return lines
