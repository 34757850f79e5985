"""Clean image–text data before a model is trained on it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from curate import audit, mitigation
    from curate.dataset import Samples
    from curate.runs import Paths, Run

__all__ = ["audit", "load", "mitigation", "open", "run"]
__version__ = "0.1.0"


def run(
    pipeline: "str | os.PathLike[str]",
    *,
    input: "Paths",
    output: "str | os.PathLike[str]",
    set: "Mapping[str, Any] | None" = None,
    **options: Any,
) -> "Run":
    """Run a pipeline as `curate run` does, and return the finished run.

    Worker processes import the script that starts them: there the call must stand under
    `if __name__ == "__main__":`. In a notebook it need not.

    Parameters
    ----------
    pipeline : str or path
        A file, or the name of a shipped pipeline.
    input : str, path or sequence of these
        Files, folders, patterns or fsspec URLs.
    output : str or path
        OUT. Where it holds an unfinished run of the same request, that is resumed.
    set : mapping of str to value, optional
        Parameters as `{"stage.field": value}`.
    **options
        `limit` (random samples to preview on), `workers`, `scheduler`, `cluster` (a file), `track`
        ("mlflow" or "wandb"), each as on the command line.

    Raises
    ------
    CurateError
        One of those of `curate.errors`; its text is the line that the command would print.
    """
    from curate.runs import run_pipeline

    return run_pipeline(pipeline, input, output, set, **options)


def open(out: "str | os.PathLike[str]") -> "Run":
    """Return a finished run: its `summary`, `decisions`, `report`, and how to ask for samples.

    Parameters
    ----------
    out : str or path
        OUT of the run.

    Raises
    ------
    OutputError
        If OUT holds no finished run.
    """
    from curate.runs import Run

    return Run(out)


def load(out: str, **options: Any) -> "Samples":
    """Return what a finished run kept as a dataset for PyTorch's DataLoader.

    Parameters
    ----------
    out : str
        OUT of a finished run.
    **options
        Parameters of `curate.dataset.Samples`: `image`, `transform`, `weighted`, `seed`,
        `shuffle`, `buffer_samples`, `rank`, `world_size`.
    """
    # Imports torch, which takes seconds and which the command line can do without.
    from curate.dataset import Samples

    return Samples(out, **options)


def __getattr__(name: str) -> Any:
    # These import torch too: `curate.audit.Monitor` works, and `import curate` stays light.
    if name in ("audit", "mitigation"):
        return importlib.import_module(f"curate.{name}")
    raise AttributeError(f"module 'curate' has no attribute {name!r}")
