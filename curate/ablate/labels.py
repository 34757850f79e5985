"""Tables by uid that a user gives: labels for zero-shot classification, and pairs that judge."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from curate import storage
from curate.errors import InputError
from curate.formats.sources import open_binary, readable, split_suffix

__all__ = ["read_labels", "read_uids"]

Array = np.ndarray[Any, Any]


def read_labels(path: str, uids: Sequence[str]) -> tuple[list[str], Array]:
    """Return class names, and which is whose.

    Parameters
    ----------
    path : str
        Parquet, CSV, TSV or JSONL with the columns uid and label.
    uids : sequence of str, length H

    Returns
    -------
    names : list of str, length C
    places : (H,) int64
        -1 where the table has no label.

    Raises
    ------
    InputError
        If it cannot be read, lacks a column, or names fewer than two classes of these samples.
    """
    uid, label = _read_columns("--labels", path, ("uid", "label"))
    known = {u: text for u, text in zip(uid, label, strict=True) if text and text.strip()}
    found = [known.get(one) for one in uids]
    names = sorted({text for text in found if text is not None})
    if len(names) < 2:
        raise InputError(
            f"--labels {path}: must name at least two classes of held-out samples; got "
            f"{len(names)}, for {len(uids)} samples. Label by the uids of the run's decisions."
        )
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([-1 if text is None else places[text] for text in found], np.int64)


def read_uids(path: str) -> frozenset[str]:
    """Return the uids of pairs to hold out.

    Parameters
    ----------
    path : str
        As for `read_labels`, with the column uid.

    Raises
    ------
    InputError
        If it cannot be read or lacks the column.
    """
    (uids,) = _read_columns("--held-out-list", path, ("uid",))
    return frozenset(uid for uid in uids if uid)


def _read_columns(option: str, path: str, names: tuple[str, ...]) -> list[list[str | None]]:
    what = f"a table of {' and '.join(names)}"
    if not storage.exists(path):
        raise InputError(f"{option} {path}: must be {what}; no such path. Correct it.")
    fs, place = storage.filesystem(path)
    if fs.isdir(place):
        raise InputError(f"{option} {path}: must be {what}; it is a folder. Name a file.")
    with readable(f"{option} {path}", what):
        table = _read(path, names)
        columns = table.column_names  # decoded as they are asked for
    for name in names:
        if columns.count(name) != 1:
            shown = ", ".join(columns[:12]) or "none"
            raise InputError(
                f"{option} {path}: must have the column {name} once; got {shown}. Rename one."
            )
    with readable(f"{option} {path}", what):
        return [table[name].cast(pa.string()).to_pylist() for name in names]


def _read(path: str, names: tuple[str, ...]) -> pa.Table:
    suffix = split_suffix(path)[1]
    with open_binary(path) as file:
        if suffix == "parquet":
            return pq.read_table(file)
        if suffix == "jsonl":
            return pa.json.read_json(file)
        form = pa.csv.ParseOptions(delimiter="\t" if suffix == "tsv" else ",")
        # As they are spelt: uids of digits alone are no numbers.
        spelt = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        return pa.csv.read_csv(file, parse_options=form, convert_options=spelt)
