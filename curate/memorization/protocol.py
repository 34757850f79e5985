"""The four-set protocol: who trains on what, and whether a measure of memorization is right.

Two models are trained: f on the shared and the candidate samples, g on the shared and the
independent ones; the external samples are seen by neither. A measure "f minus g" is then positive
on candidates, as negative on the independent samples, and nothing on the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from curate.memorization.folds import hash_unit

__all__ = [
    "SETS",
    "SetSummary",
    "SignTest",
    "Summary",
    "draw_sets",
    "sign_test",
    "summarize",
    "summarize_set",
    "training_masks",
]

Array = np.ndarray[Any, Any]

#: S_S, S_C, S_I and S_E.
SETS = ("shared", "candidate", "independent", "external")

_SHARED, _CANDIDATE, _INDEPENDENT, _EXTERNAL = range(len(SETS))

#: Whole clusters seldom add up to the size asked for; sets below this share of it are refused.
_LEAST_FILLED = 0.9


def draw_sets(clusters: Sequence[str], shared: int, candidates: int, seed: int) -> Array:
    """Assign every sample to one of `SETS`, by whole duplicate clusters.

    Clusters are walked in an order drawn by hash. Two of equal size make a pair, of which one
    becomes candidate and the other independent, as long as there is room: so both sets have
    equally many samples, in clusters of equal sizes. Then the shared set takes what fits. A
    cluster without a partner, or larger than the room left, is passed over; what remains is
    external. Sets may fall short of the size asked for by up to a tenth.

    Parameters
    ----------
    clusters : sequence of str, length N
        Duplicate cluster of each sample: a twin in another set would mean that nothing was left
        out.
    shared : int
        Samples that both models train on.
    candidates : int
        Samples that only f trains on, and equally many that only g does.
    seed : int

    Returns
    -------
    (N,) str
        Depends on the seed and the clusters, not on the order of rows.

    Raises
    ------
    ValueError
        If sizes are below 1, N leaves nothing for the external set, or whole clusters do not
        fill the others to nine tenths.

    References
    ----------
    Wang et al., Captured by Captions (arXiv:2502.07830), experimental setup: 65 000 shared,
    5 000 candidate, 5 000 independent and 5 000 external samples.
    """
    for name, asked in (("shared", shared), ("candidates", candidates)):
        if asked < 1:
            raise ValueError(f"{name}: must be at least 1; got {asked}")
    if shared + 2 * candidates >= len(clusters):
        raise ValueError(
            f"clusters: must be of more than {shared + 2 * candidates} samples, "
            f"shared + 2 * candidates; got {len(clusters)}; ask for smaller sets"
        )
    names, inverse, sizes = np.unique(
        np.asarray(clusters, np.str_), return_inverse=True, return_counts=True
    )
    # Names are sorted, so that a stable sort settles equal hashes the same way every time.
    order = hash_unit(names.tolist(), seed, "protocol set").argsort(kind="stable")
    sets = np.full(len(names), _EXTERNAL)
    waiting: dict[int, int] = {}
    room = candidates
    for cluster in order.tolist():
        size = int(sizes[cluster])
        partner = waiting.pop(size, None) if size <= room else None
        if partner is not None:
            sets[partner], sets[cluster] = _CANDIDATE, _INDEPENDENT
            room -= size
        elif size <= room:
            waiting[size] = cluster
    _check_filled("candidates", candidates, candidates - room, "in pairs of clusters of equal size")
    room = shared
    for cluster in order.tolist():
        if sets[cluster] == _EXTERNAL and sizes[cluster] <= room:
            sets[cluster] = _SHARED
            room -= int(sizes[cluster])
    _check_filled("shared", shared, shared - room, "in clusters that fit")
    result: Array = np.array(SETS)[sets[inverse]]
    return result


def _check_filled(where: str, asked: int, got: int, how: str) -> None:
    if got < _LEAST_FILLED * asked:
        raise ValueError(
            f"{where}: must be filled to nine tenths of {asked} samples by whole clusters; "
            f"got {got} {how}; ask for another size or cut large clusters"
        )


def training_masks(sets: Array) -> tuple[Array, Array]:
    """Tell which samples f and g train on.

    Parameters
    ----------
    sets : (N,) str
        Of `draw_sets`.

    Returns
    -------
    (N,) bool, (N,) bool
        Of f: shared and candidate. Of g: shared and independent.
    """
    names = np.asarray(sets)
    shared = names == SETS[_SHARED]
    return shared | (names == SETS[_CANDIDATE]), shared | (names == SETS[_INDEPENDENT])


@dataclass(frozen=True)
class SignTest:
    """Whether positive and negative values are equally frequent.

    Parameters
    ----------
    p_value : float, [0, 1]
        Two-sided. Lower: more surely not; 1 if all values are zero.
    share_positive : float, [0, 1]
        Of the values that are not zero; 0.5 if all are.
    count : int
        Values that are not zero.
    """

    p_value: float
    share_positive: float
    count: int


def sign_test(values: Array) -> SignTest:
    """Test by signs alone, without assuming any distribution; zeros are dropped.

    Parameters
    ----------
    values : (N,) floating
        Independent of each other: one a cluster, not one a sample.

    Returns
    -------
    SignTest

    Raises
    ------
    ValueError
        If a value is not finite.

    References
    ----------
    Dixon and Mood, The Statistical Sign Test, JASA 41 (1946): exact binomial.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        finite = int(np.isfinite(array).sum())
        raise ValueError(f"values: must be (N,) and finite; got {array.shape}, {finite} finite")
    positive, count = int((array > 0).sum()), int((array != 0).sum())
    if count == 0:
        return SignTest(1.0, 0.5, 0)
    return SignTest(float(binomtest(positive, count).pvalue), positive / count, count)


@dataclass(frozen=True)
class SetSummary:
    """A measure over one of `SETS`.

    Parameters
    ----------
    samples, clusters : int
    mean, stderr : float
        Over samples; its standard error over clusters.
    share_positive, p_value : float, [0, 1]
        `sign_test` of the clusters' means.
    """

    samples: int
    clusters: int
    mean: float
    stderr: float
    share_positive: float
    p_value: float


@dataclass(frozen=True)
class Summary:
    """A measure over all four sets.

    Parameters
    ----------
    sets : mapping of each name in `SETS` to its SetSummary
    correct : bool
        The correctness signature holds: candidates above 0, independent samples about as far
        below, shared and external ones about 0.
    """

    sets: Mapping[str, SetSummary]
    correct: bool


def summarize(
    scores: Array,
    sets: Array,
    clusters: Sequence[str],
    tolerance: float = 3.0,
    slack: float = 0.05,
) -> Summary:
    """Summarize a measure of memorization by set, and judge whether it behaves like one.

    Parameters
    ----------
    scores : (N,) floating
        Higher: more memorized by f than by g. Raw, not rescaled.
    sets : (N,) str
        Of `draw_sets`.
    clusters : sequence of str, length N
    tolerance : float
        Standard errors within which two numbers count as about equal, and which the candidates'
        mean must exceed.
    slack : float
        Numbers that differ by less than this share of the candidates' mean are about equal too:
        a standard error over clusters does not know that f and g are only one pair of runs, and
        vanishes on large sets.

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        If lengths differ, a score is not finite, a set is unknown or has fewer than two
        clusters, or a cluster lies in two sets.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220), means by set: candidate +0.332, independent -0.318,
    shared -0.005.
    """
    values, names = np.asarray(scores, np.float64), np.asarray(sets)
    ids = np.unique(np.asarray(clusters, np.str_), return_inverse=True)[1]
    if values.ndim != 1 or not values.shape == names.shape == ids.shape:
        raise ValueError(
            f"scores: must be (N,), as must sets and clusters; "
            f"got {values.shape}, {names.shape}, {ids.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores: must be finite; got {(~np.isfinite(values)).sum()} that are not")
    unknown = sorted(set(names.tolist()) - set(SETS))
    if unknown:
        raise ValueError(f"sets: must be of {', '.join(SETS)}; got {unknown[0]!r}")
    members = {name: names == name for name in SETS}
    if sum(len(np.unique(ids[rows])) for rows in members.values()) > len(np.unique(ids)):
        raise ValueError("clusters: must lie in one set each; got one in two; use draw_sets")
    found = {
        name: summarize_set(f"sets: {name}", values[rows], ids[rows])
        for name, rows in members.items()
    }
    shared, candidate, independent, external = found.values()
    about = slack * abs(candidate.mean)
    correct = (
        candidate.mean > tolerance * candidate.stderr
        and abs(candidate.mean + independent.mean)
        <= max(about, tolerance * float(np.hypot(candidate.stderr, independent.stderr)))
        and abs(shared.mean) <= max(about, tolerance * shared.stderr)
        and abs(external.mean) <= max(about, tolerance * external.stderr)
    )
    return Summary(found, correct)


def summarize_set(where: str, values: Array, clusters: Array) -> SetSummary:
    """Summarize a measure over samples of which those of one cluster are not independent.

    Parameters
    ----------
    where : str
        Begins the error.
    values : (N,) float64, finite
    clusters : (N,) int or str

    Raises
    ------
    ValueError
        If there are fewer than two clusters.
    """
    inverse, sizes = np.unique(clusters, return_inverse=True, return_counts=True)[1:]
    count = len(sizes)
    if count < 2:
        raise ValueError(f"{where}: must hold at least two clusters; got {count}")
    mean = values.mean()
    # A cluster's samples are not independent: the deviations of a cluster count as one.
    deviations = np.bincount(inverse, values - mean)
    stderr = np.sqrt(count / (count - 1) * (deviations**2).sum()) / len(values)
    signs = sign_test(np.bincount(inverse, values) / sizes)
    return SetSummary(
        len(values), count, float(mean), float(stderr), signs.share_positive, signs.p_value
    )
