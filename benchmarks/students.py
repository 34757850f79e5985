"""Models trained on what a filter keeps, and how well they do on pairs that nothing touched."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.trial import Corpus, embed_captions
from curate.memorization.mismatch import normalise_caption
from curate.memorization.retrieval import hits_at
from curate.models.proxy import Heads, HeadsShape, embed_pairs
from curate.models.train import Front, Recipe, fit_front, train_heads

__all__ = [
    "fit_fronts",
    "judge_student",
    "judge_vectors",
    "spell_categories",
    "train_student",
]

Array = np.ndarray[Any, Any]

_FRONT_WIDTH = 256


def fit_fronts(corpus: Corpus) -> tuple[Front, Front]:
    """Fit what all students of a corpus see of either modality, which no pairing enters."""
    return fit_front(corpus.image, _FRONT_WIDTH), fit_front(corpus.text, _FRONT_WIDTH)


def train_student(
    corpus: Corpus,
    fronts: tuple[Front, Front],
    rows: Array,
    epochs: int,
    seed: int,
    observe: Callable[[Heads], None] | None = None,
) -> Heads:
    """Train heads over the frozen vectors of some pairs.

    Parameters
    ----------
    corpus : Corpus
    fronts : pair of Front
    rows : (M,) int
    epochs, seed : int
    observe : callable, optional
        Is shown the heads after every epoch.

    Returns
    -------
    Heads
    """
    part = corpus.take(rows)
    captions = [normalise_caption(caption) for caption in part.captions.tolist()]
    groups = [np.unique(names, return_inverse=True)[1] for names in (part.clusters, captions)]
    vectors = (part.image, part.text)
    widths = (part.image.shape[1], part.text.shape[1], *(front[1].shape[1] for front in fronts))
    shape = HeadsShape(*widths)
    codes = np.stack(groups, axis=1).astype(np.int64)
    return train_heads(shape, fronts, vectors, codes, Recipe(epochs=epochs), seed, observe).heads


def spell_categories(held: Corpus) -> tuple[Array, list[str]]:
    """Return the categories of the pairs and their names as captions."""
    names = np.unique(held.categories)
    return names, [str(name).replace("_", " ").lower() for name in names]


def judge_vectors(
    image: Array, text: Array, named: Array, held: Corpus, rare: Array
) -> dict[str, float]:
    """Measure retrieval both ways and zero-shot classification on held-out pairs.

    Parameters
    ----------
    image, text : (N, W) float32, unit norm
        Under a student.
    named : (C, W) float32, unit norm
        What `spell_categories` returns, under it.
    held : Corpus
    rare : (N,) bool

    Returns
    -------
    dict
        `all`, `rare`, `rest`: R@10, the mean of both ways, and likewise by language if the pairs
        have any; `zero_shot`: share of pictures nearest to the name of their own category.
    """
    captions = np.array([normalise_caption(caption) for caption in held.captions.tolist()])
    hits = (hits_at(image, text, captions) + hits_at(text, image, captions).astype(float)) / 2
    _, code, pairs = np.unique(captions, return_inverse=True, return_counts=True)
    chosen = spell_categories(held)[0][(image @ named.T).argmax(1)]
    return {
        **{language: float(hits[rows].mean()) for language, rows in held.by_language().items()},
        "all": float(hits.mean()),
        "each_caption": float(np.average(hits, weights=1 / pairs[code])),
        "rare": float(hits[rare].mean()),
        "rest": float(hits[~rare].mean()),
        "zero_shot": float((chosen == held.categories).mean()),
    }


def judge_student(heads: Heads, held: Corpus, rare: Array) -> dict[str, float]:
    """See `judge_vectors`."""
    spoken = spell_categories(held)[1]
    image, text = (part.astype(np.float32) for part in embed_pairs(heads, held.image, held.text))
    # Only the texts of the pairs count: the images beside the names are never looked at.
    named = embed_pairs(heads, held.image[: len(spoken)], embed_captions(spoken))[1]
    return judge_vectors(image, text, named.astype(np.float32), held, rare)
