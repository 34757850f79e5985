"""The command line: parse, call, print, exit code."""

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.core import ParameterSource

from curate import __version__
from curate.errors import ConfigError, CurateError, StorageError

__all__ = ["main"]


#: Below the help of commands that take it.
_OUT = "OUT is the folder that `curate run` got as --output."


class _Commands(click.Group):
    """Turns every error that is meant for the user into one line and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated_as_interrupted():
                return super().invoke(ctx)
        except CurateError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # click leaves in silence, as pipes want it
            raise
        except OSError as error:
            where = error.filename or ctx.invoked_subcommand
            why = error.strerror or error
            click.echo(
                f"Error: {where}: cannot be used; {why}. Correct that and try again.", err=True
            )
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt:
            click.echo(
                "Stopped. What was finished is kept: run the same command again to resume.",
                err=True,
            )
            ctx.exit(130)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the command as Ctrl-C does, workers and all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse `nan`, which is above and below nothing and so within all bounds."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.")
    return value


_WORKERS = click.option(
    "--workers", type=click.IntRange(1),
    help="Local worker processes; default: one for each core, or GPU.",
)  # fmt: skip


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("pipeline"),
        click.argument("more_inputs", nargs=-1, metavar="[PATH]..."),
        click.option(
            "--input", "-i", "inputs", multiple=True, metavar="PATH",
            help="File, folder, pattern or fsspec URL to read; may be given more than once.",
        ),
        click.option("--output", "-o", "out", required=True, metavar="DIR",
                     help="Folder of the results: OUT to other commands."),
        click.option(
            "--set", "settings", multiple=True, metavar="STAGE.FIELD=VALUE",
            help="Override a parameter of the pipeline; may be given more than once.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Preview on so many random samples."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _cluster_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        _WORKERS,
        click.option(
            "--scheduler", metavar="ADDRESS", help="Use a running Dask scheduler instead."
        ),
        click.option(
            "--cluster", "cluster_file", metavar="FILE",
            help="Start a Dask cluster instead. YAML: kind (local, local-cuda, slurm, kubernetes) "
            "and its arguments.",
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
@click.option(
    "--track", "tracker", type=click.Choice(["mlflow", "wandb"]),
    help="Write parameters, counts and curves to a tracker.",
)  # fmt: skip
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
    tracker: str | None,
) -> None:
    """Run PIPELINE on --input into --output.

    PIPELINE is a YAML file, or one of default, offline, dedup, clip-score. Run again, it does only
    what is missing. PATH is one more --input.
    """
    loaded = _load(pipeline, (*inputs, *more_inputs), settings, limit)
    cluster = _cluster(workers, scheduler, cluster_file)
    summary = _carry_out(loaded, out, cluster, tracker)
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
    """Show what `curate run` would do, and why.

    It takes the same pipeline, inputs and settings, computes nothing and writes nothing.
    """
    from curate.engine import runner
    from curate.engine.session import check_apart, disk_need
    from curate.engine.summary import print_plan

    loaded = _load(pipeline, (*inputs, *more_inputs), settings, limit)
    check_apart(loaded, out)
    rows = runner.plan(loaded, out)
    need_bytes = disk_need(loaded)
    if as_json:
        click.echo(json.dumps({"tables": rows, "disk_bytes": need_bytes}, indent=2))
    else:
        print_plan(rows, need_bytes)


@main.command()
@click.argument("folder", default="curate-demo", metavar="[DIR]")
@_WORKERS
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def demo(folder: str, workers: int | None, as_json: bool) -> None:
    """Run the pipeline `offline` on a bundled sample.

    DIR is where to; default: curate-demo.
    """
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

    if markdown and as_json:
        raise ConfigError("--json and --markdown: must not be combined. Give one of them.")
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


@main.command(epilog=_OUT)
@click.argument("out")
@click.argument("uids", nargs=-1, required=True, metavar="UID...")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(out: str, uids: tuple[str, ...], as_json: bool) -> None:
    """Tell everything about samples of a finished run.

    Where they came from, why they were dropped, what would have kept them, and their copies. UID is
    that of decisions/ and of the report, or its first six or more digits.
    """
    from curate.engine.show import describe_sample, show_samples

    found = show_samples(out, uids)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n\n".join(describe_sample(sample, out) for sample in found))


@main.command(epilog=_OUT)
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print run.json, which holds them.")
def stats(out: str, as_json: bool) -> None:
    """Print counts, seconds and figures of a finished run."""
    from curate.engine.finished import read_finished
    from curate.engine.summary import describe_run

    summary = read_finished(out)
    click.echo(json.dumps(summary, indent=2) if as_json else describe_run(summary, out))


@main.command(epilog=_OUT)
@click.argument("out")
@click.option(
    "--against", "other", metavar="OTHER_OUT",
    help="Write OUT/compare instead: what differs from another finished run.",
)  # fmt: skip
def report(out: str, other: str | None) -> None:
    """Write OUT/report anew, or compare two runs."""
    from curate.engine.finished import compare_runs, read_finished, rebuild_report
    from curate.engine.runner import lock_output

    for one in (out, other):  # before anything of OUT is touched
        if one is not None:
            read_finished(one)
    with lock_output(out):
        click.echo(rebuild_report(out) if other is None else compare_runs(out, other))


@main.command(epilog=_OUT)
@click.argument("out")
@click.option(
    "--to", "layout", required=True, metavar="FORMAT", help="One of those above.",
)  # fmt: skip
@click.option("--output", "-o", "target", required=True, metavar="DIR", help="Folder to write.")
@click.option("--seed", default=0, show_default=True, help="Draws the order of samples.")
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
@click.option("--model", help="open_clip's name of files' architecture, or a .json describing it.")
@click.option("--candidates", multiple=True, metavar="PATH", help="What the model trained on.")
@click.option("--held-out", multiple=True, metavar="PATH", help="Pairs like these, not trained on.")
@click.option("--reference", metavar="CHECKPOINT", help="One that has not seen the candidates.")
@click.option("--run", "run_out", metavar="OUT", help="Finished run that judged the candidates.")
@click.option("--output", "-o", "out", metavar="DIR", help="Folder for table and page.")
@click.option(
    "--limit", type=click.IntRange(2),
    help="Candidates, and held-out pairs, drawn at most; default: 10000.",
)  # fmt: skip
@click.option("--seed", type=int, help="Draws these; default: 0.")
@click.option(
    "--search/--no-search",
    default=True,
    help="Look for copies among all candidates, and test deja vu.",
)
@click.option("--drop-overlap", is_flag=True, help="Leave out held-out pairs that were trained on.")
@click.option("--max-memorization", type=float, callback=_finite, help="Exit 3 above this mean.")
@click.option("--max-harmful", type=click.FloatRange(0, 1), callback=_finite,
              help="Exit 3 above this share memorized and wrong.")  # fmt: skip
@click.option("--track", type=click.Choice(["mlflow", "wandb"]), help="Log figures to a tracker.")
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

    CHECKPOINT is a file (safetensors, or a state dict of torch.save), a quoted pattern, the name
    open_clip:MODEL/PRETRAINED of published weights, or a folder of embeddings: candidates/NAME.npy
    and held_out/NAME.npy for each modality. Several give the curve over training. Exit code 3: a
    limit was exceeded.
    """
    from curate.audit import auditing, sources
    from curate.audit.tracking import track_series
    from curate.engine.progress import make_progress
    from curate.engine.tracking import check_tracker
    from curate.report.audit_words import describe_audit

    if track:
        check_tracker(track)
    request = sources.Request(
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


@main.command(epilog=_OUT)
@click.argument("out")
@click.option("--grid", metavar="FILE", help="YAML list of settings; default: rates of mismatch.")
@click.option(
    "--model", type=click.Choice(["small", "large", "larger", "heads"]), default="small",
    show_default=True,
    help="CLIPs end to end on thumbnails (larger: for a GPU), or heads over the run's vectors: "
    "faster.",
)  # fmt: skip
@click.option("--labels", metavar="FILE", help="Table of uid and label, for zero-shot accuracy.")
@click.option(
    "--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), callback=_finite,
    default=0.15, show_default=True,
    help="Share of the clusters held out to judge, others by each seed.",
)  # fmt: skip
@click.option(
    "--held-out-list", metavar="FILE", help="Table of uid: the pairs that judge all seeds."
)
@click.option(
    "--limit", type=click.IntRange(1), default=20_000, show_default=True,
    help="Samples that are trained on or held out at most.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(2, 1000), default=3, show_default=True,
              help="Students per setting at most.")  # fmt: skip
@click.option("--epochs", type=click.FloatRange(0, 1000, min_open=True), callback=_finite,
              help="Passes over the data that a student's steps amount to; default: 12, of heads "
              "6.")  # fmt: skip
@click.option("--weighted", is_flag=True, help="Draw samples by their weights while training.")
@click.option("--controls/--no-controls", default=True,
              help="Random and cosine-filtered sets of each size.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Draws samples and held-out pairs.")
@click.option("--plan", is_flag=True, help="Only say how many students, and how long they take.")
@_cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def ablate(
    out: str,
    workers: int | None,
    scheduler: str | None,
    cluster_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find out how hard to filter the data of a finished run.

    Small models are trained on what each setting would keep, all for as many steps, and judged by
    held-out pairs. --grid lists settings such as `- {select.max_mismatch_rate: 0.05}`: fields of
    select, dedup.min_cosine (stricter), load.weighted, and mitigation.noise, captions or text_mask.
    """
    from curate.ablate import ablating
    from curate.engine.progress import make_progress
    from curate.engine.workers import Workers
    from curate.report.ablate_words import describe_ablation

    given = click.get_current_context().get_parameter_source("held_out")
    if options["held_out_list"] and given is not ParameterSource.DEFAULT:
        raise ConfigError("--held-out and --held-out-list: must not be combined. Give one of them.")
    request = ablating.Request(out, **options)
    cluster = _cluster(workers, scheduler, cluster_file)
    imports = ablating.imports_of(request.model)
    with Workers(cluster, out, imports) as pool, make_progress() as progress:
        report = ablating.ablate(request, pool, progress)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif request.plan:
        click.echo(ablating.describe_cost(report["plan"]))
    else:
        click.echo(describe_ablation(report, ablating.page_of(out)))


@main.command(epilog=_OUT)
@click.argument("out")
def clean(out: str) -> None:
    """Remove stage folders that the last run does not use."""
    from curate.engine import runner
    from curate.engine.finished import read_finished, read_run
    from curate.report.text import tell_count

    if read_run(out) is None:
        read_finished(out)  # the lock would make what is not there
    with runner.lock_output(out):
        removed = runner.clean(out)
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"{tell_count(len(removed), 'folder')} removed")


def _load(
    pipeline: str, inputs: tuple[str, ...], settings: tuple[str, ...], limit: int | None
) -> Any:
    from curate.config import parse_setting
    from curate.engine.session import load_request

    return load_request(pipeline, inputs, [parse_setting(text) for text in settings], limit)


def _cluster(workers: int | None, scheduler: str | None, cluster_file: str | None) -> Any:
    from curate.engine.session import choose_cluster

    return choose_cluster(workers, scheduler, cluster_file)


def _carry_out(loaded: Any, out: str, cluster: Any, tracker: str | None = None) -> dict[str, Any]:
    from curate.engine.session import carry_out

    return carry_out(loaded, out, cluster, tracker)


def _print_result(summary: dict[str, Any], out: str, as_json: bool) -> None:
    from curate.engine.session import check_kept

    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        from curate.engine.summary import describe_run

        click.echo(describe_run(summary, out))
    check_kept(summary, out)
