"""A run from its request to its summary: what the command line and Python share."""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from curate import storage
from curate.config import Pipeline, load_pipeline, read_yaml_file
from curate.engine import runner, tracking
from curate.engine.progress import make_progress
from curate.engine.summary import in_units
from curate.engine.workers import ClusterOptions
from curate.errors import ConfigError, CurateError, NothingKeptError, OutputError

__all__ = [
    "carry_out",
    "check_apart",
    "check_kept",
    "choose_cluster",
    "disk_need",
    "load_request",
]

#: Samples are guessed from input bytes before they are counted: the mean over web-scale sets.
_GUESSED_SAMPLE_BYTES = 20_000
#: The same before anything is downloaded: of a URL with its caption, and of an original file.
_GUESSED_URL_BYTES = 150
_GUESSED_FILE_BYTES = 100_000
#: What a sample costs below OUT/stages: vectors, thumbnail, proxies' embeddings, tables.
_STAGE_SAMPLE_BYTES = 16_000


def load_request(
    pipeline: str,
    inputs: Sequence[str],
    settings: Sequence[tuple[str, str, Any]],
    limit: int | None,
) -> Pipeline:
    """Read and check a pipeline for an input.

    Parameters
    ----------
    pipeline : str
    inputs : sequence of str
    settings : sequence of (stage, field, value)
    limit : int, optional
        Preview on so many random samples.

    Raises
    ------
    ConfigError
    """
    if not inputs:
        raise ConfigError("--input: must name at least one path; got none. Add --input PATH.")
    chosen = [*settings, ("ingest", "inputs", tuple(inputs))]
    if limit is not None:
        chosen.append(("ingest", "limit", limit))
    return load_pipeline(pipeline, chosen)


def choose_cluster(
    workers: int | None, scheduler: str | None, cluster_file: str | None
) -> ClusterOptions:
    """Return where tasks run.

    Raises
    ------
    ConfigError
        If more than one is given, there are no workers, or the file does not hold a cluster.
    """
    given = {"--workers": workers, "--scheduler": scheduler, "--cluster": cluster_file}
    used = [name for name, value in given.items() if value is not None]
    if len(used) > 1:
        raise ConfigError(f"{' and '.join(used)}: must not be combined. Give one of them.")
    if workers is not None and workers < 1:
        raise ConfigError(
            f"workers: must be at least 1; got {workers}. Leave it out for all cores."
        )
    description = None
    if cluster_file is not None:
        description = read_yaml_file(cluster_file, "--cluster")
        if not isinstance(description, dict):
            raise ConfigError(
                f"{cluster_file}: must be a mapping with `kind`; it is not. Write e.g. `kind: "
                "local`."
            )
    return ClusterOptions(workers, scheduler, description)


def carry_out(
    loaded: Pipeline, out: str, cluster: ClusterOptions, tracker: str | None = None
) -> dict[str, Any]:
    """Run a pipeline into OUT under its lock, with progress on stderr and a log in OUT/run.log.

    Parameters
    ----------
    loaded : Pipeline
    out : str
    cluster : ClusterOptions
    tracker : {"mlflow", "wandb"}, optional
        Where to write parameters, counts and curves once the run has ended.

    Returns
    -------
    dict
        What `run.json` holds, and `computed`.

    Raises
    ------
    CurateError
    """
    if tracker is not None:
        tracking.check_tracker(tracker)
    check_apart(loaded, out)
    need_bytes = disk_need(loaded)  # also finds faults of the input before OUT is touched
    with runner.lock_output(out), _log_file(out):
        _warn_of_disk(need_bytes, out)
        with make_progress() as progress:
            summary = runner.run(loaded, out, cluster, progress)
        if tracker is not None:
            tracking.track(tracker, summary, out)
    return summary


def check_apart(loaded: Pipeline, out: str) -> None:
    """Refuse an OUT within a folder of the input: the next run would take it for input.

    Raises
    ------
    ConfigError
    """
    first: Any = loaded.stages[0]
    below = storage.filesystem(out)
    for given in first.inputs:
        fs, folder = storage.filesystem(given)
        if fs == below[0] and below[1].startswith(folder.rstrip("/") + "/"):
            raise ConfigError(
                f"--output {out}: must not lie in the input; it lies in {given}. Choose another "
                "--output."
            )


def check_kept(summary: dict[str, Any], out: str) -> None:
    """Refuse to call a run a success that kept nothing.

    Raises
    ------
    NothingKeptError
    """
    counts = summary.get("counts")
    if counts is not None and counts["kept"] == 0:
        raise NothingKeptError(
            f"{out}: every one of the {counts['ingested']} samples was dropped. The reasons are "
            f"in {out}/decisions; loosen the rules of `select`, or mend the input."
        )


class _LogFile(logging.FileHandler):
    """A log that says nothing of a full disk: the run's own error does."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without the line."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _LogObject(logging.StreamHandler[io.StringIO]):
    """A log on an object store, which cannot append: written once more when the run ends."""

    def __init__(self, url: str) -> None:
        super().__init__(io.StringIO())
        self._url = url

    def close(self) -> None:
        with contextlib.suppress(CurateError):
            before = storage.read_bytes(self._url) if storage.exists(self._url) else b""
            storage.commit_bytes(self._url, before + self.stream.getvalue().encode())
        super().close()


@contextlib.contextmanager
def _log_file(out: str) -> Iterator[None]:
    """Append what the run reports to OUT/run.log; warnings also go to the terminal."""
    logger = logging.getLogger("curate")
    logger.setLevel(logging.INFO)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handlers: list[logging.Handler] = [terminal]
    url = storage.join(out, "run.log")
    try:
        local = storage.is_local(out)
        handlers.append(_LogFile(storage.filesystem(url)[1]) if local else _LogObject(url))
    except OSError as error:
        raise OutputError(
            f"{out}: must be writable; {error.strerror}. Choose another --output."
        ) from error
    handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def disk_need(loaded: Pipeline) -> int:
    """Bytes at most: the shards (no more than the input) and what the stages keep per sample."""
    first: Any = loaded.stages[0]
    input_bytes = sum(source.size_bytes for source in first.list_sources())
    downloads = first.name == "download"
    if downloads:
        input_bytes = input_bytes // _GUESSED_URL_BYTES * _GUESSED_FILE_BYTES
    samples = input_bytes // (_GUESSED_FILE_BYTES if downloads else _GUESSED_SAMPLE_BYTES) + 1
    if first.limit is not None and first.limit < samples:
        input_bytes, samples = input_bytes * first.limit // samples, first.limit
    writes = [stage for stage in loaded.stages if stage.name == "write"]
    copies = downloads + sum(1 + bool(stage.hashed_fields()["webdataset"]) for stage in writes)
    return int(copies * input_bytes + samples * _STAGE_SAMPLE_BYTES)


def _warn_of_disk(need_bytes: int, out: str) -> None:
    if not storage.is_local(out):
        return
    free_bytes = shutil.disk_usage(storage.filesystem(out)[1]).free
    logging.getLogger("curate").info("disk: needs about %d bytes, %d free", need_bytes, free_bytes)
    if need_bytes > free_bytes:
        logging.getLogger("curate").warning(
            "%s: may need up to %s and has %s free; the run stops cleanly if it runs out",
            out, in_units(need_bytes), in_units(free_bytes),
        )  # fmt: skip
