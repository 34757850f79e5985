"""A run as Python sees it: begin one, or open one that is finished."""

import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate import storage
from curate.engine.finished import read_finished
from curate.engine.session import carry_out, check_kept, choose_cluster, load_request
from curate.engine.show import show_samples
from curate.engine.summary import describe_run, render_run
from curate.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pandas import DataFrame

    from curate.dataset import Samples

__all__ = ["Paths", "Run", "run_pipeline"]

#: One path, or several.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Run:
    """A finished run.

    Parameters
    ----------
    out : str or path
        OUT of the run.
    computed : bool
        Whether this very call did any of the work.

    Raises
    ------
    OutputError
        If OUT holds no finished run.
    """

    def __init__(self, out: str | os.PathLike[str], computed: bool = True) -> None:
        self.out = os.fspath(out)
        #: What `OUT/run.json` holds: counts, facts, parameters, versions, seconds.
        self.summary: dict[str, Any] = read_finished(self.out)
        self._computed = computed

    @property
    def report(self) -> str:
        """Location of the report's page.

        Raises
        ------
        InputError
            If the pipeline writes none.
        """
        return self._place("report/index.html", "a report")

    @cached_property
    def decisions(self) -> pa.Table:
        """One row per ingested sample; see `curate columns`."""
        return self.read_decisions()

    def read_decisions(self, columns: str | Sequence[str] | None = None) -> pa.Table:
        """Return some columns of the decisions: what a run of many millions can be asked for.

        Parameters
        ----------
        columns : str or sequence of str, optional
            By default all.

        Raises
        ------
        InputError
            If the run has no decisions, or not that column.
        """
        columns = [columns] if isinstance(columns, str) else columns
        folder = self._place("decisions", "decisions")
        paths = [storage.join(folder, name) for name in storage.list_names(folder)]
        paths = [path for path in paths if path.endswith(".parquet")]
        known = storage.list_columns(paths[0])
        for name in columns or ():
            if name not in known:
                raise InputError(
                    f"{folder}: must have the column {name!r}; it has {', '.join(known)}. "
                    "Choose among these."
                )
        wanted = list(known if columns is None else columns)
        return pa.concat_tables([storage.read_table(path, wanted) for path in paths])

    def to_pandas(self, columns: str | Sequence[str] | None = None) -> "DataFrame":
        """Return the decisions, or some of their columns, for pandas."""
        return self.read_decisions(columns).to_pandas()

    def show(self, *uids: str) -> list[dict[str, Any]]:
        """Return everything about samples; see `curate.engine.show.show_samples`."""
        return show_samples(self.out, uids)

    def load(self, **options: Any) -> "Samples":
        """Return the kept samples for a DataLoader; see `curate.load`."""
        from curate.dataset import Samples

        return Samples(self.out, **options)

    def _place(self, name: str, what: str) -> str:
        place = storage.join(self.out, name)
        if not storage.exists(place):
            raise InputError(
                f"{self.out}: must hold {what}; its pipeline {self.summary['name']} writes none. "
                "Run one that does."
            )
        return place

    def __repr__(self) -> str:
        counts = self.summary.get("counts") or {}
        told = f", {counts['kept']} of {counts['ingested']} kept" if counts else ""
        return f"<curate.Run {self.out}{told}>"

    def __str__(self) -> str:
        return describe_run({**self.summary, "computed": self._computed}, self.out)

    def _repr_html_(self) -> str:
        return render_run(self.summary, self.out)


def run_pipeline(
    pipeline: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    cluster: str | os.PathLike[str] | None = None,
    track: str | None = None,
) -> Run:
    """Carry out a pipeline; see `curate.run`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker process that imports the script which started it. It must not start another run;
        # the first process tells why its workers did not come up.
        raise SystemExit(1)
    paths = list(input) if isinstance(input, Iterable) and not isinstance(input, str) else [input]
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"input: must be a path or several; got {input!r}. Name what to read.")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f"set: must be a mapping; got {settings!r}. Write e.g. set={{'dedup.min_cosine': .9}}."
        )
    chosen = [_split(name, value) for name, value in (settings or {}).items()]
    loaded = load_request(os.fspath(pipeline), [os.fspath(path) for path in paths], chosen, limit)
    options = choose_cluster(workers, scheduler, None if cluster is None else os.fspath(cluster))
    out = os.fspath(output)
    summary = carry_out(loaded, out, options, track)
    check_kept(summary, out)
    return Run(out, summary["computed"])


def _split(target: str, value: Any) -> tuple[str, str, Any]:
    stage, dot, name = target.partition(".")
    if not dot or not stage or not name:
        raise ConfigError(
            f"set {target!r}: must be 'STAGE.FIELD'. Write e.g. set={{'dedup.min_cosine': 0.95}}."
        )
    return stage, name, value
