"""Copies among candidates and held-out pairs: what must not be held out, and what is seen often."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from curate.audit.panel import IMAGE_BATCH, MAX_PIXELS, Panel
from curate.config import load_pipeline
from curate.dedup.groups import label_components
from curate.formats.pixels import decode, make_thumbnail, read_thumbnail
from curate.stages.dedup import Dedup

if TYPE_CHECKING:
    from curate.models.encoders import Encoder

__all__ = ["Copies", "Looks", "find_copies", "look_at"]

Array = np.ndarray[Any, Any]

_THUMBNAIL_PX = 128
#: Candidates held at once.
_CHUNK = 1024
#: How a held-out picture is found among the candidates, the surest first.
_EVIDENCE = ("bytes", "pixels", "near-duplicate")


@dataclass
class Looks:
    """What is needed to tell whether two pictures are the same.

    Parameters
    ----------
    valid : (N,) bool
        Whether the picture could be decoded.
    sha256 : list of str
        Of the file's bytes; "" where there are none.
    pixels : list of str
        Hash of the decoded pixels; "" where there are none.
    thumbnails : list of bytes
    vectors : (N, D) float32, unit norm, or None
        None without an encoder.
    """

    valid: Array
    sha256: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    vectors: Array | None = None

    def take(self, rows: Array) -> "Looks":
        """Return those of some samples, in the order asked for."""
        columns = [
            [column[row] for row in rows.tolist()]
            for column in (self.sha256, self.pixels, self.thumbnails)
        ]
        vectors = None if self.vectors is None else self.vectors[rows]
        return Looks(self.valid[rows], columns[0], columns[1], columns[2], vectors)


def look_at(panel: Panel, encoder: "Encoder | None") -> Looks:
    """Decode the panel's pictures once."""
    from curate.models.encoders import Precision, embed_pictures, torch_threads
    from curate.models.precision import pick_device, pick_dtype

    # What finds copies may be rough, and is the dearest part: this runs five times as fast.
    precision = Precision(pick_dtype(pick_device()), channels_last=True)
    working_px = max(_THUMBNAIL_PX, encoder.image_px if encoder else 0)
    found = Looks(np.zeros(len(panel), bool))

    def look() -> Iterator[Array | None]:
        for row, data in enumerate(panel.read()):
            picture = decode(data, MAX_PIXELS, working_px).image if data else None
            found.sha256.append(hashlib.sha256(data).hexdigest() if data else "")
            found.pixels.append("" if picture is None else _hash_pixels(picture))
            small = b"" if picture is None else make_thumbnail(picture, _THUMBNAIL_PX)
            found.thumbnails.append(small)
            found.valid[row] = picture is not None
            yield None if picture is None or encoder is None else encoder.prepare(picture)

    if encoder is None:
        deque(look(), maxlen=0)
        return found
    with torch_threads(1):
        found.vectors, _ = embed_pictures(encoder, look(), len(panel), IMAGE_BATCH, precision)
    return found


def _hash_pixels(picture: Image.Image) -> str:
    digest = hashlib.blake2b(repr(picture.size).encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Copies:
    """What `find_copies` found.

    Parameters
    ----------
    overlap : dict of int to str
        By row of the held-out panel, how it is among the candidates: `bytes`, else `pixels`, else
        `near-duplicate`. By content alone: of two inputs, both may have a 000.jpg.
    seen : (N,) int64
        How many of all candidates show what a candidate of the panel shows, itself included.
    clusters : (N,) str
        Duplicate cluster within the panel: the first member's uid.
    """

    overlap: dict[int, str]
    seen: Array
    clusters: Array


def find_copies(
    everything: Panel,
    chosen: tuple[Panel, Looks],
    held_out: tuple[Panel, Looks],
    encoder: "Encoder | None",
    advance: Callable[[int], None] = lambda _: None,
) -> Copies:
    """Compare all candidates, some at a time, with a panel of them and with held-out pairs.

    Two pictures are copies by what `dedup` of the pipeline `offline` says; without an encoder, if
    their bytes or pixels are equal.

    Parameters
    ----------
    everything : Panel
        All candidates.
    chosen, held_out : (Panel, Looks)
        A part of the candidates, and what must be none of them.
    encoder : Encoder or None
        Of the vectors in both Looks.
    advance : callable
        Is told how many candidates were compared.
    """
    panels, known = (chosen[0], held_out[0]), (chosen[1], held_out[1])
    border = len(panels[0])
    same = [_places(known[0].sha256 + known[1].sha256), _places(known[0].pixels + known[1].pixels)]
    seen = np.zeros(border, np.int64)
    own = {uid: row for row, uid in enumerate(panels[0].uids)}
    edges: list[tuple[int, int]] = []
    ranks: dict[int, int] = {}
    for part, looks in _walk(everything, chosen, encoder):
        by_evidence = (
            _equal(looks.sha256, same[0]),
            _equal(looks.pixels, same[1]),
            _near(looks, known),
        )
        for rank, pairs in enumerate(by_evidence):
            for _, place in pairs:
                if place >= border:
                    ranks[place - border] = min(rank, ranks.get(place - border, rank))
        names = part.uids
        for row, place in {pair for pairs in by_evidence for pair in pairs}:
            if place < border:
                seen[place] += 1
                if names[row] in own:
                    edges.append((own[names[row]], place))
        advance(len(part))
    clusters = np.array(panels[0].uids, str)[_label(border, edges)]
    overlap = {row: _EVIDENCE[rank] for row, rank in sorted(ranks.items())}
    return Copies(overlap, np.maximum(seen, 1), clusters)


def _walk(
    everything: Panel, chosen: tuple[Panel, Looks], encoder: "Encoder | None"
) -> Iterator[tuple[Panel, Looks]]:
    """Yield all candidates in parts: those of the panel, which were looked at, then the others."""
    panel, looks = chosen
    for part in _slices(len(panel), _CHUNK):
        rows = np.arange(len(panel))[part]
        yield panel.take(rows), looks.take(rows)
    known = set(panel.uids)
    rest = np.flatnonzero([uid not in known for uid in everything.uids])
    for part in _slices(len(rest), _CHUNK):
        others = everything.take(rest[part])
        yield others, look_at(others, encoder)


def _slices(count: int, size: int) -> Iterator[slice]:
    """Cut rows into parts of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _label(count: int, edges: list[tuple[int, int]]) -> Array:
    ends = np.array(edges, np.int64).reshape(-1, 2)
    return label_components(count, ends[:, 0], ends[:, 1], np.arange(count))


def _places(values: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        found.setdefault(value, []).append(place)
    return found


def _equal(column: list[str], places: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Pairs of a row and a place of the same value; "" is none."""
    return [
        (row, place) for row, value in enumerate(column) if value for place in places.get(value, ())
    ]


def _near(looks: Looks, known: tuple[Looks, Looks]) -> list[tuple[int, int]]:
    """Pairs of a row and a place among the known that show the same picture."""
    if looks.vectors is None or known[0].vectors is None or known[1].vectors is None:
        return []
    from curate.dedup.neighbors import Rows, pairs_within

    judge = _judge()
    own = np.flatnonzero(looks.valid)
    valid = np.concatenate([one.valid for one in known])
    others = np.flatnonzero(valid)
    if not len(own) or not len(others):
        return []
    base = Rows.of(np.concatenate([known[0].vectors, known[1].vectors])[others])
    left, right, _ = pairs_within(Rows.of(looks.vectors[own]), base, judge.min_cosine)
    left, right = own[left], others[right]
    thumbnails = known[0].thumbnails + known[1].thumbnails

    @lru_cache(maxsize=4096)
    def read(number: int) -> Image.Image:
        mine = number < len(looks.thumbnails)
        data = looks.thumbnails[number] if mine else thumbnails[number - len(looks.thumbnails)]
        return read_thumbnail(data)

    sure = judge.confirm(left, right + len(looks.thumbnails), read)
    return list(zip(left[sure].tolist(), right[sure].tolist(), strict=True))


@lru_cache(maxsize=1)
def _judge() -> Dedup:
    stages = load_pipeline("offline", [("ingest", "inputs", ("-",))]).stages
    return next(stage for stage in stages if isinstance(stage, Dedup))
