"""The end of a run, for people."""

from typing import Any

from curate import storage

__all__ = ["describe_run"]

_ODDITIES = {
    "truncated_files": "input files are cut off; what comes before the cut was read",
    "incomplete_shards": "img2dataset shards have no _stats.json: the download was not finished",
    "unreadable_tables": "tables beside tars could not be read and were left out",
}

#: Above this estimated share real pairs are hardly told from planted ones.
_NEARLY_ALL = 0.9

_PLACES = (
    ("Pictures", "report/index.html"),
    ("Decisions", "decisions"),
    ("Shards", "shards"),
    ("Tars", "webdataset"),
    ("Figures", "run.json"),
)


def describe_run(summary: dict[str, Any], out: str) -> str:
    """Return the table printed after a run: counts, reasons, time per stage, where to look.

    Parameters
    ----------
    summary : dict
        What `run.json` holds, and `computed`.
    out : str
    """
    lines: list[str] = []
    scanned = summary["stages"]["ingest"]["steps"].get("scan", {})
    counts = summary.get("counts")
    if counts is not None:
        lines += _describe_counts(counts)
    if summary.get("computed", True):
        lines += ["", *_describe_time(summary)]
    else:
        lines += ["", "Nothing to do: every stage was complete."]
    lines += ["", *_describe_facts(summary["facts"], scanned)]
    for name, place in _PLACES:
        if storage.exists(storage.join(out, place)):
            lines.append(f"{name:<11}{storage.join(out, place)}")
    return "\n".join(lines)


def _describe_counts(counts: dict[str, Any]) -> list[str]:
    total = max(counts["ingested"], 1)
    rows = [("in", counts["ingested"]), ("kept", counts["kept"])]
    rows += [(f"  {code}", number) for code, number in counts["dropped"].items()]
    return [f"{name:<26}{number:>10}{number / total:>8.1%}" for name, number in rows]


def _describe_time(summary: dict[str, Any]) -> list[str]:
    lines = [f"{'stage':<26}{'seconds':>10}{'samples/s':>11}"]
    by_stage: dict[str, tuple[float, float]] = {}
    for table, facts in summary["stages"].items():
        stage = table.partition(".")[0]
        seconds = sum(step["wall_seconds"] for step in facts["steps"].values())
        samples = max((step.get("samples", 0) for step in facts["steps"].values()), default=0)
        # Side tables of one stage are filled by the same pass: it is counted once.
        known = by_stage.get(stage, (0.0, 0.0))
        by_stage[stage] = (max(known[0], seconds), max(known[1], samples))
    for stage, (seconds, samples) in by_stage.items():
        rate = f"{samples / seconds:.0f}" if seconds else ""
        lines.append(f"{stage:<26}{seconds:>10.1f}{rate:>11}")
    lines.append(f"{'all':<26}{summary['wall_seconds']:>10.1f}")
    return lines


def _describe_facts(facts: dict[str, Any], scanned: dict[str, float]) -> list[str]:
    lines = []
    for name, meaning in _ODDITIES.items():
        if scanned.get(name):
            lines.append(f"Warning: {scanned[name]:.0f} {meaning}")
    recall = facts.get("dedup", {}).get("recall", {})
    if recall.get("recall") is not None:
        low, high = recall["interval"]
        lines.append(
            f"Duplicate pairs found, of those that brute force finds: {recall['recall']:.2%} "
            f"({low:.2%} to {high:.2%} by {recall['rows']} samples)"
        )
        if not recall["reached"]:
            lines.append("Warning: that is below dedup.target_recall; raise dedup.max_probes")
    detector = facts.get("score", {}).get("mismatch", {})
    if detector.get("share") is not None:
        lines.append(
            f"Estimated share of mismatched captions: {detector['share']:.1%} "
            f"(± {1.96 * detector['share_stderr']:.1%})"
        )
    if (detector.get("share") or 0) > _NEARLY_ALL:
        lines.append(
            "Warning: captions look as if drawn at random: either nearly all are wrong, or the "
            "encoder cannot tell these pictures or captions apart"
        )
    selected = facts.get("select", {})
    mismatch = selected.get("mismatch")
    if mismatch and mismatch["expected_rate"] is not None:
        lines.append(f"Expected among the kept: {mismatch['expected_rate']:.1%}")
    if mismatch and mismatch.get("phantoms_caught"):
        lines.append(_describe_calibration(mismatch))
    if mismatch and mismatch["max_probability"] < 0 and selected["failed"]["mismatched"]:
        lines.append(
            "Warning: no sample is sure enough for select.max_mismatch_rate: all that have a score "
            "were dropped"
        )
    if mismatch and mismatch["unscored"]:
        lines.append(f"Warning: {mismatch['unscored']} samples have no score and were not judged")
    return lines


def _describe_calibration(mismatch: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    caught = mismatch["phantoms_caught"]
    return (
        f"At this threshold {share(caught['random'])} of captions planted at random are caught and "
        f"{share(caught['near_image'])} of look-alikes' captions; it drops "
        f"{share(mismatch['rare_dropped'])} of rare and {share(mismatch['common_dropped'])} of "
        "common samples"
    )
