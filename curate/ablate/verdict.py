"""Which setting is best, and how sure that is: outcomes of held-out pairs in, one choice out.

Settings are compared on the same pairs and seeds. What two trainings differ by on a pair varies
with the pair and with the seed, and variances of both are added. A few seeds say little of how much
trainings vary, so that what all settings tell of it is taken together, and intervals and tests are
Student's, with as many degrees of freedom as there is knowledge.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "LEAST_SEEDS",
    "Difference",
    "Recommendation",
    "Scores",
    "SeedNoise",
    "compare",
    "is_loser",
    "pool_seeds",
    "recommend",
]

Array = np.ndarray[Any, Any]
#: Outcomes of every held-out pair by seed: (M,) floating each, higher is better.
Scores = Mapping[int, Array]

#: Chance at which a setting that is behind the best gets no further seeds: three standard errors,
#: where they are well known.
_LOST = 0.001
#: Seeds before anything is given up.
LEAST_SEEDS = 2
#: Error of the gate, the chance that a setting is called better where none is; and of intervals.
_ERROR = 0.05


@dataclass(frozen=True)
class SeedNoise:
    """How much one training's mean over pairs varies with its seed.

    Parameters
    ----------
    variance : float
        Beyond what a seed does to all settings alike.
    freedom : int
        Degrees of freedom of the variance.
    """

    variance: float
    freedom: int


@dataclass(frozen=True)
class Difference:
    """Mean difference of two trainings over pairs and seeds.

    Parameters
    ----------
    mean, stderr : float
    seeds : int
        That both have.
    freedom : float
        Degrees of freedom of the standard error.
    """

    mean: float
    stderr: float
    seeds: int
    freedom: float

    @property
    def errors(self) -> float:
        """Standard errors from zero."""
        if self.stderr > 0:
            return self.mean / self.stderr
        return math.copysign(math.inf, self.mean) if self.mean else 0.0

    @property
    def p_value(self) -> float:
        """Chance of as high a mean where there is no difference; one-sided."""
        from scipy.stats import t

        return float(t.sf(self.errors, self.freedom))

    def needed(self, comparisons: int = 1) -> float:
        """Return the mean from which on it is beyond noise, as the best of so many; one-sided."""
        from scipy.stats import t

        return float(t.isf(_ERROR / comparisons, self.freedom)) * self.stderr

    def interval(self, comparisons: int = 1) -> tuple[float, float]:
        """Return an interval that holds 95 % of the time, for so many of them at once."""
        from scipy.stats import t

        within = float(t.isf(_ERROR / 2 / comparisons, self.freedom)) * self.stderr
        return self.mean - within, self.mean + within


def pool_seeds(trainings: Iterable[Scores], part: Array | None = None) -> SeedNoise | None:
    """Estimate from several settings at once how much a training varies with its seed.

    Parameters
    ----------
    trainings : iterable of mapping of int to (M,) floating
        Those with fewer seeds than others are left out.
    part : (M,) bool, optional
        Pairs that count.

    Returns
    -------
    SeedNoise or None
        None where there are not two settings with two seeds each.
    """
    given = list(trainings)
    most = max(map(len, given), default=0)
    whole = [scores for scores in given if len(scores) == most]
    seeds = sorted(set(whole[0]).intersection(*whole)) if whole else []
    if len(seeds) < 2 or len(whole) < 2:
        return None
    rows = slice(None) if part is None else part
    means = np.array([[np.mean(scores[seed][rows]) for seed in seeds] for scores in whole])
    freedom = (len(whole) - 1) * (len(seeds) - 1)
    return SeedNoise(float((_center(means) ** 2).sum() / freedom), freedom)


def _center(values: Array) -> Array:
    """Take off the means of rows and columns."""
    centered: Array = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return centered


def compare(
    one: Scores, other: Scores, part: Array | None = None, noise: SeedNoise | None = None
) -> Difference:
    """Return by how much `one` is better than `other`, on the seeds that both have.

    Parameters
    ----------
    one, other : mapping of int to (M,) floating
    part : (M,) bool, optional
        Pairs that count.
    noise : SeedNoise, optional
        See `pool_seeds`; default: from these two alone.

    References
    ----------
    Searle, Casella and McCulloch, Variance Components (1992), chapter 4: crossed random effects.
    Satterthwaite, An Approximate Distribution of Estimates of Variance Components (1946).
    """
    seeds = sorted(set(one) & set(other))
    rows = np.stack([np.asarray(one[s], float) - np.asarray(other[s], float) for s in seeds])
    rows = rows if part is None else rows[:, part]
    count, pairs = rows.shape
    mean = float(rows.mean()) if rows.size else math.nan
    if pairs < 2:
        return Difference(mean, math.nan, count, 1.0)
    if not rows.any():  # one training under two names
        return Difference(0.0, 0.0, count, float(pairs - 1))
    terms = [(rows.mean(0).var(ddof=1) / pairs, pairs - 1)]
    if noise is not None:
        terms.append((2 * noise.variance / count, noise.freedom))
    elif count > 1:
        terms.append((rows.mean(1).var(ddof=1) / count, count - 1))
    if count > 1:
        # Means over pairs and means over seeds both hold what varies with either: once too often.
        freedom = (count - 1) * (pairs - 1)
        terms.append((-(_center(rows) ** 2).sum() / freedom / rows.size, freedom))
    variance = max(sum(value for value, _ in terms), terms[0][0])
    spread = sum(value**2 / freedom for value, freedom in terms)
    known = max(1.0, variance**2 / spread) if spread > 0 else float(pairs - 1)
    return Difference(mean, math.sqrt(variance), count, float(known))


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
    behind = compare(scores[best], scores[name], noise=pool_seeds(scores.values()))
    return name != best and behind.p_value < _LOST


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
    comparisons : int
        Settings that were compared with the loosest, for which the gate and intervals allow.
    rival : str
        The setting with the highest mean among all but the loosest.
    rival_gain : Difference
        Of that to the loosest.
    """

    name: str
    best: str
    gain: Difference
    is_better: bool
    comparisons: int
    rival: str
    rival_gain: Difference


def recommend(scores: Mapping[str, Scores], order: Sequence[str]) -> Recommendation:
    """Choose the loosest setting that is within one standard error of the best.

    If no setting is better than the loosest by more than chance would make the best of so many
    appear, that is the loosest itself.

    Parameters
    ----------
    scores : mapping of str to Scores
    order : sequence of str
        Names, the loosest first, two at least.

    References
    ----------
    Breiman et al., Classification and Regression Trees (1984), section 3.4.3: the rule of one
    standard error. The gate is Bonferroni's over all other settings, one-sided.
    """
    loosest, *others = order
    noise = pool_seeds(scores.values())
    gains = {name: compare(scores[name], scores[loosest], noise=noise) for name in order}
    best, rival = (max(names, key=lambda name: gains[name].mean) for names in (order, others))
    against = len(others), rival, gains[rival]
    if best == loosest or gains[best].mean <= gains[best].needed(len(others)):
        return Recommendation(loosest, best, gains[loosest], False, *against)
    chosen = next(
        name
        for name in order
        if name == best or compare(scores[best], scores[name], noise=noise).errors <= 1
    )
    return Recommendation(chosen, best, gains[chosen], True, *against)
