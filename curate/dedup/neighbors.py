"""Search among unit vectors by cosine: FAISS trains and assigns cells, torch multiplies.

On a GPU torch does all of it.

Vectors come as stored (float16). A cosine is that of the stored rows, normalised again in float32,
so a threshold means the same at any storage precision. Products in bfloat16, six times as fast as
float32 where the processor has units for them, only sort out what cannot reach it.
"""

import timeit
from dataclasses import dataclass
from functools import cache, partial
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
#: The same on a GPU, which has a hundred times as much to keep busy: if all are near, their places
#: and cosines take 2 GB. And pairs whose cosines are computed at once.
_GPU_ROWS, _GPU_PAIRS = (4096, 16384), 1 << 18
#: Cosines of vectors with centroids that a GPU holds at once: 1 GB.
_MOST_COSINES = 1 << 28
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
    """Spherical k-means, on a GPU where there is one.

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
        Other ones on a GPU, as sums are taken in another order.
    """
    if _device() == "cuda":
        return _train_on_gpu(sample, cells, seed)
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _train_on_gpu(sample: Array, cells: int, seed: int) -> Array:
    """Lloyd's rounds; FAISS's GPU part needs a CUDA of its own beside torch's."""
    rows = torch.from_numpy(np.require(sample, np.float32, ["C", "W"])).cuda()
    first = np.random.default_rng(seed).permutation(len(sample))[:cells]
    centroids = rows[torch.from_numpy(first).cuda()]
    size = max(1, _MOST_COSINES // cells)
    for _ in range(_KMEANS_ROUNDS):
        home = torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(rows, size)])
        order, counts = home.argsort(stable=True), torch.bincount(home, minlength=cells)
        # Not by atomic additions, whose order differs from run to run.
        sums = torch.segment_reduce(rows[order], "sum", lengths=counts)
        norms = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        # A cell that nothing is nearest to stays where it is.
        centroids = torch.where(norms > 0, sums / norms, centroids)
    return centroids.cpu().numpy()


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
    if _device() == "cuda":
        cosines, cells = _nearest_on_gpu(vectors, centroids, most)
    else:
        faiss.omp_set_num_threads(threads)
        cosines, cells = faiss.knn(vectors, centroids, most, metric=faiss.METRIC_INNER_PRODUCT)
    detours = np.arange(most) * (cosines[:, :1] - cosines)
    return cells.T.astype(np.int32), np.ascontiguousarray(detours.T, np.float16)


def _nearest_on_gpu(vectors: Array, centroids: Array, most: int) -> tuple[Array, Array]:
    """Cosines and numbers of the nearest centroids, (N, most) each, nearest first."""
    columns = torch.from_numpy(centroids).cuda().T
    cosines = np.empty((len(vectors), most), np.float32)
    cells = np.empty((len(vectors), most), np.int64)
    size = max(1, _MOST_COSINES // len(centroids))
    for start in range(0, len(vectors), size):
        part = slice(start, start + size)
        found = (torch.from_numpy(vectors[part]).cuda() @ columns).topk(most)
        cosines[part], cells[part] = found.values.cpu().numpy(), found.indices.cpu().numpy()
    return cosines, cells


@dataclass(frozen=True)
class Rows:
    """Vectors ready to be searched.

    Parameters
    ----------
    stored : (N, D) floating
        Not necessarily of unit norm.
    screen : (N, D) torch.Tensor
        The same at unit norm, in the type and on the device that multiply fastest.
    exact : (N, D) torch.Tensor of float32, optional
        The same at unit norm, where that is a GPU.
    """

    stored: Array
    screen: torch.Tensor
    exact: torch.Tensor | None = None

    @classmethod
    def of(cls, vectors: Array) -> "Rows":
        """Prepare (N, D) floating vectors."""
        if _device() == "cuda":
            exact = _unit_on_gpu(vectors)
            return cls(vectors, exact.bfloat16(), exact)
        screen = torch.empty(vectors.shape, dtype=_fastest_type())
        for start in range(0, len(vectors), _BASE_ROWS):
            part = slice(start, start + _BASE_ROWS)
            screen[part] = torch.from_numpy(unit_rows(vectors[part]))
        return cls(vectors, screen)

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, rows: Array) -> "Rows":
        """Return some rows, in the order asked for."""
        places = torch.from_numpy(np.asarray(rows, np.int64)).to(self.screen.device)
        exact = None if self.exact is None else self.exact[places]
        return Rows(self.stored[rows], self.screen[places], exact)

    def part(self, start: int, count: int) -> "Rows":
        """Return at most `count` rows, which are not copied."""
        rows = slice(start, start + count)
        exact = None if self.exact is None else self.exact[rows]
        return Rows(self.stored[rows], self.screen[rows], exact)


def _unit_on_gpu(vectors: Array) -> torch.Tensor:
    # As stored, half as much has to be moved.
    rows = torch.from_numpy(np.require(vectors, requirements=["C", "W"])).cuda().float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0.0)


@cache
def _fastest_type() -> torch.dtype:
    """Measure, for a few milliseconds; the result of a search does not depend on it."""
    seconds = {}
    for kind in _SLACK:
        # Small, as what only emulates bfloat16 takes a hundred times as long for it.
        one, other = torch.ones(64, 512, dtype=kind), torch.ones(512, 256, dtype=kind)
        multiply = partial(torch.mm, one, other)
        seconds[kind] = min(timeit.repeat(multiply, number=1, repeat=4))
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
    high, wide = (_QUERY_ROWS, _BASE_ROWS) if queries.exact is None else _GPU_ROWS
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    cosines = [np.zeros(0, np.float32)]
    for start in range(0, len(queries), high):
        found = _block_pairs(queries.part(start, high), base, wide, min_cosine)
        if most is not None:
            found = nearest_pairs(*found, most)
        left.append(start + found[0])
        right.append(found[1])
        cosines.append(found[2])
    return np.concatenate(left), np.concatenate(right), np.concatenate(cosines)


def _block_pairs(
    block: Rows, base: Rows, wide: int, min_cosine: float
) -> tuple[Array, Array, Array]:
    near = _near if block.exact is None else _near_on_gpu
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    values = [np.zeros(0, np.float32)]
    for other in range(0, len(base), wide):
        rows, columns, cosines = near(block, base.part(other, wide), min_cosine)
        left.append(rows)
        right.append(other + columns)
        values.append(cosines)
    return np.concatenate(left), np.concatenate(right), np.concatenate(values)


def _near(block: Rows, base: Rows, min_cosine: float) -> tuple[Array, Array, Array]:
    products = block.screen @ base.screen.T
    rows, columns = _places(products >= min_cosine - _SLACK[products.dtype])
    own, theirs = block.stored, base.stored
    if len(rows) > _DENSE_SHARE * len(own) * len(theirs):
        own, theirs = _single(own), _single(theirs)
        rows, columns = _screen_again(own, theirs, min_cosine)
    cosines = _pair_cosines(own, theirs, rows, columns)
    reached = cosines >= np.float32(min_cosine)
    return rows[reached], columns[reached], cosines[reached]


def _near_on_gpu(block: Rows, base: Rows, min_cosine: float) -> tuple[Array, Array, Array]:
    """As above, and nothing but what is found leaves the GPU."""
    own, theirs = block.exact, base.exact
    assert own is not None
    assert theirs is not None
    near = block.screen @ base.screen.T >= min_cosine - _SLACK[block.screen.dtype]
    if near.sum() > _DENSE_SHARE * near.numel():
        products = own @ theirs.T
        places = torch.nonzero(products >= min_cosine)
        rows, columns = places.unbind(1)
        found = [rows, columns, products[rows, columns]]
    else:
        rows, columns = torch.nonzero(near).unbind(1)
        cosines = torch.empty(len(rows), device=rows.device)
        for first in range(0, len(rows), _GPU_PAIRS):
            part = slice(first, first + _GPU_PAIRS)
            cosines[part] = (own[rows[part]] * theirs[columns[part]]).sum(1)
        reached = cosines >= min_cosine
        found = [rows[reached], columns[reached], cosines[reached]]
    one, other, values = (part.cpu().numpy() for part in found)
    return one, other, values


def _places(near: torch.Tensor) -> tuple[Array, Array]:
    """Rows and columns of what is true in a matrix."""
    found = np.flatnonzero(near.numpy())
    rows, columns = np.divmod(found, near.shape[1])
    return rows, columns


def _screen_again(own: Array, theirs: Array, min_cosine: float) -> tuple[Array, Array]:
    """Find in float32 what may reach `min_cosine`, as bfloat16 did before.

    Where many pictures are of one kind it lets millions of pairs through that are a hair below.
    """
    one, other = (torch.from_numpy(unit_rows(rows)) for rows in (own, theirs))
    return _places(one @ other.T >= min_cosine - _SLACK[torch.float32])


def _pair_cosines(own: Array, theirs: Array, rows: Array, columns: Array) -> Array:
    cosines = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), _EXACT_PAIRS):
        part = slice(first, first + _EXACT_PAIRS)
        cosines[part] = exact_cosines(own[rows[part]], theirs[columns[part]])
    return cosines
