"""Titles that a whole series of pictures may have, while what stands behind them differs."""

import re
from collections import Counter

__all__ = ["find_series", "split_parts"]

#: Marks that end a part; a full stop or a dash inside a word does not.
_MARKS = re.compile(r"[.;:,|]+(?=\s|$)|\s[-–—/|]\s|[()\n]")
#: A part that more of the clusters have names a collection or its author, not a picture.
_COMMON = 0.05
#: Captions that a series has at least.
_DIFFERENT = 5


def split_parts(caption: str) -> list[str]:
    """Split at punctuation into title, sentences, tags: at least one part."""
    parts = [part for piece in _MARKS.split(caption) if (part := " ".join(piece.split()))]
    return parts or [caption]


def find_series(captions: Counter[str], clusters: Counter[str]) -> dict[str, str]:
    """Find captions that have their title in common with others, and nothing else of their own.

    The title is the first part that is no collection's name. A caption that says something that no
    other title stands beside (France - *Savoie*) is not of a series.

    Parameters
    ----------
    captions : Counter
        Samples by caption.
    clusters : Counter
        Of these, one for each cluster of copies.

    Returns
    -------
    dict of str to str
        Title by caption.
    """
    split = {caption: tuple(dict.fromkeys(split_parts(caption))) for caption in captions}
    holders: Counter[str] = Counter()
    for caption, number in clusters.items():
        for part in split[caption]:
            holders[part] += number
    limit = _COMMON * clusters.total()
    titles: dict[str, str] = {}
    beside: dict[str, str | None] = {}  # the only title that a part stands beside; None: several
    for caption, parts in split.items():
        title = next((part for part in parts if holders[part] <= limit), None)
        if title is None:
            continue
        titles[caption] = title
        for part in parts:
            if beside.setdefault(part, title) != title:
                beside[part] = None
    found = {
        caption: title
        for caption, title in titles.items()
        if all(p == title or beside[p] is None for p in split[caption])
    }
    different = Counter(found.values())
    return {c: title for c, title in found.items() if different[title] >= _DIFFERENT}
