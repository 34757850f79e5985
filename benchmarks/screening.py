"""Chooses pairs whose truth is complete, so that what is not planted is really clean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.images import opened, over_white
from benchmarks.sources import Pair, normalise

MAX_SAMPLE_PIXELS = 30_000_000
MIN_DIFFERENCE = 6.0
# A crop or a resize of a picture smaller than this, at the sample's scale, moves whole strokes:
# the result is not a near copy by anyone's eye, so it cannot be planted as one.
MIN_SIDE = 32
SAMPLE_LONGEST_SIDE = 128
MAX_TITLE_USES = 10

_THUMBNAIL_SIDE = 32
_HASH = re.compile(r"hash\(0x[0-9a-f]+\)|\bhash\b")
_WORD = re.compile(r"[^\W\d_]{3,}")


def has_words(pair: Pair, title_uses: Counter[str]) -> bool:
    """Tell whether a pair's title says something about its image.

    Parameters
    ----------
    pair
        The pair.
    title_uses
        How many pairs of the corpus have a given normalised title.

    Returns
    -------
    bool
        False for titles without a word and for those that a whole collection shares.
    """
    title = normalise(pair.title)
    if title_uses[title] > MAX_TITLE_USES:
        return False
    return _WORD.search(_HASH.sub("", title)) is not None


def _thumbnail(pair: Pair) -> npt.NDArray[np.int16] | None:
    with opened(pair.read()) as image:
        if image.width * image.height > MAX_SAMPLE_PIXELS:
            return None
        scale = min(1.0, SAMPLE_LONGEST_SIDE / max(image.size))
        if min(image.size) * scale < MIN_SIDE:
            return None
        size = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
        small = over_white(image).resize(size, Image.Resampling.BOX)
    return np.asarray(small, dtype=np.int16).ravel()


def choose_distinct(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Choose pairs with telling captions, none of them a near copy of another.

    Parameters
    ----------
    pairs
        The corpus.
    count
        How many pairs to choose.
    seed
        Decides which.

    Returns
    -------
    list of Pair
        The chosen pairs, in the corpus's order.
    """
    title_uses = Counter(normalise(pair.title) for pair in pairs)
    candidates = [index for index, pair in enumerate(pairs) if has_words(pair, title_uses)]
    Random(f"choice:{seed}").shuffle(candidates)
    thumbnails = np.zeros((count, 3 * _THUMBNAIL_SIDE**2), dtype=np.int16)
    chosen: list[int] = []
    for index in candidates:
        if len(chosen) == count:
            break
        thumbnail = _thumbnail(pairs[index])
        if thumbnail is None:
            continue
        differences = np.abs(thumbnails[: len(chosen)] - thumbnail).mean(axis=1)
        if differences.size and differences.min() < MIN_DIFFERENCE:
            continue
        thumbnails[len(chosen)] = thumbnail
        chosen.append(index)
    if len(chosen) < count:
        raise ValueError(f"only {len(chosen)} of {count} pairs can be told apart")
    return [pairs[index] for index in sorted(chosen)]
