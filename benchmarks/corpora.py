"""Builds real image-text corpora with planted defects: `python -m benchmarks.corpora --help`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from random import Random
from typing import Any

import click

from benchmarks.emoji import emoji_pairs
from benchmarks.gimp_help import gimp_help_pairs
from benchmarks.images import Encoding
from benchmarks.planting import Shares, plan
from benchmarks.screening import choose_distinct
from benchmarks.shards import write_corpus
from benchmarks.sources import Pair, fetch_openclipart, openclipart_pairs

DEFAULT_CACHE = Path("~/.cache/curate-corpora")
BUNDLED_SAMPLE = Path(__file__).resolve().parents[1] / "curate" / "sample"

SAMPLE_PAIRS = 930
SAMPLE_SHARES = Shares(
    swaps=0.11,
    exact_twins=0.04,
    near_twins=0.04,
    undecodable=0.04,
    truncated=0.04,
    empty_captions=0.04,
)
# A tar spends 3 KiB on each sample besides its image; this keeps the whole sample below 6 MB.
SAMPLE_ENCODING = Encoding(longest_side=128, quality=80)
SAMPLE_SAMPLES_PER_SHARD = 256

_Command = Callable[..., None]
_SHARE = click.FloatRange(0, 1)

_CACHE_OPTION = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_CACHE,
    show_default=True,
    help="Folder that keeps the downloaded packages.",
)
_SEED_OPTION = click.option("--seed", type=int, default=0, show_default=True)
_OUTPUT = click.Path(file_okay=False, path_type=Path)

_CORPUS_OPTIONS = [
    click.option("--output", type=_OUTPUT, required=True, help="Folder for shards and truth."),
    _CACHE_OPTION,
    _SEED_OPTION,
    click.option("--pairs", type=click.IntRange(1), help="Take a random subset of this size."),
    click.option(
        "--longest-side",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Re-encode as JPEG, resized down to this; 0 keeps the original files.",
    ),
    click.option("--samples-per-shard", type=click.IntRange(1), default=1000, show_default=True),
    click.option("--swaps", type=_SHARE, default=0.0, help="Share given a wrong caption."),
    click.option("--exact-twins", type=_SHARE, default=0.0, help="Share repeated as it is."),
    click.option("--near-twins", type=_SHARE, default=0.0, help="Share repeated, altered."),
    click.option("--undecodable", type=_SHARE, default=0.0, help="Share made of random bytes."),
    click.option("--truncated", type=_SHARE, default=0.0, help="Share cut short."),
    click.option("--empty-captions", type=_SHARE, default=0.0, help="Share without caption."),
]


def _corpus_options(command: _Command) -> _Command:
    return reduce(lambda done, option: option(done), reversed(_CORPUS_OPTIONS), command)


def build(
    pairs: Sequence[Pair],
    output: Path,
    shares: Shares,
    encoding: Encoding,
    seed: int = 0,
    samples_per_shard: int = 1000,
) -> dict[str, Any]:
    """Plant defects in a corpus and write it.

    Parameters
    ----------
    pairs
        The originals.
    output
        Folder for `shards` and `truth.parquet`.
    shares
        How much to plant.
    encoding
        How originals are stored.
    seed
        Decides everything that is random; the same seed gives the same bytes.
    samples_per_shard
        The number of samples in a full shard.

    Returns
    -------
    dict
        Counts per kind, the numbers of originals and of samples, bytes and seconds.
    """
    start = time.perf_counter()
    written = write_corpus(plan(pairs, shares, seed), output, encoding, seed, samples_per_shard)
    seconds = round(time.perf_counter() - start, 2)
    return {"originals": len(pairs), **written, "seconds": seconds}


def _build_from_options(
    pairs: list[Pair],
    *,
    pairs_wanted: int | None,
    output: Path,
    seed: int,
    longest_side: int,
    samples_per_shard: int,
    **shares: float,
) -> None:
    if pairs_wanted is not None and pairs_wanted < len(pairs):
        subset = Random(f"pairs:{seed}").sample(range(len(pairs)), pairs_wanted)
        pairs = [pairs[index] for index in sorted(subset)]
    try:
        encoding = Encoding(longest_side=longest_side)
        report = build(pairs, output, Shares(**shares), encoding, seed, samples_per_shard)
    except (ValueError, FileExistsError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(report))


@click.group()
def main() -> None:
    """Build real image-text corpora with planted defects."""


@main.command()
@_corpus_options
def openclipart(cache: Path, pairs: int | None, **options: Any) -> None:
    """Build a corpus of clip art captioned by its authors."""
    found = openclipart_pairs(fetch_openclipart(cache.expanduser()))
    _build_from_options(found, pairs_wanted=pairs, **options)


@main.command()
@_corpus_options
def emoji(cache: Path, pairs: int | None, **options: Any) -> None:
    """Build a corpus of emoji captioned by their names."""
    _build_from_options(emoji_pairs(cache.expanduser()), pairs_wanted=pairs, **options)


@main.command()
@_corpus_options
@click.option(
    "--language",
    "languages",
    multiple=True,
    default=("en",),
    show_default=True,
    help="Language as the package gimp-help-LANGUAGE spells it; repeat for several.",
)
def gimp_help(cache: Path, pairs: int | None, languages: tuple[str, ...], **options: Any) -> None:
    """Build a corpus of the pictures in GIMP's manuals, captioned by their alt texts."""
    try:
        found = gimp_help_pairs(cache.expanduser(), languages)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise click.ClickException(str(error)) from error
    _build_from_options(found, pairs_wanted=pairs, **options)


@main.command()
@click.option(
    "--output",
    type=_OUTPUT,
    default=BUNDLED_SAMPLE,
    help="Folder for shards and truth, by default that of the bundled sample.",
)
@_CACHE_OPTION
@_SEED_OPTION
def sample(output: Path, cache: Path, seed: int) -> None:
    """Build the small openclipart sample that the package bundles."""
    start = time.perf_counter()
    found = openclipart_pairs(fetch_openclipart(cache.expanduser()))
    chosen = choose_distinct(found, SAMPLE_PAIRS, seed)
    try:
        report = build(
            chosen, output, SAMPLE_SHARES, SAMPLE_ENCODING, seed, SAMPLE_SAMPLES_PER_SHARD
        )
    except FileExistsError as error:
        raise click.ClickException(str(error)) from error
    report["seconds"] = round(time.perf_counter() - start, 2)
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
