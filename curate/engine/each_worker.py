"""A plug-in of Dask's workers; apart from `workers`, which imports Dask only once it is needed."""

from collections.abc import Callable
from typing import Any

from distributed import Worker, WorkerPlugin

__all__ = ["EachWorker"]


class EachWorker(WorkerPlugin):
    """Calls a function once in every worker, also in those that are started later."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._call = (function, *arguments)

    def setup(self, worker: Worker) -> None:
        """Call it; Dask does as a worker starts, or is there already."""
        function, *arguments = self._call
        function(*arguments)
