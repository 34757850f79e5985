"""Retrieval among held-out pairs: arrays in, arrays out."""

from typing import Any

import numpy as np

__all__ = ["RETRIEVED", "hits_at"]

Array = np.ndarray[Any, Any]

#: As many answers are looked at.
RETRIEVED = 10


def hits_at(queries: Array, targets: Array, captions: Array, count: int = RETRIEVED) -> Array:
    """Tell whether a right target is among the nearest.

    Parameters
    ----------
    queries, targets : (N, W) floating, unit norm
    captions : (N,) str, or (N,) int64 codes
        A target whose pair has an equal caption is right.
    count : int

    Returns
    -------
    (N,) bool
    """
    nearest = np.argsort(-(queries @ targets.T), axis=1, kind="stable")[:, :count]
    found: Array = (captions[nearest] == captions[:, None]).any(1)
    return found
