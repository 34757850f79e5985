"""How much a caption tells about its picture, whether or not it is the right one.

Boilerplate, the name of a collection or a single vague word fit hundreds of pictures. That is no
mismatch, and calls for another remedy: such a caption can be replaced, a wrong picture cannot.
"""

from typing import Any

import numpy as np

__all__ = ["score_information", "uniqueness"]

Array = np.ndarray[Any, Any]

#: Typical bits below this are rounding; what is measured by them would be too.
_LEAST_BITS = 1e-3


def uniqueness(sharing: Array, clusters: int) -> Array:
    """Information in a caption if pictures that share it cannot be told apart by it.

    Parameters
    ----------
    sharing : (N,) int, [1, clusters]
        Reference clusters that have this very caption, the asking one counted.
    clusters : int
        Reference clusters.

    Returns
    -------
    (N,) float64, [0, 1]
        `log(clusters / sharing) / log(clusters)`: 1 for a caption of its own, 0 for everybody's.
    """
    return np.log(clusters / np.asarray(sharing, np.float64)) / np.log(max(clusters, 2))


def score_information(bits: Array, typical: float, unique: Array) -> Array:
    """Tell how much captions say.

    Parameters
    ----------
    bits : (N,) floating
        How far a caption narrows down pictures under proxies that trained on neither: the loss of
        entropy from all reference pictures alike to a softmax over its cosines.
    typical : float
        Median of the bits.
    unique : (N,) floating, [0, 1]
        See `uniqueness`.

    Returns
    -------
    (N,) float64, [0, 1]
        The lower of both, the bits in units of the typical. Higher says more.
    """
    relative = np.clip(bits / max(typical, _LEAST_BITS), 0, 1)
    return np.minimum(relative, unique)
