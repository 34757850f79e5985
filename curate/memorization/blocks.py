"""Products of matrices whose floats depend on their row and column alone.

BLAS sums in an order that depends on the shape and, on processors without AVX512, on a row's place:
a row in another shard, or in another place of its shard, would differ in last digits, a tie among
neighbours would fall out otherwise, and another phantom would be planted. Sums that are exact have
no order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BLOCK_ROWS", "by_blocks", "exact_products"]

Array = np.ndarray[Any, Any]

#: Rows per block: what a function makes of them all is held at once.
BLOCK_ROWS = 256
#: Of a float64.
_BITS = 53


def by_blocks(function: Callable[..., Array], *parts: Array) -> Array:
    """Apply a function of rows to blocks of at most `BLOCK_ROWS` rows.

    Parameters
    ----------
    function : callable
        Takes a block of each part, returns as many rows.
    parts : (N, ...), one at least

    Returns
    -------
    (N, ...)
        What the function returns.
    """
    starts = range(0, max(1, len(parts[0])), BLOCK_ROWS)
    return np.concatenate(
        [function(*(part[start : start + BLOCK_ROWS] for part in parts)) for start in starts]
    )


def exact_products(columns: Array) -> Callable[[Array], Array]:
    """Return a function that multiplies rows by a matrix, in any order to the same last digit.

    Parameters
    ----------
    columns : (D, M) floating

    Returns
    -------
    callable
        (N, D) floating -> (N, M) float32.

    Notes
    -----
    Each row and each column is rounded to so many bits below the power of two above its largest
    entry that all of its products, and D of them added, fit into a float64: 21 bits of 1280
    numbers, which unit vectors' cosines feel as little as those of float32.
    """
    bits = (_BITS - int(np.ceil(np.log2(max(2, len(columns)))))) // 2
    other = _round(columns, 0, bits)

    def multiply(rows: Array) -> Array:
        found: Array = (_round(rows, 1, bits) @ other).astype(np.float32)
        return found

    return multiply


def _round(values: Array, axis: int, bits: int) -> Array:
    """Round to so many bits along an axis: float64."""
    wide = values.astype(np.float64)
    _, exponent = np.frexp(np.abs(wide).max(axis, keepdims=True, initial=0))
    step = np.ldexp(1.0, exponent - bits)
    wide /= step
    np.rint(wide, out=wide)
    wide *= step
    return wide
