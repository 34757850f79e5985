"""Search among unit vectors by cosine: FAISS trains and assigns cells, torch multiplies.

On a GPU torch does all of it.

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
#: Rows per product, by device. On a CPU 1024 x 4096 bfloat16 stay in the second cache while they
#: are looked through; a GPU has a hundred times the cores to keep busy, and memory for the places
#: of all if all are near.
_QUERY_ROWS = {"cpu": 1024, "cuda": 4096}
_BASE_ROWS = {"cpu": 4096, "cuda": 16384}
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
    """

    stored: Array
    screen: torch.Tensor

    @classmethod
    def of(cls, vectors: Array) -> "Rows":
        """Prepare (N, D) floating vectors."""
        device = _device()
        kind = torch.bfloat16 if device == "cuda" else _fastest_type()
        screen = torch.empty(vectors.shape, dtype=kind, device=device)
        size = _BASE_ROWS[device]
        for start in range(0, len(vectors), size):
            part = slice(start, start + size)
            screen[part] = _unit_on(device, vectors[part])
        return cls(vectors, screen)

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, rows: Array) -> "Rows":
        """Return some rows, in the order asked for."""
        places = torch.from_numpy(np.asarray(rows, np.int64)).to(self.screen.device)
        return Rows(self.stored[rows], self.screen[places])


def _unit_on(device: str, vectors: Array) -> torch.Tensor:
    """Rows as `unit_rows` has them, but for the last digits."""
    if device == "cpu":
        return torch.from_numpy(unit_rows(vectors))
    # As stored, half as much has to be moved.
    rows = torch.from_numpy(np.require(vectors, requirements=["C", "W"])).to(device).float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0.0)


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
    for start in range(0, len(queries), _QUERY_ROWS[queries.screen.device.type]):
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
    device = queries.screen.device.type
    high, wide = _QUERY_ROWS[device], _BASE_ROWS[device]
    block = queries.screen[start : start + high]
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    values = [np.zeros(0, np.float32)]
    for other in range(0, len(base), wide):
        products = block @ base.screen[other : other + wide].T
        rows, columns = _places(products >= min_cosine - _SLACK[block.dtype])
        own = queries.stored[start : start + high]
        theirs = base.stored[other : other + wide]
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
    if near.is_cuda:  # where the matrix is, or moving it would take longer than computing it
        found = torch.nonzero(near.view(-1)).view(-1).cpu().numpy()
    else:
        found = np.flatnonzero(near.numpy())
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
