"""A finished OUT: what can be asked of it without its input."""

import json
from collections.abc import Callable
from typing import Any

from curate import storage
from curate.errors import OutputError
from curate.stages.base import Room
from curate.stages.report import Report, RunFacts, write_report
from curate.stages.report_compare import Side, write_comparison

__all__ = ["compare_runs", "open_room", "read_finished", "read_run", "rebuild_report"]

#: Tables whose shards are results, not rows beside those of the index.
_RESULTS = ("write", "report")


def read_run(out: str) -> dict[str, Any] | None:
    """Return what `run.json` holds: None where there is none, an empty dict if it is damaged."""
    try:
        data = storage.read_bytes(storage.join(out, "run.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = json.loads(data)
    except ValueError:  # JSON's and Unicode's
        return {}
    if not isinstance(found, dict) or "status" not in found:
        return {}
    told = found.get("stages"), found.get("facts")
    is_whole = all(isinstance(one, dict) for one in told) and "ingest" in found["stages"]
    return found if is_whole or found["status"] != "finished" else {}


def read_finished(out: str, otherwise: str = "name another folder") -> dict[str, Any]:
    """Return what `run.json` holds.

    Parameters
    ----------
    out : str
    otherwise : str
        What to do if the run is not to be finished.

    Raises
    ------
    OutputError
        If OUT holds no finished run.
    """
    found = read_run(out)
    if found is None:
        got = "there is no such folder"
        if storage.exists(out):
            got = "it is a file" if storage.is_file(out) else "it holds no run.json"
        raise OutputError(
            f"{out}: must hold a finished run; {got}. Make one with `curate run`, or name another "
            "folder."
        )
    if found.get("status") != "finished":
        got = "the one in it has not ended" if found else "its run.json is damaged"
        raise OutputError(
            f"{out}: must hold a finished run; {got}. Finish it with the same `curate run`, or "
            f"{otherwise}."
        )
    return found


def open_room(out: str, summary: dict[str, Any]) -> Room:
    """Return the room behind all stages of a finished run, as its `report` would have it.

    Which column lies where is read from the files: the run may be of an earlier version.
    """
    stages = summary["stages"]
    given = stages.get("report", {}).get("parameters", {})
    stage = Report(**{name: v for name, v in given.items() if name in Report.model_fields})
    folders = {
        name: storage.join(out, "stages", f"{name}-{table['fingerprint']}")
        for name, table in stages.items()
    }
    origins: dict[str, str] = {}
    room = Room(stage, folders, origins, frozenset())
    try:
        shards = room.shards()
    except FileNotFoundError:
        shards = []
    for name in folders:
        if name in _RESULTS or not shards:
            continue
        path = room.shard_path(name, shards[0])
        if storage.exists(path):
            origins.update(dict.fromkeys(storage.list_columns(path), name))
    origins.pop("uid", None)
    if "keep" not in origins:
        raise OutputError(
            f"{out}: must hold decisions; its pipeline has no `select`, or stages/ was removed. "
            "Run it again."
        )
    return room


def rebuild_report(out: str) -> str:
    """Write OUT/report anew from what a finished run left; return where its page is.

    The caller holds OUT locked.
    """
    side = _open_side(out)
    return _write_page(out, "report", lambda folder: write_report(side.room, side.run, folder))


def compare_runs(out: str, other: str) -> str:
    """Write OUT/compare, the page of what differs from another run; return where it is.

    The caller holds OUT locked; the other run is only read.
    """
    this, there = _open_side(out), _open_side(other)
    return _write_page(out, "compare", lambda folder: write_comparison(this, there, folder))


def _open_side(out: str) -> Side:
    summary = read_finished(out)
    return Side(out, open_room(out, summary), RunFacts(summary["facts"], summary["stages"]))


def _write_page(out: str, name: str, write: Callable[[str], int]) -> str:
    """Have a page written beside its place and put there whole."""
    scratch = storage.join(out, f"{storage.TEMPORARY_PREFIX}{name}")
    storage.remove(scratch)
    try:
        write(scratch)
        storage.mirror(scratch, storage.join(out, name))
    finally:
        storage.remove(scratch)
    return storage.join(out, name, "index.html")
