"""Everything that is known about a sample, and what would have kept it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from curate import storage
from curate.engine.finished import open_room, read_finished
from curate.errors import ConfigError
from curate.report.text import clean_text, tell_score
from curate.schema import COLUMNS, REASONS, public_columns
from curate.stages.base import Room
from curate.stages.report_curves import join_judged, judge, needed_rate

__all__ = ["describe_sample", "show_samples"]

#: Digits that name a sample for certain in sets of millions, and in most of billions.
_LEAST_DIGITS = 6
_SHOWN_MEMBERS = 20

_MEMBER = ("caption", "keep", "reason", "representative_uid", "representative_cosine", "cluster_id")
#: What `_show` tells beside columns.
_PARTS = ("source", "captions", "cluster", "rules", "what_would_keep_it")
_PLACE = ("member", "offset", "size_bytes", "row_group", "row", "metadata", "sha256")


@dataclass(frozen=True)
class _Run:
    """A finished run, read once for all samples that are asked for."""

    out: str
    summary: dict[str, Any]
    room: Room

    def parameter(self, stage: str, name: str) -> Any:
        tables = self.summary["stages"]
        of_stage = [t["parameters"] for key, t in tables.items() if key.partition(".")[0] == stage]
        return next((found[name] for found in of_stage if name in found), None)

    def columns(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if self.room.has(name)]


def show_samples(out: str, uids: tuple[str, ...]) -> list[dict[str, Any]]:
    """Look samples up in a finished run.

    Parameters
    ----------
    out : str
    uids : tuple of str
        Whole, or their first digits.

    Returns
    -------
    list of dict
        One per uid: the columns of `decisions`, `source`, `captions`, `cluster` (its samples,
        who represents it first), `rules` (code and meaning of those it failed) and
        `what_would_keep_it` (sentences).

    Raises
    ------
    ConfigError
        If a uid names no sample, or several.
    OutputError
    """
    summary = read_finished(out)
    run = _Run(out, summary, open_room(out, summary))
    wanted = [uid.strip().lower() for uid in uids]
    found: dict[str, list[tuple[str, str]]] = {uid: [] for uid in wanted}
    for shard in run.room.shards():
        names = run.room.read(shard, [])["uid"]
        for uid in found:
            hits = names.filter(pc.starts_with(names, uid)).to_pylist()
            found[uid] += [(shard, name) for name in hits]
    return [_show(run, *_only(run, uid, found[uid])) for uid in wanted]


def _only(run: _Run, uid: str, hits: list[tuple[str, str]]) -> tuple[str, str]:
    if len(uid) >= _LEAST_DIGITS and len(hits) == 1:
        return hits[0]
    got = f"one of {len(hits) or 'no'} samples"
    got = got if len(uid) >= _LEAST_DIGITS else f"{len(uid)} characters"
    raise ConfigError(
        f"{clean_text(uid, 40)!r}: must be the uid of a sample of {run.out}, or its first "
        f"{_LEAST_DIGITS} or more digits; got {got}. The report and decisions/ hold the uids."
    )


def _show(run: _Run, shard: str, uid: str) -> dict[str, Any]:
    names = (*public_columns("decisions"), *_PLACE, "captions")
    further = run.room.further()
    table = run.room.read(shard, list(dict.fromkeys([*run.columns(names), *further])))
    row = table.filter(pc.equal(table["uid"], uid)).to_pylist()[0]
    source = {name: row.pop(name) for name in _PLACE if row.get(name) is not None}
    captions = row.pop("captions", None) or []
    failed = row.get("failed_rules") or []
    return {
        **{name: row.get(name) for name in (*public_columns("decisions"), *further)},
        "source": {"file": row["source_file"], "key": row["key"], **source},
        "captions": captions,
        "cluster": _cluster(run, row),
        "rules": [{"code": code, "meaning": REASONS.get(code, "")} for code in failed],
        "what_would_keep_it": [_advise(run, row, code) for code in failed],
    }


def _cluster(run: _Run, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a cluster, the kept first, then by cosine."""
    if row.get("cluster_id") is None or (row.get("cluster_size") or 1) < 2:
        return []
    members: list[dict[str, Any]] = []
    for shard in run.room.shards():
        table = run.room.read(shard, run.columns(_MEMBER))
        members += table.filter(pc.equal(table["cluster_id"], row["cluster_id"])).to_pylist()

    def rank(member: dict[str, Any]) -> tuple[bool, bool, float, str]:
        is_own = member["uid"] == row.get("representative_uid")
        cosine = member["representative_cosine"] or -1.0
        return not is_own, not member["keep"], -cosine, member["uid"]

    return sorted(members, key=rank)


def _advise(run: _Run, row: dict[str, Any], code: str) -> str:
    """Say what would have made a sample pass one rule."""
    if code == "mismatched":
        return _advise_rate(run, row)
    if code.startswith("duplicate_") and row.get("representative_uid"):
        return _advise_copy(run, row, code)
    width, height = row.get("width") or 0, row.get("height") or 0
    chars = len((row["caption"] or "").strip())
    value = {
        "nsfw": ("select.max_nsfw_probability", _round(row, "nsfw_probability", math.ceil)),
        "caption_in_picture": ("select.max_text_overlap", _round(row, "text_overlap", math.ceil)),
        "caption_too_short": ("select.min_caption_chars", str(chars)),
        "caption_too_long": ("select.max_caption_chars", str(chars)),
        "image_too_small": ("select.min_side_px", str(min(width, height))),
        "caption_uninformative": (
            "select.min_caption_information",
            _round(row, "caption_information", math.floor),
        ),
    }
    if width and height:
        aspect = max(width, height) / min(width, height)
        value["aspect_too_extreme"] = ("select.max_aspect", f"{math.ceil(aspect * 100) / 100:g}")
    if code in value:
        name, setting = value[code]
        return f"--set {name}={setting}"
    return _OTHERWISE.get(code, "nothing in the pipeline: mend the source")


def _round(row: dict[str, Any], name: str, step: Callable[[float], int]) -> str:
    """Write a column's value in three digits, rounded up or down."""
    return f"{step(1000 * (row.get(name) or 0)) / 1000:g}"


_OTHERWISE = {
    "removed_by_uid": "another list of remove.lists",
    "removed_by_url": "another list of remove.lists",
    "removed_by_hash": "another list of remove.lists",
    "caption_language": "another list of select.languages, or a higher "
    "select.min_language_probability",
    "too_many_pixels": "a larger embed.max_pixels",
    "duplicate_earlier": "another list of dedup.against",
    "contaminated": "another list of decontaminate.inputs",
    "outside_threshold": "other bounds in select.thresholds",
    "outside_fraction": "a larger select.keep_fraction",
    "caption_repeated": "a larger select.max_caption_repeats",
}


def _advise_rate(run: _Run, row: dict[str, Any]) -> str:
    wanted = ("keep", "failed_rules", "mismatch_probability", "rarity", "cluster_id")
    shards = run.room.shards()
    tables = (run.room.read(shard, run.columns(wanted)) for shard in shards)
    judged = join_judged([judge(table, 0) for table in tables])
    facts = run.summary["facts"].get("select", {}).get("mismatch") or {}
    limit = facts.get("max_probability", math.inf)
    if judged is None or row["mismatch_probability"] is None:
        return "no threshold on mismatch"
    rate = needed_rate(judged, limit, row["mismatch_probability"])
    return (
        f"--set select.max_mismatch_rate={rate:g} (about; this run's "
        f"{run.parameter('select', 'max_mismatch_rate'):g} keeps up to {tell_score(limit)})"
    )


def _advise_copy(run: _Run, row: dict[str, Any], code: str) -> str:
    cosine = row["representative_cosine"]
    if code == "duplicate_bytes" or cosine is None or cosine >= 0.9999:
        return "another order in select.prefer: of equal samples one stays"
    above = math.floor(cosine * 1000 + 1) / 1000
    return (
        f"--set dedup.min_cosine={above:g}, unless another copy reaches it then; or another order "
        "in select.prefer"
    )


def describe_sample(found: dict[str, Any], out: str) -> str:
    """Return the lines that `curate show` prints about one sample.

    Parameters
    ----------
    found : dict
        See `show_samples`.
    out : str
    """
    reason = found["reason"]
    verdict = "kept" if found["keep"] else f"dropped: {reason}, {REASONS.get(reason, '')}"
    size = f"{found['width']} x {found['height']} px" if found["width"] else None
    place = ", ".join(
        f"{name} {_line(value)}"
        for name, value in found["source"].items()
        if name not in ("file", "key", "metadata", "sha256")
    )
    file = _line(found["source"]["file"])
    rows = [
        ("uid", found["uid"]),
        ("verdict", verdict),
        ("caption", None if found["caption"] is None else _line(found["caption"])),
        *(("merged", _line(text)) for text in found["captions"][1:]),
        ("key", _line(found["key"])),
        ("source", f"{file} ({place})" if place else file),
        ("metadata", found["source"].get("metadata") and _line(found["source"]["metadata"])),
        ("size", size),
        ("sha256", found["source"].get("sha256")),
        ("weight", f"{found['weight']:.4g}" if found["keep"] else None),
        ("shows", found["contaminated_by"] and _line(found["contaminated_by"])),
        ("copy of", found["earlier_uid"] and f"{found['earlier_uid']} of an earlier run"),
        ("memorized", found["memorization_kind"]),
        ("language", found["caption_language"]),
        ("reads", found["picture_text"] and _line(found["picture_text"])),
    ]
    lines = [f"{name:<11}{value}" for name, value in rows if value is not None]
    lines += _describe_scores(found)
    if found["rules"]:
        lines.append("Rules it failed, and what would have kept it:")
        for rule, advice in zip(found["rules"], found["what_would_keep_it"], strict=True):
            lines.append(f"  {rule['code']}: {rule['meaning']}")
            lines.append(f"    {advice}")
    lines += _describe_cluster(found, out)
    return "\n".join(lines)


def _line(value: Any) -> str:
    """Text from outside on one line, unable to steer a terminal."""
    return clean_text(str(value)).replace("\n", "␊").replace("\t", "␉")


def _describe_scores(found: dict[str, Any]) -> list[str]:
    lines = []
    known = public_columns("decisions")
    further = [name for name in found if name not in (*known, *_PARTS)]
    for name in (*known, *further):
        value, column = found[name], COLUMNS.get(name)
        direction = column.direction if column else ""
        if column and direction == "" and not name.endswith(("_score", "_cosine")):
            continue
        if isinstance(value, float) and name != "weight":
            error = found.get(f"{name}_stderr")
            spread = f" ± {tell_score(error, 4)}" if error is not None else ""
            lines.append(f"  {name:<24}{tell_score(value, 4):>8}{spread:<10}  {direction}".rstrip())
    return ["Scores:", *lines] if lines else []


def _describe_cluster(found: dict[str, Any], out: str) -> list[str]:
    members = found["cluster"]
    if not members:
        return []
    kept = sum(member["keep"] for member in members)
    lines = [f"Cluster {found['cluster_id']}: {len(members)} samples, {kept} kept"]
    for member in members[:_SHOWN_MEMBERS]:
        cosine = member["representative_cosine"]
        told = [member["uid"], f"{'kept' if member['keep'] else member['reason']:<20}"]
        told.append("      " if cosine is None else tell_score(cosine, 4))
        told.append(clean_text(_line(member["caption"] or ""), 60))
        if member["uid"] == found["representative_uid"]:
            told.append("<- represents it")
        elif member["uid"] == found["uid"]:
            told.append("<- this one")
        lines.append("  " + "  ".join(told).rstrip())
    if len(members) > _SHOWN_MEMBERS:
        lines.append(
            f"  and {len(members) - _SHOWN_MEMBERS} more: --json lists all, "
            f"{storage.join(out, 'decisions')} has them"
        )
    return lines
