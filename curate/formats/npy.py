"""Vectors alone: `.npy` files without anything that says what they are of."""

from curate.formats import index
from curate.formats.arrays import Pair, open_array
from curate.formats.index import Row, Scan
from curate.formats.sources import File, Source, check_name, split_suffix

__all__ = ["group", "open_vectors", "scan"]


def group(files: list[File]) -> list[Source]:
    """Return one source per file."""
    return [
        Source(check_name(file.name), file.url, "npy", file.size_bytes, (), (file,))
        for file in files
        if split_suffix(file.name)[1] == "npy"
    ]


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index one file: a sample's key is the number of its row, and it has no caption.

    Raises
    ------
    InputError
        If it does not hold vectors.
    """
    count = open_array(source.url, source.name).rows
    rows = [Row(str(number), row=number) for number in range(count)]
    return Scan(index.to_table(rows, source.name))


def open_vectors(source: Source, choice: str | None = None) -> Pair:
    """Open the vectors of one file; there is nothing to choose.

    Raises
    ------
    InputError
        If it does not hold vectors.
    """
    return Pair(open_array(source.url, source.name))
