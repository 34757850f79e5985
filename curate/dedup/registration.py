"""Find one picture within another: by shift and scale, then to first order by whatever is left.

The search tries windows of whole pixels of a coarse grid. A copy whose edges lie between them, or
that is turned by a few degrees, correlates less than it could. How much it could is known without
trying: what small moves and a small turn do to a picture is, to first order, a sum of its
gradients, and the part of the difference that they explain is no difference.

References
----------
Simard, LeCun & Denker, Efficient pattern recognition using a new transformation distance, NIPS
1992.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

__all__ = ["DIGITS", "GRID_PX", "Found", "ReadImage", "find", "groups", "merge"]

Array = np.ndarray[Any, Any]
ReadImage = Callable[[int], Image.Image]

#: Side of the compared window. 16 confuses series, 32 loses crops to sub-pixel shifts.
GRID_PX = 24
#: The other picture is scaled to these sides and searched for the window: up to 1 - 24/28 = 14 %
#: of either side may have been cut off.
_SEARCH_PX = (24, 25, 26, 27, 28)
#: At these only the middle is: a border is as wide on all sides.
_MIDDLE_PX = (30,)
#: Standard deviation over pixels, in grey levels of the most varied channel, at and below which a
#: picture counts as of one colour. (Channels differ from each other in any colour but grey.)
_MIN_SPREAD = 1.0
_MIDDLE_GREY = 128
#: Pictures that are kept ready to be searched for: 45 kB each.
_KEPT = 1024
#: Decimals of correlations by which windows are told apart.
DIGITS = 5
#: Share of a picture's own gradients added to them, so that stripes do not move along themselves.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Found:
    """Where pictures were found.

    Parameters
    ----------
    matches : (E,) float32
        Correlation with the best window, in [-1, 1].
    expected : (E,) float32
        What it may become once the window is moved and turned; at least `matches`.
    windows : (E, 4) float64
        Left, top, right and bottom of it, in shares of the outer picture's sides.
    degrees : (E,) float32
        By how much the outer picture has to be turned, counter-clockwise.
    """

    matches: Array
    expected: Array
    windows: Array
    degrees: Array

    def take(self, rows: Array) -> "Found":
        """Choose pairs."""
        return Found(*(value[rows] for value in vars(self).values()))


def merge(chosen: Array, one: Found, other: Found) -> Found:
    """Take pairs from `one` where `chosen` (E,), else from `other`."""
    parts = zip(vars(one).values(), vars(other).values(), strict=True)
    return Found(*(np.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in parts))


def groups(names: Array) -> Iterator[tuple[int, Array]]:
    """Each name and where it occurs."""
    order = np.argsort(names, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(names[order]) != 0, True][: len(order) + 1])
    for begin, end in pairwise(starts):
        yield int(names[order[begin]]), order[begin:end]


def find(outer: Array, inner: Array, read_image: ReadImage, least: float = -1.0) -> Found:
    """Find each inner picture in its outer one.

    Parameters
    ----------
    outer, inner : (E,) int
        Pairs, as numbers that `read_image` understands.
    read_image : callable
        Returns the RGB thumbnail of a picture.
    least : float
        A lower correlation is taken for hopeless: nothing more is expected of it.
    """
    whole = lru_cache(_KEPT)(lambda name: _Whole(read_image(name)))
    matches = np.zeros(len(outer), np.float32)
    expected, degrees = matches.copy(), matches.copy()
    places = np.zeros(len(outer), np.intp)
    for name, pairs in groups(outer):
        windows, norms = _windows(read_image(name))
        wholes = [whole(int(other)) for other in inner[pairs]]
        targets = np.array([one.row for one in wholes], np.float64)
        # The targets are centred, so that the windows need not be. Float32 would make the window
        # chosen depend on how many targets are multiplied.
        products = windows.astype(np.float64) @ targets.T
        found = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        # Of windows as good the first, which is the whole picture.
        places[pairs] = found.round(DIGITS).argmax(axis=0)
        # Rounding may leave 1.000001.
        best = matches[pairs] = expected[pairs] = np.minimum(found.max(axis=0), 1)
        hopeful = np.flatnonzero((best >= least) & (best > 0))
        pairs = pairs[hopeful]
        at = places[pairs]
        expected[pairs], degrees[pairs] = _expect(
            windows[at] / norms[at], [wholes[one] for one in hopeful], best[hopeful]
        )
    return Found(matches, expected, _PLACES[places], degrees)


class _Whole:
    """A picture that is searched for.

    Parameters
    ----------
    image : Image.Image

    Attributes
    ----------
    row : (24 * 24 * 3,) float32
        Centred, of unit norm, or zeros if of one colour.
    """

    def __init__(self, image: Image.Image) -> None:
        row = _scaled(image, GRID_PX).ravel()
        norm = _norms(row[None])[0]
        self.row = (row - row.mean()) / norm if norm > 0 else np.zeros_like(row)
        self._aspect = image.width / image.height

    @cached_property
    def tangents(self) -> Array:
        """(5, 24 * 24 * 3) float32: what moving, scaling and turning add to the row."""
        pixels: Array = self.row.reshape(GRID_PX, GRID_PX, 3)
        down, across = np.gradient(pixels, 1 / GRID_PX, axis=(0, 1))
        turn = across * _Y / self._aspect - down * _X * self._aspect
        tangents = np.stack([across, down, across * _X, down * _Y, turn]).reshape(5, -1)
        tangents -= tangents.mean(axis=1, keepdims=True)
        # What is left of them beside the row itself.
        tangents -= np.outer(tangents @ self.row, self.row)
        found: Array = tangents.astype(np.float32)
        return found

    @cached_property
    def inverse(self) -> Array:
        """(5, 5) float64: from products with the tangents to shares of them."""
        normal = (self.tangents @ self.tangents.T).astype(np.float64)
        ridge = _RIDGE * np.trace(normal) / 5 + 1e-9
        return np.linalg.inv(normal + ridge * np.eye(5))


def _windows(image: Image.Image) -> tuple[Array, Array]:
    """(W, 24 * 24 * 3) float32 and the norms (W, 1) that they have once centred."""
    parts = []
    for side in (*_SEARCH_PX, *_MIDDLE_PX):
        pixels = _scaled(image, side)
        if side in _MIDDLE_PX:
            start = (side - GRID_PX) // 2
            pixels = pixels[start : start + GRID_PX, start : start + GRID_PX]
        views = sliding_window_view(pixels, (GRID_PX, GRID_PX), axis=(0, 1))
        parts.append(views.transpose(0, 1, 3, 4, 2).reshape(-1, GRID_PX * GRID_PX * 3))
    rows = np.concatenate(parts)
    return rows, _norms(rows)[:, None]


def _places() -> Array:
    """(W, 4): left, top, right and bottom of what `_windows` returns, in shares of a side."""
    corners = [
        (x / side, y / side, (x + GRID_PX) / side, (y + GRID_PX) / side)
        for side in _SEARCH_PX
        for y in range(side - GRID_PX + 1)
        for x in range(side - GRID_PX + 1)
    ]
    for side in _MIDDLE_PX:
        start = (side - GRID_PX) // 2 / side
        end = start + GRID_PX / side
        corners.append((start, start, end, end))
    return np.array(corners)


_PLACES = _places()


def _scaled(image: Image.Image, side: int) -> Array:
    """(side, side, 3) float32: grey levels from the middle one, whole numbers."""
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32) - np.float32(_MIDDLE_GREY)


def _norms(rows: Array) -> Array:
    """Norms (W,) float32 of windows (W, 24 * 24 * 3), once centred.

    0 where a window is of one colour: it has nothing to correlate and matches nothing but equal
    bytes.
    """
    # Whole numbers under 2**24 (squares of 128 over 576 pixels): float32 has them exactly.
    first, second = (
        part.astype(np.float64) for part in (rows @ _OF_CHANNEL, rows**2 @ _OF_CHANNEL)
    )
    count = GRID_PX * GRID_PX
    spread = np.sqrt(np.maximum(second / count - (first / count) ** 2, 0))
    centred = np.maximum(second.sum(1) - first.sum(1) ** 2 / (3 * count), 0)
    return np.where(spread.max(axis=1) > _MIN_SPREAD, np.sqrt(centred), 0).astype(np.float32)


_OF_CHANNEL = np.tile(np.eye(3, dtype=np.float32), (GRID_PX * GRID_PX, 1))
_SHARE = ((np.arange(GRID_PX) + 0.5) / GRID_PX - 0.5).astype(np.float32)
_X, _Y = _SHARE[None, :, None], _SHARE[:, None, None]


def _expect(windows: Array, wholes: Sequence[_Whole], matches: Array) -> tuple[Array, Array]:
    """Correlations (P,) that moving, scaling and turning may reach, and the turns in degrees.

    `windows` are (P, 24 * 24 * 3), of unit norm once centred.
    """
    if len(wholes) == 0:
        return np.zeros(0), np.zeros(0)
    tangents = np.stack([one.tangents for one in wholes])
    inverse = np.stack([one.inverse for one in wholes])
    products = (tangents @ windows[:, :, None]).astype(np.float64)
    moves = (inverse @ products)[:, :, 0]
    explained = np.maximum((moves * products[:, :, 0]).sum(axis=1), 0)
    expected = np.sqrt(np.minimum(matches.astype(np.float64) ** 2 + explained, 1))
    return expected, np.degrees(moves[:, 4] / matches)
