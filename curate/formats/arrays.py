"""Vectors in NumPy files: what the layouts that hold embeddings share."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.errors import InputError
from curate.formats.sources import Source, first_line, open_binary, rows_changed

__all__ = ["Pair", "Stored", "list_arrays", "no_images", "normalise", "open_array"]

Array = np.ndarray[Any, Any]

#: Rows normalised at once: 4096 of 1024 numbers are 32 MB as float64.
_BLOCK_ROWS = 4096
_UNREADABLE = (
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
    tokenize.TokenError,  # NumPy's second try at a header that is no Python
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Stored:
    """An array of vectors of which only the header has been read.

    Parameters
    ----------
    name : str
        The file, and the array within it, for error messages.
    url : str
    member : str or None
        Name of the array within a `.npz`.
    rows, width : int
        N and D of its shape.
    """

    name: str
    url: str
    member: str | None
    rows: int
    width: int

    def take(self, rows: Array) -> Array:
        """Return some rows, in the order asked: (M, D) floating, as stored.

        Of a `.npy` what lies between the first and the last of them is read, of a `.npz` the
        whole array.

        Raises
        ------
        SourceChangedError
            If the file is gone or no longer holds the rows.
        """
        try:
            if self.member is None:
                first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
                return np.asarray(storage.read_array_rows(self.url, first, end)[rows - first])
            with open_binary(self.url) as file, np.load(file, allow_pickle=False) as arrays:
                return np.asarray(arrays[self.member][rows])
        except (*_UNREADABLE, OSError) as error:
            raise rows_changed(self.name) from error


@dataclass(frozen=True)
class Pair:
    """Vectors of images and, where there are any, of their captions, row by row."""

    image: Stored
    text: Stored | None = None


def open_array(url: str, name: str, member: str | None = None) -> Stored:
    """Read the header of a `.npy` file, or of one array in a `.npz`.

    Raises
    ------
    InputError
        If it is not whole, or not (N, D) of floating numbers.
    SourceChangedError
        If the file is gone.
    """
    shown = name if member is None else f"{name}: {member}"
    try:
        with open_binary(url) as file:
            if member is None:
                shape, dtype, is_whole = _read_header(file, file.seek(0, 2))
            else:
                with zipfile.ZipFile(file) as archive:
                    held = archive.getinfo(f"{member}.npy")
                    with archive.open(held) as inner:
                        shape, dtype, is_whole = _read_header(inner, held.file_size)
    except (*_UNREADABLE, OSError) as error:
        raise InputError(
            f"{shown}: must be a whole NumPy array; cannot be read: {first_line(error)}. "
            "Copy it again."
        ) from error
    if dtype.kind != "f":
        got = "pickled objects" if dtype.hasobject else str(dtype)
        raise InputError(f"{shown}: must hold floating numbers; got {got}. Save it as float16.")
    if len(shape) != 2 or shape[1] == 0:
        raise InputError(
            f"{shown}: must be of shape (samples, numbers per vector); got {shape}. Reshape it."
        )
    if not is_whole:
        raise InputError(f"{shown}: must be whole; it is cut short. Copy it again.")
    return Stored(shown, url, member, shape[0], shape[1])


def list_arrays(url: str, name: str) -> list[str]:
    """Return the names of the arrays in a `.npz`.

    Raises
    ------
    InputError
        If it is not whole.
    SourceChangedError
        If it is gone.
    """
    try:
        with open_binary(url) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (*_UNREADABLE, OSError) as error:
        raise InputError(
            f"{name}: must be a whole .npz; cannot be read: {first_line(error)}. Copy it again."
        ) from error
    return sorted(one.removesuffix(".npy") for one in names if one.endswith(".npy"))


def _read_header(file: Any, size_bytes: int) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Return shape, type, and whether the data is as long as they say."""
    if file.tell():
        file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:  # written for field names alone, which vectors have none of
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    shape, _, dtype = read(file)
    need_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return shape, dtype, file.tell() + need_bytes <= size_bytes


def normalise(vectors: Array) -> tuple[Array, Array]:
    """Bring vectors to unit norm.

    Parameters
    ----------
    vectors : (N, D) floating

    Returns
    -------
    unit : (N, D) float16, unit norm
        Zeros where there is no vector.
    valid : (N,) bool
        False for rows of zeros, and rows that hold a NaN or an infinity.
    """
    unit = np.zeros(vectors.shape, np.float16)
    valid = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        rows = vectors[part].astype(np.float64)
        # By the largest number first: squares of what float64 holds may overflow.
        largest = np.abs(rows).max(axis=1)
        valid[part] = good = np.isfinite(largest) & (largest > 0)
        scaled = rows[good] / largest[good, None]
        unit[part][good] = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    return unit, valid


def no_images(source: Source, rows: pa.Table) -> Iterator[bytes | None]:
    """Yield None for every row: such layouts hold no images."""
    yield from (None for _ in range(len(rows)))
