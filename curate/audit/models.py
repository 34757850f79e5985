"""What is measured: checkpoints, folders of embeddings, or anything that can be called."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from curate.audit.measures import Embeddings
from curate.errors import InputError
from curate.models import OPEN_CLIP

__all__ = [
    "embed",
    "find_equal",
    "is_named",
    "list_checkpoints",
    "number_steps",
    "read_folder",
]

Array = np.ndarray[Any, Any]

_PARTS = ("candidates", "held_out")


def is_named(checkpoint: str) -> bool:
    """Tell a name, `open_clip:MODEL/PRETRAINED`, from a path."""
    return checkpoint.startswith(f"{OPEN_CLIP}:")


def number_steps(checkpoints: Sequence[str]) -> list[int]:
    """Return the steps of checkpoints: the last number in each file's name, else their places.

    Places count where a name has no number, or where the numbers do not rise (epoch_10 and
    epoch_latest, one epoch of two trainings): trackers drop such steps or put one over another.
    """
    steps = [_find_step(one) for one in checkpoints]
    known = [step for step in steps if step is not None]
    rise = all(one < other for one, other in pairwise(known))
    return known if rise and len(known) == len(steps) else list(range(len(steps)))


def _find_step(checkpoint: str) -> int | None:
    path = checkpoint.partition("/")[2] if is_named(checkpoint) else checkpoint
    numbers = re.findall(r"\d+", Path(path).stem) if Path(path).exists() else []
    return int(numbers[-1]) if numbers else None


def list_checkpoints(patterns: Sequence[str]) -> list[str]:
    """Return files, folders of embeddings or names, in natural order: epoch_2 before epoch_10.

    Raises
    ------
    InputError
        If a pattern matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        is_one = is_named(pattern) or Path(pattern).exists()
        matches = [pattern] if is_one else glob.glob(pattern)
        if not matches:
            raise InputError(
                f"{pattern}: must match a checkpoint; matches none. Check the path, or name "
                f"published weights as {OPEN_CLIP}:MODEL/PRETRAINED."
            )
        found += matches
    return sorted(dict.fromkeys(found), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def read_folder(folder: str) -> Embeddings:
    """Read one model's embeddings: `candidates/NAME.npy` and `held_out/NAME.npy`, by modality.

    Rows are brought to unit norm.

    Raises
    ------
    InputError
        If an array is missing, no array of vectors, or does not fit the others.
    """
    found = []
    for part in _PARTS:
        paths = sorted(Path(folder, part).glob("*.npy"))
        if len(paths) < 2:
            raise InputError(
                f"{folder}: must hold {part}/NAME.npy for at least 2 modalities; got {len(paths)}. "
                "Add them, or name checkpoints."
            )
        found.append({path.stem: _read_array(path) for path in paths})
    return Embeddings(*found)


def find_equal(given: Embeddings) -> tuple[Array, Array]:
    """Find held-out samples whose embeddings another sample has, number by number.

    Of a model that makes the same of all candidates nothing is told: everything would be found.

    Returns
    -------
    shared, repeated : (K,) and (L,) int64
        Rows of held-out samples, ascending: those of a candidate, and of the rest those of an
        earlier held-out sample.
    """
    candidates, held_out = map(_row_bytes, given.arrays())
    known = set(candidates)
    shared: list[int] = []
    repeated: list[int] = []
    first: dict[bytes, int] = {}
    for place, row in enumerate(held_out if len(known) > 1 else ()):
        if row in known:
            shared.append(place)
        elif first.setdefault(row, place) < place:
            repeated.append(place)
    return np.array(shared, np.int64), np.array(repeated, np.int64)


def _row_bytes(arrays: list[Array]) -> list[bytes]:
    """Return the bytes of each sample's embeddings, of all modalities and views."""
    parts = [np.moveaxis(one, -2, 0).reshape(one.shape[-2], -1) for one in arrays]
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]


def _read_array(path: Path) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError) as error:
        why = str(error)
        if isinstance(error, ValueError) and "pickle" in why:  # with advice to load it all the same
            why = "it holds Python objects, or is no .npy"
        raise InputError(
            f"{path}: must be an array of numbers; {why}. Save it anew as float32, by numpy.save."
        ) from error
    return _unit(str(path), array)


def _unit(where: str, values: Any) -> Array:
    array = np.asarray(values)
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiu" or 0 in array.shape:
        raise InputError(
            f"{where}: must be N x D numbers, or K x N x D for K views; got {array.shape} "
            f"{array.dtype}."
        )
    rows = array.astype(np.float32)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    wrong = np.argwhere(~(np.isfinite(norms) & (norms > 0)))
    if len(wrong):
        raise InputError(
            f"{where}: rows must be finite and not zero; row {wrong[0][-2]} is not. Leave it out."
        )
    unit: Array = rows / norms
    return unit


def embed(
    encoders: Mapping[str, Callable[[Any], Any]],
    candidates: Mapping[str, Any],
    held_out: Mapping[str, Any],
    batch: int = 64,
) -> Embeddings:
    """Embed a panel with any callables.

    Parameters
    ----------
    encoders : mapping of str to callable
        By modality, two or more: takes a slice of that modality's items, of at most `batch`, and
        returns (B, D) numbers, of an array or a tensor, brought to unit norm here.
    candidates, held_out : mapping of str to sequence
        Items of the same modalities: anything with a length that can be sliced (tensors, arrays,
        lists).
    batch : int

    Returns
    -------
    Embeddings

    Raises
    ------
    InputError
        If modalities are missing or results do not fit each other.
    """
    parts = []
    for where, given in (("candidates", candidates), ("held-out", held_out)):
        missing = sorted(set(encoders) - set(given))
        if missing:
            raise InputError(f"{where}: must hold {', '.join(encoders)}; {missing[0]} is missing.")
        parts.append(
            {name: _run(name, call, given[name], batch) for name, call in encoders.items()}
        )
    return Embeddings(*parts)


def _run(name: str, encoder: Callable[[Any], Any], items: Any, batch: int) -> Array:
    found = []
    for start in range(0, len(items), batch):
        rows = encoder(items[start : start + batch])
        if hasattr(rows, "detach"):
            rows = rows.detach().float().cpu().numpy()
        found.append(np.asarray(rows))
    if not found:
        raise InputError(f"{name}: must hold at least one sample; got none.")
    return _unit(name, np.concatenate(found))
