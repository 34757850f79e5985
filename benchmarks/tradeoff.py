"""The plot: what are kept shares worth? `python -m benchmarks.tradeoff OUT TRUTH WORK`.

Plants swapped captions in a finished run's pairs, one of each cluster, and keeps the share that
each score likes best. Small CLIPs are trained from first weights on what is kept, thumbnails and
tokens, all with the same number of pairs seen, and judged on clusters held out before. Each student
is a file in WORK, so that a run that was stopped goes on and `--part` shares the work among
processes. With `--language` emoji are named in several, and every figure is told for each besides.
Prints one JSON line; `--table` prints the same for people to read.
"""

import json
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks.memorization import Trial, mean_of, set_up
from benchmarks.methods import METHODS
from benchmarks.noise import KINDS, translate
from benchmarks.planting import CLEAN
from benchmarks.reliability import Data, clip_fit
from benchmarks.students import judge_vectors, spell_categories
from benchmarks.trial import Corpus, read_corpus
from curate import storage
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.folds import draw_masks
from curate.memorization.mismatch import normalise_caption
from curate.memorization.verdict import measure_memorization
from curate.models.clip_proxy import (
    ClipShape,
    choose_words,
    embed_texts,
    embed_views,
    fold_tokens,
    tokenize,
)
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe, train_clip
from curate.stages.score import Score

Array = np.ndarray[Any, Any]

#: Two sizes of students, at 32 px: at 64 one takes half again as long and finds .01 more.
SIZES = {
    "small": {"image_px": 32, "image_width": 16, "text_width": 64, "text_layers": 1},
    "large": {"image_px": 32, "image_width": 24, "text_width": 128, "text_layers": 2},
}
#: Under small CLIPs trained end to end with and without the pair.
MEMORIZATION = "CLIPMem"
#: The axis beside mismatch: what says least about its picture is removed first.
INFORMATION = "caption_information"
#: The lines of the plot, beside all pairs.
LINES = (
    "random",
    "in-sample cosine",
    "early-stopped cosine",
    "DFN-like",
    "negCLIPLoss",
    "LEMoN",
    MEMORIZATION,
    INFORMATION,
    "ours",
    "oracle",
)
_EVERYTHING = "nothing"
#: What of `KINDS` leaves the pictures alone, which students read from the run.
_CAPTION_KINDS = tuple(kind for kind in KINDS if kind not in ("noise_picture", "one_colour"))
_BATCH = 64
_PROXIES = 4


def read_pixels(out: Path, uids: Array, image_px: int) -> Array:
    """Return pictures of a finished run: (N, 3, S, S) uint8."""
    (folder,) = (out / "stages").glob("embed.thumbnails-*")
    table = pq.read_table(folder / "shards", columns=["uid", "thumbnail"])
    place = {uid: row for row, uid in enumerate(table["uid"].to_pylist())}
    pictures = table["thumbnail"]
    return np.stack([read_square(pictures[place[uid]].as_py(), image_px) for uid in uids.tolist()])


def find_words(corpus: Corpus) -> Array:
    """Choose the vocabulary of pairs that a small CLIP trains on: see `choose_words`."""
    return choose_words(Counter(tokenize(corpus.captions.tolist()).ravel().tolist()))


def make_data(corpus: Corpus, pixels: Array, words: Array) -> Data:
    """Give pairs what a small CLIP sees."""
    return Data(
        corpus.clusters.tolist(),
        [normalise_caption(caption) for caption in corpus.captions.tolist()],
        pixels,
        fold_tokens(tokenize(corpus.captions.tolist()), words),
        len(words),
        (corpus.image, corpus.text),
    )


class Bench:
    """One seed's planting: scores of all lines, and students trained on what they keep.

    Parameters
    ----------
    out : Path
        The finished run.
    corpus : Corpus
        Its clean pairs, one of each cluster.
    kind, share, seed
        Of the planting.
    size : str
        One of `SIZES`.
    epochs : int
        Of a student on all pairs.
    """

    def __init__(
        self, out: Path, corpus: Corpus, kind: str, share: float, seed: int, size: str, epochs: int
    ) -> None:
        self.seed, self.epochs = seed, epochs
        self.trial: Trial = set_up(corpus, kind, share, Score(seed=seed))
        self.recipe = ClipRecipe(epochs, _BATCH, dtype=pick_dtype(pick_device()))
        self.words = find_words(self.trial.planting.corpus)
        self.shape = ClipShape(len(self.words), **SIZES[size])
        self.data, self.held = (
            make_data(part, read_pixels(out, part.uids, self.shape.image_px), self.words)
            for part in (self.trial.planting.corpus, self.trial.held)
        )

    def score(self, line: str) -> Array:
        """Return what is removed first, highest: (N,) float64."""
        if line == _EVERYTHING:
            return np.zeros(len(self.data.clusters))
        if line == INFORMATION:
            return -self.trial.planting.column(INFORMATION)
        if line != MEMORIZATION:
            return np.nan_to_num(METHODS[line](self.trial.planting))
        inside = draw_masks(self.data.clusters, _PROXIES, self.seed)
        fit = clip_fit(self.data, self.shape, self.recipe, 1)
        values = [fit(inside[:, p], 1000 * (self.seed + 1) + p) for p in range(_PROXIES)]
        return measure_memorization(np.stack(values, axis=1), inside)[0]

    def student(self, badness: Array, kept: float) -> dict[str, float]:
        """Train on a share of the pairs, judge on the held-out ones."""
        count = round(kept * len(badness))
        rows = np.sort(np.argsort(badness, kind="stable")[:count])
        trained = train_clip(
            self.shape,
            self.data.pixels[rows],
            self.data.tokens[rows],
            self.data.codes[rows],
            ClipRecipe(round(self.epochs / kept), _BATCH, dtype=self.recipe.dtype),
            self.seed + 100,
            pick_device(),
        )
        spoken = fold_tokens(tokenize(spell_categories(self.trial.held)[1]), self.words)
        pixels, tokens, kind = self.held.pixels, self.held.tokens, self.recipe.dtype
        image, text, _ = embed_views(trained.model, pixels, tokens, 1, kind)
        named = embed_texts(trained.model, spoken, kind)
        figures = judge_vectors(image, text, named, self.trial.held, self.trial.held_rare)
        planted = self.trial.planting.planted
        for language, spoken_in in self.trial.planting.corpus.by_language().items():
            clean = ~planted & spoken_in
            figures[f"kept {language}"] = float(clean[rows].sum() / clean.sum())
        return {**figures, "planted": float(planted[rows].mean()), "loss": trained.losses[-1]}


def read_scores(bench: Bench, line: str, path: Path) -> Array:
    """Return a line's scores, computed once for all processes and shares."""
    if not path.exists():
        storage.commit_array(str(path), bench.score(line))
    values: Array = storage.read_array(str(path))
    return values


def summarize(results: dict[tuple[int, str, float], dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over seeds, by line and share kept.

    Returns
    -------
    dict
        Per figure `[mean, standard error]`; `gain`: in R@10 over training on everything, `behind`:
        to ours at the same share, both seed by seed; `rare_gain` and `caption_gain` as `gain`, on
        the rarest fifth and of `each_caption`. Of languages R@10, `gain`, and `kept`: the share of
        their clean pairs.
    """
    found: dict[str, Any] = {}
    for line, kept in sorted({key[1:] for key in results}, key=lambda key: (-key[1], key[0])):
        rows = {seed: row for (seed, *rest), row in results.items() if rest == [line, kept]}
        (first, *_) = rows.values()
        figures = {
            name: mean_of([row[name] for row in rows.values()]) for name in first if name != "loss"
        }
        languages = [name.removeprefix("kept ") for name in first if name.startswith("kept ")]
        for name, part, rival, sign in (
            ("gain", "all", (_EVERYTHING, 1.0), 1),
            ("rare_gain", "rare", (_EVERYTHING, 1.0), 1),
            ("caption_gain", "each_caption", (_EVERYTHING, 1.0), 1),
            ("behind", "all", ("ours", kept), -1),
            *((f"gain {one}", one, (_EVERYTHING, 1.0), 1) for one in languages),
        ):
            both = [(row, results.get((seed, *rival))) for seed, row in rows.items()]
            differences = [sign * (row[part] - other[part]) for row, other in both if other]
            if differences:
                figures[name] = mean_of(differences)
        found.setdefault(f"{kept:g}", {})[line] = {"seeds": len(rows), **figures}
    return found


_COLUMNS = (
    *("all", "rare", "rest", "each_caption", "zero_shot", "planted"),
    *("gain", "rare_gain", "caption_gain", "behind"),
)


def write_table(summary: dict[str, Any]) -> str:
    """Lay a summary out as a Markdown table."""
    told = {name for rows in summary.values() for row in rows.values() for name in row}
    columns = (*_COLUMNS, *sorted(told - {"seeds", *_COLUMNS}))
    lines = [
        "| kept | by | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for kept, rows in summary.items():
        for line, row in rows.items():
            cells = [f"{row[c][0]:.3f} ± {row[c][1]:.3f}" if c in row else "-" for c in columns]
            lines.append(f"| {kept} | {line} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("truth", type=click.Path(exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(_CAPTION_KINDS), default="swap", show_default=True)
@click.option("--share", default=0.2, show_default=True)
@click.option("--language", "languages", multiple=True, help="Of emoji's names; en are theirs.")
@click.option("--kept", multiple=True, type=float, default=(0.9, 0.8, 0.6), show_default=True)
@click.option("--line", "lines", multiple=True, type=click.Choice(LINES), default=LINES)
@click.option("--size", type=click.Choice(tuple(SIZES)), default="small", show_default=True)
@click.option("--epochs", default=12, show_default=True, help="Of a student on all pairs.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--part", type=(int, int), default=(0, 1), help="Which share of the students to do.")
@click.option("--table", is_flag=True, help="Print a table instead of one JSON line.")
def main(
    out: Path,
    truth: str,
    work: Path,
    kind: str,
    share: float,
    languages: tuple[str, ...],
    kept: tuple[float, ...],
    lines: tuple[str, ...],
    size: str,
    epochs: int,
    seeds: int,
    part: tuple[int, int],
    table: bool,
) -> None:
    """Measure on the clean pairs of the run in OUT, whose planted truth is TRUTH."""
    keep_freed_memory()
    corpus = read_corpus(str(out), truth)
    corpus = corpus.take(np.flatnonzero(corpus.kinds == CLEAN)).one_per_cluster()
    corpus = translate(corpus, languages) if languages else corpus
    setting = "-".join([size, str(epochs), kind, f"{share:g}", *languages])
    results: dict[tuple[int, str, float], dict[str, Any]] = {}
    # Processes begin at different seeds, so that one computes scores that another will find.
    order = np.roll(np.arange(seeds), -part[0] * seeds // part[1]).tolist()
    cells = [(_EVERYTHING, 1.0), *product(lines, kept)]
    for seed in order:
        name = f"{setting}-{seed}"
        paths = {cell: work / f"{name}-{cell[0]}-{cell[1]:g}.json" for cell in cells}
        mine = [cell for number, cell in enumerate(cells) if number % part[1] == part[0]]
        missing = [cell for cell in mine if not paths[cell].exists()]
        if missing:
            bench = Bench(out, corpus, kind, share, seed, size, epochs)
        for line, portion in missing:
            begun = time.monotonic()
            badness = read_scores(bench, line, work / f"{name}-{line}.npy")
            path = paths[line, portion]
            storage.commit_json(str(path), bench.student(badness, portion))
            click.echo(f"{path.stem}: {time.monotonic() - begun:.0f} s", err=True)
        for cell, path in paths.items():
            if path.exists():
                results[seed, *cell] = storage.read_json(str(path))
    summary = summarize(results)
    click.echo(write_table(summary) if table else json.dumps(summary))


if __name__ == "__main__":
    main()
