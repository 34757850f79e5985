"""Lists and score tables from outside, looked up by 16-byte digests of their keys.

A file may have any number of rows: it is read a batch at a time and put down in sorted runs of
bounded size, which whoever looks something up maps into memory instead of loading.
"""

import contextlib
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from curate import storage
from curate.errors import InputError
from curate.formats import index
from curate.formats.sources import File, open_binary, readable, split_suffix

__all__ = [
    "DIGEST",
    "HASHES",
    "Runs",
    "digest",
    "find_key",
    "hash_bytes",
    "hash_whole",
    "is_hash",
    "list_columns",
    "read_batches",
    "read_lines",
    "sort_runs",
]

Array = np.ndarray[Any, Any]

#: What a key becomes: 128 bits, which two of a trillion keys share with a chance of 1e-15.
DIGEST = np.dtype("S16")
#: Digits of the hashes that keys may be.
HASHES = {"md5": 32, "sha256": 64}

_BATCH_ROWS = 1 << 16
#: Rows of a run: as digests 64 MB, as much again for two columns.
_RUN_ROWS = 1 << 22
_HASH_BYTES = 1 << 22
_HEX = re.compile(r"[0-9a-fA-F]*")


def hash_whole(file: File) -> str:
    """Return the digest of all of a file: of a list no line may change unseen."""
    content = hashlib.blake2b(digest_size=16)
    with open_binary(file.url) as opened:
        while data := opened.read(_HASH_BYTES):
            content.update(data)
    return content.hexdigest()


def _whole(name: str) -> contextlib.AbstractContextManager[None]:
    return readable(name, "a whole table of numbers by key", "Mend it or copy it again.")


def list_columns(file: File) -> dict[str, pa.DataType | None]:
    """Return a table's columns; types are known of Parquet alone.

    Raises
    ------
    InputError
        If it is not whole.
    """
    suffix = split_suffix(file.name)[1]
    with _whole(file.name), open_binary(file.url) as opened:
        if suffix == "parquet":
            return {field.name: field.type for field in pq.read_schema(opened)}
        if suffix == "jsonl":
            return dict.fromkeys(next(_objects(opened), {}))
        head = pa.csv.open_csv(opened, parse_options=_csv_form(suffix))
        return dict.fromkeys(head.schema.names)


def find_key(file: File, candidates: Sequence[str], values: Sequence[str] = ()) -> str:
    """Return the column that holds the keys, after checking that all columns are there.

    Parameters
    ----------
    file : File
        A table.
    candidates : sequence of str
        Names that it may have, best first.
    values : sequence of str
        Columns of numbers that it must have.

    Raises
    ------
    InputError
        If one is missing, or is not of numbers; the message names those that there are.
    """
    held = list_columns(file)
    shown = ", ".join(list(held)[:12]) or "none"
    key = index.find_name(held, candidates)
    lacking = [] if key else [" or ".join(candidates)]
    lacking += [name for name in values if name not in held]
    if lacking:
        raise InputError(
            f"{file.name}: must have the column {lacking[0]}; got {shown}. Correct the name, or "
            "the file."
        )
    for name in values:
        kind = held[name]
        if kind is not None and not _is_number(kind):
            raise InputError(f"{file.name}: {name} must hold numbers; got {kind}. Name another.")
    assert key is not None
    return key


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    )


def _csv_form(suffix: str) -> pa.csv.ParseOptions:
    delimiter = "\t" if suffix == "tsv" else ","
    return pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _objects(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in file:
        if line.strip():
            yield index.parse_json(line) or {}


def read_batches(
    file: File, key: str, values: Sequence[str] = ()
) -> Iterator[tuple[list[str | None], Array]]:
    """Yield a table's keys as text, and its numbers, a batch at a time.

    Parameters
    ----------
    file : File
    key : str
    values : sequence of str

    Yields
    ------
    keys : list of str or None, length B
    numbers : (B, C) float64
        NaN where there is none.

    Raises
    ------
    InputError
        If the table is not whole, or what should be numbers is not.
    """
    with _whole(file.name), open_binary(file.url) as opened:
        for table in _tables(opened, split_suffix(file.name)[1], key, values):
            keys = table[key].cast(pa.string()).to_pylist()
            numbers = np.full((len(keys), len(values)), np.nan)
            for place, name in enumerate(values):
                numbers[:, place] = table[name].cast(pa.float64()).to_numpy()
            yield keys, numbers


def _tables(file: BinaryIO, suffix: str, key: str, values: Sequence[str]) -> Iterator[pa.Table]:
    names = list(dict.fromkeys([key, *values]))
    if suffix == "parquet":
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=names):
            yield pa.table(batch)
    elif suffix == "jsonl":
        rows = _objects(file)
        while block := list(itertools.islice(rows, _BATCH_ROWS)):
            columns = [[row.get(name) for row in block] for name in names]
            texts = [None if one is None else str(one) for one in columns[0]]
            numbers = [pa.array(column, pa.float64(), from_pandas=True) for column in columns[1:]]
            yield pa.table([pa.array(texts, pa.string()), *numbers], names)
    else:
        kinds = {key: pa.string(), **{name: pa.float64() for name in values if name != key}}
        form = pa.csv.ConvertOptions(column_types=kinds, include_columns=names)
        for batch in pa.csv.open_csv(file, parse_options=_csv_form(suffix), convert_options=form):
            yield pa.table(batch)


def read_lines(file: File) -> Iterator[tuple[list[str | None], Array]]:
    """Yield the lines of a plain list, as `read_batches` does the keys of a table.

    Raises
    ------
    InputError
        If it is not UTF-8.
    """
    with _whole(file.name), open_binary(file.url) as opened:
        lines = io.TextIOWrapper(opened, "utf-8-sig")
        while block := list(itertools.islice(lines, _BATCH_ROWS)):
            yield list(block), np.zeros((len(block), 0))


def digest(texts: Sequence[str], kind: str, where: str) -> Array:
    """Return the digests of keys: (N,) of `DIGEST`.

    Parameters
    ----------
    texts : sequence of str
        Without white space around them, not empty.
    kind : str
        Key of `HASHES`, or what else they are.
    where : str
        Where they come from, for the error.

    Raises
    ------
    InputError
        If a hash is not one.
    """
    if kind not in HASHES:
        return _shorten(text.encode("utf-8", "surrogatepass") for text in texts)
    lowered = [text.lower() for text in texts]
    for text in lowered:
        if not is_hash(text, kind):
            raise InputError(
                f"{where}: a {kind} must be {HASHES[kind]} hex digits; got {text[:80]!r}. "
                "Correct it, or say what the list holds."
            )
    return _shorten(map(bytes.fromhex, lowered))


def is_hash(text: str, kind: str) -> bool:
    """Tell whether a text has the form of a hash, a key of `HASHES`."""
    return len(text) == HASHES[kind] and _HEX.fullmatch(text) is not None


def _shorten(keys: Iterable[bytes]) -> Array:
    raw = b"".join(hashlib.blake2b(key, digest_size=DIGEST.itemsize).digest() for key in keys)
    return np.frombuffer(raw, DIGEST)


def hash_bytes(data: bytes, kind: str) -> Array:
    """Return the digest of what a hash of `data` would be as a key: (1,) of `DIGEST`."""
    return _shorten([hashlib.new(kind, data, usedforsecurity=False).digest()])


def sort_runs(
    batches: Iterable[tuple[Array, Array]], folder: str, name: str, run_rows: int = _RUN_ROWS
) -> int:
    """Put keys and their numbers down in sorted runs; return how many keys there are.

    Parameters
    ----------
    batches : iterable of (keys, numbers)
        (B,) of `DIGEST` and (B, C) float64.
    folder, name : str
        Run i becomes FOLDER/NAME-i.keys.npy and, where C is not 0, NAME-i.numbers.npy.
    run_rows : int
        A run is ended by the batch that reaches this many rows.
    """
    total = number = held = 0
    parts: list[tuple[Array, Array]] = []

    def flush() -> None:
        keys = np.concatenate([keys for keys, _ in parts])
        order = np.argsort(keys, kind="stable")
        numbers = np.concatenate([numbers for _, numbers in parts])[order]
        target = storage.join(folder, f"{name}-{number:04d}")
        if numbers.shape[1]:
            storage.commit_array(f"{target}.numbers.npy", numbers)
        storage.commit_array(f"{target}.keys.npy", keys[order])

    for batch in batches:
        parts.append(batch)
        held += len(batch[0])
        total += len(batch[0])
        if held >= run_rows:
            flush()
            parts, held, number = [], 0, number + 1
    if held:
        flush()
    return total


@dataclass(frozen=True)
class Runs:
    """Sorted runs to look keys up in.

    Parameters
    ----------
    keys : tuple of (M,) of `DIGEST`
    numbers : tuple of (M, C) float64
        Empty where there are none.
    """

    keys: tuple[Array, ...]
    numbers: tuple[Array, ...] = ()

    @classmethod
    def open(cls, folder: str, name: str) -> "Runs":
        """Open the runs that `sort_runs` left of a file."""
        found = [n for n in storage.list_names(folder) if n.rpartition("-")[0] == name]
        paths = {
            kind: [storage.join(folder, n) for n in found if n.endswith(f".{kind}.npy")]
            for kind in ("keys", "numbers")
        }
        keys, numbers = (tuple(map(storage.read_array, paths[k])) for k in ("keys", "numbers"))
        return cls(keys, numbers)

    def holds(self, wanted: Array) -> Array:
        """Tell which of (N,) keys there are: (N,) bool."""
        found = np.zeros(len(wanted), bool)
        for keys in self.keys:
            places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found |= keys[places] == wanted
        return found

    def rows(self, wanted: Array) -> Iterator[tuple[Array, Array]]:
        """Yield places in (N,) keys and the numbers that a run has of them, repeats included.

        Yields
        ------
        places : (R,) int64
        numbers : (R, C) float64
        """
        for keys, numbers in zip(self.keys, self.numbers, strict=True):
            low, high = (np.searchsorted(keys, wanted, side) for side in ("left", "right"))
            times = high - low
            places = np.repeat(np.arange(len(wanted)), times)
            within = np.arange(len(places)) - np.repeat(np.cumsum(times) - times, times)
            yield places, np.asarray(numbers[np.repeat(low, times) + within])
