"""Vectors with planted near-copies and one picture that is everywhere, of any number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["COSINES", "HEAVY_SHARE", "draw_mixture", "write_mixture"]

Array = np.ndarray[Any, Any]

#: Cosines of planted copies to their originals.
COSINES = (0.951, 0.955, 0.96, 0.97, 0.98, 0.99, 0.999)
#: Share of the rows that are copies, and share that show one picture, at cosine .96 to each other.
_COPY_SHARE, HEAVY_SHARE = 0.1, 0.02
_HEAVY_COSINE = 0.96
#: Rows per theme, and how near a row is to its theme: two of a theme have a cosine of .56.
_PER_THEME, _THEME_COSINE = 200, 0.75
_BLOCK = 50_000


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _at_cosine(rows: torch.Tensor, cosines: Array) -> torch.Tensor:
    """Draw a unit vector at a cosine to each row; cosines (N, 1) or (1, 1)."""
    noise = torch.randn_like(rows)
    noise -= (noise * rows).sum(1, keepdim=True) * rows
    along, across = (
        torch.from_numpy(part.astype(np.float32)).to(rows.device)
        for part in (cosines, np.sqrt(1 - cosines**2))
    )
    return along * rows + across * _unit(noise)


def draw_mixture(count: int, width: int, seed: int = 0) -> Iterator[Array]:
    """Yield `count` rows of float16 in blocks of 50 000, in a random order of kinds.

    Themes have sizes like 1 / sqrt(rank). A copy's original is in the block before its own, so that
    no more than two blocks are held. Drawn on a GPU where there is one, which draws other numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    themes = _unit(torch.randn(max(8, count // _PER_THEME), width, device=device))
    shares = 1 / np.sqrt(np.arange(1, len(themes) + 1))
    everywhere = _unit(torch.randn(1, width, device=device))
    before: torch.Tensor | None = None
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        theme = themes[rng.choice(len(themes), size, p=shares / shares.sum())]
        rows = _at_cosine(theme, np.array([[_THEME_COSINE]]))
        kind = rng.random(size)
        heavy = kind < HEAVY_SHARE
        centre = everywhere.expand(int(heavy.sum()), width)
        rows[heavy] = _at_cosine(centre, np.array([[_HEAVY_COSINE**0.5]]))
        copy = (kind >= HEAVY_SHARE) & (kind < HEAVY_SHARE + _COPY_SHARE)
        # In the first block, of its own rows that are no copies.
        originals = rows[~copy] if before is None else before
        drawn = originals[rng.integers(0, len(originals), int(copy.sum()))]
        rows[copy] = _at_cosine(drawn, rng.choice(np.array(COSINES), (len(drawn), 1)))
        before = rows[~copy]
        yield rows.half().cpu().numpy()


def write_mixture(folder: Path, count: int, width: int, seed: int = 0) -> None:
    """Write the blocks of `draw_mixture` into `.npy` files."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(draw_mixture(count, width, seed)):
        np.save(folder / f"{number:05d}.npy", rows)
