"""The figures of an audit for MLflow or wandb, a step for each checkpoint."""

import logging
import os
from collections.abc import Mapping, Sequence

__all__ = ["track_series"]

_log = logging.getLogger(__name__)

#: The experiment (MLflow) or project (wandb) unless the tracker's own variables name another.
_PROJECT = "curate-audit"


def track_series(
    tracker: str,
    name: str,
    parameters: Mapping[str, str],
    series: Sequence[tuple[int, Mapping[str, float]]],
) -> bool:
    """Write figures step by step; a tracker that fails costs a warning, never a result.

    Parameters
    ----------
    tracker : {"mlflow", "wandb"}
    name : str
        Of the tracker's run.
    parameters : mapping
    series : sequence of (int, mapping)
        Step and figures.

    Returns
    -------
    bool
        Whether that went well.
    """
    try:
        (_to_mlflow if tracker == "mlflow" else _to_wandb)(name, parameters, series)
    except Exception as error:  # whatever a tracker, its server or its disk comes up with
        why = str(error).partition("\n")[0] or type(error).__name__
        _log.warning("--track %s: the audit is complete, but was not tracked: %s", tracker, why)
        return False
    return True


def _to_mlflow(
    name: str, parameters: Mapping[str, str], series: Sequence[tuple[int, Mapping[str, float]]]
) -> None:
    import mlflow

    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment(_PROJECT)
    with mlflow.start_run(run_name=name):
        mlflow.log_params(dict(parameters))
        for step, figures in series:
            mlflow.log_metrics(dict(figures), step=step)


def _to_wandb(
    name: str, parameters: Mapping[str, str], series: Sequence[tuple[int, Mapping[str, float]]]
) -> None:
    import wandb

    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    with wandb.init(project=project, name=name, config=dict(parameters)) as run:
        for step, figures in series:
            run.log(dict(figures), step=step)
