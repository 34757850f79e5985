"""Which setting is best, and how sure that is: outcomes of held-out pairs in, one choice out.

Settings are compared on the same pairs and seeds. What two trainings differ by on a pair varies
with the pair and with the seed, and variances of both are added. Seeds are judged by the same pairs
(crossed) or each by its own (nested), by which as many trainings see several times the pairs. A few
seeds say little of how much trainings vary, so that what all settings tell of it is taken together,
and intervals and tests are Student's, with as many degrees of freedom as there is knowledge.
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
#: Outcomes of a seed's held-out pairs by seed: (M,) floating each, higher is better.
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
    """How much one training's mean over pairs varies from seed to seed.

    Parameters
    ----------
    variance : float
        Beyond what a seed does to all settings alike.
    freedom : int
        Degrees of freedom of the variance.
    by_pairs : float
        The part of `variance` that other pairs make, where each seed has its own.
    """

    variance: float
    freedom: int
    by_pairs: float = 0.0


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


def pool_seeds(trainings: Iterable[Scores], apart: bool = False) -> SeedNoise | None:
    """Estimate from several settings at once how much a training varies from seed to seed.

    Parameters
    ----------
    trainings : iterable of mapping of int to (M,) floating
        Those with fewer seeds than others are left out.
    apart : bool
        Each seed has pairs of its own, so that M may differ.

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
    rows = [np.stack([scores[seed] for scores in whole]).astype(float) for seed in seeds]
    means = np.stack([row.mean(1) for row in rows], axis=1)
    freedom = (len(whole) - 1) * (len(seeds) - 1)
    by_pairs = 0.0
    if apart:
        by_pairs = float(np.mean([_interaction(row) / row.shape[1] for row in rows]))
    return SeedNoise(_interaction(means), freedom, by_pairs)


def _interaction(values: Array) -> float:
    """Variance that neither rows nor columns account for."""
    centered = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return float((centered**2).sum() / max(1, (len(values) - 1) * (values.shape[1] - 1)))


def compare(
    one: Scores, other: Scores, noise: SeedNoise | None = None, apart: bool = False
) -> Difference:
    """Return by how much `one` is better than `other`, on the seeds that both have.

    Parameters
    ----------
    one, other : mapping of int to (M,) floating
    noise : SeedNoise, optional
        See `pool_seeds`; default: from these two alone.
    apart : bool
        Each seed has pairs of its own.

    References
    ----------
    Searle, Casella and McCulloch, Variance Components (1992), chapter 4: crossed and nested random
    effects. Satterthwaite, An Approximate Distribution of Estimates of Variance Components (1946).
    """
    seeds = sorted(set(one) & set(other))
    rows = [np.asarray(one[s], float) - np.asarray(other[s], float) for s in seeds]
    count, fewest = len(rows), min(map(len, rows), default=0)
    means = np.array([row.mean() if len(row) else math.nan for row in rows])
    mean = float(means.mean()) if count else math.nan
    if fewest < 2:
        return Difference(mean, math.nan, count, 1.0)
    if not any(row.any() for row in rows):  # one training under two names
        return Difference(0.0, 0.0, count, float(fewest - 1))
    terms = _variance_terms(rows, noise, apart)
    variance = max(sum(value for value, _ in terms), terms[0][0])
    spread = sum(value**2 / freedom for value, freedom in terms)
    known = max(1.0, variance**2 / spread) if spread > 0 else float(terms[0][1])
    return Difference(mean, math.sqrt(variance), count, float(known))


def _variance_terms(
    rows: list[Array], noise: SeedNoise | None, apart: bool
) -> list[tuple[float, int]]:
    """What a mean's variance is the sum of, with degrees of freedom; that by pairs is the first."""
    count, fewest, total = len(rows), min(map(len, rows)), sum(map(len, rows))
    if apart:
        by_pairs = sum(row.var(ddof=1) / len(row) for row in rows) / count**2, total - count
    else:
        by_pairs = np.mean(rows, axis=0).var(ddof=1) / fewest, fewest - 1
    if noise is not None:
        by_seeds = 2 * noise.variance / count, noise.freedom
    elif count > 1:
        by_seeds = np.var([row.mean() for row in rows], ddof=1) / count, count - 1
    else:
        return [by_pairs]
    # Means by seed hold a part of what varies with pairs: once too often.
    if not apart:
        twice = _interaction(np.stack(rows)) / total, max(1, count - 1) * (fewest - 1)
    elif noise is not None:
        twice = 2 * noise.by_pairs / count, by_pairs[1]
    else:
        twice = by_pairs
    return [by_pairs, by_seeds, (-twice[0], twice[1])]


def is_loser(scores: Mapping[str, Scores], name: str, loosest: str, apart: bool = False) -> bool:
    """Tell whether a setting is clearly behind the best, so that no further seed is due to it.

    Parameters
    ----------
    scores : mapping of str to Scores
        All settings.
    name, loosest : str
        What all are compared with, the loosest, is never given up.
    apart : bool
        Each seed has pairs of its own.
    """
    if name == loosest or len(scores[name]) < LEAST_SEEDS:
        return False
    best = max(scores, key=lambda one: compare(scores[one], scores[loosest], apart=apart).mean)
    noise = pool_seeds(scores.values(), apart)
    behind = compare(scores[best], scores[name], noise, apart)
    return name != best and behind.p_value < _LOST


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


def recommend(
    scores: Mapping[str, Scores], order: Sequence[str], apart: bool = False
) -> Recommendation:
    """Choose the loosest setting that is within one standard error of the best.

    If no setting is better than the loosest by more than chance would make the best of so many
    appear, that is the loosest itself.

    Parameters
    ----------
    scores : mapping of str to Scores
    order : sequence of str
        Names, the loosest first, two at least.
    apart : bool
        Each seed has pairs of its own.

    References
    ----------
    Breiman et al., Classification and Regression Trees (1984), section 3.4.3: the rule of one
    standard error. The gate is Bonferroni's over all other settings, one-sided.
    """
    loosest, *others = order
    noise = pool_seeds(scores.values(), apart)
    gains = {name: compare(scores[name], scores[loosest], noise, apart) for name in order}
    best, rival = (max(names, key=lambda name: gains[name].mean) for names in (order, others))
    against = len(others), rival, gains[rival]
    if best == loosest or gains[best].mean <= gains[best].needed(len(others)):
        return Recommendation(loosest, best, gains[loosest], False, *against)
    chosen = next(
        name
        for name in order
        if name == best or compare(scores[best], scores[name], noise, apart).errors <= 1
    )
    return Recommendation(chosen, best, gains[chosen], True, *against)
