"""What measures over embeddings share: checks of their input, walks in blocks, and InfoNCE."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = [
    "NORM_TOLERANCE",
    "at_least",
    "blocks",
    "embeddings",
    "finite_row",
    "held_out_means",
    "info_nce",
    "matrix",
    "modalities",
    "pair",
    "parts",
    "positive",
    "same_samples",
    "width",
]

Array = np.ndarray[Any, Any]

#: float16 rows of unit norm are off by less than this.
NORM_TOLERANCE = 1e-3

#: Of the largest array in a block of rows.
_BLOCK_BYTES = 2**26


def embeddings(where: str, values: Array, dimensions: int | None = None) -> Array:
    """Check one array, of that many dimensions if given, and return it as (K, N, D)."""
    array = _plain(where, values)
    form = "(N, D)" if dimensions == 2 else "(N, D) or (K, N, D)"
    if array.ndim not in ({2, 3} if dimensions is None else {dimensions}):
        raise ValueError(f"{where}: must be {form}; got shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{where}: must hold at least one sample; got shape {array.shape}")
    array = array[None] if array.ndim == 2 else array
    for view in array:
        for part in parts(len(view), 8 * view.shape[1]):
            block = view[part].astype(np.float64)
            with np.errstate(over="ignore"):
                norms = np.sqrt(np.einsum("bd,bd->b", block, block))
            wrong = np.flatnonzero(~(abs(norms - 1) <= NORM_TOLERANCE))
            if len(wrong):
                row, norm = part.start + wrong[0], norms[wrong[0]]
                what = "finite" if not np.isfinite(norm) else f"of norm 1 within {NORM_TOLERANCE}"
                raise ValueError(
                    f"{where}: rows must be {what}; row {row} has norm {norm:.6g}; "
                    "divide rows by their norms and drop those that have none"
                )
    return array


def matrix(where: str, values: Array) -> Array:
    """Check one (N, D) array and return it as float32."""
    return embeddings(where, values, 2)[0].astype(np.float32, copy=False)


def width(where: str, array: Array, expected: int) -> None:
    """Check the length of rows."""
    if array.shape[-1] != expected:
        raise ValueError(f"{where}: must have width {expected}; got {array.shape[-1]}")


def pair(
    image: Array,
    text: Array,
    least: int = 1,
    shared: bool = True,
    where: tuple[str, str] = ("image", "text"),
) -> tuple[Array, Array]:
    """Check N images and N texts, of one width if `shared`, and return them as float32."""
    first, second = matrix(where[0], image), matrix(where[1], text)
    if len(first) != len(second) or len(first) < least:
        raise ValueError(
            f"{where[1]}: must hold as many rows as {where[0]}, at least {least}; "
            f"got {len(second)} and {len(first)}"
        )
    if shared and first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{where[1]}: must have width {first.shape[1]}, that of {where[0]}; "
            f"got {second.shape[1]}; use encoders that share a space (or lemon's pair_distance)"
        )
    return first, second


def modalities(where: str, given: Sequence[Array]) -> list[Array]:
    """Check the modalities of one model and return them as (K or 1, N, D)."""
    if len(given) < 2:
        raise ValueError(f"{where}: must hold at least 2 modalities; got {len(given)}")
    arrays = [embeddings(f"{where}[{i}]", array) for i, array in enumerate(given)]
    views = max(len(array) for array in arrays)
    for place, array in enumerate(arrays):
        if array.shape[1:] != arrays[0].shape[1:] or len(array) not in (1, views):
            raise ValueError(
                f"{where}[{place}]: must fit {where}[0] in samples, width and views "
                f"{arrays[0].shape[1:]}, {views}; got {array.shape[1:]}, {len(array)}"
            )
    return arrays


def held_out_means(where: str, held_out: Sequence[Array], samples: list[Array]) -> Array:
    """Check held-out samples against checked ones; mean of each modality, (n, D) float64."""
    arrays = modalities(where, held_out)
    if len(arrays) != len(samples):
        raise ValueError(f"{where}: must hold {len(samples)} modalities; got {len(arrays)}")
    width(where, arrays[0], samples[0].shape[2])
    return np.stack([array.mean((0, 1), dtype=np.float64) for array in arrays])


def finite_row(where: str, values: Array) -> Array:
    """Check one row of finite numbers and return it as float64."""
    array = _plain(where, values).astype(np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        finite = int(np.isfinite(array).sum())
        raise ValueError(
            f"{where}: must be (N,) and finite; got {array.shape} with {finite} finite"
        )
    return array


def same_samples(first: Array, second: Array) -> None:
    """Check that f's and g's results are as long as each other."""
    if len(first) != len(second):
        raise ValueError(
            f"both models: must hold the same samples; got {len(first)} in, {len(second)} out"
        )


def _plain(where: str, values: Array) -> Array:
    """Check that values are real numbers, all of them."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{where}: must not be masked; leave out the rows that are")
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where}: must hold real numbers; got {array.dtype}")
    return array


def positive(where: str, value: float) -> None:
    """Check a setting that float32 is divided by."""
    if not np.finfo(np.float32).tiny <= value < np.inf:
        raise ValueError(f"{where}: must be positive; got {value}")


def at_least(where: str, value: int, least: int) -> None:
    """Check a whole number that has a smallest value."""
    if not isinstance(value, int | np.integer):
        raise ValueError(f"{where}: must be a whole number; got {value}")
    if value < least:
        raise ValueError(f"{where}: must be at least {least}; got {value}")


def parts(number: int, row_bytes: int) -> Iterator[slice]:
    """Cut rows into parts of at most `_BLOCK_BYTES`."""
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, number, step):
        yield slice(start, min(start + step, number))


def blocks(arrays: list[Array]) -> Iterator[tuple[slice, list[Array]]]:
    """Walk the samples, a float64 block (K, B, D) of every modality at a time."""
    row_bytes = 8 * arrays[0].shape[2] * sum(len(array) for array in arrays)
    for part in parts(arrays[0].shape[1], row_bytes):
        yield part, [array[:, part].astype(np.float64) for array in arrays]


def info_nce(
    pair: tuple[Array, Array], bank: tuple[Array, Array], temperature: float, rows: Array
) -> Array:
    """Mean loss of both directions, without the bank's `rows` as negatives (-1: none): (N,)."""
    own = np.einsum("nd,nd->n", *pair, dtype=np.float64) / temperature
    result = np.zeros(len(own))
    for queries, references in ((pair[0], bank[1]), (pair[1], bank[0])):
        for part in parts(len(own), 4 * len(references)):
            logits = queries[part] @ references.T
            logits /= np.float32(temperature)
            lines = np.flatnonzero(rows[part] >= 0)
            logits[lines, rows[part][lines]] = -np.inf
            top = logits.max(1)
            logits -= top[:, None]
            others = np.log(np.exp(logits, out=logits).sum(1, dtype=np.float64)) + top
            result[part] += np.logaddexp(others, own[part]) - own[part]
    return result / 2
