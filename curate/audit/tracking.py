"""The figures of an audit for MLflow or wandb, a step for each checkpoint."""

from collections.abc import Mapping, Sequence

from curate.engine.tracking import open_mlflow, open_wandb, try_tracker

__all__ = ["track_series"]


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
    write = _to_mlflow if tracker == "mlflow" else _to_wandb
    return try_tracker(tracker, lambda: write(name, parameters, series), "audit")


def _to_mlflow(
    name: str, parameters: Mapping[str, str], series: Sequence[tuple[int, Mapping[str, float]]]
) -> None:
    import mlflow

    with open_mlflow(_PROJECT, name):
        mlflow.log_params(dict(parameters))
        for step, figures in series:
            mlflow.log_metrics(dict(figures), step=step)


def _to_wandb(
    name: str, parameters: Mapping[str, str], series: Sequence[tuple[int, Mapping[str, float]]]
) -> None:
    with open_wandb(_PROJECT, name, parameters) as run:
        for step, figures in series:
            run.log(dict(figures), step=step)
