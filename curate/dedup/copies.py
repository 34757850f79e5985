"""Confirm that two pictures show the same thing, allowing for a crop, a turn and other light.

A pretrained tower is trained to ignore what tells two pictures of one series apart: colour,
mirroring, a number printed on them. On clip art, cosines of EfficientNet features of real near
copies (down to .78) and of a red and a purple arrow (.96) overlap widely. So the cosine proposes,
and this disposes, with two questions:

1. Do the pictures match as wholes? The correlation of two thumbnails once one is registered within
   the other. It cannot tell clocks of one series: their hands are too few pixels.
2. How much do they differ where they differ most? A copy differs from its original a little
   everywhere (compression, resampling), another picture of the series a lot in one place.

Where they differ, they may still be a picture and its copy turned by a few degrees, in other
light, or without colour. Each is tried and has to fit at least as well; of plain pictures, which
show nothing but a colour, only turns are. Mirrored pictures and such with a line of text are left
alone: arrows to the left and to the right, signs with two numbers are no copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from PIL import Image

from curate.dedup.registration import DIGITS, GRID_PX, Found, ReadImage, find, groups, merge

__all__ = ["are_copies", "pixel_matches", "worst_differences"]

Array = np.ndarray[Any, Any]

#: Correlation with the best window below which nothing is expected of a pair.
_LEAST_MATCH = 0.75
#: How much less than asked may be expected of a pair that is looked at closely: what is expected is
#: exact for small moves only.
_SLACK = 0.04

#: Side of the grid on which the worst place is looked for, in patches of 3 x 3. Where it loses the
#: same 2 % of copies, 24 finds 72 % of spots of 7 % of a side that were erased, 32 89 %, 40 97 %,
#: 48 98 %, but 48 takes a quarter more time and comes nearer to losing small pictures.
_FINE_PX = 40
#: A picture smaller than the grid has a coarser one, for upscaling invents what copies then differ
#: in; but not below this.
_LEAST_FINE_PX = 12
#: Luma and the two colour differences of RGB. JPEG stores the latter at half the resolution:
#: weighing them equally finds 61 instead of 89 % of the erased spots (at 32 px), without colour a
#: fifth of the recoloured areas is missed instead of a tenth.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
_LUMA = _YCC[0].astype(np.float32)
_WEIGHED = (_YCC * [[1], [0.5], [0.5]]).T.astype(np.float32)
#: Refinements of the window. None finds 41 instead of 89 % of the erased spots, more find no more.
_STEPS = 2
#: What one of them may move an edge by, in shares of the window: more than the search left over.
_MAX_MOVE = 0.05
_ALL = np.array([0.0, 0.0, 1.0, 1.0])
#: Pictures turned by fewer or more degrees are not turned back.
_TURNS = (1.0, 9.0)
#: In a pale or thin picture fewer grey levels are a lot: where its pixels' standard deviation is
#: less than this, so much less is allowed. Of 3 405 pairs of stars of thin lines it takes 4 % for
#: copies, 30 instead of 43 8 %, 0 23 %; of copies of other pictures it loses .4 %, of blurred ones
#: 5 %.
_FULL_SPREAD = 43.0
#: A registration is given up where the worst place is more than so many times what is allowed
#: before its first step (copies had at most 7), or where a step leaves more of it than this share
#: and more than a little too much.
_LOST, _LEFT, _NEARLY = 8.0, 0.6, 1.3
#: Pictures of which more than these shares are as white, or as black, as before are not in other
#: light: they are another skin tone, dots of another size, a paler heart. (Black outlines stay.)
_WHITE, _WHITE_SHARE = 250, 0.02
_BLACK, _BLACK_SHARE = 5, 0.2
#: Bounds of contrast and saturation within which the light may be another one.
_LIGHT = (0.69, 1.45)
#: For pictures in other light or without colour: share of the difference that is allowed else,
#: least correlation, and the worst place before, in times of what is allowed, of pairs worth
#: trying.
_STRICT_SHARE, _STRICT_MATCH, _LIGHT_WORST = 0.6, 0.98, 4.0
#: Grey levels by which channels of a grey picture may differ.
_GREY = 8
#: A picture is plain where its pixels (but for these percentiles, and a frame of an eighth) differ
#: by no more grey levels. Colour is all it shows, and any other would be explained by other light.
_PLAIN, _PLAIN_RANGE = 24, (1, 99)
#: Pixels that a fit of light needs.
_LIT_PIXELS = 40


def are_copies(
    left: Array,
    right: Array,
    read_image: ReadImage,
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
        Correlation that the registered pictures must reach; None: not asked.
    max_difference : float or None
        Grey levels by which they may differ where they differ most; None: not asked, nor are
        turns, light and missing colour tried.

    Returns
    -------
    (E,) bool
        Whether one of the pictures, found within the other, passes both.
    """
    if max_difference is None:
        if min_match is None:
            return np.ones(len(left), bool)
        return pixel_matches(left, right, read_image) >= min_match
    grey = cache(lambda name: _is_grey(read_image(name)))
    ends = [np.array([grey(int(name)) for name in names], bool) for names in (left, right)]
    mixed = ends[0] != ends[1]
    copies = np.zeros(len(left), bool)
    asked = _Asked(min_match, max_difference)
    copies[~mixed] = _confirm(left[~mixed], right[~mixed], read_image, asked)
    copies[mixed] = _confirm(
        left[mixed], right[mixed], lambda name: _without_colour(read_image(name)), asked.strictly()
    )
    return copies


@dataclass(frozen=True)
class _Asked:
    """What a pair must reach."""

    min_match: float | None
    max_difference: float
    strict: bool = False

    def strictly(self) -> "_Asked":
        """Of pairs that differ in light or colour."""
        return _Asked(
            max(self.min_match or -1, _STRICT_MATCH),
            self.max_difference * _STRICT_SHARE,
            strict=True,
        )


def _confirm(left: Array, right: Array, read_image: ReadImage, asked: _Asked) -> Array:
    one, other = (find(*ends, read_image, _LEAST_MATCH) for ends in ((left, right), (right, left)))
    # Of a picture and its crop only one can be found within the other: looking once is enough.
    swapped = other.expected.round(DIGITS) > one.expected.round(DIGITS)
    found = merge(swapped, other, one)
    outer, inner = np.where(swapped, right, left), np.where(swapped, left, right)
    least = -1 if asked.min_match is None else asked.min_match - _SLACK
    rows = np.flatnonzero(found.expected >= least)
    copies = np.zeros(len(left), bool)
    for look, pair in _looks(outer[rows], inner[rows], read_image, found.take(rows), asked):
        copies[rows[pair]] = look.is_copy(float(found.degrees[rows[pair]]))
    return copies


def _looks(
    outer: Array, inner: Array, read_image: ReadImage, found: Found, asked: _Asked
) -> Iterator[tuple["_Look", int]]:
    for name, pairs in groups(inner):
        image, targets = read_image(name), dict[int, _Target]()
        for pair in pairs:
            other = read_image(int(outer[pair]))
            side = max(_LEAST_FINE_PX, min(_FINE_PX, *image.size, *other.size))
            if side not in targets:
                targets[side] = _Target(_cut(image, _ALL, side))
            yield _Look(targets[side], other, found.windows[pair], asked), pair


def _is_grey(image: Image.Image) -> bool:
    pixels = np.asarray(image.resize((GRID_PX, GRID_PX), Image.Resampling.BOX), np.int16)
    return bool(np.ptp(pixels, axis=2).max() <= _GREY)


def _without_colour(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def pixel_matches(left: Array, right: Array, read_image: ReadImage) -> Array:
    """Correlate pairs of pictures after searching one within the other.

    Returns
    -------
    (E,) float32
        In [-1, 1]; 1 for pictures equal up to brightness and contrast. The larger of searching
        the right picture in the left one and the left in the right.
    """
    one, other = (find(*ends, read_image).matches for ends in ((left, right), (right, left)))
    return np.maximum(one, other)


def worst_differences(left: Array, right: Array, read_image: ReadImage) -> Array:
    """Measure how much pairs of pictures differ where they differ most.

    Brightness and contrast count.

    Returns
    -------
    (E,) float32
        Grey levels, 0 for equal pictures: the largest mean over a patch of 3 x 3 of 40 x 40,
        colour differences counting half, once the window of the best correlation is refined. The
        smaller of searching the right picture in the left one and the left in the right.
    """
    worst = np.full(len(left), np.inf, np.float32)
    for outer, inner in ((left, right), (right, left)):
        found = find(outer, inner, read_image)
        for look, pair in _looks(outer, inner, read_image, found, _Asked(None, 0)):
            look.registers(look.other)
            worst[pair] = min(worst[pair], look.worst)
    return worst


@dataclass
class _Target:
    """A picture, (side, side, 3) RGB, that windows of others are compared to."""

    pixels: Array

    @cached_property
    def weighed(self) -> Array:
        """The differences' space: luma and colour differences, weighed."""
        return self.pixels @ _WEIGHED

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the pixels, in grey levels."""
        return float(self.pixels.std())

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is of one colour but for a frame or a spot."""
        edge = len(self.pixels) // 8
        inside = self.pixels[edge:-edge, edge:-edge]
        low, high = np.percentile(inside, _PLAIN_RANGE, axis=(0, 1))
        return bool((high - low).max() <= _PLAIN)

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
        down, across = np.gradient(self.weighed, 1 / side, axis=(0, 1))
        share = (np.arange(side, dtype=np.float32) + 0.5) / side
        x, y = share[None, :, None], share[:, None, None]
        slopes = np.stack([across * (1 - x), down * (1 - y), across * x, down * y]).reshape(4, -1)
        normal = np.einsum("pn,qn->pq", slopes, slopes, dtype=np.float64)
        # Stripes do not say where along them the window lies: there it stays.
        normal += np.eye(4) * (1e-3 * np.trace(normal) / 4 + 1e-6)
        return np.linalg.solve(normal, slopes.astype(np.float64)).astype(np.float32)


@dataclass
class _Look:
    """A close look at a pair; `worst` is the least worst difference, `window` where it was."""

    target: _Target
    other: Image.Image
    window: Array
    asked: _Asked
    worst: float = np.inf

    def is_copy(self, degrees: float) -> bool:
        """Tell whether the pair passes as it is, turned or in other light."""
        start = self.window
        if self.asked.strict and self.target.is_plain:
            return False
        if self.registers(self.other):
            return True
        if self.asked.strict:
            return False
        if _TURNS[0] <= abs(degrees) <= _TURNS[1]:
            turned = self.other.convert("RGBA").rotate(degrees, Image.Resampling.BILINEAR)
            worst, window, self.window = self.worst, self.window, start
            if self.registers(turned):
                return True
            self.worst, self.window = worst, window
        if self.target.is_plain or self.worst > _LIGHT_WORST * self.asked.max_difference:
            return False
        pixels = _cut(self.other, self.window, len(self.target.pixels))
        white = (np.minimum(pixels, self.target.pixels) >= _WHITE).all(axis=2).mean()
        black = (np.maximum(pixels, self.target.pixels) <= _BLACK).all(axis=2).mean()
        if white > _WHITE_SHARE or black > _BLACK_SHARE:
            return False
        return self.registers(self.other, relit=True)

    def registers(self, other: Image.Image, relit: bool = False) -> bool:
        """Move the window until the pair passes, or is lost."""
        asked = self.asked.strictly() if relit else self.asked
        most = asked.max_difference * min(1, self.target.spread / _FULL_SPREAD)
        window, least = self.window, _LOST * most
        for step in range(_STEPS + 1):
            pixels, seen = _seen(_cut(other, window, len(self.target.pixels)))
            if relit:
                pixels = _relit(pixels, self.target.pixels)
            differences = (self.target.weighed - pixels @ _WEIGHED) * seen
            _leave_edges(differences, window)
            worst = _worst_patch(differences)
            if worst < self.worst and not relit:
                self.worst, self.window = worst, window
            if worst <= most and (
                asked.min_match is None
                or _match(self.target.pixels, pixels, seen) >= asked.min_match
            ):
                return True
            if step == _STEPS or worst > max(least, _NEARLY * most) > 0:
                break
            least = _LEFT * worst
            # einsum, unlike BLAS, adds in the same order whatever the number of threads.
            moves = np.einsum("pn,n->p", self.target.moves, differences.ravel())
            sides = np.tile(window[2:] - window[:2], 2)
            window = (window + moves.clip(-_MAX_MOVE, _MAX_MOVE) * sides).clip(0, 1)
        return False


def _cut(image: Image.Image, window: Array, side: int) -> Array:
    """(side, side, channels) float32: the window of a picture, in shares of its sides."""
    box = tuple((window * (image.size * 2)).tolist())
    small = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small, np.float32)


def _seen(pixels: Array) -> tuple[Array, Array]:
    """RGB, and (side, side, 1) bool: what a turned picture has something to show at."""
    if pixels.shape[2] == 3:
        return pixels, _EVERYWHERE
    return pixels[:, :, :3], pixels[:, :, 3:] >= 250


_EVERYWHERE = np.ones((1, 1, 1), bool)


def _leave_edges(differences: Array, window: Array) -> None:
    """Forget the outermost pixels on sides where the window lies inside: borders shine through."""
    half = 0.5 / len(differences)
    left, top, right, bottom = window
    if left > half:
        differences[:, 0] = 0
    if top > half:
        differences[0] = 0
    if right < 1 - half:
        differences[:, -1] = 0
    if bottom < 1 - half:
        differences[-1] = 0


def _match(one: Array, other: Array, seen: Array) -> float:
    """Correlation where both are seen; 0 for a picture of one colour."""
    chosen = np.broadcast_to(seen, one.shape)
    first, second = one[chosen], other[chosen]
    if len(first) == 0:
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float((first * second).sum() / norm) if norm > 0 else 0.0


def _relit(pixels: Array, target: Array) -> Array:
    """Pixels in the light of a target: contrast, brightness and saturation fitted, in bounds."""
    low, high = target.min(), target.max()
    luma, wanted = pixels @ _LUMA, target @ _LUMA
    # What is clipped in either says nothing.
    used = (wanted > low + 4) & (wanted < high - 4) & (luma > 3) & (luma < 252)
    if used.sum() < _LIT_PIXELS:
        used = np.ones_like(used)
    for _ in range(2):
        one, other = luma[used], wanted[used]
        one_mean, other_mean, spread = one.mean(), other.mean(), one.var()
        contrast = ((one - one_mean) * (other - other_mean)).mean() / max(spread, 1)
        contrast = contrast.clip(*_LIGHT) if spread > 4 else 1.0
        brightness = other_mean - contrast * one_mean
        residual = np.abs((contrast * luma + brightness).clip(low, high) - wanted)
        # The next round is not disturbed by what fits worst.
        close = used & (residual <= max(8, 2 * np.median(residual[used])))
        if close.sum() < _LIT_PIXELS:
            break
        used = close
    one, other = (pixels - luma[..., None])[used], (target - wanted[..., None])[used]
    power = np.square(one).sum()
    # Nearly grey pictures do not tell.
    coloured = power > 12 * used.sum()
    saturation = ((one * other).sum() / power / contrast).clip(*_LIGHT) if coloured else 1.0
    lit = (contrast * pixels + brightness).clip(low, high)
    grey = (lit @ _LUMA)[..., None]
    found: Array = (grey + saturation * (lit - grey)).clip(low, high).astype(np.float32)
    return found


def _worst_patch(differences: Array) -> float:
    """The largest norm of the mean over a patch of 3 x 3."""
    rows = differences[:-2] + differences[1:-1] + differences[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    # Channel by channel: numpy sums three numbers at a time ten times as slowly.
    luma, blue, red = np.moveaxis(np.square(sums), -1, 0)
    return float(np.sqrt((luma + blue + red).max()) / 9)
