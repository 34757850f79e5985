"""Rows in blocks of one size, so that a row's floats depend on the row alone.

A product of matrices is summed in an order that depends on its shape. A shard of 7 rows and one of
1 000 would differ in last digits, a tie among neighbours would fall out otherwise, and another
phantom would be planted.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BLOCK_ROWS", "by_blocks"]

Array = np.ndarray[Any, Any]

#: Rows per block, always padded to this.
BLOCK_ROWS = 256


def by_blocks(function: Callable[..., Array], *parts: Array) -> Array:
    """Apply a function of rows to blocks of `BLOCK_ROWS` rows, the last row repeated if need be.

    Parameters
    ----------
    function : callable
        Takes a block of each part, returns as many rows.
    parts : (N, ...), one at least

    Returns
    -------
    (N, ...)
        What the function returns, padding left out.
    """
    if not len(parts[0]):
        return function(*parts)
    found = []
    for start in range(0, len(parts[0]), BLOCK_ROWS):
        count = min(BLOCK_ROWS, len(parts[0]) - start)
        take = np.minimum(np.arange(start, start + BLOCK_ROWS), start + count - 1)
        found.append(function(*(part[take] for part in parts))[:count])
    return np.concatenate(found)
