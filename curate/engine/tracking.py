"""Experiment tracking: parameters, counts and curves of a finished run, for MLflow or wandb.

Where to is each tracker's own business: MLFLOW_TRACKING_URI, WANDB_MODE and their like are obeyed.
A tracker that fails costs a warning, never a run.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from curate import storage
from curate.errors import ConfigError

__all__ = [
    "TRACKERS",
    "check_tracker",
    "list_counts",
    "list_curves",
    "list_parameters",
    "open_mlflow",
    "open_wandb",
    "track",
    "try_tracker",
]

_LOG = logging.getLogger("curate")

TRACKERS = ("mlflow", "wandb")
#: The experiment (MLflow) or project (wandb) unless the tracker's own variables name another.
_PROJECT = "curate"
#: MLflow's limits: characters of a value, parameters a call.
_MOST_CHARS, _MOST_AT_ONCE = 500, 100


def check_tracker(tracker: str) -> None:
    """Refuse a tracker that cannot be had, before anything runs.

    Raises
    ------
    ConfigError
    """
    if tracker not in TRACKERS:
        raise ConfigError(
            f"--track: must be one of {', '.join(TRACKERS)}; got {tracker!r}. Choose one of them."
        )
    if find_spec(tracker) is None:
        raise ConfigError(
            f"--track {tracker}: needs the package {tracker}; it is not installed. Run "
            f"pip install 'curate[{tracker}]'."
        )


def track(tracker: str, summary: dict[str, Any], out: str) -> bool:
    """Write a finished run to a tracker; tell whether that went well.

    Parameters
    ----------
    tracker : {"mlflow", "wandb"}
    summary : dict
        What `run.json` holds.
    out : str
    """
    write = {"mlflow": _to_mlflow, "wandb": _to_wandb}[tracker]
    advice = ". Mend that and give the same command again: nothing is computed anew."
    return try_tracker(tracker, lambda: write(summary, out), "run", advice)


def try_tracker(tracker: str, write: Callable[[], None], what: str, advice: str = "") -> bool:
    """Call `write`, which may fail in any way, at the cost of a warning; tell whether it did not.

    Parameters
    ----------
    tracker : str
    write : callable
    what : str
        What is complete without it.
    advice : str
    """
    try:
        write()
    except Exception as error:  # whatever a tracker, its server or its disk comes up with
        why = str(error).partition("\n")[0] or type(error).__name__
        _LOG.warning(
            "--track %s: the %s is complete, but was not tracked: %s%s", tracker, what, why, advice
        )
        return False
    return True


@contextlib.contextmanager
def open_mlflow(project: str, name: str) -> Iterator[Any]:
    """Open a run of MLflow in the experiment `project`, unless its own variables name another."""
    import mlflow

    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment(project)
    with mlflow.start_run(run_name=name) as run:
        yield run


def open_wandb(project: str, name: str, parameters: Mapping[str, str]) -> Any:
    """Open a run of wandb, a context, in a project, unless its own variable names another."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", project)
    return wandb.init(project=project, name=name, config=dict(parameters))


def list_parameters(summary: dict[str, Any]) -> dict[str, str]:
    """Parameters as `stage.field`, values as JSON, and the fingerprint of each table."""
    found = {}
    for table, told in summary["stages"].items():
        stage = table.partition(".")[0]
        for name, value in told["parameters"].items():
            found[f"{stage}.{name}"] = value if isinstance(value, str) else json.dumps(value)
        found[f"fingerprint.{table}"] = told["fingerprint"]
    return found


def list_counts(summary: dict[str, Any]) -> dict[str, float]:
    """Counts, seconds and figures that a tracker compares over runs."""
    counts = summary.get("counts") or {"ingested": 0, "kept": 0, "dropped": {}}
    facts = summary["facts"]
    mismatch = facts.get("select", {}).get("mismatch") or {}
    figures = {
        "ingested": counts["ingested"],
        "kept": counts["kept"],
        "wall_seconds": summary["wall_seconds"],
        "dedup_recall": facts.get("dedup", {}).get("recall", {}).get("recall"),
        "mismatched_share": facts.get("score", {}).get("mismatch", {}).get("share"),
        "mismatched_share_kept": mismatch.get("expected_rate"),
        "rare_dropped": mismatch.get("rare_dropped"),
        "common_dropped": mismatch.get("common_dropped"),
        **{f"dropped.{code}": number for code, number in counts["dropped"].items()},
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def list_curves(out: str) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield name and points of each curve of the report; nothing without a report."""
    path = storage.join(out, "report", "curves.json")
    if not storage.exists(path):
        return
    curves = storage.read_json(path)
    points = [
        {name: point[name] for name in ("rate", "kept", "expected", "rare_lost", "common_lost")}
        for point in curves["threshold"] or []
    ]
    yield "threshold", points
    yield "min_cosine", [{"cosine": cosine, "kept": kept} for cosine, kept in curves["min_cosine"]]
    for name, chart in curves["histograms"].items():
        width = (chart["high"] - chart["low"]) / len(chart["kept"])
        yield (
            f"histogram.{name}",
            [
                {"value": chart["low"] + (place + 0.5) * width, "kept": kept, "dropped": dropped}
                for place, (kept, dropped) in enumerate(
                    zip(chart["kept"], chart["dropped"], strict=True)
                )
            ],
        )


def _to_mlflow(summary: dict[str, Any], out: str) -> None:
    import mlflow
    from mlflow.entities import Metric

    with open_mlflow(_PROJECT, _name(out)) as run:
        texts = [(name, value[:_MOST_CHARS]) for name, value in list_parameters(summary).items()]
        for start in range(0, len(texts), _MOST_AT_ONCE):
            mlflow.log_params(dict(texts[start : start + _MOST_AT_ONCE]))
        mlflow.set_tags({"curate.pipeline": summary["name"], "curate.output": out})
        mlflow.log_metrics(list_counts(summary))
        client = mlflow.MlflowClient()
        for name, points in list_curves(out):
            metrics = [
                Metric(f"{name}.{key}", value, 0, step)
                for step, point in enumerate(points)
                for key, value in point.items()
                if value is not None
            ]
            if metrics:
                client.log_batch(run.info.run_id, metrics=metrics)
        told = {name: value for name, value in summary.items() if name != "computed"}
        mlflow.log_dict(told, "run.json")


def _to_wandb(summary: dict[str, Any], out: str) -> None:
    import wandb

    with open_wandb(_PROJECT, _name(out), list_parameters(summary)) as run:
        run.summary.update(list_counts(summary))
        for name, points in list_curves(out):
            if not points:
                continue
            columns: list[str | int] = list(points[0])
            rows = [list(point.values()) for point in points]
            run.log({name: wandb.Table(columns=columns, data=rows)})


def _name(out: str) -> str:
    return out.rstrip("/").rpartition("/")[2] or out
