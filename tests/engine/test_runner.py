import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from threadpoolctl import threadpool_info

from curate import storage
from curate.config import Pipeline
from curate.engine.runner import bind, clean, lock_output, plan, run
from curate.engine.summary import describe_run
from curate.engine.workers import ClusterOptions
from curate.errors import InputError, OutputError, ReconcileError, StorageError, WorkerError
from curate.report.words import stage_times
from curate.stages.base import Room, Stage, Step, Table, execution_only, one_task, shard_tasks


class Lines(Stage):
    """Stands first: a row for every line of a file."""

    name: ClassVar[str] = "ingest"
    path: str = execution_only("", "file to read")
    shard_samples: int = 2

    def tables(self) -> tuple[Table, ...]:
        return (Table("ingest", ("key",)),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("layout", _layout, one_task), Step("shards", _index, shard_tasks))

    def sources(self) -> list[dict[str, Any]]:
        data = Path(self.path).read_bytes()
        return [{"name": "lines", "digest": hashlib.sha256(data).hexdigest()}]

    def lines(self) -> list[str]:
        return Path(self.path).read_text("utf-8").split()


def _layout(room: Room, task: str) -> dict[str, float]:
    assert isinstance(room.stage, Lines)
    lines, size = room.stage.lines(), room.stage.shard_samples
    shards = [
        {"name": f"{start // size:05d}", "lines": lines[start : start + size]}
        for start in range(0, len(lines), size)
    ]
    storage.commit_json(room.path("layout.json"), {"shards": shards})
    return {}


def _index(room: Room, task: str) -> dict[str, float]:
    layout = storage.read_json(room.path("layout.json"))
    lines = next(shard["lines"] for shard in layout["shards"] if shard["name"] == task)
    uids = [hashlib.md5(line.encode()).hexdigest() for line in lines]
    room.commit_shard("ingest", task, pa.table({"uid": uids, "key": lines}))
    return {"samples": len(lines)}


class Measure(Stage):
    """Two side tables, each with a field of its own, filled in one pass."""

    name: ClassVar[str] = "measure"
    factor: int = 2
    suffix: str = "x"
    note: str = execution_only("", "says nothing")
    stumble: str = execution_only("", "task that fails")

    def reads(self) -> tuple[str, ...]:
        return ("key",)

    def tables(self) -> tuple[Table, ...]:
        return (
            Table("measure.length", ("length",), ("factor",)),
            Table("measure.name", ("name",), ("suffix",)),
        )

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _measure, shard_tasks),)


def _measure(room: Room, shard: str) -> dict[str, float]:
    stage = room.stage
    assert isinstance(stage, Measure)
    if shard == stage.stumble:
        raise OSError(5, "Input/output error")
    keys = room.read(shard, ["key"])
    uids = keys.select(["uid"])
    names = keys["key"].to_pylist()
    columns = {
        "measure.length": ("length", pa.array([len(n) * stage.factor for n in names])),
        "measure.name": ("name", pa.array([n + stage.suffix for n in names])),
    }
    for table in room.missing:
        room.commit_shard(table, shard, uids.append_column(*columns[table]))
    return {"samples": len(names)}


class Together(Measure):
    """Leaves word of which tasks were done together."""

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _measure, shard_tasks, run_together=_measure_together),)


def _measure_together(room: Room, tasks: Sequence[str]) -> list[dict[str, float]]:
    storage.commit_json(room.path("together.json"), list(tasks))
    return [_measure(room, task) for task in tasks]


class Greedy(Measure):
    """Asks for more memory than there is."""

    of_torch: bool = execution_only(False, "of which library")

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _exhaust, shard_tasks),)


def _exhaust(room: Room, shard: str) -> dict[str, float]:
    stage = room.stage
    assert isinstance(stage, Greedy)
    return {"samples": len(torch.empty(1 << 55) if stage.of_torch else np.empty(1 << 55))}


class Crowded(Together):
    """Fits a GPU's memory one task at a time."""

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _measure, shard_tasks, run_together=_exhaust_together),)


def _exhaust_together(room: Room, tasks: Sequence[str]) -> list[dict[str, float]]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")


class Alone(Measure):
    """Tells how many threads a sum may take."""

    single_threaded: ClassVar[bool] = True

    def steps(self) -> tuple[Step, ...]:
        return (Step("shards", _count_threads, shard_tasks),)


def _count_threads(room: Room, shard: str) -> dict[str, float]:
    np.ones((2, 2)) @ np.ones((2, 2))
    most = max(pool["num_threads"] for pool in threadpool_info())
    storage.commit_json(room.path(f"threads-{shard}.json"), most)
    return _measure(room, shard)


class NewMeasure(Measure):
    version: ClassVar[int] = 2


class Decide(Stage):
    """Keeps long names; can be told to lose some on the way."""

    name: ClassVar[str] = "select"
    publishes: ClassVar[tuple[str, ...]] = ("decisions",)
    longest: int = 100
    lose: int = 0

    def reads(self) -> tuple[str, ...]:
        return ("length",)

    def wants(self) -> tuple[str, ...]:
        return ("name", "colour")

    def tables(self) -> tuple[Table, ...]:
        return (Table("select", ("keep",)),)

    def steps(self) -> tuple[Step, ...]:
        return (Step("table", _decide, shard_tasks), Step("sum", _sum, one_task))

    def facts(self, room: Room) -> dict[str, Any]:
        return {"counts": storage.read_json(room.path("counts.json"))}


def _decide(room: Room, shard: str) -> dict[str, float]:
    assert isinstance(room.stage, Decide)
    table = room.read(shard, ["length"])
    keep = [length <= room.stage.longest for length in table["length"].to_pylist()]
    decided = table.select(["uid"]).append_column("keep", pa.array(keep))
    room.commit_shard("select", shard, decided)
    storage.commit_table(room.path("decisions", f"{shard}.parquet"), decided)
    return {"samples": len(table)}


def _sum(room: Room, task: str) -> dict[str, float]:
    assert isinstance(room.stage, Decide)
    tables = [storage.read_table(room.shard_path("select", shard)) for shard in room.shards()]
    keep = pa.concat_tables(tables)["keep"].to_pylist()
    dropped = keep.count(False)
    counts = {
        "ingested": len(keep),
        "kept": keep.count(True) - room.stage.lose,
        "dropped": {"caption_too_long": dropped} if dropped else {},
    }
    storage.commit_json(room.path("counts.json"), counts)
    return {"samples": len(keep)}


class Log:
    """Remember what a run tells."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.ended = 0

    def note(self, text: str) -> None:
        assert text.startswith("Dask dashboard: ")

    def begin(self, stage: str, step: str, tasks: int, done: int, workers: int = 0) -> None:
        self.steps.append([f"{stage}.{step}", tasks, done, 0.0])

    def advance(self, counts: Mapping[str, float]) -> None:
        self.steps[-1][2] += 1
        self.steps[-1][3] += counts.get("samples", 0)

    def end(self) -> None:
        self.ended += 1


ONE = ClusterOptions(workers=1)
#: A cluster that cannot be reached: whoever asks for it fails.
NONE = ClusterOptions(scheduler="tcp://127.0.0.1:1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text("one three five seven eleven\n", "utf-8")
    return path


def make(source: Path, *stages: Stage, **fields: Any) -> Pipeline:
    chosen = stages or (Measure(**fields), Decide(longest=8))
    return Pipeline("test", "recipe", (Lines(path=str(source)), *chosen))


@pytest.fixture(scope="module")
def finished(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Log]:
    out, log = tmp_path_factory.mktemp("finished") / "out", Log()
    with lock_output(str(out)):
        summary = run(make(source), str(out), ONE, log)
    return out, summary, log


@pytest.fixture
def out(finished: tuple[Path, dict[str, Any], Log], tmp_path: Path) -> str:
    """Give a test its own copy of a finished OUT."""
    shutil.copytree(finished[0], tmp_path / "out")
    return str(tmp_path / "out")


def states(pipeline: Pipeline, out: str) -> dict[str, tuple[str, str]]:
    return {row["table"]: (row["state"], row["why"]) for row in plan(pipeline, out)}


DONE = ("done", "complete")


def test_a_first_run(finished: tuple[Path, dict[str, Any], Log], source: Path) -> None:
    out, summary, log = finished
    assert summary["computed"]
    assert summary["status"] == "finished"
    assert summary["counts"] == {"ingested": 5, "kept": 2, "dropped": {"caption_too_long": 3}}
    assert log.steps == [
        ["ingest.layout", 1, 1, 0.0],
        ["ingest.shards", 3, 3, 5.0],
        ["measure.shards", 3, 3, 5.0],
        ["select.table", 3, 3, 5.0],
        ["select.sum", 1, 1, 5.0],
    ]
    assert log.ended == 5
    stages = summary["stages"]
    assert list(stages) == ["ingest", "measure.length", "measure.name", "select"]
    assert stages["measure.length"]["parameters"] == {"factor": 2}
    assert stages["measure.length"]["steps"]["shards"]["tasks"] == 3
    assert stages["measure.length"]["steps"]["shards"]["samples"] == 5
    assert "torch" in summary["versions"]
    stored = storage.read_json(str(out / "run.json"))
    assert stored == {k: v for k, v in summary.items() if k != "computed"}
    published = storage.walk_files(str(out / "decisions"))
    assert list(published) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert not [n for n in storage.walk_files(str(out)) if storage.TEMPORARY_PREFIX in n]
    assert set(states(make(source), str(out)).values()) == {DONE}
    text = describe_run(summary, str(out))
    assert "caption_too_long" in text
    assert "60.0%" in text
    assert f"{out}/decisions" in text


def test_a_sample_that_a_training_saw_often_is_one() -> None:
    stages = {
        name: {"steps": {"shards": {"wall_seconds": seconds, "samples": samples}}}
        for name, seconds, samples in (
            ("ingest", 1.0, 10),
            ("embed.vectors", 3.0, 9),
            ("score", 2.0, 240),
        )
    }
    assert stage_times(stages) == [("ingest", 1.0, 10), ("embed", 3.0, 9), ("score", 2.0, 10)]


def test_before_anything_ran(source: Path, tmp_path: Path) -> None:
    rows = {row["table"]: row for row in plan(make(source), str(tmp_path / "out"))}
    assert {(row["state"], row["why"]) for row in rows.values()} == {("new", "no earlier result")}
    assert rows["ingest"]["steps"] == [
        {"step": "layout", "tasks": 1, "done": 0},
        {"step": "shards", "tasks": None, "done": 0},
    ]
    assert not (tmp_path / "out").exists()


def test_a_second_run_does_nothing(out: str, source: Path) -> None:
    before = {name: os.stat(f"{out}/{name}").st_mtime_ns for name in storage.walk_files(out)}
    log = Log()
    summary = run(make(source), out, NONE, log)
    assert not summary["computed"]
    assert log.steps == []
    after = {name: os.stat(f"{out}/{name}").st_mtime_ns for name in storage.walk_files(out)}
    assert after == before
    assert "Nothing to do" in describe_run(summary, out)


def test_what_cannot_change_the_result_does_not(out: str, source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.txt"
    shutil.copy(source, elsewhere)
    assert set(states(make(elsewhere, note="other"), out).values()) == {DONE}


def test_a_changed_parameter_says_so(out: str, source: Path) -> None:
    found = states(make(source, factor=3), out)
    assert found == {
        "ingest": DONE,
        "measure.length": ("new", "measure.factor 2 -> 3"),
        "measure.name": DONE,
        "select": ("new", "input measure.length changed"),
    }
    found = states(make(source, suffix="y"), out)
    assert found["measure.length"] == DONE
    assert found["measure.name"] == ("new", "measure.suffix x -> y")
    # `select` uses the name where there is one, without needing it.
    assert found["select"] == ("new", "input measure.name changed")


def test_a_changed_version_says_so(out: str, source: Path) -> None:
    found = states(make(source, NewMeasure(), Decide(longest=8)), out)
    assert found["ingest"] == DONE
    assert found["measure.length"] == found["measure.name"] == ("new", "stage version 1 -> 2")


def test_a_changed_source_says_so(out: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one three five seven twelve\n", "utf-8")
    found = states(make(other), out)
    assert found["ingest"] == ("new", "input files changed")
    assert {state for state, _ in found.values()} == {"new"}


def test_the_nearest_earlier_result_is_compared(out: str, source: Path) -> None:
    far = bind(make(source, Measure(factor=9), Decide(longest=7)), out)
    for bound in far:
        for table, origin in bound.origins.items():
            storage.commit_json(f"{bound.room.folders[table]}/origin.json", origin)
    assert states(make(source, factor=3), out)["measure.length"][1] in (
        "measure.factor 2 -> 3",
        "measure.factor 9 -> 3",
    )
    decide = make(source, Measure(factor=9), Decide(longest=6))
    assert states(decide, out)["select"] == ("new", "select.longest 7 -> 6")


def test_stages_of_a_shorter_pipeline_are_found_again(out: str, source: Path) -> None:
    found = states(make(source, Measure()), out)
    assert list(found) == ["ingest", "measure.length", "measure.name"]
    assert set(found.values()) == {DONE}


@pytest.mark.parametrize("gpus", ["", "0"])
def test_a_worker_with_a_gpu_does_tasks_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    out, log = str(tmp_path / "out"), Log()
    with lock_output(out):
        run(make(source, Together()), out, ONE, log)
    assert log.steps[-1] == ["measure.shards", 3, 3, 5.0]
    (folder,) = (Path(out) / "stages").glob("measure.length-*")
    lengths = [len(storage.read_table(str(path))) for path in sorted(folder.glob("shards/*"))]
    marks = [storage.read_json(str(path)) for path in sorted(folder.glob("done/shards/*"))]
    assert lengths == [mark["samples"] for mark in marks] == [2, 2, 1]
    told = folder / "together.json"
    assert told.exists() == bool(gpus)
    if gpus:
        assert storage.read_json(str(told)) == ["00000", "00001", "00002"]


def test_tasks_that_fail_together_are_all_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    out = str(tmp_path / "out")
    with lock_output(out), pytest.raises(StorageError, match="task 00000 00001 00002: "):
        run(make(source, Together(stumble="00001")), out, ONE, Log())
    assert run(make(source, Together()), out, ONE, Log())["computed"]


def test_what_does_not_fit_together_is_done_one_by_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    out = str(tmp_path / "out")
    with lock_output(out):
        assert run(make(source, Crowded()), out, ONE, Log())["computed"]


def test_a_stage_whose_sums_depend_on_threads_has_one(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with lock_output(out):
        run(make(source, Alone()), out, ONE, Log())
    (folder,) = (Path(out) / "stages").glob("measure.length-*")
    told = [storage.read_json(str(path)) for path in sorted(folder.glob("threads-*"))]
    assert told == [1, 1, 1]


@pytest.mark.parametrize("of_torch", [False, True])
def test_a_task_without_enough_memory_ends_in_one_line(
    source: Path, tmp_path: Path, of_torch: bool
) -> None:
    out = str(tmp_path / "out")
    with lock_output(out), pytest.raises(WorkerError) as told:
        run(make(source, Greedy(of_torch=of_torch)), out, ONE, Log())
    assert re.fullmatch(
        r"measure.shards, task \d{5}: must fit into memory; .*allocate.*\. "
        r"Use fewer --workers or smaller batches, then run again to resume\.",
        str(told.value),
    )


def test_unfinished_work_is_resumed(
    out: str, source: Path, finished: tuple[Path, dict[str, Any], Log]
) -> None:
    measure = bind(make(source), out)[1]
    for table in ("measure.length", "measure.name"):
        storage.remove(storage.join(measure.room.folders[table], "manifest.json"))
    # One table lost a mark, the other has them all: the task is done again for both.
    lost = storage.join(measure.room.folders["measure.name"], "done", "shards", "00001.json")
    storage.remove(lost)
    half = storage.join(measure.room.folders["measure.name"], "shards", ".tmp-12345678")
    Path(half).write_text("half")
    rows = {row["table"]: row for row in plan(make(source), out)}
    assert rows["measure.name"]["state"] == "resume"
    assert rows["measure.name"]["why"] == "was begun and not finished"
    assert rows["measure.name"]["steps"] == [{"step": "shards", "tasks": 3, "done": 2}]
    assert rows["select"]["state"] == "done"
    log = Log()
    summary = run(make(source), out, ONE, log)
    assert log.steps == [["measure.shards", 3, 3, 2.0]]
    assert summary["computed"]
    first = finished[1]
    assert summary["counts"] == first["counts"]
    assert [t["fingerprint"] for t in summary["stages"].values()] == [
        t["fingerprint"] for t in first["stages"].values()
    ]
    assert summary["stages"]["measure.name"]["steps"]["shards"]["samples"] == 5
    assert not Path(half).exists()
    whole = {name for name in storage.walk_files(str(finished[0])) if name != ".lock"}
    assert {name for name in storage.walk_files(out) if name != ".lock"} == whole


def test_a_failed_run_then_other_parameters_then_clean(out: str, source: Path) -> None:
    with pytest.raises(StorageError, match=r"^measure\.shards, task 00001: .*again to resume"):
        run(make(source, factor=5, stumble="00001"), out, ONE, Log())
    assert storage.read_json(f"{out}/run.json")["status"] == "unfinished"
    with pytest.raises(OutputError, match="must hold a finished run"):
        clean(out)
    assert states(make(source, factor=5), out)["measure.length"][0] == "resume"

    # Both in one run: other parameters, and decisions that lose a sample.
    broken = make(source, Measure(factor=3), Decide(longest=100, lose=1))
    with pytest.raises(ReconcileError, match=r"must be the 5 ingested; got 4 \+ 0"):
        run(broken, out, ONE, Log())
    assert storage.read_json(f"{out}/run.json")["status"] == "unfinished"

    # Back to what was finished first: nothing is computed, and its results are published again.
    summary = run(make(source), out, NONE, Log())
    assert summary["counts"]["kept"] == 2
    removed = clean(out)
    assert len(removed) == 3
    assert {name.rpartition("-")[0] for name in removed} == {"measure.length", "select"}
    assert len(storage.list_names(f"{out}/stages")) == 4
    assert clean(out) == []
    assert not run(make(source), out, NONE, Log())["computed"]


def test_published_files_follow_the_run(out: str, source: Path) -> None:
    stray = Path(out) / "decisions" / "99999.parquet"
    stray.write_text("of an earlier run with more shards")
    (Path(out) / "decisions" / "00000.parquet").unlink()
    summary = run(make(source), out, NONE, Log())
    assert summary["computed"]
    assert storage.list_names(f"{out}/decisions") == [f"0000{i}.parquet" for i in range(3)]


def test_an_output_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"thesis\.tex.*no run\.json"), lock_output(str(tmp_path)):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(OutputError), lock_output(str(tmp_path / "thesis.tex")):
        pass


def test_an_empty_output_and_an_earlier_run_are_taken(tmp_path: Path) -> None:
    out = str(tmp_path / "deep" / "out")
    for _ in range(2):
        with lock_output(out):
            storage.commit_json(f"{out}/run.json", {"status": "unfinished"})
    assert storage.read_json(f"{out}/run.json") == {"status": "unfinished"}


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    refused = pytest.raises(OutputError, match="another run holds it")
    with lock_output(out), refused, lock_output(out):
        pass
    with lock_output(out):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="writable"), lock_output(str(tmp_path / "out")):
        pass


def test_clean_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="must hold a finished run"):
        clean(str(tmp_path))


def test_unknown_protocols() -> None:
    with pytest.raises(InputError), lock_output("nonsense://bucket"):
        pass
