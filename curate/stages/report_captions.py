"""Captions and titles that many samples share, and whether their pictures look alike."""

from collections import Counter

import numpy as np
import pyarrow as pa

from curate.report.words import describe_repeated, describe_series, describe_unlike
from curate.stages.report_curves import Array, column, numbers
from curate.stages.report_titles import find_series, split_parts
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


#: By caption or title: of some clusters of copies rank and uid of one picture.
_Chosen = dict[str, dict[str, tuple[float, str]]]


class Captions:
    """Counts captions in a first pass, and chooses pictures of the common ones in a second.

    Titles that a series of pictures may have are treated like captions, see `find_series`.

    Parameters
    ----------
    share : float
        Samples of a lower rank are counted.
    titled : float
        Of these, those of a lower rank have their captions taken apart.
    """

    def __init__(self, share: float, titled: float) -> None:
        self.share, self.titled = share, titled
        self._counts: Counter[str] = Counter()
        self._parted: Counter[str] = Counter()
        self._clusters: Counter[str] = Counter()
        self._spellings: dict[str, str] = {}
        self._series: dict[str, str] = {}
        self._samples: Counter[str] = Counter()
        self._chosen: _Chosen | None = None
        self._titled: _Chosen = {}

    def count(self, table: pa.Table, ranks: Array) -> None:
        """Count a shard's captions; `ranks` (N,) in [0, 1)."""
        rows = np.flatnonzero(ranks < self.share)
        part = table.take(pa.array(rows))
        uids, clusters = part["uid"].to_pylist(), column(part, "cluster_id")
        for place, caption in enumerate(part["caption"].to_pylist()):
            folded = fold_caption(caption or "")
            if not folded:
                continue
            self._counts[folded] += 1
            self._spellings.setdefault(folded, caption)
            if ranks[rows[place]] < self.titled:
                self._parted[folded] += 1
                # A cluster has the name of one of its samples.
                self._clusters[folded] += clusters[place] in (None, uids[place])

    def choose(self, table: pa.Table, ranks: Array) -> None:
        """Choose pictures of a shard's common captions, once all have been counted."""
        if self._chosen is None:
            self._chosen = _begin(self._counts)
            self._series = find_series(self._parted, self._clusters)
            for folded, title in self._series.items():
                self._samples[title] += self._parted[folded]
            self._titled = _begin(self._samples)
        seen = ~np.isnan(numbers(table, "width"))
        rows = np.flatnonzero((ranks < self.share) & seen)
        part = table.take(pa.array(rows))
        uids, clusters = part["uid"].to_pylist(), column(part, "cluster_id")
        for place, caption in enumerate(part["caption"].to_pylist()):
            folded = fold_caption(caption or "")
            name, found = clusters[place] or uids[place], (float(ranks[rows[place]]), uids[place])
            _hold(self._chosen.get(folded), name, found)
            _hold(self._titled.get(self._series.get(folded, "")), name, found)

    def uids(self) -> list[str]:
        """Return the chosen pictures, in order."""
        chosen = [*(self._chosen or {}).values(), *self._titled.values()]
        return sorted({uid for held in chosen if len(held) >= _LEAST for _, uid in held.values()})

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
        known = [vectors[uid] for uid in drawn if uid in vectors]
        if len(known) < _LEAST_DRAWN:
            return lines
        random = unit(np.stack(known))
        alike = np.quantile((random @ random.T)[np.triu_indices(len(random), 1)], _ALIKE)
        unlike = _unlike(self._chosen or {}, vectors, alike)
        shared = sum(self._counts[folded] for folded in unlike)
        if unlike and shared >= _SHARE * total:
            example = self._spellings[unlike[0]]
            lines.append(describe_unlike(len(unlike), shared / total, example, _LEAST - 1))
        series = _unlike(self._titled, vectors, alike)
        part = sum(self._samples[title] for title in series) / max(self._parted.total(), 1)
        if series and part >= _SHARE:
            lines.append(describe_series(len(series), part, *self._example(series[0])))
        return lines

    def _example(self, title: str) -> tuple[str, str]:
        """A title as it is written, and the commonest caption that has it."""
        having = [folded for folded, one in self._series.items() if one == title]
        caption = self._spellings[max(having, key=lambda folded: (self._counts[folded], folded))]
        written = (part for part in split_parts(caption) if fold_caption(part) == title)
        return next(written, title), caption


def _begin(counts: Counter[str]) -> _Chosen:
    common = [one for one in counts.most_common(_COMPARED) if one[1] >= _LEAST]
    return {name: {} for name, _ in common}


def _hold(
    held: dict[str, tuple[float, str]] | None, cluster: str, found: tuple[float, str]
) -> None:
    """Keep a picture if it is among those of lowest rank, one of a cluster."""
    if held is None:
        return
    if found < held.get(cluster, (2.0, "")):
        held[cluster] = found
    if len(held) > _PICTURES:
        del held[max(held, key=lambda name: held[name])]


def _unlike(chosen: _Chosen, vectors: dict[str, Array], alike: float) -> list[str]:
    """Those, the most common first, whose pictures are no more alike than random ones."""
    found = []
    for name, held in chosen.items():
        known = [vectors[uid] for _, uid in sorted(held.values()) if uid in vectors]
        number = len(known)
        if number < _LEAST:
            continue
        together = unit(np.stack(known)).sum(axis=0)
        mean = (np.square(together).sum() - number) / (number * (number - 1))
        if mean < alike:
            found.append(name)
    return found
