"""The Python face: a run begun from a script, opened again, asked, and tracked."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import curate
from benchmarks.report import check
from curate.engine.session import choose_cluster
from curate.engine.tracking import check_tracker, list_counts, list_parameters, track
from curate.errors import ConfigError, CurateError, InputError, OutputError, WorkerError
from tests.support import read_decisions, read_summary, succeed

ROOT = Path(__file__).parents[1]


def run_script(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a file as a user would: worker processes import it."""
    # mlflow leaves the experiment of another test in the environment.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("MLFLOW_")}
    (folder / "script.py").write_text(text, "utf-8")
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the vectors `embeddings` and a run of them, `cleaned`, by the README's own example."""
    found = tmp_path_factory.mktemp("python")
    vectors = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    vectors[200:] = vectors[:100] + 0.01
    (found / "embeddings").mkdir()
    np.save(found / "embeddings/0.npy", vectors)
    text = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"<!-- python -->\n```python\n(.*?)```\n<!-- /python -->", text, re.S)
    assert example is not None
    done = run_script(example.group(1), found)
    assert done.returncode == 0, done.stderr
    assert "Dask dashboard: " in done.stderr
    assert "duplicate_semantic" in done.stdout
    return found


def test_a_run_can_be_asked(folder: Path) -> None:
    run = curate.open(folder / "cleaned")
    assert run.decisions.equals(read_decisions(folder / "cleaned"))
    assert run.to_pandas(["uid", "keep"]).keep.sum() == 200
    assert run.read_decisions(["keep"]).column_names == ["keep"]
    assert run.summary == read_summary(folder / "cleaned")
    assert run.summary["stages"]["dedup"]["parameters"]["min_cosine_alone"] == 0.9
    assert Path(run.report).read_text("utf-8").startswith("<!doctype html>")
    assert repr(run).endswith("200 of 300 kept>")
    assert str(run) == succeed("stats", folder / "cleaned").stdout.rstrip("\n")
    dropped = run.to_pandas().query("not keep").uid.iloc[0]
    assert run.show(dropped)[0]["reason"] == "duplicate_semantic"


def test_the_page_says_what_the_decisions_say(folder: Path) -> None:
    compared = check(folder / "cleaned")
    assert compared["reasons"] == 1
    assert compared["scores"] > 20
    assert compared["histograms"] == 1


def test_a_notebook_shows_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = curate.open(folder / "cleaned")
    shown = run._repr_html_()
    for text in ("kept", "200", "66.7%", "duplicate_semantic", "100", "33.3%"):
        assert f">{text}<" in shown
    monkeypatch.setattr(run, "out", "<script>")
    assert "<script>" not in run._repr_html_()


def test_mistakes_are_errors_of_curate(folder: Path, tmp_path: Path) -> None:
    inputs, out = folder / "embeddings", tmp_path / "out"
    with pytest.raises(OutputError, match="must hold a finished run"):
        curate.open(tmp_path)
    with pytest.raises(InputError, match="must have the column 'nothing'"):
        curate.open(folder / "cleaned").read_decisions(["nothing"])
    with pytest.raises(ConfigError, match=r"must be 'STAGE\.FIELD'"):
        curate.run("dedup", input=inputs, output=out, set={"min_cosine": 1})
    with pytest.raises(ConfigError, match="must name at least one path"):
        curate.run("dedup", input=[], output=out)
    with pytest.raises(ConfigError, match="input: must be a path or several; got None"):
        curate.run("dedup", input=None, output=out)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="set: must be a mapping; got 'dedup"):
        curate.run("dedup", input=inputs, output=out, set="dedup.min_cosine=1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="workers: must be at least 1; got 0"):
        curate.run("dedup", input=inputs, output=out, workers=0)
    assert curate.open(folder / "cleaned").to_pandas("uid").columns.tolist() == ["uid"]
    with pytest.raises(ConfigError, match="must not be combined"):
        choose_cluster(1, "tcp://127.0.0.1:1", None)
    with pytest.raises(CurateError, match="Did you mean"):
        curate.run("dedupe", input=inputs, output=out)
    assert not out.exists()


def test_a_script_without_a_guard_is_told(folder: Path) -> None:
    text = "import curate\ncurate.run('dedup', input='embeddings', output='other', workers=1)\n"
    done = run_script(text, folder)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 + done.stderr.count("direct cause")
    assert done.stderr.splitlines()[-1].startswith(f"curate.errors.{WorkerError.__name__}: workers")
    assert '`if __name__ == "__main__":`' in done.stderr


def test_numbers_for_a_tracker(folder: Path) -> None:
    summary = read_summary(folder / "cleaned")
    parameters = list_parameters(summary)
    assert parameters["dedup.min_cosine_alone"] == "0.9"
    assert parameters["select.prefer"] == '["resolution"]'
    assert parameters["fingerprint.select"] == summary["stages"]["select"]["fingerprint"]
    counts = list_counts(summary)
    assert counts["ingested"] == 300
    assert counts["dropped.duplicate_semantic"] == 100


def _dropped(out: Path) -> list[int]:
    """Counts of the one curve of a run that only looks for copies."""
    curves = json.loads((out / "report/curves.json").read_text("utf-8"))
    (chart,) = curves["histograms"].values()
    assert sum(chart["dropped"]) == 100
    found: list[int] = chart["dropped"]
    return found


def test_mlflow_has_parameters_counts_and_curves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    out = folder / "cleaned"
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "CURATE_OUT": str(out),
    }
    # Another process: mlflow leaves warnings, threads and settings behind.
    script = f"""
import json, mlflow
from curate.engine.tracking import track
from curate.runs import Run
assert track("mlflow", Run({str(out)!r}).summary, {str(out)!r})
(run,) = mlflow.search_runs(experiment_names=["curate"], output_format="list")
curve = "histogram.representative_cosine.dropped"
points = mlflow.MlflowClient().get_metric_history(run.info.run_id, curve)
print(json.dumps([run.data.params, run.data.metrics, [p.value for p in points], run.info.run_name]))
"""
    done = run_script(script, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    parameters, metrics, points, name = json.loads(done.stdout.splitlines()[-1])
    summary = read_summary(out)
    assert parameters["dedup.min_cosine_alone"] == "0.9"
    assert metrics["kept"] == summary["counts"]["kept"]
    assert metrics["dropped.duplicate_semantic"] == 100
    assert points == _dropped(out)
    assert name == "cleaned"


def test_wandb_has_them_offline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    out = folder / "cleaned"
    script = f"""
from curate.engine.tracking import track
from curate.runs import Run
assert track("wandb", Run({str(out)!r}).summary, {str(out)!r})
"""
    done = run_script(script, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.rglob("run-*.wandb")
    held = log.read_bytes()
    assert b"dedup.min_cosine" in held
    assert b"dropped.duplicate_semantic" in held
    (path,) = tmp_path.rglob("histogram.representative_cosine*.table.json")
    table = json.loads(path.read_text("utf-8"))
    assert table["columns"] == ["value", "kept", "dropped"]
    assert [row[2] for row in table["data"]] == _dropped(out)


def test_a_tracker_that_fails_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(summary: object, out: str) -> None:
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr("curate.engine.tracking._to_mlflow", stumble)
    with caplog.at_level(logging.WARNING, "curate"):
        assert not track("mlflow", {}, "out")
    assert "the run is complete, but was not tracked: no route to host." in caplog.text
    with pytest.raises(ConfigError, match="must be one of mlflow, wandb"):
        check_tracker("aim")
    monkeypatch.setattr("curate.engine.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'curate\[wandb\]'"):
        check_tracker("wandb")
