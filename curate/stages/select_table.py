"""What `select` decided, as a table, shard by shard.

One task decides for millions of samples: it holds arrays of them, not Python objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from curate.dedup.groups import Walk
from curate.schema import REASONS, select_schema

__all__ = ["DECISION", "Decisions", "fold_caption", "merge_captions"]

Array = np.ndarray[Any, Any]

DECISION = (
    "keep",
    "reason",
    "failed_rules",
    "removed_by",
    "weight",
    "representative_uid",
    "representative_cosine",
    "duplicate_level",
    "captions",
)
_LEVELS = ("bytes", "perceptual", "semantic")
#: Captions of duplicates that are looked at together.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Decisions:
    """All samples' decisions.

    Parameters
    ----------
    uids : (N,) S32
    captions : pyarrow.ChunkedArray of string, length N
    failed : dict of str to (N,) bool
        By reason code, the samples that failed the rule.
    removed_by : pyarrow.ChunkedArray of string, length N
    walk : Walk
    weight : (N,) floating
    merged : (M,) int64 twice
        See `merge_captions`.
    """

    uids: Array
    captions: pa.ChunkedArray
    failed: dict[str, Array]
    removed_by: pa.ChunkedArray
    walk: Walk
    weight: Array
    merged: tuple[Array, Array]

    def table(self, start: int, stop: int) -> pa.Table:
        """Return the decisions of some rows: `uid` and `DECISION`."""
        own = slice(start, stop)
        representative = self.walk.representative[own]
        alone = representative < 0
        columns = {
            "uid": self.uids[own].astype(str),
            "keep": self.walk.kept[own],
            "reason": _names(self._codes, self._first[own]),
            "failed_rules": self._rules(own),
            "removed_by": self.removed_by.slice(start, stop - start),
            "weight": self.weight[own],
            "representative_uid": pa.array(
                self.uids[representative].astype(str), pa.string(), mask=alone
            ),
            "representative_cosine": pa.array(self.walk.cosine[own], pa.float32(), mask=alone),
            "duplicate_level": _names(_LEVELS, self._level[own]),
            "captions": self._captions(start, stop),
        }
        return pa.table(columns).cast(select_schema(["uid", *DECISION]))

    def counts(self) -> dict[str, Any]:
        """Count what was kept, and what was dropped why."""
        dropped = np.bincount(self._first[self._first >= 0], minlength=len(self._codes)).tolist()
        own = int((self.merged[0] == self.merged[1]).sum())
        return {
            "counts": {
                "ingested": len(self.uids),
                "kept": int(self.walk.kept.sum()),
                "dropped": {c: n for c, n in zip(self._codes, dropped, strict=True) if n},
            },
            "failed": {code: int(self.failed[code].sum()) for code in self._codes},
            "merged_captions": len(self.merged[0]) - own,
        }

    @cached_property
    def _codes(self) -> tuple[str, ...]:
        return tuple(code for code in REASONS if code in self.failed)

    @cached_property
    def _first(self) -> Array:
        """(N,) int8: which of the codes is each sample's reason; -1 where none is."""
        first = np.full(len(self.uids), -1, np.int8)
        for number in reversed(range(len(self._codes))):
            first[self.failed[self._codes[number]]] = number
        return first

    @cached_property
    def _level(self) -> Array:
        level = np.full(len(self.uids), -1, np.int8)
        for number, name in enumerate(_LEVELS):
            level[self.failed.get(f"duplicate_{name}", np.zeros(len(level), bool))] = number
        return level

    def _rules(self, own: slice) -> pa.Array:
        shape = (0, len(self.uids[own]))
        failed = np.array([self.failed[code][own] for code in self._codes]).reshape(-1, shape[1])
        row, number = np.nonzero(failed.T)
        ends = np.searchsorted(row, np.arange(shape[1] + 1))
        return pa.ListArray.from_arrays(ends.astype(np.int32), _names(self._codes, number))

    def _captions(self, start: int, stop: int) -> pa.Array:
        """Null where a sample is dropped or has no caption."""
        bounds = np.searchsorted(self.merged[0], np.arange(start, stop + 1))
        texts = self.captions.take(pa.array(self.merged[1][bounds[0] : bounds[-1]]))
        texts = texts.combine_chunks()
        ends, none = (bounds - bounds[0]).astype(np.int32), np.diff(bounds) == 0
        return pa.ListArray.from_arrays(ends, texts, mask=pa.array(none))


def _names(names: Sequence[str], numbers: Array) -> pa.Array:
    """Text by number, null where it is below 0."""
    numbers = pa.array(numbers.astype(np.int8), mask=numbers < 0)
    found = pa.DictionaryArray.from_arrays(numbers, pa.array(names, pa.string()))
    return found.cast(pa.string())


def merge_captions(
    captions: pa.ChunkedArray, kept: Array, representative: Array, order: Array, most: int
) -> tuple[Array, Array]:
    """Give kept samples the captions of their duplicates.

    Parameters
    ----------
    captions : pyarrow.ChunkedArray of string, length N
    kept : (N,) bool
    representative : (N,) int64
        Row of the kept sample that a row duplicates; -1 where it duplicates none.
    order : (N,) int64
        Rows, most preferred first.
    most : int
        Captions of a sample. Those equal up to case and white space count once.

    Returns
    -------
    rows, sources : (M,) int64
        Kept rows, in order, and the rows whose captions they have, their own first. Of kept rows
        without a caption there are none.
    """
    present = captions.is_valid().to_numpy()
    own = np.flatnonzero(kept & present)
    others = order[representative[order] >= 0]
    others = others[present[others] & present[representative[others]]]
    others = others[np.argsort(representative[others], kind="stable")]
    chosen, seen, last = np.zeros(len(others), bool), set[str](), -1
    for first in range(0, len(others), _BLOCK):
        rows = others[first : first + _BLOCK]
        targets = representative[rows]
        texts, theirs = (captions.take(pa.array(part)).to_pylist() for part in (rows, targets))
        for place, target in enumerate(targets.tolist()):
            if target != last:
                last, seen = target, {fold_caption(theirs[place])}
            folded = fold_caption(texts[place])
            if folded not in seen and len(seen) < most:
                seen.add(folded)
                chosen[first + place] = True
    rows = np.r_[own, representative[others[chosen]]]
    sources = np.r_[own, others[chosen]]
    by_row = np.argsort(rows, kind="stable")
    return rows[by_row], sources[by_row]


def fold_caption(caption: str) -> str:
    """Return a caption without what makes no difference: case and white space."""
    return " ".join(caption.casefold().split())
