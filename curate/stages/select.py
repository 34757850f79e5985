"""select: rules, each with its reason code; then the walk over duplicates; then weights."""

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from curate import storage
from curate.dedup import groups
from curate.memorization.folds import hash_unit
from curate.memorization.mismatch import RUNGS
from curate.memorization.rarity import RARE
from curate.schema import select_schema
from curate.stages.base import OneOrMore, Room, Stage, Step, Table, one_task, shard_tasks
from curate.stages.dedup_inputs import read_edges, read_nodes, read_pixels, read_spots, shard_starts
from curate.stages.score_inputs import read_phantoms
from curate.stages.select_columns import (
    ScoreTable,
    check_joined,
    check_number,
    check_tables,
    find_columns,
    is_outside,
    join_shard,
    join_tasks,
    read_joined,
    sort_table,
    table_tasks,
)
from curate.stages.select_table import DECISION, Decisions, fold_caption, merge_captions

__all__ = ["Fraction", "Preference", "Select", "Threshold", "decide", "mismatch_limit"]

Array = np.ndarray[Any, Any]

#: Which removal list names a sample, and by what.
_LISTED = ("removal_list", "removal_reason", "byte_list")
#: Cosines at which the kept are counted again.
_STRICTER = (0.85, 0.9, 0.95, 0.98, 0.99)
#: Criterion -> column, and whether higher values are preferred.
_PREFERENCES = {
    "mismatch": ("mismatch_probability", False),
    "clip_score": ("clip_score", True),
    "alignment": ("alignment_out", True),
}


class Threshold(BaseModel):
    """Bounds that a column's value must lie within; `missing` says what becomes of null."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    column: str
    min: float | None = None
    max: float | None = None
    missing: Literal["drop", "keep"] = "drop"

    _numeric = field_validator("column")(check_number)


class Fraction(BaseModel):
    """Share of the samples with a value in `column` to keep, the best first."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    column: str
    fraction: Annotated[float, Field(gt=0, le=1)]
    highest: bool = True

    _numeric = field_validator("column")(check_number)


class Preference(BaseModel):
    """Of several duplicates the one with the best value in `column`; null comes last."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    column: str
    highest: bool = True

    _numeric = field_validator("column")(check_number)


_RULES = (Threshold, Fraction, Preference)


class Select(Stage):
    """Decide for every sample whether it is kept, why not, and what it weighs."""

    name: ClassVar[str] = "select"

    require_caption: bool = Field(True, description="samples without a caption are dropped")
    min_caption_chars: int | None = Field(None, description="shorter captions are dropped", ge=1)
    max_caption_chars: int | None = Field(None, description="longer captions are dropped", ge=1)
    min_side_px: int | None = Field(None, description="smaller images are dropped", ge=1)
    max_aspect: float | None = Field(
        None, description="images with a larger ratio of sides are dropped", ge=1
    )
    max_mismatch_rate: float | None = Field(
        None, description="expected share of mismatched pairs among the kept", ge=0, le=1
    )
    max_caption_repeats: int | None = Field(
        None, description="kept samples that may have one caption, copies not counted", ge=1
    )
    min_caption_information: float | None = Field(
        None, description="captions that say less are dropped", ge=0, le=1
    )
    max_nsfw_probability: float | None = Field(
        None, description="pictures that are more probably unsafe are dropped", ge=0, le=1
    )
    max_text_overlap: float | None = Field(
        None,
        description="samples are dropped if more of their caption stands in the picture",
        ge=0,
        le=1,
    )
    min_overlap_area: float = Field(
        0.0,
        description="max_text_overlap asks only pictures of which text covers this share",
        ge=0,
        le=1,
    )
    languages: OneOrMore = Field(
        (), description="captions in other languages are dropped; ISO 639 codes"
    )
    min_language_probability: float = Field(
        0.5, description="languages drops no caption of whose language less is sure", ge=0, le=1
    )
    score_tables: tuple[ScoreTable, ...] = Field(
        (),
        description="tables of numbers, which rules call NAME.COLUMN: [{path, on: uid | key | url "
        "| any field of the metadata, column, name}]; Parquet, CSV, TSV or JSONL",
    )
    keep_fraction: Fraction | None = Field(
        None,
        description="keep the best share by a column: {column, fraction, highest}; samples without "
        "a value do not count and are dropped",
    )
    thresholds: tuple[Threshold, ...] = Field(
        (),
        description="bounds on numeric columns, metadata.FIELD or TABLE.COLUMN: [{column, min, "
        "max, missing: drop | keep}]",
    )
    prefer: tuple[
        Literal["mismatch", "clip_score", "alignment", "resolution", "source", "random"]
        | Preference,
        ...,
    ] = Field(
        ("mismatch", "resolution"),
        description="which of several duplicates stays, first criterion first, a name or {column, "
        "highest}; then the lower uid",
    )
    source_priority: tuple[str, ...] = Field(
        (),
        description="patterns of source_file (* and ?), the most preferred first, for the "
        "criterion `source`; what matches none comes last",
    )
    seed: int = Field(0, description="draws for the criterion `random`")
    max_captions: int = Field(
        5, description="captions of a kept sample, its own and those of its duplicates", ge=1
    )
    density_power: float = Field(
        0.0,
        description="weights are divided by (kept samples of the same cluster) to this power",
        ge=0,
        le=1,
    )

    @field_validator("keep_fraction", "thresholds", "prefer")
    @classmethod
    def _check_outside(cls, value: Any, info: ValidationInfo) -> Any:
        rules = value if isinstance(value, tuple) else (value,)
        columns = [rule.column for rule in rules if isinstance(rule, _RULES)]
        check_tables(columns, info.data.get("score_tables", ()))
        return value

    def rule_columns(self) -> tuple[str, ...]:
        """Columns that rules name, each once."""
        rules = (*self.thresholds, self.keep_fraction, *self.prefer)
        named = (rule.column for rule in rules if isinstance(rule, _RULES))
        return tuple(dict.fromkeys(named))

    def outside_columns(self) -> tuple[str, ...]:
        """Columns that rules name and that no stage writes."""
        return tuple(filter(is_outside, self.rule_columns()))

    def tables_used(self) -> tuple[ScoreTable, ...]:
        """Tables that a rule names."""
        titles = {column.partition(".")[0] for column in self.outside_columns()}
        return tuple(table for table in self.score_tables if table.title in titles)

    def hashed_fields(self) -> dict[str, Any]:
        return {
            **super().hashed_fields(),
            "score_tables": [one.identity() for one in self.score_tables],
        }

    def prepare(self) -> None:
        """Refuse tables that are not there, those included that no rule asks for."""
        for table in self.score_tables:
            table.list_files()

    def sources(self) -> list[dict[str, Any]]:
        find_columns(self)
        return [table.content() for table in self.tables_used()]

    def reads(self) -> tuple[str, ...]:
        columns = ["caption", "ingest_reason", "decode_reason", "width", "height", "sha256"]
        if self.max_mismatch_rate is not None:
            columns.append("mismatch_probability")
        if self.min_caption_information is not None:
            columns.append("caption_information")
        if self.max_nsfw_probability is not None:
            columns.append("nsfw_probability")
        if self.max_text_overlap is not None:
            columns += ["text_overlap", "text_area"]
        if self.languages:
            columns += ["caption_language", "caption_language_probability"]
        if "source" in self.prefer:
            columns.append("source_file")
        columns += [column for column in self.rule_columns() if not is_outside(column)]
        if self.outside_columns():
            columns += ["key", "metadata"]
        return tuple(dict.fromkeys(columns))

    def wants(self) -> tuple[str, ...]:
        preferred = (column for column, _ in _PREFERENCES.values())
        found = ("cluster_id", "earlier_uid", "contaminated_by", "rarity", *_LISTED)
        return tuple(dict.fromkeys((*found, *preferred)))

    def tables(self) -> tuple[Table, ...]:
        return (Table("select", DECISION),)

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("tables", sort_table, table_tasks),
            Step("join", join_shard, join_tasks),
            Step("decide", _decide, one_task),
            Step("table", _write_shard, shard_tasks),
        )

    def facts(self, room: Room) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(room.path("summary.json"))
        return found


def _stage(room: Room) -> Select:
    assert isinstance(room.stage, Select)
    return room.stage


def _load(room: Room) -> pa.Table:
    wanted = (*_stage(room).reads(), *(c for c in _stage(room).wants() if room.has(c)))
    columns = [name for name in dict.fromkeys(wanted) if name not in ("key", "metadata")]
    shards = room.shards()
    return pa.concat_tables([read_joined(room, room.read(s, columns), s) for s in shards])


def _numbers(table: pa.Table, column: str) -> Array:
    """(N,) float64; NaN where null."""
    values = table[column].cast(pa.float64()).to_numpy()
    return np.asarray(values, np.float64)


@dataclass(frozen=True)
class _Copies:
    """What the walk needs, and walks over other sets of samples."""

    order: Array
    edges: tuple[Array, Array, Array]
    spots: groups.Spots | None
    nodes: Array
    byte_groups: Array
    captions: Array | None
    quota: int

    def walk(self, eligible: Array) -> groups.Walk:
        """See `groups.walk`."""
        return groups.walk(
            self.order,
            eligible,
            *self.edges,
            self.nodes,
            self.byte_groups,
            self.captions,
            self.quota,
            self.spots,
        )

    def stricter(self, min_cosine: float) -> "_Copies":
        """Leave the written edges of at least a cosine; of spots, which are not, none."""
        near = self.edges[2] >= min_cosine
        left, right, cosines = (part[near] for part in self.edges)
        return replace(self, edges=(left, right, cosines), spots=None)


def _read_copies(room: Room, table: pa.Table, order: Array) -> _Copies:
    quota = _stage(room).max_caption_repeats
    captions = None if quota is None else _caption_codes(table["caption"].to_pylist())
    limits = (captions, quota or 0)
    if not room.has("cluster_id"):
        none = np.full(len(table), -1)
        return _Copies(order, _NO_EDGES, None, np.arange(len(table)), none, *limits)
    known = _byte_groups(table["sha256"])
    edges, spots = read_edges(room, "edges"), read_spots(room)
    return _Copies(order, edges, spots, read_nodes(room), known, *limits)


def _caption_codes(captions: list[str | None]) -> Array:
    """(N,) int64: equal for captions equal up to case and white space, -1 where there is none."""
    codes: dict[str, int] = {}
    return np.array(
        [-1 if c is None else codes.setdefault(fold_caption(c), len(codes)) for c in captions],
        np.int64,
    )


_NO_EDGES = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def decide(room: Room, min_cosine: float | None = None) -> tuple[Decisions, dict[str, Any]]:
    """Apply all rules to all samples, and commit nothing.

    Parameters
    ----------
    room : Room
        Of a stage `Select`; of its own tables only those of columns from outside must be there.
    min_cosine : float, optional
        Walk as a stricter `dedup.min_cosine` would have it, by the edges that are written.

    Returns
    -------
    decisions : Decisions
    facts : dict
        For `run.json`, besides counts.
    """
    stage, table = _stage(room), _load(room)
    joined = check_joined(room, table)
    failed: dict[str, Array] = {}
    _source_rules(stage, table, failed)
    _basic_rules(stage, table, failed)
    _plugin_rules(stage, table, failed)
    _column_rules(stage, table, failed)
    eligible = ~np.any(list(failed.values()), axis=0) if failed else np.ones(len(table), bool)
    uids = table["uid"].to_numpy(zero_copy_only=False).astype("S32")
    order = _preference(stage, table, uids)
    copies = _read_copies(room, table, order)
    if min_cosine is not None:
        copies = copies.stricter(min_cosine)
    facts: dict[str, Any] = {"joined": joined} if joined else {}
    if stage.max_mismatch_rate is not None:
        facts["mismatch"] = _mismatch_rule(stage, table, copies, eligible, failed)
        facts["mismatch"] |= _calibrate(room, table, eligible, facts["mismatch"]["max_probability"])
        eligible = eligible & ~failed["mismatched"]
    found = copies.walk(eligible)
    keep, representative, _, exact = found
    if room.has("cluster_id"):
        failed["duplicate_bytes"] = (representative >= 0) & exact
        pixels = read_pixels(room)
        matched = (representative >= 0) & ~exact & pixels & pixels[representative]
        failed["duplicate_perceptual"] = matched
        failed["duplicate_semantic"] = (representative >= 0) & ~exact & ~matched
        facts["what_if"] = _what_if(copies, eligible)
    unjudged = _unjudged(stage, table, keep)
    if unjudged:
        facts["unjudged"] = unjudged
    if stage.max_caption_repeats is not None:
        failed["caption_repeated"] = eligible & ~keep & (representative < 0)
    captions = table["caption"]
    merged = merge_captions(captions, keep, representative, order, stage.max_captions)
    weight = _weights(stage, table, keep)
    return Decisions(uids, captions, failed, _removed_by(table), found, weight, merged), facts


def _decide(room: Room, task: str) -> dict[str, float]:
    """Commit the decisions as one table."""
    decisions, facts = decide(room)
    with storage.commit_batches(
        room.path("decisions.parquet"), select_schema(["uid", *DECISION])
    ) as append:
        for start, stop in pairwise(shard_starts(room)):
            append(decisions.table(start, stop))
    counted = decisions.counts()
    storage.commit_json(room.path("summary.json"), {**counted, **facts})
    dropped = counted["counts"]["dropped"]
    samples = counted["counts"]["ingested"]
    return {"samples": samples, **{f"reason.{code}": n for code, n in dropped.items()}}


def _source_rules(stage: Select, table: pa.Table, failed: dict[str, Array]) -> None:
    """What the stages before already found."""
    allowed = set() if stage.require_caption else {"caption_missing"}
    for column in ("ingest_reason", "removal_reason", "decode_reason"):
        if column not in table.column_names:
            continue
        codes = table[column].to_numpy(zero_copy_only=False)
        for code in sorted({code for code in codes if code is not None} - allowed):
            failed[code] = failed.get(code, False) | (codes == code)


def _removed_by(table: pa.Table) -> pa.ChunkedArray:
    """Name the removal list that each sample is on."""
    lists = [table[n] for n in ("removal_list", "byte_list") if n in table.column_names]
    return pc.coalesce(*lists) if lists else pa.chunked_array([pa.nulls(len(table), pa.string())])


def _basic_rules(stage: Select, table: pa.Table, failed: dict[str, Array]) -> None:
    # Chunk by chunk: all at once would be as many Python strings as there are samples.
    lengths = (
        len(caption.strip()) if caption else 0
        for chunk in table["caption"].chunks
        for caption in chunk.to_pylist()
    )
    chars = np.fromiter(lengths, np.int64, len(table))
    present = chars > 0
    if stage.min_caption_chars is not None:
        failed["caption_too_short"] = present & (chars < stage.min_caption_chars)
    if stage.max_caption_chars is not None:
        failed["caption_too_long"] = present & (chars > stage.max_caption_chars)
    width, height = _numbers(table, "width"), _numbers(table, "height")
    with np.errstate(invalid="ignore"):  # NaN where the size is not known: never fails a rule
        if stage.min_side_px is not None:
            failed["image_too_small"] = np.minimum(width, height) < stage.min_side_px
        if stage.max_aspect is not None:
            aspect = np.maximum(width, height) / np.minimum(width, height)
            failed["aspect_too_extreme"] = aspect > stage.max_aspect


def _plugin_rules(stage: Select, table: pa.Table, failed: dict[str, Array]) -> None:
    """What the packaged plug-ins' scores say; a sample without one cannot be judged by it."""
    with np.errstate(invalid="ignore"):  # NaN where there is no score
        if stage.max_nsfw_probability is not None:
            failed["nsfw"] = _numbers(table, "nsfw_probability") > stage.max_nsfw_probability
        if stage.max_text_overlap is not None:
            reads = _numbers(table, "text_overlap") > stage.max_text_overlap
            covered = _numbers(table, "text_area") >= stage.min_overlap_area
            failed["caption_in_picture"] = reads & covered
        if stage.languages:
            sure = _numbers(table, "caption_language_probability") >= stage.min_language_probability
            failed["caption_language"] = sure & ~_speaks(stage, table)


def _speaks(stage: Select, table: pa.Table) -> Array:
    """(N,) bool: whether the caption is called one of the languages wanted."""
    wanted = pa.array(stage.languages, pa.string())
    return np.asarray(pc.is_in(table["caption_language"], wanted).to_numpy(), bool)


def _unjudged(stage: Select, table: pa.Table, keep: Array) -> dict[str, int]:
    """Count the kept that a rule on a plug-in's score could not judge, by the rule's reason."""
    unjudged: dict[str, Array] = {}
    if stage.max_nsfw_probability is not None:
        unjudged["nsfw"] = table["nsfw_probability"].is_null().to_numpy()
    if stage.max_text_overlap is not None:
        unjudged["caption_in_picture"] = table["text_overlap"].is_null().to_numpy()
    if stage.languages:
        unjudged["caption_language"] = ~_speaks(stage, table)  # of no call, or of no sure one
    return {reason: int((keep & rows).sum()) for reason, rows in unjudged.items()}


def _column_rules(stage: Select, table: pa.Table, failed: dict[str, Array]) -> None:
    if "contaminated_by" in table.column_names:
        failed["contaminated"] = table["contaminated_by"].is_valid().to_numpy()
    if "earlier_uid" in table.column_names:
        failed["duplicate_earlier"] = table["earlier_uid"].is_valid().to_numpy()
    if stage.min_caption_information is not None:
        with np.errstate(invalid="ignore"):  # NaN where there is no score: `mismatched` neither
            uninformative = _numbers(table, "caption_information") < stage.min_caption_information
        failed["caption_uninformative"] = uninformative
    for bounds in stage.thresholds:
        values = _numbers(table, bounds.column)
        low = -math.inf if bounds.min is None else bounds.min
        high = math.inf if bounds.max is None else bounds.max
        outside = ~((values >= low) & (values <= high))
        if bounds.missing == "keep":
            outside &= ~np.isnan(values)
        failed["outside_threshold"] = failed.get("outside_threshold", False) | outside
    if stage.keep_fraction is not None:
        failed["outside_fraction"] = ~_best_share(table, stage.keep_fraction)


def _mismatch_rule(
    stage: Select, table: pa.Table, copies: _Copies, eligible: Array, failed: dict[str, Array]
) -> dict[str, Any]:
    """Find a limit that keeps the promise among what is kept in the end, copies gone."""
    rate = stage.max_mismatch_rate
    assert rate is not None
    probability = _numbers(table, "mismatch_probability")
    limit, _ = mismatch_limit(probability[eligible], rate)
    while True:
        # A sample without a score cannot be judged by it; `unscored` says how many there are.
        failed["mismatched"] = np.nan_to_num(probability, nan=-1.0) > limit
        sound = eligible & ~failed["mismatched"]
        kept = probability[copies.walk(sound).kept]
        scored = kept[~np.isnan(kept)]
        if len(scored) == 0 or scored.mean() <= rate:
            break
        # Copies of good pairs made room for bad ones, and are gone: the limit can only fall.
        limit, _ = mismatch_limit(kept, rate)
    return {
        "max_probability": limit,
        "expected_rate": float(scored.mean()) if len(scored) else None,
        "unscored": len(kept) - len(scored),
    }


def _calibrate(room: Room, table: pa.Table, eligible: Array, limit: float) -> dict[str, Any]:
    """Tell what the limit does to the detector's phantoms, and to rare and common samples."""
    phantoms = read_phantoms(room)
    if phantoms is None:
        return {}
    rungs, planted = phantoms
    probability, rarity = _numbers(table, "mismatch_probability"), _numbers(table, "rarity")
    scored = eligible & ~np.isnan(probability)
    dropped = probability > limit
    return {
        "phantoms_caught": {rung: _share(planted[rungs == rung] > limit) for rung in RUNGS},
        "rare_dropped": _share(dropped[scored & (rarity >= RARE)]),
        "common_dropped": _share(dropped[scored & (rarity < RARE)]),
    }


def _what_if(copies: _Copies, eligible: Array) -> list[dict[str, Any]]:
    """Tell how many samples a stricter `dedup.min_cosine` would have kept, of the same edges.

    Pairs within spots are not written: where there are any the number is an upper bound.
    """
    least = copies.edges[2].min(initial=1)
    pruned = copies.spots is not None and len(copies.spots.rows) > 0
    if copies.spots is not None and pruned:
        least = min(least, copies.spots.min_cosine)
    return [
        {
            "min_cosine": cosine,
            "kept": int(copies.stricter(cosine).walk(eligible).kept.sum()),
            **({"bound": "upper"} if pruned else {}),
        }
        for cosine in _STRICTER
        if cosine > least
    ]


def _share(values: Array) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def mismatch_limit(probability: Array, max_rate: float) -> tuple[float, float | None]:
    """Return the largest probability to keep so that their mean stays within `max_rate`.

    Parameters
    ----------
    probability : (N,) float64, [0, 1]
        NaN where there is none.
    max_rate : float

    Returns
    -------
    limit : float
        -1 if even the best sample is above `max_rate`.
    expected : float or None
        Mean probability of those at most `limit`; None if there are none.
    """
    ordered = np.sort(probability[~np.isnan(probability)])
    means = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    # A value and its ties stay or go together.
    last = np.r_[np.diff(ordered) > 0, True][: len(ordered)]
    fitting = np.flatnonzero((means <= max_rate) & last)
    if len(fitting) == 0:
        return -1.0, None
    return float(ordered[fitting[-1]]), float(means[fitting[-1]])


def _best_share(table: pa.Table, rule: Fraction) -> Array:
    values = _numbers(table, rule.column)
    uids = table["uid"].to_numpy(zero_copy_only=False).astype("S32")
    order = np.lexsort((uids, -values if rule.highest else values))  # NaN sorts last
    count = round(rule.fraction * int((~np.isnan(values)).sum()))
    best = np.zeros(len(values), bool)
    best[order[:count]] = True
    return best


def _byte_groups(column: pa.ChunkedArray) -> Array:
    """(N,) int64: equal for rows of equal sha256, -1 where there is none."""
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(), np.int64)


def _preference(stage: Select, table: pa.Table, uids: Array) -> Array:
    """Rows in order of preference, a function of the samples and not of their order."""
    keys: list[Array] = [uids]
    for criterion in reversed(stage.prefer):
        if isinstance(criterion, Preference):
            keys.append(_preferred(table, criterion.column, criterion.highest))
        elif criterion == "resolution":
            keys.append(-np.nan_to_num(_numbers(table, "width") * _numbers(table, "height")))
        elif criterion == "source":
            keys.append(_source_places(stage.source_priority, table["source_file"].to_pylist()))
        elif criterion == "random":
            keys.append(hash_unit(uids.astype(str).tolist(), stage.seed, "preference"))
        elif _PREFERENCES[criterion][0] in table.column_names:
            keys.append(_preferred(table, *_PREFERENCES[criterion]))
    return np.lexsort(keys)


def _preferred(table: pa.Table, column: str, higher: bool) -> Array:
    """(N,) float64: the better, the smaller."""
    values = _numbers(table, column)
    return np.nan_to_num(-values if higher else values, nan=np.inf)


def _source_places(patterns: tuple[str, ...], files: list[str]) -> Array:
    """(N,) int64: number of the first pattern that each file matches."""
    places = {
        file: next((i for i, p in enumerate(patterns) if fnmatchcase(file, p)), len(patterns))
        for file in set(files)
    }
    return np.array([places[file] for file in files], np.int64)


def _weights(stage: Select, table: pa.Table, keep: Array) -> Array:
    weights = keep.astype(np.float64)
    if "mismatch_probability" in table.column_names:
        weights *= 1.0 - np.nan_to_num(_numbers(table, "mismatch_probability"))
    if stage.density_power and "cluster_id" in table.column_names:
        encoded = table["cluster_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        kept = np.bincount(encoded[keep], minlength=int(encoded.max(initial=0)) + 1)
        weights /= np.maximum(kept[encoded], 1) ** stage.density_power
    total = weights.sum()
    if total == 0:  # every kept pair is surely mismatched: nothing tells them apart
        return keep.astype(np.float64)
    return weights * (keep.sum() / total)


def _write_shard(room: Room, shard: str) -> dict[str, float]:
    """Cut one shard out of the decisions."""
    number = room.shards().index(shard)
    part = storage.read_row_group(room.path("decisions.parquet"), number)
    room.commit_shard("select", shard, part)
    return {"samples": len(part)}
