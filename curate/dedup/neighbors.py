"""Search among unit vectors by cosine: FAISS trains and assigns cells, torch multiplies.

Vectors come as stored (float16). A cosine is that of the stored rows, normalised again in float32,
so a threshold means the same at any storage precision. Products in bfloat16, six times as fast as
float32 where the processor has units for them, only sort out what cannot reach it.
"""

import time
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import faiss
import numpy as np
import torch

from curate.dedup.groups import nearest_pairs

__all__ = [
    "Rows",
    "assign_cells",
    "exact_cosines",
    "pairs_within",
    "row_digests",
    "train_centroids",
    "unit_rows",
]

Array = np.ndarray[Any, Any]

_KMEANS_ROUNDS = 10
#: Rows per product: 1024 x 4096 bfloat16 stay in the second cache while they are looked through.
_QUERY_ROWS, _BASE_ROWS = 1024, 4096
#: Pairs whose cosines are computed at once: 16 k of 1280 float32 are 160 MB for both sides.
_EXACT_PAIRS = 16384
#: Share of a block's pairs that pass the screen above which the whole block is multiplied in
#: float32, which costs as much as the cosines of a hundredth of its pairs.
_DENSE_SHARE = 0.01
#: What a product of unit vectors may be off by. Rounding to bfloat16 (8 significant bits) is off by
#: at most 2**-8 of every entry of both factors and of the result; by Cauchy and Schwarz 3 * 2**-8
#: in all.
_SLACK = {torch.bfloat16: 0.012, torch.float32: 1e-5}


def unit_rows(vectors: Array) -> Array:
    """Return rows as float32 of unit norm; rows of zeros stay zero.

    Parameters
    ----------
    vectors : (N, D) floating
    """
    rows = _single(vectors)
    norms = np.sqrt(np.vecdot(rows, rows))[:, None]
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def row_digests(vectors: Array) -> Array:
    """Digest rows: (N,) S32, equal for rows of equal bits.

    Parameters
    ----------
    vectors : (N, D) any dtype
    """
    rows = np.ascontiguousarray(vectors).view(np.uint8).reshape(len(vectors), -1)
    return np.array([blake2b(row.data, digest_size=16).hexdigest() for row in rows], "S32")


def train_centroids(sample: Array, cells: int, seed: int, threads: int = 1) -> Array:
    """Spherical k-means.

    Parameters
    ----------
    sample : (M, D) float32, unit norm
    cells : int
        At most M.
    seed : int
    threads : int

    Returns
    -------
    (cells, D) float32, unit norm
    """
    faiss.omp_set_num_threads(threads)
    clustering = faiss.Kmeans(
        sample.shape[1],
        cells,
        niter=_KMEANS_ROUNDS,
        spherical=True,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    clustering.train(np.ascontiguousarray(sample, dtype=np.float32))
    return np.asarray(clustering.centroids, dtype=np.float32)


def assign_cells(
    vectors: Array, centroids: Array, most: int, threads: int = 1
) -> tuple[Array, Array]:
    """Find the nearest cells of each vector, and how far out of the way each is.

    Parameters
    ----------
    vectors : (N, D) float32, unit norm
    centroids : (C, D) float32, unit norm
    most : int
        Cells wanted.

    Returns
    -------
    cells : (min(most, C), N) int32
        Nearest first: row 0 holds the homes.
    detours : (min(most, C), N) float16
        Place in the list times the cosine given up against the home: 0 there, rising. Of place
        alone, cosine alone, distance to the border and ratio of distances, none finds as many pairs
        with as little work.
    """
    most = min(most, len(centroids))
    faiss.omp_set_num_threads(threads)
    cosines, cells = faiss.knn(vectors, centroids, most, metric=faiss.METRIC_INNER_PRODUCT)
    detours = np.arange(most) * (cosines[:, :1] - cosines)
    return cells.T.astype(np.int32), np.ascontiguousarray(detours.T, np.float16)


@dataclass(frozen=True)
class Rows:
    """Vectors ready to be searched.

    Parameters
    ----------
    stored : (N, D) floating
        Not necessarily of unit norm.
    screen : (N, D) torch.Tensor
        The same at unit norm, in the type and on the device that multiply fastest.
    """

    stored: Array
    screen: torch.Tensor

    @classmethod
    def of(cls, vectors: Array) -> "Rows":
        """Prepare (N, D) floating vectors."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = torch.bfloat16 if device == "cuda" else _fastest_type()
        screen = torch.empty(vectors.shape, dtype=kind, device=device)
        for start in range(0, len(vectors), _BASE_ROWS):
            part = slice(start, start + _BASE_ROWS)
            screen[part] = torch.from_numpy(unit_rows(vectors[part]))
        return cls(vectors, screen)

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, rows: Array) -> "Rows":
        """Return some rows, in the order asked for."""
        places = torch.from_numpy(np.asarray(rows, np.int64)).to(self.screen.device)
        return Rows(self.stored[rows], self.screen[places])


@cache
def _fastest_type() -> torch.dtype:
    """Measure, for a few milliseconds; the result of a search does not depend on it."""
    seconds = {}
    for kind in _SLACK:
        one, other = torch.ones(256, 512, dtype=kind), torch.ones(512, 1024, dtype=kind)
        torch.mm(one, other)
        begun = time.perf_counter()
        for _ in range(3):
            torch.mm(one, other)
        seconds[kind] = time.perf_counter() - begun
    return min(seconds, key=lambda kind: seconds[kind])


def exact_cosines(left: Array, right: Array) -> Array:
    """Return cosines of pairs of vectors, each independent of all others: (E,) float32.

    Parameters
    ----------
    left, right : (E, D) floating
        Either may be one row, (1, D), for all of the other.
    """
    one, other = _single(left), _single(right)
    norms = np.sqrt(np.vecdot(one, one) * np.vecdot(other, other))
    products = np.vecdot(one, other)
    found: Array = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return found


def _single(vectors: Array) -> Array:
    """(N, D) float32; torch converts float16 several times faster than numpy."""
    # torch must not be handed what cannot be written, such as a mapped file.
    writable = np.require(vectors, requirements=["C", "W"])
    return torch.from_numpy(writable).float().numpy()


def pairs_within(
    queries: Rows, base: Rows, min_cosine: float, most: int | None = None
) -> tuple[Array, Array, Array]:
    """Return all pairs whose cosine reaches `min_cosine`.

    Parameters
    ----------
    queries : Rows of (Q, D)
    base : Rows of (M, D)
    min_cosine : float
    most : int, optional
        Of a query's pairs, only so many of the highest cosine.

    Returns
    -------
    query_rows, base_rows : (E,) int64
    cosines : (E,) float32
    """
    left, right, cosines = [], [], []
    for start in range(0, len(queries), _QUERY_ROWS):
        found = _block_pairs(queries, base, start, min_cosine)
        if most is not None:
            found = nearest_pairs(*found, most)
        left.append(found[0])
        right.append(found[1])
        cosines.append(found[2])
    if not left:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(left), np.concatenate(right), np.concatenate(cosines)


def _block_pairs(
    queries: Rows, base: Rows, start: int, min_cosine: float
) -> tuple[Array, Array, Array]:
    block = queries.screen[start : start + _QUERY_ROWS]
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    values = [np.zeros(0, np.float32)]
    for other in range(0, len(base), _BASE_ROWS):
        products = block @ base.screen[other : other + _BASE_ROWS].T
        rows, columns = _places(products >= min_cosine - _SLACK[block.dtype])
        own = queries.stored[start : start + _QUERY_ROWS]
        theirs = base.stored[other : other + _BASE_ROWS]
        if len(rows) > _DENSE_SHARE * len(own) * len(theirs):
            own, theirs = _single(own), _single(theirs)
            rows, columns = _screen_again(own, theirs, block.device, min_cosine)
        cosines = _pair_cosines(own, theirs, rows, columns)
        reached = cosines >= np.float32(min_cosine)
        left.append(start + rows[reached])
        right.append(other + columns[reached])
        values.append(cosines[reached])
    return np.concatenate(left), np.concatenate(right), np.concatenate(values)


def _places(near: torch.Tensor) -> tuple[Array, Array]:
    """Rows and columns of what is true in a matrix."""
    found = np.flatnonzero(near.cpu().numpy())
    rows, columns = np.divmod(found, near.shape[1])
    return rows, columns


def _screen_again(
    own: Array, theirs: Array, device: torch.device, min_cosine: float
) -> tuple[Array, Array]:
    """Find in float32 what may reach `min_cosine`, as bfloat16 did before.

    Where many pictures are of one kind it lets millions of pairs through that are a hair below.
    """
    one, other = (torch.from_numpy(unit_rows(rows)).to(device) for rows in (own, theirs))
    return _places(one @ other.T >= min_cosine - _SLACK[torch.float32])


def _pair_cosines(own: Array, theirs: Array, rows: Array, columns: Array) -> Array:
    cosines = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), _EXACT_PAIRS):
        part = slice(first, first + _EXACT_PAIRS)
        cosines[part] = exact_cosines(own[rows[part]], theirs[columns[part]])
    return cosines
