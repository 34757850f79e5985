"""Confirm that two pictures show the same thing, allowing for a crop.

A pretrained tower is trained to ignore what tells two pictures of one series apart: colour,
mirroring, a number printed on them. On clip art, cosines of EfficientNet features of real near
copies (down to .78) and of a red and a purple arrow (.96) overlap widely. So the cosine proposes,
and this disposes, with two questions:

1. Do the pictures match as wholes? The correlation of two thumbnails after the best shift and
   scale. It finds crops, but cannot tell clocks of one series: their hands are too few pixels.
2. How much do they differ where they differ most? A copy differs from its original a little
   everywhere (compression, resampling), another picture of the series a lot in one place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

__all__ = ["GRID_PX", "are_copies", "pixel_matches", "worst_differences"]

Array = np.ndarray[Any, Any]
_ReadImage = Callable[[int], Image.Image]

#: Side of the compared window. 16 confuses series, 32 loses crops to sub-pixel shifts.
GRID_PX = 24
#: The other picture is scaled to these sides and searched for the window: up to 1 - 24/28 = 14 %
#: of either side may have been cut off.
_SEARCH_PX = (24, 25, 26, 27, 28)
#: Standard deviation over pixels, in grey levels of the most varied channel, at and below which a
#: picture counts as of one colour. (Channels differ from each other in any colour but grey.)
_MIN_SPREAD = 1.0

#: Side of the grid on which the worst place is looked for, in patches of 3 x 3. Where it loses the
#: same 2 % of copies, 24 finds 72 % of spots of 7 % of a side that were erased, 32 89 %, 40 97 %,
#: 48 98 %, but 48 takes a quarter more time and comes nearer to losing small pictures.
_FINE_PX = 40
#: A picture smaller than the grid has a coarser one, for upscaling invents what copies then differ
#: in; but not below this.
_LEAST_FINE_PX = 12
#: Of luma and the two colour differences, which JPEG stores at half the resolution. Weighing them
#: equally finds 61 instead of 89 % of the erased spots (at 32 px), without colour a fifth of the
#: recoloured areas is missed instead of a tenth.
_WEIGHTS = np.array([1, 0.5, 0.5], np.float32)
#: Refinements of the window. None finds 41 instead of 89 % of the erased spots, more find no more.
_STEPS = 2
#: What one of them may move an edge by, in shares of the window: more than the search left over.
_MAX_MOVE = 0.05
_ALL = np.array([0.0, 0.0, 1.0, 1.0])


def are_copies(
    left: Array,
    right: Array,
    read_image: _ReadImage,
    min_match: float | None,
    max_difference: float | None,
) -> Array:
    """Ask both questions about pairs of pictures.

    Parameters
    ----------
    left, right : (E,) int
        Pairs, as numbers that `read_image` understands.
    read_image : callable
        Returns the RGB thumbnail of a picture.
    min_match : float or None
        What `pixel_matches` must reach; None: not asked.
    max_difference : float or None
        What `worst_differences` must not exceed; None: not asked.

    Returns
    -------
    (E,) bool
        Whether one of the pictures, found within the other, passes both.
    """
    copies = np.zeros(len(left), bool)
    whole = cache(lambda name: _whole(read_image(name)))
    for outer, inner in ((left, right), (right, left)):
        asked = np.flatnonzero(~copies)
        matches, windows = _find(outer[asked], inner[asked], read_image, whole)
        passed = np.ones(len(asked), bool) if min_match is None else matches >= min_match
        asked, windows = asked[passed], windows[passed]
        if max_difference is not None:
            worst = _worst(outer[asked], inner[asked], windows, read_image, max_difference)
            asked = asked[worst <= max_difference]
        copies[asked] = True
    return copies


def pixel_matches(left: Array, right: Array, read_image: _ReadImage) -> Array:
    """Correlate pairs of pictures after registering one within the other.

    Returns
    -------
    (E,) float32
        In [-1, 1]; 1 for pictures equal up to brightness and contrast. The larger of searching
        the right picture in the left one and the left in the right.
    """
    whole = cache(lambda name: _whole(read_image(name)))
    one, _ = _find(left, right, read_image, whole)
    other, _ = _find(right, left, read_image, whole)
    return np.maximum(one, other)


def worst_differences(left: Array, right: Array, read_image: _ReadImage) -> Array:
    """Measure how much pairs of pictures differ where they differ most.

    Brightness and contrast count: fitting them makes large dots of small ones, and the flag of
    Monaco of Indonesia's.

    Returns
    -------
    (E,) float32
        Grey levels, 0 for equal pictures: the largest mean over a patch of 3 x 3 of 40 x 40,
        colour differences counting half, once the window of the best correlation is refined. The
        smaller of searching the right picture in the left one and the left in the right.
    """
    whole = cache(lambda name: _whole(read_image(name)))
    _, windows = _find(left, right, read_image, whole)
    one = _worst(left, right, windows, read_image)
    _, windows = _find(right, left, read_image, whole)
    return np.minimum(one, _worst(right, left, windows, read_image))


def _groups(names: Array) -> Iterator[tuple[int, Array]]:
    """Each name and where it occurs."""
    order = np.argsort(names, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(names[order]) != 0, True][: len(order) + 1])
    for begin, end in pairwise(starts):
        yield int(names[order[begin]]), order[begin:end]


def _find(
    outer: Array, inner: Array, read_image: _ReadImage, whole: Callable[[int], Array]
) -> tuple[Array, Array]:
    """Correlations (E,) of inner pictures within outer ones, and where, (E, 4) as `_PLACES`."""
    matches = np.zeros(len(outer), np.float32)
    places = np.zeros(len(outer), np.intp)
    for name, pairs in _groups(outer):
        windows, norms = _windows(read_image(name))
        targets = np.stack([whole(int(other)) for other in inner[pairs]])
        # The targets are centred, so that the windows need not be.
        products = windows @ targets.T
        found = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        places[pairs] = found.argmax(axis=0)
        matches[pairs] = found.max(axis=0)
    return np.minimum(matches, 1), _PLACES[places]  # rounding may leave 1.000001


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


def _places() -> Array:
    """(W, 4): left, top, right and bottom of what `_windows` returns, in shares of a side."""
    corners = [
        (x / side, y / side, (x + GRID_PX) / side, (y + GRID_PX) / side)
        for side in _SEARCH_PX
        for y in range(side - GRID_PX + 1)
        for x in range(side - GRID_PX + 1)
    ]
    return np.array(corners)


_PLACES = _places()


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


def _worst(
    outer: Array, inner: Array, windows: Array, read_image: _ReadImage, enough: float = 0
) -> Array:
    """Worst places (E,) of found pictures; of those not above `enough`, perhaps unrefined."""
    worst = np.zeros(len(outer), np.float32)
    for name, pairs in _groups(inner):
        image = read_image(name).convert("YCbCr")
        targets: dict[int, _Target] = {}
        for pair in pairs:
            other = read_image(int(outer[pair])).convert("YCbCr")
            side = max(_LEAST_FINE_PX, min(_FINE_PX, *image.size, *other.size))
            if side not in targets:
                targets[side] = _Target(_cut(image, _ALL, side))
            worst[pair] = targets[side].worst_difference(other, windows[pair], enough)
    return worst


@dataclass
class _Target:
    """A picture, (side, side, 3) as `_cut` returns it, that windows of others are compared to."""

    pixels: Array

    def worst_difference(self, other: Image.Image, window: Array, enough: float) -> float:
        """Move the window until nothing differs by more than `enough`; the least found."""
        differences = self.pixels - _cut(other, window, len(self.pixels))
        worst = _worst_patch(differences)
        for _ in range(_STEPS):
            if worst <= enough:
                break
            # einsum, unlike BLAS, adds in the same order whatever the number of threads.
            moves = np.einsum("pn,n->p", self.moves, differences.ravel())
            sides = np.tile(window[2:] - window[:2], 2)
            window = (window + moves.clip(-_MAX_MOVE, _MAX_MOVE) * sides).clip(0, 1)
            differences = self.pixels - _cut(other, window, len(self.pixels))
            worst = min(worst, _worst_patch(differences))
        return worst

    @cached_property
    def moves(self) -> Array:
        """(4, side * side * 3): times differences, how far to move each edge of the window.

        A Gauss-Newton step with the target's gradients, which the right window has too, so that
        they are computed once.

        References
        ----------
        Baker & Matthews, Lucas-Kanade 20 years on: a unifying framework, IJCV 2004.
        """
        side = len(self.pixels)
        down, across = np.gradient(self.pixels, 1 / side, axis=(0, 1))
        share = (np.arange(side, dtype=np.float32) + 0.5) / side
        x, y = share[None, :, None], share[:, None, None]
        slopes = np.stack([across * (1 - x), down * (1 - y), across * x, down * y]).reshape(4, -1)
        normal = np.einsum("pn,qn->pq", slopes, slopes, dtype=np.float64)
        # Stripes do not say where along them the window lies: there it stays.
        normal += np.eye(4) * (1e-3 * np.trace(normal) / 4 + 1e-6)
        return np.linalg.solve(normal, slopes.astype(np.float64)).astype(np.float32)


def _cut(image: Image.Image, window: Array, side: int) -> Array:
    """(side, side, 3) float32, weighted: the window of a YCbCr picture, in shares of its sides."""
    box = tuple((window * (image.size * 2)).tolist())
    small = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small, np.float32) * _WEIGHTS


def _worst_patch(differences: Array) -> float:
    """The largest norm of the mean over a patch of 3 x 3."""
    rows = differences[:-2] + differences[1:-1] + differences[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return float(np.sqrt(np.square(sums).sum(axis=-1).max()) / 9)
