"""Captions that many samples share, and whether their pictures have anything in common."""

from collections import Counter

import numpy as np
import pyarrow as pa

from curate.report.words import describe_repeated, describe_unlike
from curate.stages.report_curves import Array, column, numbers
from curate.stages.score_inputs import unit
from curate.stages.select_table import fold_caption

__all__ = ["Captions"]

#: A caption, equal up to case and white space, that this share of samples has is worth a word.
_SHARE, _LEAST = 0.01, 5
#: Captions whose pictures are compared, and pictures of each, one of a cluster of copies.
_COMPARED, _PICTURES = 1000, 16
#: Pictures look alike whose cosine is above that of this share of random pairs, of at least so many
#: pictures.
_ALIKE, _LEAST_DRAWN = 0.95, 100


class Captions:
    """Counts captions in a first pass, and chooses pictures of the common ones in a second.

    Parameters
    ----------
    share : float
        Samples of a lower rank are counted.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._counts: Counter[str] = Counter()
        self._spellings: dict[str, str] = {}
        self._chosen: dict[str, dict[str, tuple[float, str]]] | None = None

    def count(self, table: pa.Table, ranks: Array) -> None:
        """Count a shard's captions; `ranks` (N,) in [0, 1)."""
        rows = np.flatnonzero(ranks < self.share)
        for caption in table["caption"].take(pa.array(rows)).to_pylist():
            folded = fold_caption(caption or "")
            if folded:
                self._counts[folded] += 1
                self._spellings.setdefault(folded, caption)

    def choose(self, table: pa.Table, ranks: Array) -> None:
        """Choose pictures of a shard's common captions, once all have been counted."""
        if self._chosen is None:
            common = [one for one in self._counts.most_common(_COMPARED) if one[1] >= _LEAST]
            self._chosen = {folded: {} for folded, _ in common}
        seen = ~np.isnan(numbers(table, "width"))
        rows = np.flatnonzero((ranks < self.share) & seen)
        part = table.take(pa.array(rows))
        uids, clusters = part["uid"].to_pylist(), column(part, "cluster_id")
        for place, caption in enumerate(part["caption"].to_pylist()):
            held = self._chosen.get(fold_caption(caption or ""))
            if held is None:
                continue
            name, found = clusters[place] or uids[place], (float(ranks[rows[place]]), uids[place])
            if found < held.get(name, (2.0, "")):
                held[name] = found
            if len(held) > _PICTURES:
                del held[max(held, key=lambda cluster: held[cluster])]

    def uids(self) -> list[str]:
        """Return the chosen pictures, in order."""
        chosen = (self._chosen or {}).values()
        return sorted(uid for held in chosen if len(held) >= _LEAST for _, uid in held.values())

    def warnings(self, vectors: dict[str, Array], drawn: list[str]) -> list[str]:
        """Say in words what is common.

        Parameters
        ----------
        vectors : dict of str to (D,) floating
            Image vectors by uid, as far as there are any.
        drawn : list of str
            uids of pictures drawn at random.
        """
        total = sum(self._counts.values())
        lines = [
            describe_repeated(self._spellings[folded], number / total)
            for folded, number in self._counts.most_common(3)
            if number >= max(_LEAST, _SHARE * total)
        ]
        unlike = self._unlike(vectors, drawn)
        shared = sum(self._counts[folded] for folded in unlike)
        if unlike and shared >= _SHARE * total:
            example = self._spellings[unlike[0]]
            lines.append(describe_unlike(len(unlike), shared / total, example, _LEAST - 1))
        return lines

    def _unlike(self, vectors: dict[str, Array], drawn: list[str]) -> list[str]:
        """Captions, the most common first, whose pictures are no more alike than random ones."""
        known = [vectors[uid] for uid in drawn if uid in vectors]
        if len(known) < _LEAST_DRAWN:
            return []
        random = unit(np.stack(known))
        alike = np.quantile((random @ random.T)[np.triu_indices(len(random), 1)], _ALIKE)
        found = []
        for folded, held in (self._chosen or {}).items():
            known = [vectors[uid] for _, uid in sorted(held.values()) if uid in vectors]
            number = len(known)
            if number < _LEAST:
                continue
            together = unit(np.stack(known)).sum(axis=0)
            mean = (np.square(together).sum() - number) / (number * (number - 1))
            if mean < alike:
                found.append(folded)
        return found
