"""Which setting is best, and how sure that is: outcomes of held-out pairs in, one choice out.

Settings are compared on the same pairs and seeds. What two trainings differ by on a pair varies
with the pair and with the seed, so that variances of both are added and what both hold is taken
out once (two-way clustering).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "LEAST_SEEDS",
    "Difference",
    "Recommendation",
    "Scores",
    "compare",
    "is_loser",
    "recommend",
]

Array = np.ndarray[Any, Any]
#: Outcomes of every held-out pair by seed: (M,) floating each, higher is better.
Scores = Mapping[int, Array]

#: Standard errors by which a setting must be behind the best to get no further seeds.
_LOST = 3.0
#: Seeds before anything is given up.
LEAST_SEEDS = 2
#: Error of the gate: the chance that a setting is called better where none is.
_ERROR = 0.05


@dataclass(frozen=True)
class Difference:
    """Mean difference of two trainings over pairs and seeds.

    Parameters
    ----------
    mean, stderr : float
    seeds : int
        That both have.
    """

    mean: float
    stderr: float
    seeds: int

    @property
    def errors(self) -> float:
        """Standard errors from zero."""
        if self.stderr > 0:
            return self.mean / self.stderr
        return math.copysign(math.inf, self.mean) if self.mean else 0.0


def compare(one: Scores, other: Scores, part: Array | None = None) -> Difference:
    """Return by how much `one` is better than `other`, on the seeds that both have.

    Parameters
    ----------
    one, other : mapping of int to (M,) floating
    part : (M,) bool, optional
        Pairs that count.

    References
    ----------
    Cameron, Gelbach and Miller, Robust Inference with Multiway Clustering (2011), section 2.
    """
    seeds = sorted(set(one) & set(other))
    rows = np.stack([np.asarray(one[s], float) - np.asarray(other[s], float) for s in seeds])
    rows = rows if part is None else rows[:, part]
    pairs = rows.shape[1]
    if pairs < 2:
        return Difference(float(rows.mean()) if rows.size else math.nan, math.nan, len(seeds))
    by_pair = rows.mean(0).var(ddof=1) / pairs
    both = rows.var(ddof=1) / rows.size
    by_seed = rows.mean(1).var(ddof=1) / len(seeds) if len(seeds) > 1 else both
    return Difference(
        float(rows.mean()), math.sqrt(max(by_pair + by_seed - both, by_pair)), len(seeds)
    )


def is_loser(scores: Mapping[str, Scores], name: str, loosest: str) -> bool:
    """Tell whether a setting is clearly behind the best, so that no further seed is due to it.

    Parameters
    ----------
    scores : mapping of str to Scores
        All settings.
    name, loosest : str
        What all are compared with, the loosest, is never given up.
    """
    if name == loosest or len(scores[name]) < LEAST_SEEDS:
        return False
    best = _best(scores, loosest)
    return name != best and compare(scores[name], scores[best]).errors < -_LOST


def _best(scores: Mapping[str, Scores], loosest: str) -> str:
    """Name the highest mean, each over the seeds that it has in common with the loosest."""
    return max(scores, key=lambda name: compare(scores[name], scores[loosest]).mean)


@dataclass(frozen=True)
class Recommendation:
    """One setting of all.

    Parameters
    ----------
    name : str
    best : str
        The setting with the highest mean.
    gain : Difference
        Of the recommended to the loosest.
    is_better : bool
        Whether any setting is better than the loosest beyond noise.
    """

    name: str
    best: str
    gain: Difference
    is_better: bool


def recommend(scores: Mapping[str, Scores], order: Sequence[str]) -> Recommendation:
    """Choose the loosest setting that is within one standard error of the best.

    If no setting is better than the loosest by more than chance would make the best of so many
    appear, that is the loosest itself.

    Parameters
    ----------
    scores : mapping of str to Scores
    order : sequence of str
        Names, the loosest first.

    References
    ----------
    Breiman et al., Classification and Regression Trees (1984), section 3.4.3: the rule of one
    standard error. The gate is Bonferroni's over all other settings, one-sided.
    """
    from scipy.stats import norm

    loosest = order[0]
    best = _best(scores, loosest)
    threshold = float(norm.isf(_ERROR / max(1, len(order) - 1)))
    if best == loosest or compare(scores[best], scores[loosest]).errors < threshold:
        return Recommendation(loosest, best, Difference(0.0, 0.0, len(scores[loosest])), False)
    chosen = next(n for n in order if n == best or compare(scores[best], scores[n]).errors <= 1)
    return Recommendation(chosen, best, compare(scores[chosen], scores[loosest]), True)
