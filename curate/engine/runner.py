"""Plan a run, carry it out, prove that nothing was lost, publish it."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from typing import Any, Protocol

from filelock import FileLock, Timeout

from curate import storage
from curate.config import Pipeline
from curate.engine.finished import read_finished, read_run
from curate.engine.lease import hold
from curate.engine.manifest import fingerprint, is_complete, provenance
from curate.engine.workers import ClusterOptions, Workers
from curate.errors import CurateError, OutputError, ReconcileError, StorageError, WorkerError
from curate.schema import COLUMNS
from curate.stages.base import Room, Stage, Step, Table
from curate.stores import is_http

__all__ = [
    "BoundStage",
    "Progress",
    "bind",
    "clean",
    "lock_output",
    "plan",
    "publish",
    "run",
]

_LOG = logging.getLogger("curate")

#: Tasks that a worker with a GPU does together, so many of which a kill costs at most. Of trainings
#: each takes a stream, and one more for every time that it begins: torch has 32.
_MOST_TOGETHER = 8

#: How torch says that a GPU's or the machine's memory does not suffice.
_EXHAUSTED = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")

#: What may lie in OUT before a run has begun in it.
_BEFORE_RUN = (".lock", "run.log", storage.TEMPORARY_PREFIX)


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def note(self, text: str) -> None:
        """Something is worth a line."""

    def begin(self, stage: str, step: str, tasks: int, done: int, workers: int = 0) -> None:
        """A step begins; `done` of its tasks were finished before."""

    def advance(self, counts: Mapping[str, float]) -> None:
        """One task of the current step ended: its `samples`, and `reason.CODE` it gave."""

    def end(self) -> None:
        """The current step ended."""


@dataclass(frozen=True)
class BoundStage:
    """A stage with the places of its tables and of everything it reads."""

    stage: Stage
    room: Room
    fingerprints: dict[str, str]
    origins: dict[str, dict[str, Any]] = field(repr=False)

    def missing_steps(self) -> list[Step]:
        """Steps that must run because a table they serve is missing."""
        missing = self.room.missing
        return [s for s in self.stage.steps() if missing & set(s.tables or missing)]

    def done_folder(self, step: Step, table: str) -> str:
        """Folder of the marks of a step's finished tasks."""
        return storage.join(self.room.folders[table], "done", step.name)

    def served(self, step: Step) -> list[str]:
        """Missing tables that a step serves."""
        return sorted(self.room.missing & set(step.tables or self.room.missing))

    def done_tasks(self, step: Step) -> set[str]:
        """Tasks of a step that are finished in every table it serves."""
        marks = [
            {name.removesuffix(".json") for name in storage.list_names(self.done_folder(step, t))}
            for t in self.served(step)
        ]
        return set.intersection(*marks) if marks else set()


def bind(pipeline: Pipeline, out: str) -> list[BoundStage]:
    """Give every stage of a pipeline its folders below OUT.

    The fingerprint of a table is that of the stage's name and version, the parameters that the
    table depends on, what is read from outside, and the fingerprints of the tables it reads.
    Where a stage that makes what later ones read is not complete, it is the last.
    """
    prints: dict[str, str] = {}
    folders: dict[str, str] = {}
    writers: dict[str, str] = {}
    bound = []
    for number in range(len(pipeline.stages)):
        stages = tuple(stage.placed(folders) for stage in pipeline.stages)
        stage = stages[number]
        columns = [*stage.reads(), *(c for c in stage.wants() if c in writers)]
        if stage.reads_further:
            columns += [column for column in writers if column not in COLUMNS]
        inputs = {writers[c]: prints[writers[c]] for c in columns}
        sources, fields = stage.sources(), stage.hashed_fields()
        origins = {
            table.name: {
                "stage": stage.name,
                "table": table.name,
                "version": stage.version,
                "parameters": fields if table.fields is None else _pick(fields, table.fields),
                "sources": sources,
                "inputs": inputs,
            }
            for table in stage.tables()
        }
        own = {name: fingerprint(origin) for name, origin in origins.items()}
        places = {name: storage.join(out, "stages", f"{name}-{own[name]}") for name in own}
        missing = frozenset(
            name for name in own if not is_complete(places[name]) or stage.asks_more(places[name])
        )
        folders = {**folders, **places}
        room = Room(stage, folders, dict(writers), missing, pipeline=stages)
        bound.append(BoundStage(stage, room, own, origins))
        prints.update(own)
        writers.update({column: table.name for table in stage.tables() for column in table.columns})
        if missing and stage.makes_input:
            break
    return bound


def _pick(fields: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: fields[name] for name in names}


def plan(pipeline: Pipeline, out: str) -> list[dict[str, Any]]:
    """Describe what a run would do, without doing any of it.

    Returns
    -------
    list of dict
        One per table: `stage`, `table`, `folder` (null until the download is complete), `state`
        (done | resume | new), `why`, and `steps`: name, tasks (null until earlier steps are done)
        and done.

    Raises
    ------
    OutputError
        If OUT is not ours.
    """
    _check_ours(out)
    rows = []
    stages = bind(pipeline, out)
    for bound in stages:
        for table in bound.stage.tables():
            rows.append(_plan_table(bound, table, out))
    for stage in pipeline.stages[len(stages) :]:
        for table in stage.tables():
            row = {"stage": stage.name, "table": table.name, "folder": None, "state": "new"}
            rows.append({**row, "why": f"follows {stages[-1].stage.name}", "steps": []})
    return rows


def _plan_table(bound: BoundStage, table: Table, out: str) -> dict[str, Any]:
    folder = bound.room.folders[table.name]
    row: dict[str, Any] = {"stage": bound.stage.name, "table": table.name, "folder": folder}
    if table.name not in bound.room.missing:
        return {**row, "state": "done", "why": "complete", "steps": []}
    started = storage.exists(storage.join(folder, "origin.json"))
    why = "was begun and not finished" if started else _why_new(bound, table, out)
    steps = []
    for step in bound.missing_steps():
        if table.name in bound.served(step):
            done = len(bound.done_tasks(step))
            steps.append({"step": step.name, "tasks": _count_tasks(bound, step), "done": done})
    return {**row, "state": "resume" if started else "new", "why": why, "steps": steps}


def _count_tasks(bound: BoundStage, step: Step) -> int | None:
    try:
        return len(step.tasks(bound.room))
    except FileNotFoundError:  # names come from a file that an earlier step has yet to write
        return None


def _why_new(bound: BoundStage, table: Table, out: str) -> str:
    """Say how this table differs from the latest one of the same name, if there is one."""
    stages = storage.join(out, "stages")
    earlier = [n for n in storage.list_names(stages) if n.rpartition("-")[0] == table.name]
    wanted = bound.origins[table.name]
    best: list[str] | None = None
    for name in earlier:
        path = storage.join(stages, name, "origin.json")
        if storage.exists(path):
            changes = _differences(storage.read_json(path), wanted)
            best = changes if best is None or len(changes) < len(best) else best
    return "no earlier result" if best is None else "; ".join(best)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = []
    if before["version"] != now["version"]:
        changes.append(f"stage version {before['version']} -> {now['version']}")
    old, new = before["parameters"], now["parameters"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            changes.append(f"{now['stage']}.{name} {old.get(name)} -> {new.get(name)}")
    if before["sources"] != now["sources"]:
        changes.append("input files changed")
    for name in sorted({*before["inputs"], *now["inputs"]}):
        if before["inputs"].get(name) != now["inputs"].get(name):
            changes.append(f"input {name} changed")
    return changes or ["earlier result was removed"]


@contextlib.contextmanager
def lock_output(out: str, mark: str = "run.json", holds: str = "run") -> Iterator[None]:
    """Hold OUT for this process; killed processes release it.

    Parameters
    ----------
    mark, holds : str
        The file by which OUT is known to be ours, and what it is the mark of.

    Raises
    ------
    OutputError
        If OUT is not ours, not writable, or in use.
    """
    _check_ours(out, mark, holds)
    try:
        storage.make_folder(out)
    except StorageError as error:
        raise OutputError(str(error)) from error
    if not storage.is_local(out):
        with hold(storage.join(out, ".lock"), out, holds):
            yield
        return
    lock = FileLock(storage.filesystem(storage.join(out, ".lock"))[1])
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{out}: must not be in use; another {holds} holds it. Wait for it, or choose another "
            "--output."
        ) from error
    except OSError as error:
        raise OutputError(
            f"{out}: must be writable; {error.strerror or error}. Choose another --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_ours(out: str, mark: str = "run.json", holds: str = "run") -> None:
    """Refuse what holds something else, see `lock_output`."""
    _check_store(out)
    if storage.is_file(out):
        raise OutputError(f"{out}: must be a folder; it is a file. Choose another --output.")
    names = [name for name in storage.list_names(out) if not name.startswith(_BEFORE_RUN)]
    if names and mark not in names:
        raise OutputError(
            f"{out}: must be empty or hold an earlier {holds}; found {names[0]!r} and no {mark}. "
            "Choose another --output."
        )


def _check_store(out: str) -> None:
    """Refuse a store that cannot be written, and names that its client would take for patterns."""
    fs, path = storage.filesystem(out)
    if is_http(fs):
        raise OutputError(
            f"{out}: must be on a disk or an object store; an HTTP server cannot be written. "
            "Choose another --output."
        )
    if not storage.is_local(out) and has_magic(path):
        raise OutputError(f"{out}: must hold none of * ? [ ]. Choose another --output.")


def run(
    pipeline: Pipeline, out: str, options: ClusterOptions, progress: Progress
) -> dict[str, Any]:
    """Carry out a pipeline into OUT, which the caller holds locked.

    Finished work is found and not repeated; unfinished work is resumed.

    Returns
    -------
    dict
        What `run.json` holds.

    Raises
    ------
    CurateError
    """
    try:
        return _run(pipeline, out, options, progress)
    except OSError as error:
        raise StorageError(
            f"{out}: must stay as it is while a run uses it; got {error}. Run the same command "
            "again to resume."
        ) from error


def _run(
    pipeline: Pipeline, out: str, options: ClusterOptions, progress: Progress
) -> dict[str, Any]:
    begun = time.monotonic()
    for stage in pipeline.stages:
        stage.prepare()
    stages = bind(pipeline, out)
    unfinished = [bound for bound in stages if bound.room.missing]
    previous = read_run(out) or {}
    if unfinished or previous.get("status") != "finished":
        storage.clear_temporaries(out)
        # The mark that OUT is ours and what lies in it unfinished, should this run be killed.
        _commit_run(out, {**previous, "status": "unfinished", "pipeline": pipeline.text})
    imports = [module for bound in unfinished for module in bound.stage.imports(bound.room)]
    with Workers(options, out, imports) as workers:
        if unfinished:
            progress.note(workers.describe_dashboard())
        _run_stages(unfinished, workers, progress)
        if len(stages) < len(pipeline.stages):  # the last of them made what the others read
            stages = bind(pipeline, out)
            _run_stages([bound for bound in stages if bound.room.missing], workers, progress)
    for bound in stages:  # what was complete before, by a run that was killed in between
        bound.stage.release(bound.room)
    summary = _summarise(pipeline, stages, time.monotonic() - begun)
    told = previous.get("stages", {}) if previous.get("status") == "finished" else {}
    published = [name for bound in stages for name in publish(bound, out, told)]
    # Stages differ where a run of other parameters was killed after it had published.
    is_told = previous.get("status") == "finished" and previous["stages"] == summary["stages"]
    if not unfinished and not published and is_told:
        return dict(previous, computed=False)
    _commit_run(out, summary)
    return dict(summary, computed=True)


def _commit_run(out: str, value: dict[str, Any]) -> None:
    storage.commit_json(storage.join(out, "run.json"), value)


def _run_stages(unfinished: list[BoundStage], workers: Workers, progress: Progress) -> None:
    for bound in unfinished:
        workers.warm(bound.stage.warm, bound.room)
    for bound in unfinished:
        _run_stage(bound, workers, progress)


def _run_stage(bound: BoundStage, workers: Workers, progress: Progress) -> None:
    stage, room = bound.stage, replace(bound.room, threads=workers.threads)
    for name in sorted(room.missing):
        storage.commit_json(storage.join(room.folders[name], "origin.json"), bound.origins[name])
    seconds: dict[str, float] = {}
    for step in bound.missing_steps():
        done = bound.done_tasks(step)
        tasks = step.tasks(room)
        left = [task for task in tasks if task not in done]
        _LOG.info("%s.%s: %d tasks, %d done before", stage.name, step.name, len(tasks), len(done))
        done_before = len(tasks) - len(left)
        progress.begin(stage.name, step.name, len(tasks), done_before, workers.count)
        begun = time.monotonic()
        if left:
            folders = [bound.done_folder(step, table) for table in bound.served(step)]
            groups = _group(left, step, workers)
            for _tasks, found in workers.map(_execute, groups, room, step.name, folders):
                for counts in found:
                    progress.advance(counts)
        seconds[step.name] = time.monotonic() - begun
        progress.end()
    for name in sorted(room.missing):
        _commit_manifest(bound, name, seconds)
    workers.everywhere(stage.release, room)


def _group(tasks: list[str], step: Step, workers: Workers) -> list[tuple[str, ...]]:
    """Put those tasks together that a worker with a GPU does at once."""
    size = 1
    if step.run_together is not None:
        workers.start()  # which knows whether they have one
        if workers.have_gpus:
            size = min(_MOST_TOGETHER, math.ceil(len(tasks) / max(1, workers.count)))
    return [tuple(tasks[first : first + size]) for first in range(0, len(tasks), size)]


def _execute(
    room: Room, step_name: str, done_folders: Sequence[str], tasks: tuple[str, ...]
) -> list[dict[str, float]]:
    """Run tasks on a worker and mark them done."""
    from threadpoolctl import threadpool_limits

    step = next(step for step in room.stage.steps() if step.name == step_name)
    begun = time.monotonic()
    try:
        with threadpool_limits(1 if room.stage.single_threaded else room.threads):
            found = _run_tasks(room, step, tasks)
    except CurateError:
        raise
    except OSError as error:
        raise StorageError(
            f"{room.stage.name}.{step_name}, task {' '.join(tasks)}: {error}. "
            "Run the same command again to resume."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        raise WorkerError(
            f"{room.stage.name}.{step_name}, task {' '.join(tasks)}: must fit into memory; "
            f"{str(error).partition(chr(10))[0] or type(error).__name__}. Use fewer --workers or "
            "smaller batches, then run again to resume."
        ) from error
    seconds = round((time.monotonic() - begun) / len(tasks), 3)
    for task, counts in zip(tasks, found, strict=True):
        for folder in done_folders:
            record = {"busy_seconds": seconds, **counts}
            storage.commit_json(storage.join(folder, f"{task}.json"), record)
    return found


def _run_tasks(room: Room, step: Step, tasks: tuple[str, ...]) -> list[dict[str, float]]:
    if len(tasks) > 1 and step.run_together is not None:
        try:
            return step.run_together(room, tasks)
        except (MemoryError, RuntimeError) as error:
            if not _is_exhaustion(error):
                raise
        # A small GPU does one after the other.
    return [step.run(room, task) for task in tasks]


def _is_exhaustion(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _EXHAUSTED)


def _commit_manifest(bound: BoundStage, table: str, seconds: dict[str, float]) -> None:
    steps = {}
    for step in bound.stage.steps():
        if step.tables is not None and table not in step.tables:
            continue
        folder = storage.join(bound.room.folders[table], "done", step.name)
        total: dict[str, float] = {}
        names = storage.list_names(folder)
        for name in names:
            for key, value in storage.read_json(storage.join(folder, name)).items():
                total[key] = total.get(key, 0) + value
        wall = round(seconds.get(step.name, 0.0), 3)
        steps[step.name] = {"tasks": len(names), "wall_seconds": wall, **total}
    manifest = {**bound.origins[table], "versions": provenance(), "steps": steps}
    storage.commit_json(storage.join(bound.room.folders[table], "manifest.json"), manifest)


def publish(bound: BoundStage, out: str, told: dict[str, Any]) -> list[str]:
    """Make OUT/<name> hold what a finished stage publishes; return the names that changed.

    Parameters
    ----------
    told : dict
        `stages` of a finished `run.json`: what was published then is known to be the same where
        the fingerprint is.
    """
    changed = []
    table = bound.stage.tables()[0].name
    known = told.get(table, {}).get("fingerprint") == bound.fingerprints[table]
    for name in bound.stage.publishes:
        source = bound.room.path(name)
        if storage.mirror(source, storage.join(out, name), trust_sizes=known):
            changed.append(name)
    return changed


def _summarise(pipeline: Pipeline, finished: list[BoundStage], seconds: float) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for bound in finished:
        for table in bound.stage.tables():
            folder = bound.room.folders[table.name]
            manifest = storage.read_json(storage.join(folder, "manifest.json"))
            stages[table.name] = {
                "fingerprint": bound.fingerprints[table.name],
                "parameters": manifest["parameters"],
                "steps": manifest["steps"],
                "versions": manifest["versions"],
            }
        found = bound.stage.facts(bound.room)
        if found:
            facts[bound.stage.name] = found
    counts = facts.get("select", {}).get("counts")
    if counts is not None:
        _reconcile(counts)
    return {
        "status": "finished",
        "name": pipeline.name,
        "pipeline": pipeline.text,
        "wall_seconds": round(seconds, 3),
        "counts": counts,
        "facts": facts,
        "stages": stages,
        "versions": provenance(),
    }


def _reconcile(counts: dict[str, Any]) -> None:
    dropped = sum(counts["dropped"].values())
    if counts["kept"] + dropped != counts["ingested"]:
        raise ReconcileError(
            f"select: kept + dropped must be the {counts['ingested']} ingested; got "
            f"{counts['kept']} + {dropped}. This is a defect of curate; please report it."
        )


def clean(out: str) -> list[str]:
    """Remove stage folders that OUT's last finished run does not refer to; return their names.

    Raises
    ------
    OutputError
        If OUT holds no finished run.
    """
    last = read_finished(out, "remove the folder")
    used = {f"{name}-{table['fingerprint']}" for name, table in last["stages"].items()}
    removed = []
    for name in storage.list_names(storage.join(out, "stages")):
        if name not in used:
            storage.remove(storage.join(out, "stages", name))
            removed.append(name)
    return removed
