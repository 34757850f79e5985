"""DataComp's metadata (Parquet without images, a `.npz` of vectors beside it) and its subsets.

A subset is a sorted `.npy` of uids as two 64-bit numbers; one that comes twice is taken twice.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from curate import storage
from curate.errors import InputError
from curate.formats import arrays, index
from curate.formats.arrays import Pair, open_array
from curate.formats.index import Scan
from curate.formats.parquet import scan_rows
from curate.formats.sources import File, Source, check_name, list_folder, parent, split_suffix

__all__ = [
    "CHOICES",
    "SUBSET",
    "find_stems",
    "group",
    "has_vectors",
    "open_vectors",
    "pack_subset",
    "scan",
]

#: What DataComp's resharder searches in.
SUBSET = np.dtype("u8,u8")

#: What may be chosen, the default first: arrays of images and of captions. `dedup` is a descriptor
#: made to find copies (ISC), of images alone.
CHOICES: dict[str, tuple[str, str | None]] = {
    "l14": ("l14_img", "l14_txt"),
    "b32": ("b32_img", "b32_txt"),
    "dedup": ("dedup", None),
}


def find_stems(names: Iterable[str]) -> set[str]:
    """Return the names, without suffix, of which there are a `.parquet` and a `.npz`."""
    stems: dict[str, set[str]] = {"parquet": set(), "npz": set()}
    for name in names:
        stem, suffix = split_suffix(name)
        if suffix in stems:
            stems[suffix].add(stem)
    return stems["parquet"] & stems["npz"]


def has_vectors(files: list[File]) -> bool:
    """Tell whether the first of some Parquet files has vectors beside it, named as input or not."""
    first = next(file for file in files if split_suffix(file.name)[1] == "parquet")
    return storage.exists(split_suffix(first.url)[0] + ".npz")


def _base(url: str) -> str:
    return split_suffix(url)[0].rpartition("/")[2]


def group(files: list[File]) -> list[Source]:
    """Return one source per Parquet file.

    Raises
    ------
    InputError
        If there are no vectors beside one.
    """
    sources = []
    beside: dict[str, dict[str, File]] = {}
    for file in files:
        if split_suffix(file.name)[1] != "parquet":
            continue
        folder = parent(file.url)
        if folder not in beside:
            beside[folder] = list_folder(folder)
        vectors = beside[folder].get(f"{_base(file.url)}.npz")
        if vectors is None:
            raise InputError(
                f"{file.name}: must have {_base(file.url)}.npz beside it; there is none. "
                "Copy it there."
            )
        size_bytes = file.size_bytes + vectors.size_bytes
        name = check_name(file.name)
        sources.append(Source(name, file.url, "datacomp", size_bytes, (), (file, vectors)))
    return sources


def scan(source: Source, uid_column: str | None = None, caption_column: str | None = None) -> Scan:
    """Index one Parquet file.

    Parameters
    ----------
    source : Source
    uid_column, caption_column : str, optional
        Columns that identify a sample, and that hold its caption.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    table = (source.url, source.name)
    return scan_rows(source, table, (*index.KEY_NAMES, "uid"), uid_column, caption_column)


def open_vectors(source: Source, choice: str | None = None) -> Pair:
    """Open the chosen vectors of one file.

    Parameters
    ----------
    source : Source
    choice : str, optional
        Key of `CHOICES`; default: the first that there is.

    Raises
    ------
    InputError
        If the arrays are not there, or are not vectors.
    """
    url, name = (split_suffix(one)[0] + ".npz" for one in (source.url, source.name))
    held = arrays.list_arrays(url, name)
    wanted = list(CHOICES) if choice is None else [choice]
    found = next((one for one in wanted if CHOICES[one][0] in held), None)
    if found is None:
        needed = " or ".join(CHOICES[one][0] for one in wanted)
        there = [one for one in CHOICES if CHOICES[one][0] in held]
        advice = f"Set vectors to {' or '.join(there)}" if there else "Copy it again"
        raise InputError(
            f"{name}: must hold {needed}; got {', '.join(held[:8]) or 'nothing'}. {advice}."
        )
    image, text = CHOICES[found]
    has_text = text is not None and text in held
    return Pair(open_array(url, name, image), open_array(url, name, text) if has_text else None)


def pack_subset(uids: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return uids of 32 hex digits as DataComp's resharder reads them: packed and sorted.

    Returns
    -------
    (N,) of `SUBSET`
    """
    halves = np.frombuffer(bytes.fromhex("".join(uids)), ">u8").reshape(-1, 2)
    packed = np.empty(len(halves), SUBSET)
    packed["f0"], packed["f1"] = halves[:, 0], halves[:, 1]
    return np.sort(packed, order=("f0", "f1"))
