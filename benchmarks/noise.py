"""What kinds of noise do the scores see? `python -m benchmarks.noise OUT TRUTH`.

Plants one kind at a time, in memory, among the clean pairs of a finished run, runs the score stage
on the result, and prints one JSON line per kind: how well `mismatch_probability` tells the planted
pairs from the rest, how many of either it puts above one half, and how well low
`caption_information` does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.corpora import DEFAULT_CACHE
from benchmarks.emoji import emoji_names, plain_code
from benchmarks.mismatch import calibration_error
from benchmarks.parts import split_parts
from benchmarks.planting import CLEAN
from benchmarks.titles import by_title
from benchmarks.trial import Corpus, embed_captions, embed_pictures, read_corpus, run_score
from curate.memorization.folds import hash_unit
from curate.memorization.mismatch import normalise_caption
from curate.stages.score import Score
from curate.stages.select import mismatch_limit

__all__ = ["KINDS", "plant", "translate"]

Array = np.ndarray[Any, Any]

_BOILERPLATE = (
    "Image courtesy of the photographer. All rights reserved.",
    "Click here to enlarge the picture",
    "Untitled document, last saved on Monday",
)
_SALES = "Order now in our online shop: best price, free shipping, thirty days to return it!"
_LANGUAGES = ("de", "es", "ja", "ru")
_BLOCK = 512
_PASSES = 50
#: What is asked of the kept, as in select.max_mismatch_rate.
_MAX_RATE = 0.02


def _differs(corpus: Corpus, row: int, others: Array) -> Array:
    """Tell which rows show something else, as far as names and captions tell: (M,) bool."""
    found = corpus.name_groups[others] != corpus.name_groups[row]
    found &= corpus.clusters[others] != corpus.clusters[row]
    found &= np.char.lower(corpus.captions[others]) != corpus.captions[row].lower()
    result: Array = found
    return result


def _given(corpus: Corpus, rows: Array, donors: Array) -> tuple[Corpus, Array]:
    rows, donors = rows[donors >= 0], donors[donors >= 0]
    return corpus.with_captions(rows, corpus.captions[donors], corpus.text[donors]), rows


def _permuted(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
    """Permute captions among the rows: none becomes more frequent, which would give it away.

    Rows for which nothing fits are left as they are.
    """
    donors = rng.permutation(rows)
    for _ in range(_PASSES):
        fixed = [
            at for at, row in enumerate(rows) if not _differs(corpus, row, donors[at : at + 1])[0]
        ]
        for at in fixed:
            other = int(rng.integers(len(rows)))
            donors[at], donors[other] = donors[other], donors[at]
    fits = [_differs(corpus, row, donors[at : at + 1])[0] for at, row in enumerate(rows)]
    return _given(corpus, rows, np.where(fits, donors, -1))


def _category(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
    """Permute captions within each category."""
    moved = []
    for category in np.unique(corpus.categories[rows]):
        part = rows[corpus.categories[rows] == category]
        corpus, changed = _permuted(corpus, part, rng)
        moved.append(changed)
    return corpus, np.concatenate(moved)


def _nearest(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
    """The caption of the most similar picture of something else."""
    donors = np.full(len(rows), -1)
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        order = np.argsort(-(corpus.image[part] @ corpus.image.T), axis=1)[:, :200]
        for place, row in enumerate(part):
            fitting = order[place][_differs(corpus, row, order[place])]
            if len(fitting):
                donors[start + place] = fitting[0]
    return _given(corpus, rows, donors)


def _reworded(change: Callable[[str, np.random.Generator], str]) -> Any:
    def spoil(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
        captions = [change(str(caption), rng) for caption in corpus.captions[rows]]
        same = [
            normalise_caption(a) == normalise_caption(str(b))
            for a, b in zip(captions, corpus.captions[rows], strict=True)
        ]
        rows = rows[~np.array(same)]
        captions = [caption for caption, equal in zip(captions, same, strict=True) if not equal]
        return corpus.with_captions(rows, np.array(captions), embed_captions(captions)), rows

    return spoil


def _one_word(caption: str, rng: np.random.Generator) -> str:
    words = [word.strip(".,:;()") for word in caption.split()]
    long = [word for word in words if len(word) > 2] or words
    return str(rng.choice(long))


def _garbled(caption: str, rng: np.random.Generator) -> str:
    return "".join(rng.permutation(list(caption))).strip() or "."


def _retitled(longest: int) -> Any:
    """Series of up to so many pictures of a category get the title of another; tags stay."""

    def spoil(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
        given: dict[int, str] = {}
        for category in np.unique(corpus.categories[rows]):
            waiting = rng.permutation(rows[corpus.categories[rows] == category])
            others = np.setdiff1d(np.flatnonzero(corpus.categories == category), rows)
            while len(waiting) and len(others):
                size = int(rng.integers(1, longest + 1))
                series, waiting = waiting[:size], waiting[size:]
                donor = int(rng.choice(others))
                title = split_parts(str(corpus.captions[donor]))[0]
                for row in series[_differs(corpus, donor, series)].tolist():
                    first, *rest = split_parts(str(corpus.captions[row]))
                    if rest and normalise_caption(first) != normalise_caption(title):
                        given[row] = f"{title}. {', '.join(rest)}"
        captions = list(given.values())
        changed = np.array(list(given), np.int64)
        return corpus.with_captions(changed, np.array(captions), embed_captions(captions)), changed

    return spoil


def _points(corpus: Corpus) -> Array:
    """Which emoji each picture shows: (N,) str."""
    return np.array([plain_code(Path(source).stem) for source in corpus.sources.tolist()])


def _names(languages: Sequence[str]) -> list[dict[str, str]]:
    return [emoji_names(DEFAULT_CACHE.expanduser(), language) for language in languages]


def translate(corpus: Corpus, languages: Sequence[str]) -> Corpus:
    """Give emoji their names in one of several languages each, drawn by hash, evenly.

    Parameters
    ----------
    corpus : Corpus
        Of emoji with English names.
    languages : sequence of str
        Of `emoji_names`.

    Returns
    -------
    Corpus
        With `languages`; an emoji without a name in the one that was drawn has its own.
    """
    draws = hash_unit(corpus.uids.tolist(), 0, "language") * len(languages)
    names, points = _names(languages), _points(corpus)
    spoken = np.full(len(corpus), "en", "U5")
    given: dict[int, str] = {}
    for row, place in enumerate(draws.astype(int).tolist()):
        name = names[place].get(points[row])
        if languages[place] != "en" and name:
            given[row], spoken[row] = name, languages[place]
    rows, captions = np.array(list(given), np.int64), list(given.values())
    changed = corpus.with_captions(rows, np.array(captions), embed_captions(captions))
    return replace(changed, languages=spoken)


def _translated(swapped: bool) -> Any:
    """An emoji's own name, or another's, in another language."""

    def spoil(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
        names, points = _names(_LANGUAGES), _points(corpus)
        given: dict[int, str] = {}
        for row in rows.tolist():
            others = rng.permutation(rows)
            donor = int(others[_differs(corpus, row, others)][0]) if swapped else row
            name = names[rng.integers(len(names))].get(points[donor])
            if name and normalise_caption(name) != normalise_caption(str(corpus.captions[donor])):
                given[row] = name
        captions, changed = list(given.values()), np.array(list(given), np.int64)
        return corpus.with_captions(changed, np.array(captions), embed_captions(captions)), changed

    return spoil


def _pictured(make: Callable[[np.random.Generator], Image.Image]) -> Any:
    def spoil(corpus: Corpus, rows: Array, rng: np.random.Generator) -> tuple[Corpus, Array]:
        return corpus.with_pictures(rows, embed_pictures([make(rng) for _ in rows])), rows

    return spoil


def _noise_picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8))


def _one_colour(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (128, 128), tuple(rng.integers(0, 256, 3).tolist()))


Spoil = Callable[[Corpus, Array, np.random.Generator], tuple[Corpus, Array]]

KINDS: dict[str, Spoil] = {
    "swap": _permuted,
    "category": _category,
    "nearest": _nearest,
    "boilerplate": _reworded(lambda _, rng: str(rng.choice(_BOILERPLATE))),
    "one_word": _reworded(_one_word),
    "first_third": _reworded(lambda caption, _: caption[: max(3, len(caption) // 3)]),
    "garbled": _reworded(_garbled),
    "title": _retitled(1),
    "series": _retitled(24),
    "sales": _reworded(lambda caption, _: f"{caption}. {_SALES}"),
    "language": _translated(swapped=False),
    "language_swap": _translated(swapped=True),
    "noise_picture": _pictured(_noise_picture),
    "one_colour": _pictured(_one_colour),
}


def plant(
    corpus: Corpus, kind: str, share: float, seed: int, twins: bool = False
) -> tuple[Corpus, Array]:
    """Spoil some rows in one way.

    Parameters
    ----------
    corpus : Corpus
    kind : str
        One of `KINDS`.
    share : float
        Of the rows.
    seed : int
    twins : bool
        Give what a row is given to all rows of its cluster.

    Returns
    -------
    corpus : Corpus
    planted : (N,) bool
    """
    rng = np.random.default_rng((seed, *kind.encode()))
    rows = np.sort(rng.permutation(len(corpus))[: round(share * len(corpus))])
    if twins:
        _, first = np.unique(corpus.clusters[rows], return_index=True)
        rows = rows[first]
    spoilt, rows = KINDS[kind](corpus, rows, rng)
    planted = np.zeros(len(corpus), bool)
    planted[rows] = True
    if twins:
        order = {str(corpus.clusters[row]): row for row in rows}
        every = np.array([order.get(str(name), -1) for name in corpus.clusters])
        rest = np.flatnonzero((every >= 0) & ~planted)
        given = every[rest]
        spoilt = spoilt.with_captions(rest, spoilt.captions[given], spoilt.text[given])
        planted[rest] = True
    return spoilt, planted


def judge(values: Array, information: Array, planted: Array, captions: Array) -> dict[str, Any]:
    """Compare scores with what was planted.

    `information_auroc` compares with pairs whose caption nobody else has: corpora come with
    boilerplate of their own.
    """
    known = np.isfinite(values)
    limit = mismatch_limit(values, _MAX_RATE)[0]
    report = {
        "planted": int(planted.sum()),
        "auroc": _auroc(planted[known], values[known]),
        "planted_above_half": _share(values[planted & known] >= 0.5),
        "rest_above_half": _share(values[~planted & known] >= 0.5),
        "mean_probability": _share(values[known]),
        "calibration_error": round(calibration_error(values[known], planted[known]), 4),
        "left_of_2_percent": _share(planted[values <= limit]),
        "kept": _share(values <= limit),
    }
    _, codes, counts = np.unique(np.char.lower(captions), return_inverse=True, return_counts=True)
    asked = known & (planted | (counts[codes] == 1))
    report["information_auroc"] = _auroc(planted[asked], -information[asked])
    return report


def _auroc(planted: Array, values: Array) -> float:
    return round(float(roc_auc_score(planted, values)), 4)


def _share(values: Array) -> float:
    return round(float(values.mean()), 4)


@click.command()
@click.argument("out")
@click.argument("truth")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(tuple(KINDS)), help="Only these.")
@click.option("--share", default=0.03, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--as-is", is_flag=True, help="All rows instead of one of each cluster.")
@click.option("--twins", is_flag=True, help="A row's duplicates are spoilt alike.")
@click.option("--titles", is_flag=True, help="Judge captions by their titles alone.")
def main(
    out: str,
    truth: str,
    kinds: tuple[str, ...],
    share: float,
    seed: int,
    as_is: bool,
    twins: bool,
    titles: bool,
) -> None:
    """Measure on the clean pairs of the run in OUT, whose planted truth is TRUTH."""
    corpus = read_corpus(out, truth)
    corpus = corpus.take(np.flatnonzero(corpus.kinds == CLEAN))
    corpus = corpus if as_is else corpus.one_per_cluster()
    for kind in kinds or tuple(KINDS):
        spoilt, planted = plant(corpus, kind, share, seed, twins)
        spoilt = by_title(spoilt) if titles else spoilt
        scored = run_score(spoilt, Score(seed=seed))
        probability = scored.columns["mismatch_probability"]
        information = scored.columns["caption_information"]
        found = judge(probability, information, planted, spoilt.captions)
        click.echo(json.dumps({"kind": kind, "share": share, "pairs": len(corpus), **found}))


if __name__ == "__main__":
    main()
