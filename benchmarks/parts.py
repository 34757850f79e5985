"""Parts of a caption: its title and what stands beside it."""

from collections import defaultdict
from collections.abc import Sequence

from curate.stages.report_titles import split_parts

__all__ = ["find_titles", "split_parts"]

#: A part that more of the clusters have names a collection or its author, not a picture.
_COMMON = 0.05


def find_titles(captions: Sequence[str], clusters: Sequence[str]) -> list[str]:
    """Find the first part of each caption that is no collection's name.

    Parameters
    ----------
    captions : sequence of str, length N
    clusters : sequence of str, length N
        A part is common if it occurs in many of them.

    Returns
    -------
    list of str, length N
        The very first part where all are common.
    """
    split = [split_parts(caption) for caption in captions]
    holders = defaultdict(set)
    for parts, cluster in zip(split, clusters, strict=True):
        for part in parts:
            holders[part.lower()].add(cluster)
    limit = _COMMON * len(set(clusters))
    return [
        next((p for p in parts if len(holders[p.lower()]) <= limit), parts[0]) for parts in split
    ]
