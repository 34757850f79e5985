"""Search among unit vectors by cosine; the only place that imports FAISS.

Vectors come as stored (float16) and are compared in float32 after normalising again, so that a
threshold means the same at any storage precision.
"""

from hashlib import blake2b
from typing import Any

import faiss
import numpy as np

__all__ = ["assign_cells", "nearest", "pairs_within", "row_digests", "train_centroids", "unit_rows"]

Array = np.ndarray[Any, Any]

#: Rows per call of a range search: bounds the result buffers that FAISS holds at once.
_BLOCK_ROWS = 4096
_KMEANS_ROUNDS = 10


def unit_rows(vectors: Array) -> Array:
    """Return rows as float32 of unit norm; rows of zeros stay zero.

    Parameters
    ----------
    vectors : (N, D) floating
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
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


def assign_cells(vectors: Array, centroids: Array, probes: int, threads: int = 1) -> Array:
    """Return the `probes` nearest cells of each vector, nearest first: (N, probes) int32."""
    _, cells = nearest(vectors, centroids, min(probes, len(centroids)), threads)
    return cells.astype(np.int32)


def nearest(queries: Array, base: Array, count: int, threads: int = 1) -> tuple[Array, Array]:
    """Exact nearest neighbours by cosine.

    Parameters
    ----------
    queries : (Q, D) float32, unit norm
    base : (M, D) float32, unit norm
    count : int
        At most M.

    Returns
    -------
    cosines : (Q, count) float32, descending
    rows : (Q, count) int64
        Rows of `base`.
    """
    faiss.omp_set_num_threads(threads)
    cosines, rows = faiss.knn(
        np.ascontiguousarray(queries, dtype=np.float32),
        np.ascontiguousarray(base, dtype=np.float32),
        count,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    return cosines, rows


def pairs_within(
    queries: Array, base: Array, min_cosine: float, threads: int = 1
) -> tuple[Array, Array, Array]:
    """Return all pairs whose cosine reaches `min_cosine`.

    Parameters
    ----------
    queries : (Q, D) float32, unit norm
    base : (M, D) float32, unit norm
    min_cosine : float

    Returns
    -------
    query_rows, base_rows : (E,) int64
    cosines : (E,) float32
    """
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base, dtype=np.float32))
    # FAISS keeps what is strictly above its radius; the threshold itself counts as reached.
    radius = float(np.nextafter(np.float32(min_cosine), np.float32(-2)))
    left, right, cosines = [], [], []
    for start in range(0, len(queries), _BLOCK_ROWS):
        block = np.ascontiguousarray(queries[start : start + _BLOCK_ROWS], dtype=np.float32)
        limits, found, rows = index.range_search(block, radius)
        left.append(np.repeat(np.arange(start, start + len(block)), np.diff(limits.astype(int))))
        right.append(rows.astype(np.int64))
        cosines.append(found)
    if not left:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(left), np.concatenate(right), np.concatenate(cosines)
