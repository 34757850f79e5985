"""The command line: parse, call, print, exit code."""

import contextlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from curate import __version__
from curate.errors import CurateError, NothingKeptError

__all__ = ["main"]

#: Samples are guessed from input bytes before they are counted: the mean over web-scale sets.
_GUESSED_SAMPLE_BYTES = 20_000
#: The same before anything is downloaded: of a URL with its caption, and of an original file.
_GUESSED_URL_BYTES = 150
_GUESSED_FILE_BYTES = 100_000
#: What a sample costs below OUT/stages: vectors, thumbnail, proxies' embeddings, tables.
_STAGE_SAMPLE_BYTES = 16_000


class _Commands(click.Group):
    """Turns every error that is meant for the user into one line and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CurateError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(
                "Stopped. What was finished is kept: run the same command again to resume.",
                err=True,
            )
            ctx.exit(130)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("pipeline"),
        click.argument("more_inputs", nargs=-1, metavar="[PATH]..."),
        click.option(
            "--input", "-i", "inputs", multiple=True, metavar="PATH",
            help="File, folder, pattern or fsspec URL to read; may be given more than once.",
        ),
        click.option("--output", "-o", "out", required=True, metavar="DIR", help="Where to."),
        click.option(
            "--set", "settings", multiple=True, metavar="STAGE.FIELD=VALUE",
            help="Override a parameter of the pipeline.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Preview on so many random samples."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _cluster_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--workers", type=click.IntRange(1), help="Local worker processes."),
        click.option("--scheduler", metavar="ADDRESS", help="Use a running Dask scheduler."),
        click.option(
            "--cluster", "cluster_file", metavar="FILE",
            help="YAML: kind (local, local-cuda, slurm, kubernetes) and its arguments.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="curate")
def main() -> None:
    """Clean image–text data before a model is trained on it.

    `curate demo` shows the whole chain on a bundled sample.
    """


@main.command()
@_run_options
@_cluster_options
def run(
    pipeline: str,
    more_inputs: tuple[str, ...],
    inputs: tuple[str, ...],
    out: str,
    settings: tuple[str, ...],
    limit: int | None,
    as_json: bool,
    workers: int | None,
    scheduler: str | None,
    cluster_file: str | None,
) -> None:
    """Run PIPELINE on --input into --output.

    PIPELINE is a file, or one of default, offline, dedup, clip-score. Run again, it does only what
    is missing.
    """
    loaded = _load(pipeline, (*inputs, *more_inputs), settings, limit)
    cluster = _cluster(workers, scheduler, cluster_file)
    summary = _carry_out(loaded, out, cluster)
    _print_result(summary, out, as_json)


@main.command()
@_run_options
def plan(
    pipeline: str,
    more_inputs: tuple[str, ...],
    inputs: tuple[str, ...],
    out: str,
    settings: tuple[str, ...],
    limit: int | None,
    as_json: bool,
) -> None:
    """Show what `curate run` would do, and why."""
    from curate.engine import runner

    loaded = _load(pipeline, (*inputs, *more_inputs), settings, limit)
    rows = runner.plan(loaded, out)
    need_bytes = _disk_need(loaded)
    if as_json:
        click.echo(json.dumps({"tables": rows, "disk_bytes": need_bytes}, indent=2))
        return
    for row in rows:
        click.echo(f"{row['state']:<6}  {row['table']:<16}  {row['why']}")
        for step in row["steps"]:
            tasks = "?" if step["tasks"] is None else step["tasks"]
            click.echo(f"        {'':<16}  {step['step']}: {step['done']} of {tasks} tasks done")
    click.echo(f"Disk needed at most: about {_in_units(need_bytes)}")


@main.command()
@click.argument("folder", default="curate-demo", metavar="[DIR]")
@click.option("--workers", type=click.IntRange(1), help="Local worker processes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def demo(folder: str, workers: int | None, as_json: bool) -> None:
    """Run the pipeline `offline` on a bundled sample."""
    from importlib import resources

    with resources.as_file(resources.files("curate") / "sample" / "shards") as sample:
        loaded = _load("offline", (str(sample),), (), None)
        summary = _carry_out(loaded, folder, _cluster(workers, None, None))
    _print_result(summary, folder, as_json)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--markdown", is_flag=True, help="Print as the table of the README.")
def columns(as_json: bool, markdown: bool) -> None:
    """List output columns and reason codes."""
    from curate.schema import describe_columns, markdown_tables

    if markdown:
        click.echo(markdown_tables())
    elif as_json:
        click.echo(json.dumps(describe_columns(), indent=2))
    else:
        for row in describe_columns()["columns"]:
            unit = f" [{row['unit']}]" if row["unit"] else ""
            direction = f"; {row['direction']}" if row["direction"] else ""
            click.echo(f"{row['name']}: {row['type']}{unit}{direction}\n    {row['meaning']}")
        click.echo("\nReasons, in the order in which they are given:")
        for code, meaning in describe_columns()["reasons"].items():
            click.echo(f"{code}\n    {meaning}")


@main.command()
@click.argument("out")
@click.argument("uids", nargs=-1, required=True, metavar="UID...")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(out: str, uids: tuple[str, ...], as_json: bool) -> None:
    """Tell everything about samples of a finished run.

    Where they came from, why they were dropped, what would have kept them, and their copies. UID
    may be cut after six digits.
    """
    from curate.engine.show import describe_sample, show_samples

    found = show_samples(out, uids)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n\n".join(describe_sample(sample, out) for sample in found))


@main.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print run.json.")
def stats(out: str, as_json: bool) -> None:
    """Print counts, seconds and figures of a finished run."""
    from curate.engine.finished import read_finished
    from curate.engine.summary import describe_run

    summary = read_finished(out)
    click.echo(json.dumps(summary, indent=2) if as_json else describe_run(summary, out))


@main.command()
@click.argument("out")
def report(out: str) -> None:
    """Write OUT/report anew from a finished run."""
    from curate.engine.finished import read_finished, rebuild_report
    from curate.engine.runner import lock_output

    read_finished(out)  # before anything of OUT is touched
    with lock_output(out):
        click.echo(rebuild_report(out))


@main.command()
@click.argument("out")
@click.option(
    "--to", "layout", required=True, metavar="FORMAT",
    help="webdataset, groups, mds, hf, datacomp or keep-list.",
)  # fmt: skip
@click.option("--output", "-o", "target", required=True, metavar="DIR", help="Where to.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the samples.")
@click.option("--shard-samples", type=click.IntRange(1), help="Samples per file at most.")
@click.option(
    "--groups", type=click.IntRange(1, 99), default=4, show_default=True,
    help="Groups of like weight at most, where the format has groups.",
)  # fmt: skip
@_cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    out: str,
    layout: str,
    target: str,
    seed: int,
    shard_samples: int | None,
    groups: int,
    workers: int | None,
    scheduler: str | None,
    cluster_file: str | None,
    as_json: bool,
) -> None:
    """Write what the run in OUT kept in another format.

    \b
    webdataset  tars with sizes.json
    groups      tars in groups of like weight, and TRAINING.md
    mds         MosaicML streaming, in such groups, and TRAINING.md
    hf          Parquet and a dataset card for Hugging Face's datasets
    datacomp    DataComp subsets: sorted uids, each once and as often as it weighs
    keep-list   uid, key, source file and weight of the kept
    """  # noqa: D301 (click reads the character)
    from curate.engine import export as exports
    from curate.engine.progress import make_progress
    from curate.engine.workers import Workers

    request = exports.Request(out, target, layout, seed, shard_samples, groups)
    options = _cluster(workers, scheduler, cluster_file)
    with Workers(options, target) as pool, make_progress() as progress:
        result = exports.export(request, pool, progress)
    click.echo(json.dumps(result, indent=2) if as_json else exports.describe_export(result, target))


@main.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--model", help="open_clip's name of the architecture, or a .json that describes it.")
@click.option("--candidates", multiple=True, metavar="PATH", help="What the model trained on.")
@click.option("--held-out", multiple=True, metavar="PATH", help="Pairs like these, not trained on.")
@click.option("--reference", metavar="FILE", help="A checkpoint that has not seen the candidates.")
@click.option("--run", "run_out", metavar="OUT", help="Finished run that judged the candidates.")
@click.option("--output", "-o", "out", metavar="DIR", help="Where to write table and page.")
@click.option(
    "--limit", type=click.IntRange(2), default=10_000, show_default=True,
    help="Candidates, and held-out pairs, measured at most.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Draws them.")
@click.option("--search/--no-search", default=True, help="Look for copies, and test deja vu.")
@click.option("--drop-overlap", is_flag=True, help="Leave out held-out pairs that were trained on.")
@click.option("--max-memorization", type=float, help="Exit 3 above this mean.")
@click.option("--max-harmful", type=float, help="Exit 3 above this share memorized and wrong.")
@click.option("--track", type=click.Choice(["mlflow", "wandb"]), help="Log the figures there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def audit(
    checkpoints: tuple[str, ...],
    candidates: tuple[str, ...],
    held_out: tuple[str, ...],
    run_out: str | None,
    out: str | None,
    track: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what trained models memorized.

    CHECKPOINT is a file (safetensors, or a state dict of torch.save), a quoted pattern, or a folder
    of embeddings: candidates/NAME.npy and held_out/NAME.npy for each modality. Several give the
    curve over training. Exit code 3: a limit was exceeded.
    """
    from curate.audit import auditing
    from curate.audit.tracking import check_tracker, track_series
    from curate.engine.progress import make_progress
    from curate.report.audit_words import describe_audit

    if track:
        check_tracker(track)
    request = auditing.Request(
        checkpoints=checkpoints, candidates=candidates, held_out=held_out, run=run_out, output=out,
        **options,
    )  # fmt: skip
    with make_progress() as progress:
        report = auditing.audit(request, progress)
    click.echo(json.dumps(report, indent=2) if as_json else describe_audit(report))
    if track:
        series = [(one["step"], auditing.figures(one)) for one in report["checkpoints"]]
        parameters = {name: str(value) for name, value in vars(request).items()}
        track_series(track, out or checkpoints[0], parameters, series)
    auditing.check_limits(report, request.max_memorization, request.max_harmful)


@main.command()
@click.argument("out")
def clean(out: str) -> None:
    """Remove stage folders that the last run does not use."""
    from curate.engine import runner

    with runner.lock_output(out):
        removed = runner.clean(out)
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"{len(removed)} folders removed")


def _load(
    pipeline: str, inputs: tuple[str, ...], settings: tuple[str, ...], limit: int | None
) -> Any:
    from curate.config import load_pipeline, parse_setting
    from curate.errors import ConfigError

    if not inputs:
        raise ConfigError("--input: must name at least one path; got none. Add --input PATH.")
    chosen = [parse_setting(text) for text in settings]
    chosen.append(("ingest", "inputs", inputs))
    if limit is not None:
        chosen.append(("ingest", "limit", limit))
    return load_pipeline(pipeline, chosen)


def _cluster(workers: int | None, scheduler: str | None, cluster_file: str | None) -> Any:
    from curate.config import read_yaml
    from curate.engine.workers import ClusterOptions
    from curate.errors import ConfigError

    given = {"--workers": workers, "--scheduler": scheduler, "--cluster": cluster_file}
    used = [name for name, value in given.items() if value is not None]
    if len(used) > 1:
        raise ConfigError(f"{' and '.join(used)}: must not be combined. Give one of them.")
    description = None
    if cluster_file is not None:
        try:
            text = Path(cluster_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--cluster {cluster_file}: must be a readable YAML file; {error.strerror}."
            ) from error
        description = read_yaml(text, cluster_file)
        if not isinstance(description, dict):
            raise ConfigError(f"{cluster_file}: must be a mapping with `kind`. See the README.")
    return ClusterOptions(workers, scheduler, description)


def _carry_out(loaded: Any, out: str, cluster: Any) -> dict[str, Any]:
    from curate.engine import runner
    from curate.engine.progress import make_progress

    need_bytes = _disk_need(loaded)  # also finds faults of the input before OUT is touched
    with runner.lock_output(out), _log_file(out):
        _warn_of_disk(need_bytes, out)
        with make_progress() as progress:
            return runner.run(loaded, out, cluster, progress)


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
        from curate import storage

        with contextlib.suppress(CurateError):
            before = storage.read_bytes(self._url) if storage.exists(self._url) else b""
            storage.commit_bytes(self._url, before + self.stream.getvalue().encode())
        super().close()


@contextlib.contextmanager
def _log_file(out: str) -> Iterator[None]:
    """Append what the run reports to OUT/run.log; warnings also go to the terminal."""
    from curate import storage

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
        from curate.errors import OutputError

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


def _disk_need(loaded: Any) -> int:
    """Bytes at most: the shards (no more than the input) and what the stages keep per sample."""
    first = loaded.stages[0]
    input_bytes = sum(source.size_bytes for source in first.list_sources())
    downloads = first.name == "download"
    if downloads:
        input_bytes = input_bytes // _GUESSED_URL_BYTES * _GUESSED_FILE_BYTES
    samples = input_bytes // (_GUESSED_FILE_BYTES if downloads else _GUESSED_SAMPLE_BYTES) + 1
    limit = first.limit
    if limit is not None and limit < samples:
        input_bytes, samples = input_bytes * limit // samples, limit
    copies = downloads + sum(
        1 + bool(stage.webdataset) for stage in loaded.stages if stage.name == "write"
    )
    return copies * input_bytes + samples * _STAGE_SAMPLE_BYTES


def _warn_of_disk(need_bytes: int, out: str) -> None:
    from curate import storage

    if not storage.is_local(out):
        return
    free_bytes = shutil.disk_usage(storage.filesystem(out)[1]).free
    logging.getLogger("curate").info("disk: needs about %d bytes, %d free", need_bytes, free_bytes)
    if need_bytes > free_bytes:
        logging.getLogger("curate").warning(
            "%s: may need up to %s and has %s free; the run stops cleanly if it runs out",
            out, _in_units(need_bytes), _in_units(free_bytes),
        )  # fmt: skip


def _in_units(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _print_result(summary: dict[str, Any], out: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        from curate.engine.summary import describe_run

        click.echo(describe_run(summary, out))
    counts = summary.get("counts")
    if counts is not None and counts["kept"] == 0:
        raise NothingKeptError(
            f"{out}: every one of the {counts['ingested']} samples was dropped. The reasons are "
            f"in {out}/decisions; loosen the rules of `select`, or mend the input."
        )
