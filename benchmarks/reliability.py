"""How reliable are memorization scores of few proxies? `python -m benchmarks.reliability OUT WORK`.

Ground truth is the score of many proxies of 64 px trained end to end on random halves of the
clusters of a finished run's pairs. Against it stand eight more of them, the score stage's own
design (more and smaller ones, which take as long), and heads over the frozen vectors; each as it
is and with the chance of its company taken off, as the stage does. No proxy serves both sides.
Every proxy's result is kept in WORK, so that a run that was stopped goes on; `--part` shares the
work among processes. Prints one JSON line.

References: Feldman and Zhang (arXiv:2008.03703), section 2: the subset-sampling estimator.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from benchmarks.signature import read_pair_vectors, read_pairs
from curate import storage
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.company import Company, adjust_values, fit_slopes, regression_sums
from curate.memorization.folds import draw_halves, draw_masks, hash_unit
from curate.memorization.mismatch import normalise_caption
from curate.memorization.verdict import coherence, mean_of_others, measure_memorization
from curate.models.clip_proxy import (
    ClipShape,
    choose_words,
    embed_views,
    fold_tokens,
    tokenize,
)
from curate.models.precision import pick_device, pick_dtype
from curate.models.proxy import HeadsShape, embed_pairs
from curate.models.train import Recipe, fit_front, train_heads
from curate.models.train_clip import ClipRecipe, train_clip
from curate.stages.score import Score
from curate.stages.score_clips import CLIP_SHAPE, place_pairs

Array = np.ndarray[Any, Any]

_IMAGE_PX = 64
_HELD_OUT = 1000
#: Proxies of 64 px that take as long as those of the stage.
FEW = 8
_FRONT_WIDTH = 256
_TOP_SHARE = 0.1


@dataclass(frozen=True)
class Data:
    """The pairs, as all proxies see them.

    Parameters
    ----------
    clusters, captions : list of str, length N
    pixels : (N, 3, S, S) uint8
    tokens : (N, L) int32
    words : int
        Of the vocabulary.
    vectors : ((N, D) float32, (N, E) float32)
    """

    clusters: list[str]
    captions: list[str]
    pixels: Array
    tokens: Array
    words: int
    vectors: tuple[Array, Array]

    @property
    def codes(self) -> Array:
        """(N, 2) int64: pairs that share an entry of a column are not each other's negatives."""
        columns = (self.clusters, self.captions)
        codes = [np.unique(column, return_inverse=True)[1] for column in columns]
        return np.stack(codes, axis=1).astype(np.int64)


@dataclass(frozen=True)
class Design:
    """Proxies whose values make one score.

    Parameters
    ----------
    name : str
    masks : (N, P) bool
        Columns 2m and 2m + 1 are complements.
    fit : callable
        Values of all pairs under a proxy, (N,) float64, of what it trains on, (N,) bool, and its
        seed.
    """

    name: str
    masks: Array
    fit: Callable[[Array, int], Array]

    def seed(self, proxy: int) -> int:
        """Return a seed that no other proxy has."""
        return int(hash_unit([f"{self.name} {proxy}"], 0, "reliability")[0] * 2**31)


def read_data(out: Path, limit: int) -> Data:
    """Read the first pairs by hash of a run that has vectors and thumbnails."""
    table = read_pairs(out, limit)
    tokens = tokenize(table["caption"].to_pylist())
    words = choose_words(Counter(tokens.ravel().tolist()))
    return Data(
        table["cluster_id"].to_pylist(),
        [normalise_caption(caption) for caption in table["caption"].to_pylist()],
        np.stack([read_square(data, _IMAGE_PX) for data in table["thumbnail"].to_pylist()]),
        fold_tokens(tokens, words),
        len(words),
        read_pair_vectors(out, table["uid"].to_pylist()),
    )


def shrink(data: Data, side_px: int) -> Data:
    """The same pairs with smaller pictures."""
    times = _IMAGE_PX // side_px
    parts = data.pixels.reshape(len(data.pixels), 3, side_px, times, side_px, times)
    return replace(data, pixels=parts.mean((3, 5)).round().astype(np.uint8))


def adjust(vectors: Array, clusters: Array, values: Array, masks: Array) -> Array:
    """Take off what a proxy's company did by chance, as the stage does: (N, P) float64.

    `vectors` (N, D) and `clusters` (N,) tell who is whose neighbour, see `Company`.
    """
    shares = Company(vectors, clusters, masks).shares(vectors, clusters)
    slopes = fit_slopes(regression_sums(values, masks, shares))
    return adjust_values(values, masks, shares, slopes)


def clip_fit(data: Data, shape: ClipShape, recipe: ClipRecipe, views: int) -> Any:
    """Return a `Design.fit` by proxies trained end to end."""

    def fit(inside: Array, seed: int) -> Array:
        trained = train_clip(
            shape,
            data.pixels[inside],
            data.tokens[inside],
            data.codes[inside],
            recipe,
            seed,
            pick_device(),
        )
        both = embed_views(trained.model, data.pixels, data.tokens, views, recipe.dtype)
        return _coherence(*both, inside, data.codes[:, 0])

    return fit


def heads_fit(data: Data) -> Any:
    """Return a `Design.fit` by heads over the frozen vectors."""
    fronts = tuple(fit_front(part, _FRONT_WIDTH) for part in data.vectors)
    shape = HeadsShape(
        data.vectors[0].shape[1],
        data.vectors[1].shape[1],
        fronts[0][1].shape[1],
        fronts[1][1].shape[1],
    )

    def fit(inside: Array, seed: int) -> Array:
        pair = (data.vectors[0][inside], data.vectors[1][inside])
        front = (fronts[0], fronts[1])
        trained = train_heads(shape, front, pair, data.codes[inside], Recipe(), seed)
        image, text = (
            part.astype(np.float32) for part in embed_pairs(trained.heads, *data.vectors)
        )
        return _coherence(image, text, (image * text).sum(1), inside, data.codes[:, 0])

    return fit


def _coherence(
    image: Array, text: Array, alignment: Array, inside: Array, clusters: Array
) -> Array:
    held = np.flatnonzero(~inside)[:_HELD_OUT]
    others = mean_of_others(image[held] + text[held], clusters[held], clusters)
    return coherence(alignment, image, text, others)


def run(design: Design, work: Path, part: tuple[int, int]) -> None:
    """Fit the design's proxies that are missing in `work` and of this part."""
    for proxy in range(design.masks.shape[1]):
        path = work / f"{design.name}-{proxy}.npy"
        if proxy % part[1] == part[0] and not path.exists():
            begun = time.monotonic()
            values = design.fit(design.masks[:, proxy], design.seed(proxy))
            storage.commit_array(str(path), values)
            click.echo(f"{path.stem}: {time.monotonic() - begun:.0f} s", err=True)


Change = Callable[[Array, Array], Array]


def load(
    design: Design, work: Path, proxies: slice | None = None, change: Change | None = None
) -> tuple[Array, Array]:
    """Return the score of some of a design's proxies and its values as (N, P).

    `change` makes other values of values and masks.
    """
    chosen = list(range(design.masks.shape[1]))[proxies or slice(None)]
    values = np.stack([np.load(work / f"{design.name}-{p}.npy") for p in chosen], axis=1)
    masks = design.masks[:, chosen]
    values = values if change is None else change(values, masks)
    return measure_memorization(values, masks)[0], values


def compare(score: Array, truth: Array) -> dict[str, float]:
    """Spearman correlation with ground truth, overall and among its top tenth."""
    top = truth >= np.quantile(truth, 1 - _TOP_SHARE)
    picked = score >= np.quantile(score, 1 - _TOP_SHARE)
    return {
        "spearman": round(float(spearmanr(score, truth)[0]), 4),
        "spearman_top": round(float(spearmanr(score[top], truth[top])[0]), 4),
        "top_shared": round(float((top & picked).sum() / top.sum()), 4),
    }


def split_half(design: Design, work: Path, change: Change | None = None) -> dict[str, float]:
    """Correlation of the scores of two halves of the proxies, and what it says of all of them.

    References
    ----------
    Spearman 1910, Brown 1910: a score of twice as many proxies has reliability 2 r / (1 + r).
    """
    count = design.masks.shape[1] // 2 // 2 * 2
    halves = (slice(None, count), slice(count, 2 * count))
    first, second = (load(design, work, half, change)[0] for half in halves)
    rank = float(spearmanr(first, second)[0])
    return {"split_half": round(rank, 4), "reliability": round(2 * rank / (1 + rank), 4)}


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--limit", default=3000, show_default=True, help="Pairs used.")
@click.option("--truth-proxies", default=64, show_default=True)
@click.option("--epochs", default=ClipRecipe().epochs, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--part", type=(int, int), default=(0, 1), help="Which share of the proxies to fit.")
def main(
    out: Path,
    work: Path,
    limit: int,
    truth_proxies: int,
    epochs: int,
    views: int,
    part: tuple[int, int],
) -> None:
    """Measure on the pairs of OUT, a finished run."""
    keep_freed_memory()
    data = read_data(out, limit)
    recipe = ClipRecipe(epochs=epochs, dtype=pick_dtype(pick_device()))
    clip = clip_fit(data, ClipShape(data.words, image_px=_IMAGE_PX), recipe, views)
    small = shrink(data, CLIP_SHAPE["image_px"])
    stage = clip_fit(small, ClipShape(data.words, **CLIP_SHAPE), recipe, views)
    heads = heads_fit(data)
    halves = draw_halves(data.clusters, truth_proxies, 0)
    designs = [
        Design("few", draw_masks(data.clusters, FEW, 0), clip),
        Design("stage", draw_halves(data.clusters, Score().clip_proxies, 1), stage),
        Design("truth", halves, clip),
        Design("heads", draw_masks(data.clusters, FEW, 0), heads),
        Design("heads-truth", halves, heads),
    ]
    work.mkdir(parents=True, exist_ok=True)
    for design in designs:
        run(design, work, part)
    if part[1] > 1:
        return
    by_name = {design.name: design for design in designs}
    truth, _ = load(by_name["truth"], work)
    report: dict[str, Any] = {
        "pairs": len(data.clusters),
        "clusters": len(set(data.clusters)),
        "epochs": epochs,
        "truth_proxies": truth_proxies,
        "truth": split_half(by_name["truth"], work),
    }
    fronts = [fit_front(part, _FRONT_WIDTH) for part in data.vectors]
    change = partial(adjust, place_pairs(*data.vectors, fronts), data.codes[:, 0])
    for name in ("few", "stage", "heads", "heads-truth"):
        design = by_name[name]
        for label, way in ((name, None), (f"{name}, adjusted", change)):
            score, _ = load(design, work, change=way)
            report[label] = {**compare(score, truth), **split_half(design, work, way)}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
