"""Vectors with planted near-copies and one picture that is everywhere, of any number."""

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["COSINES", "HEAVY_SHARE", "write_mixture"]

Array = np.ndarray[Any, Any]

#: Cosines of planted copies to their originals.
COSINES = (0.951, 0.955, 0.96, 0.97, 0.98, 0.99, 0.999)
#: Share of the rows that are copies, and share that show one picture, at cosine .96 to each other.
_COPY_SHARE, HEAVY_SHARE = 0.1, 0.02
_HEAVY_COSINE = 0.96
#: Rows per theme, and how near a row is to its theme: two of a theme have a cosine of .56.
_PER_THEME, _THEME_COSINE = 200, 0.75
_BLOCK = 50_000


def _unit(rows: Array) -> Array:
    found: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def _at_cosine(rows: Array, cosines: Array, rng: np.random.Generator) -> Array:
    """Draw a unit vector at a cosine to each row."""
    noise = rng.standard_normal(rows.shape, np.float32)
    noise -= (noise * rows).sum(1, keepdims=True) * rows
    found: Array = cosines * rows + np.sqrt(1 - cosines**2) * _unit(noise)
    return found


def write_mixture(folder: Path, count: int, width: int, seed: int = 0) -> None:
    """Write `count` rows of float16 into `.npy` files of 50 000, in a random order of kinds.

    Themes have sizes like 1 / sqrt(rank). A copy's original is in the block before its own, so that
    no more than two blocks are held.
    """
    rng = np.random.default_rng(seed)
    themes = _unit(rng.standard_normal((max(8, count // _PER_THEME), width), np.float32))
    shares = 1 / np.sqrt(np.arange(1, len(themes) + 1))
    everywhere = _unit(rng.standard_normal((1, width), np.float32))
    folder.mkdir(parents=True)
    before: Array | None = None
    for number, start in enumerate(range(0, count, _BLOCK)):
        size = min(_BLOCK, count - start)
        theme = themes[rng.choice(len(themes), size, p=shares / shares.sum())]
        rows = _at_cosine(theme, np.float32(_THEME_COSINE), rng)
        kind = rng.random(size)
        heavy = kind < HEAVY_SHARE
        centre = np.broadcast_to(everywhere, (int(heavy.sum()), width))
        rows[heavy] = _at_cosine(centre, np.float32(_HEAVY_COSINE**0.5), rng)
        copy = (kind >= HEAVY_SHARE) & (kind < HEAVY_SHARE + _COPY_SHARE)
        # In the first block, of its own rows that are no copies.
        originals = rows[~copy] if before is None else before
        drawn = originals[rng.integers(0, len(originals), int(copy.sum()))]
        cosines = rng.choice(np.array(COSINES, np.float32), (len(drawn), 1))
        rows[copy] = _at_cosine(drawn, cosines, rng)
        before = rows[~copy]
        np.save(folder / f"{number:05d}.npy", rows.astype(np.float16))
