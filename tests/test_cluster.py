"""One worker, two workers, a scheduler of its own: the same answer; unfit workers: one line."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curate.engine.workers import ClusterOptions, Workers
from tests.support import (
    TIMEOUT_SECONDS,
    assert_equal_decisions,
    assert_sound,
    curate,
    launch,
    list_tree,
    only_error,
    read_summary,
    succeed,
    table_differences,
    write_subset,
)

DASK = Path(sys.executable).with_name("dask")


@dataclass(frozen=True)
class Single:
    """What one worker gives."""

    source: Path
    out: Path

    def arguments(self, out: Path) -> tuple[str, ...]:
        settings = ("--set", "ingest.shard_samples=15", "--set", "write.shard_samples=20")
        return ("run", "dedup", "--input", str(self.source), "--output", str(out), *settings)

    def assert_equalled_by(self, out: Path) -> None:
        assert_sound(out)
        assert list_tree(out) == list_tree(self.out)
        assert_equal_decisions(self.out, out)
        assert table_differences(self.out, out) == []
        assert read_summary(out)["counts"] == read_summary(self.out)["counts"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Single:
    folder = tmp_path_factory.mktemp("single")
    run = Single(write_subset(folder / "in", 60, 3), folder / "out")
    succeed(*run.arguments(run.out), "--workers", 1)
    assert_sound(run.out)
    assert len(list((run.out / "decisions").iterdir())) == 4
    return run


@contextlib.contextmanager
def started(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background for as long as the block lasts."""
    with subprocess.Popen(
        [str(one) for one in arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Path]:
    """A file that says where a scheduler listens."""
    file = tmp_path / "scheduler.json"
    where = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0")
    with started(DASK, "scheduler", *where, "--scheduler-file", file) as process:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield file


def address(scheduler: Path) -> str:
    found: str = json.loads(scheduler.read_text(encoding="utf-8"))["address"]
    return found


def worker_command(scheduler: Path) -> list[object]:
    scratch = scheduler.parent / "scratch"
    where = ("--host", "127.0.0.1", "--nthreads", 1, "--no-nanny", "--no-dashboard")
    return [DASK, "worker", "--scheduler-file", scheduler, *where, "--local-directory", scratch]


def test_two_workers_decide_as_one(single: Single, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed(*single.arguments(out), "--workers", 2, by=launch)
    single.assert_equalled_by(out)


def test_running_scheduler_decides_as_one_worker(
    single: Single, scheduler: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    one = worker_command(scheduler)
    with started(*one), started(*one):
        succeed(*single.arguments(out), "--scheduler", address(scheduler), by=launch)
    single.assert_equalled_by(out)


def test_worker_of_another_version(single: Single, scheduler: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import curate\n\ncurate.__version__ = '0.0.1'\n", encoding="utf-8"
    )
    out = tmp_path / "out"
    with started(*worker_command(scheduler), PYTHONPATH=str(tmp_path / "site")):
        done = curate(*single.arguments(out), "--scheduler", address(scheduler))
    assert done.returncode == 1
    line = only_error(done.stderr)
    assert "it has 0.0.1" in line
    assert "Install the same versions" in line
    assert read_summary(out)["status"] == "unfinished"
    assert list_tree(out) == {".lock", "run.json", "run.log"}


def test_worker_that_does_not_see_the_output(
    single: Single, scheduler: Path, tmp_path: Path
) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], check=False).returncode != 0:
        pytest.skip("needs the right to mount (root and `unshare`)")
    shared = tmp_path / "shared"
    shared.mkdir()
    script = 'mount -t tmpfs tmpfs "$1"; shift; exec "$@"'
    hidden = (unshare, "-m", "sh", "-euc", script, "sh", shared)
    with started(*hidden, *worker_command(scheduler)):
        done = curate(*single.arguments(shared / "out"), "--scheduler", address(scheduler))
    assert done.returncode == 1
    assert f"must see {shared / 'out'}; it does not" in only_error(done.stderr)
    assert list_tree(shared / "out") == {".lock", "run.json", "run.log"}


def leave_mark(folder: str, task: str = "warm") -> None:
    """Say in which process a task ran, after a second in which others can start."""
    time.sleep(1)
    (Path(folder) / f"{task}-{os.getpid()}").touch()


def test_local_workers_come_when_tasks_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.engine.workers.count_cores", lambda: 2)
    monkeypatch.setattr("curate.engine.workers.count_gpus", lambda: 0)

    def marks(name: str) -> dict[str, str]:
        found = (path.name.rsplit("-", 1) for path in tmp_path.glob(f"{name}*-*"))
        return {process: task for task, process in found}

    with Workers(ClusterOptions(workers=2), str(tmp_path)) as workers:
        workers.warm(leave_mark, str(tmp_path))
        assert workers.planned() == 2
        for number in range(3):
            assert len(list(workers.map(leave_mark, [f"one{number}"], str(tmp_path)))) == 1
        assert len(marks("one")) == 1
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(marks("many")) < 2:
            assert time.monotonic() < deadline
            tasks = [f"many{number}" for number in range(8)]
            assert {task for task, _ in workers.map(leave_mark, tasks, str(tmp_path))} == {*tasks}
        assert marks("one").keys() < marks("many").keys()
        # What was to be loaded is loaded also by the worker that came later.
        while marks("warm").keys() != marks("many").keys():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def write_process(folder: str, task: str) -> None:
    """Say what surrounds a worker: its parent, what it has imported, and a variable."""
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode()
    imported = getattr(sys.modules.get("wave"), "__file__", None)
    found = {"parent": os.getppid(), "command": parent, "imported": imported}
    variable = {"variable": os.environ.get("CURATE_TEST")}
    (Path(folder) / f"{task}.json").write_text(json.dumps(found | variable), encoding="utf-8")


def run_three_times(folder: Path, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Let a process of its own start workers thrice: in this one a run may have begun before."""
    script = folder / "scripts" / "script.py"
    script.parent.mkdir()
    (folder / "wave.py").touch()  # in the folder that the command is called from
    names = ("first", "second", "third")
    script.write_text(
        f"""
import os
from curate.engine.workers import ClusterOptions, Workers
from tests.test_cluster import write_process

if __name__ == "__main__":
    for name, value in zip({names}, ("1", None, "3")):
        os.environ.pop("CURATE_TEST", None)
        if value is not None:
            os.environ["CURATE_TEST"] = value
        with Workers(ClusterOptions(workers=1), {str(folder)!r}, ["wave"]) as workers:
            list(workers.map(write_process, [name], {str(folder)!r}))
    print(os.getpid())
""",
        encoding="utf-8",
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=folder,
        timeout=TIMEOUT_SECONDS,
    )
    return int(done.stdout), [json.loads((folder / f"{name}.json").read_text()) for name in names]


@pytest.mark.skipif(sys.platform != "linux", reason="others start each worker anew")
def test_local_workers_share_one_import(tmp_path: Path) -> None:
    own, (first, second, third) = run_three_times(tmp_path)
    assert first["imported"] == wave.__file__
    assert "forkserver" in first["command"]
    assert first["parent"] == second["parent"] == third["parent"] != own
    # Of each run's own environment, whatever it was when the first began.
    assert [run["variable"] for run in (first, second, third)] == ["1", None, "3"]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while Path(f"/proc/{first['parent']}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="others start each worker anew")
def test_local_workers_import_by_themselves_where_they_cannot_share(tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 30)  # too long for the name of a socket
    temporary.mkdir()
    own, found = run_three_times(tmp_path, TMPDIR=str(temporary))
    assert [run["parent"] for run in found] == [own] * 3
    assert [run["variable"] for run in found] == ["1", None, "3"]


def test_the_dashboard_is_on_the_loopback_or_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, Workers(ClusterOptions(workers=1), "out") as workers:
        patched.setattr("curate.engine.workers.find_spec", lambda name: None)
        assert "pip install 'curate[dashboard]'" in workers.describe_dashboard()
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    with Workers(ClusterOptions(workers=1), str(tmp_path)) as workers:
        assert workers.describe_dashboard().startswith("Dask dashboard: http://127.0.0.1:")


def test_scheduler_that_is_not_there(single: Single, tmp_path: Path) -> None:
    arguments = (*single.arguments(tmp_path / "out"), "--scheduler")
    done = curate(*arguments, "tcp://127.0.0.1:1")
    assert done.returncode == 1
    assert "must be a running Dask scheduler; none answered" in only_error(done.stderr)
    done = curate(*arguments, "nonsense://127.0.0.1:1")
    assert done.returncode == 1
    assert "nonsense://127.0.0.1:1" in only_error(done.stderr)


def test_cluster_file(single: Single, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(single.out, out)
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kind: local\nn_workers: 2\nthreads_per_worker: 1\nhost: 127.0.0.1\n"
        "dashboard_address: 127.0.0.1:0\n",
        encoding="utf-8",
    )
    succeed(*single.arguments(out), "--set", "select.min_side_px=100", "--cluster", path)
    assert_sound(out)
    assert "image_too_small" in read_summary(out)["counts"]["dropped"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: lokal\n", "must be one of local, local-cuda, slurm, kubernetes; got 'lokal'"),
        ("n_workers: 1\n", "got None"),
        ("kind: local\nn_worker: 1\n", "refused its arguments"),
        ("kind: kubernetes\n", "needs the package"),
        ("local\n", "must be a mapping with `kind`"),
        ("kind: [\n", "must be valid YAML"),
        (None, "must be a readable YAML file"),
    ],
)
def test_cluster_file_that_does_not_hold(
    single: Single, tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    done = curate(*single.arguments(tmp_path / "out"), "--cluster", path)
    assert done.returncode == 2
    assert said in only_error(done.stderr)
