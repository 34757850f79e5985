"""Confirm that two pictures show the same thing, allowing for a crop.

A pretrained tower is trained to ignore what tells two pictures of one series apart: colour,
mirroring, a number printed on them. On clip art, cosines of EfficientNet features of real near
copies (down to .78) and of a red and a purple arrow (.96) overlap widely. A pixel comparison
alone fails on crops. So the cosine proposes, and this disposes: the correlation of two
thumbnails after the best shift and scale.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

__all__ = ["GRID_PX", "pixel_matches"]

Array = np.ndarray[Any, Any]

#: Side of the compared window. 16 confuses series, 32 loses crops to sub-pixel shifts.
GRID_PX = 24
#: The other picture is scaled to these sides and searched for the window: up to 1 - 24/28 = 14 %
#: of either side may have been cut off.
_SEARCH_PX = (24, 25, 26, 27, 28)
#: Standard deviation over pixels, in grey levels of the most varied channel, at and below which a
#: picture counts as of one colour. (Channels differ from each other in any colour but grey.)
_MIN_SPREAD = 1.0


def pixel_matches(left: Array, right: Array, read_image: Callable[[int], Image.Image]) -> Array:
    """Correlate pairs of pictures after registering one within the other.

    Parameters
    ----------
    left, right : (E,) int
        Pairs, as numbers that `read_image` understands.
    read_image : callable
        Returns the RGB thumbnail of a picture.

    Returns
    -------
    (E,) float32
        In [-1, 1]; 1 for pictures equal up to brightness and contrast. The larger of searching
        the right picture in the left one and the left in the right.
    """
    wholes: dict[int, Array] = {}

    def whole(name: int) -> Array:
        if name not in wholes:
            wholes[name] = _whole(read_image(name))
        return wholes[name]

    best = np.full(len(left), -1, np.float32)
    for searched, wanted in ((left, right), (right, left)):
        order = np.argsort(searched, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(searched[order]) != 0, True][: len(order) + 1])
        for begin, end in pairwise(starts):
            pairs = order[begin:end]
            windows, norms = _windows(read_image(int(searched[pairs[0]])))
            targets = np.stack([whole(int(name)) for name in wanted[pairs]])
            # The targets are centred, so that the windows need not be.
            products = windows @ targets.T
            found = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
            best[pairs] = np.maximum(best[pairs], found.max(axis=0))
    return np.minimum(best, 1)  # rounding may leave 1.000001


def _whole(image: Image.Image) -> Array:
    """(24 * 24 * 3,) float32, centred, unit norm; zeros for a picture of one colour."""
    row = _scaled(image, GRID_PX).reshape(1, -1)
    norm = _norms(row)[0, 0]
    return (row[0] - row.mean()) / norm if norm > 0 else np.zeros_like(row[0])


def _windows(image: Image.Image) -> tuple[Array, Array]:
    """(W, 24 * 24 * 3) float32 and the norms (W, 1) that they have once centred."""
    parts = []
    for side in _SEARCH_PX:
        views = sliding_window_view(_scaled(image, side), (GRID_PX, GRID_PX), axis=(0, 1))
        parts.append(views.transpose(0, 1, 3, 4, 2).reshape(-1, GRID_PX * GRID_PX * 3))
    rows = np.concatenate(parts)
    return rows, _norms(rows)


def _scaled(image: Image.Image, side: int) -> Array:
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)


def _norms(rows: Array) -> Array:
    """Norms of rows once centred, (N, 1) float32; 0 where a picture is of one colour.

    Such a picture has nothing to correlate: it matches nothing but equal bytes.
    """
    pixels = rows.reshape(len(rows), -1, 3)
    count = pixels.shape[1]
    sums = pixels.sum(axis=1, dtype=np.float64)
    squares = np.einsum("npc,npc->nc", pixels, pixels, dtype=np.float64)
    spread = np.sqrt(np.maximum(squares / count - (sums / count) ** 2, 0))
    centred = np.maximum(squares.sum(1) - sums.sum(1) ** 2 / (3 * count), 0)
    norms = np.where(spread.max(axis=1) > _MIN_SPREAD, np.sqrt(centred), 0)
    return norms[:, None].astype(np.float32)
