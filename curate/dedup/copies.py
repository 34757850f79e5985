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
    best = np.full(len(left), -1, np.float32)
    for searched, wanted in ((left, right), (right, left)):
        order = np.argsort(searched, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(searched[order]) != 0, True][: len(order) + 1])
        for begin, end in pairwise(starts):
            pairs = order[begin:end]
            windows = _windows(read_image(int(searched[pairs[0]])))
            for pair in pairs:
                name = int(wanted[pair])
                if name not in wholes:
                    wholes[name] = _whole(read_image(name))
                best[pair] = max(best[pair], float((windows @ wholes[name]).max()))
    return best


def _whole(image: Image.Image) -> Array:
    return _centred(_scaled(image, GRID_PX).reshape(1, -1))[0]


def _windows(image: Image.Image) -> Array:
    parts = []
    for side in _SEARCH_PX:
        views = sliding_window_view(_scaled(image, side), (GRID_PX, GRID_PX), axis=(0, 1))
        parts.append(views.transpose(0, 1, 3, 4, 2).reshape(-1, GRID_PX * GRID_PX * 3))
    return _centred(np.concatenate(parts))


def _scaled(image: Image.Image, side: int) -> Array:
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)


def _centred(rows: Array) -> Array:
    # A picture of one colour has nothing to correlate: it matches nothing but equal bytes.
    varied = rows.reshape(len(rows), -1, 3).std(axis=1).max(axis=1, keepdims=True) > _MIN_SPREAD
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=varied)
