"""How much does a better encoder help? `python -m benchmarks.strength OUT TRUTH`.

Half of the clusters of a finished run's pairs, one pair of each, train small CLIPs of three
lengths. In the other half captions are swapped and every score is computed over the vectors of the
packaged towers, of these CLIPs, and of one that was trained on the very pairs that are scored,
swaps and all. Prints one JSON line; `--table` prints the same for people to read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.memorization import (
    apply_methods,
    judge_removal,
    mean_of,
    rare_rows,
    score_planting,
    spoil,
)
from benchmarks.methods import METHODS
from benchmarks.planting import CLEAN
from benchmarks.tradeoff import find_words, make_data, read_pixels
from benchmarks.trial import Corpus, read_corpus
from curate.engine.workers import keep_freed_memory
from curate.memorization.folds import hash_unit
from curate.models.clip_proxy import ClipShape, embed_views
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe, train_clip
from curate.stages.score import Score

Array = np.ndarray[Any, Any]
Encode = Callable[[Corpus], Corpus]

PACKAGED, SCORED = "packaged towers", "trained on the scored pairs"
#: The CLIP-score filter, where an encoder has one space.
OWN_COSINE = "the encoder's cosine"
_BATCH = 64
_FIGURES = ("auroc", "precision", "rare_lost", "common_lost")


def train_encoder(out: Path, corpus: Corpus, epochs: int, seed: int) -> Encode:
    """Train a small CLIP on pairs, and return what shows others through it."""
    words = find_words(corpus)
    shape = ClipShape(len(words))
    recipe = ClipRecipe(epochs, _BATCH, dtype=pick_dtype(pick_device()))
    data = make_data(corpus, read_pixels(out, corpus.uids, shape.image_px), words)
    model = train_clip(
        shape, data.pixels, data.tokens, data.codes, recipe, seed, pick_device()
    ).model

    def encode(pairs: Corpus) -> Corpus:
        seen = make_data(pairs, read_pixels(out, pairs.uids, shape.image_px), words)
        image, text, _ = embed_views(model, seen.pixels, seen.tokens, 1, recipe.dtype)
        return pairs.with_vectors(image, text)

    return encode


def judge(pairs: Corpus, planted: Array, classes: Array, rare: Array, seed: int) -> dict[str, Any]:
    """Remove by every method what the pairs' vectors let it see."""
    values = apply_methods(score_planting(pairs, planted, classes, Score(seed=seed)))
    if pairs.shared:
        values[OWN_COSINE] = -(pairs.image * pairs.text).sum(1)
    return {name: judge_removal(badness, planted, rare) for name, badness in values.items()}


def measure(
    out: Path, corpus: Corpus, lengths: tuple[int, ...], share: float, seed: int
) -> dict[str, Any]:
    """Return figures by encoder and method.

    Parameters
    ----------
    out : Path
        The run that has the pairs' thumbnails.
    corpus : Corpus
        Over the packaged towers' vectors.
    lengths : tuple of int
        Epochs of encoders trained on disjoint pairs; the longest also on the scored ones.
    share : float
        Of captions swapped.
    seed : int
    """
    # Rarity is one for all encoders, or they would be judged by different samples.
    rare = rare_rows(corpus)
    scored = hash_unit(corpus.clusters.tolist(), seed, "strength") < 0.5
    elsewhere, clean = corpus.take(np.flatnonzero(~scored)), corpus.take(np.flatnonzero(scored))
    spoilt, planted, given = spoil(clean, "swap", share, seed)
    seen = {PACKAGED: spoilt}
    for epochs in lengths:
        encode = train_encoder(out, elsewhere, epochs, seed)
        seen[f"{epochs} epochs on others"] = encode(spoilt)
    seen[SCORED] = train_encoder(out, spoilt, max(lengths), seed)(spoilt)
    return {name: judge(pairs, planted, given, rare[scored], seed) for name, pairs in seen.items()}


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over seeds, by encoder and method."""
    return {
        encoder: {
            method: {
                name: mean_of([result[encoder][method][name] for result in results])
                for name in _FIGURES
            }
            for method in results[0][encoder]
        }
        for encoder in results[0]
    }


def write_table(summary: dict[str, Any]) -> str:
    """Lay AUROC and precision out as a Markdown table."""
    lines = ["| removed by | " + " | ".join(summary) + " |", "|---" * (len(summary) + 1) + "|"]
    for method in (*METHODS, OWN_COSINE):
        cells = [
            f"{row[method]['auroc'][0]:.3f} / {row[method]['precision'][0]:.3f}"
            if method in row
            else "-"
            for row in summary.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("truth", type=click.Path(exists=True))
@click.option("--length", "lengths", multiple=True, default=(3, 10, 30), show_default=True)
@click.option("--share", default=0.2, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--table", is_flag=True, help="Print a table instead of one JSON line.")
def main(
    out: Path, truth: str, lengths: tuple[int, ...], share: float, seeds: int, table: bool
) -> None:
    """Measure on the clean pairs of the run in OUT, whose planted truth is TRUTH."""
    keep_freed_memory()
    corpus = read_corpus(str(out), truth)
    corpus = corpus.take(np.flatnonzero(corpus.kinds == CLEAN)).one_per_cluster()
    summary = summarize([measure(out, corpus, lengths, share, seed) for seed in range(seeds)])
    click.echo(write_table(summary) if table else json.dumps(summary))


if __name__ == "__main__":
    main()
