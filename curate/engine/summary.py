"""The end of a run, for people."""

from typing import Any

from curate import storage
from curate.report.words import describe_facts, stage_times

__all__ = ["describe_run"]

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
    lines += ["", *describe_facts(summary["facts"], scanned)]
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
    for stage, seconds, samples in stage_times(summary["stages"]):
        rate = f"{samples / seconds:.0f}" if seconds else ""
        lines.append(f"{stage:<26}{seconds:>10.1f}{rate:>11}")
    lines.append(f"{'all':<26}{summary['wall_seconds']:>10.1f}")
    return lines
