"""A plan, and the end of a run, for people."""

import sys
from html import escape
from typing import Any, TextIO

from curate import storage
from curate.report.words import describe_facts, stage_times

__all__ = ["describe_plan", "describe_run", "in_units", "print_plan", "render_run"]

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


def render_run(summary: dict[str, Any], out: str) -> str:
    """Return the table of `describe_run` as HTML, for a notebook.

    Parameters
    ----------
    summary : dict
    out : str
    """
    counts = summary.get("counts") or {"ingested": 0, "kept": 0, "dropped": {}}
    total = max(counts["ingested"], 1)
    rows = [("in", counts["ingested"]), ("kept", counts["kept"]), *counts["dropped"].items()]
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td>{number:,}</td>"
        f"<td>{number / total:.1%}</td></tr>"
        for name, number in rows
    )
    scanned = summary["stages"]["ingest"]["steps"].get("scan", {})
    lines = "".join(f"<li>{escape(one)}</li>" for one in describe_facts(summary["facts"], scanned))
    return (
        f"<table><caption>{escape(summary['name'])}: {escape(out)}</caption><thead><tr>"
        "<th style='text-align:left'>reason</th><th>samples</th><th>share</th></tr></thead>"
        f"<tbody>{cells}</tbody></table><ul>{lines}</ul>"
    )


def print_plan(rows: list[dict[str, Any]], need_bytes: int, stream: TextIO | None = None) -> None:
    """Print what a run would do: a table on a terminal, plain lines elsewhere.

    Parameters
    ----------
    rows : list of dict
        See `curate.engine.runner.plan`.
    need_bytes : int
    stream : file, optional
        By default stdout.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    if not stream.isatty():
        print(describe_plan(rows, need_bytes), file=stream)
        return
    console = Console(file=stream)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for head in ("table", "state", "tasks", "why"):
        table.add_column(head, overflow="fold")
    for row in rows:
        state = Text(row["state"], _STATE_COLOURS[row["state"]])
        table.add_row(Text(row["table"]), state, Text(_sum_tasks(row)), Text(row["why"]))
    console.print(table)
    console.print(Text(f"\n{_describe_need(rows, need_bytes)}"))


_STATE_COLOURS = {"done": "green", "resume": "yellow", "new": "cyan"}


def _sum_tasks(row: dict[str, Any]) -> str:
    """Tasks of all steps; `+`: more, which earlier steps have yet to name."""
    steps = row["steps"]
    known = sum(step["tasks"] or 0 for step in steps)
    more = "+" if any(step["tasks"] is None for step in steps) else ""
    done = sum(step["done"] for step in steps)
    return f"{done} of {known}{more} done" if steps else ""


def describe_plan(rows: list[dict[str, Any]], need_bytes: int) -> str:
    """Return what a run would do, a line per table and step."""
    lines = []
    for row in rows:
        lines.append(f"{row['state']:<6}  {row['table']:<16}  {row['why']}")
        for step in row["steps"]:
            lines.append(f"        {'':<16}  {step['step']}: {_count(step)} tasks done")
    return "\n".join([*lines, _describe_need(rows, need_bytes)])


def _count(step: dict[str, Any]) -> str:
    return f"{step['done']} of {'?' if step['tasks'] is None else step['tasks']}"


def _describe_need(rows: list[dict[str, Any]], need_bytes: int) -> str:
    states = [row["state"] for row in rows]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    need = f"{len(rows)} tables: {told}. Disk needed at most: about {in_units(need_bytes)}"
    if any(row["table"] == "ingest" and row["state"] != "done" for row in rows):
        need += "\nThe input was listed and not read through: only a run finds damaged files."
    return need


def in_units(size_bytes: float) -> str:
    """Return a size as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
