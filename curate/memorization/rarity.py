"""How alone a sample is, in both modalities."""

from typing import Any

import numpy as np

from curate.memorization.blocks import by_blocks, exact_products
from curate.memorization.evidence import highest

__all__ = ["RARE", "isolation", "rank_scale"]

Array = np.ndarray[Any, Any]

#: The rarest fifth counts as rare where rare and common samples are told apart.
RARE = 0.8


def isolation(
    image: Array,
    text: Array,
    clusters: Array,
    bank: tuple[Array, Array, Array],
    neighbour: int = 10,
) -> Array:
    """Mean over modalities of 1 - cosine to the nth nearest neighbour outside the cluster.

    Parameters
    ----------
    image : (N, D) float32, unit norm
    text : (N, E) float32, unit norm
    clusters : (N,) int64
    bank : ((B, D) float32, (B, E) float32, (B,) int64)
        Reference samples: image, text, clusters. The samples themselves may be among them.
    neighbour : int
        n; the farthest one where fewer lie outside the cluster.

    Returns
    -------
    (N,) float32, [0, 2]
        Higher is rarer; 2 where the bank holds nothing outside the cluster.
    """
    by_side = [exact_products(part.T) for part in bank[:2]]

    def alone(image: Array, text: Array, clusters: Array) -> Array:
        lines, columns = np.nonzero(clusters[:, None] == bank[2])
        outside = len(bank[2]) - np.bincount(lines, minlength=len(clusters))
        last = np.maximum(np.minimum(neighbour, outside) - 1, 0)[:, None]
        total = np.zeros(len(clusters), np.float32)
        for queries, multiply in zip((image, text), by_side, strict=True):
            cosines = multiply(queries)
            cosines[lines, columns] = -1
            nearest = np.take_along_axis(highest(cosines, neighbour), last, 1)
            total += 1 - np.take_along_axis(cosines, nearest, 1)[:, 0]
        return np.where(outside > 0, total / 2, np.float32(2))

    return by_blocks(alone, image, text, clusters)


def rank_scale(values: Array, reference: Array) -> Array:
    """Share of the reference below each value, ties counted half.

    Parameters
    ----------
    values : (N,) floating
    reference : (B,) floating
        Of samples drawn at random.

    Returns
    -------
    (N,) float32, [0, 1]
    """
    ordered = np.sort(reference)
    below = np.searchsorted(ordered, values, side="left")
    upto = np.searchsorted(ordered, values, side="right")
    return ((below + upto) / (2 * max(len(ordered), 1))).astype(np.float32)
