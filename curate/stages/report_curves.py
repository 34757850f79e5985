"""What the report draws of all samples: histograms, and what other thresholds would have kept."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate.memorization.folds import hash_unit
from curate.memorization.rarity import RARE
from curate.stages.select import mismatch_limit

__all__ = [
    "BINS",
    "LOGARITHMIC",
    "Array",
    "Judged",
    "bar_range",
    "choose_rates",
    "column",
    "count_bins",
    "eligible",
    "join_judged",
    "judge",
    "needed_rate",
    "numbers",
    "trade_off",
]

Array = np.ndarray[Any, Any]

#: Bars of a histogram: what a phone's width still shows apart.
BINS = 32
#: Scores whose small values matter, on a logarithmic axis that begins here at the least.
LOGARITHMIC = {"mismatch_probability": 1e-6}
#: Least width of a histogram on an axis that is not.
_LEAST_SPAN = 0.01
#: Stops of the slider.
_RATES = 48
#: The strictest stop keeps about this share: below it nobody curates.
_LEAST_KEPT = 0.2
#: Rules that come after the threshold on mismatch.
_LATER = {
    "mismatched",
    "duplicate_bytes",
    "duplicate_perceptual",
    "duplicate_semantic",
    "caption_repeated",
}


def column(table: pa.Table, name: str) -> list[Any]:
    """Values of a column; None where the run has none."""
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def numbers(table: pa.Table, name: str) -> Array:
    """(N,) float64; NaN where null."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), np.float64)


def eligible(table: pa.Table) -> Array:
    """(N,) bool: whether no rule before the threshold on mismatch dropped the sample."""
    rules = table["failed_rules"].to_pylist()
    return np.array([_LATER.issuperset(failed) for failed in rules], bool)


@dataclass(frozen=True)
class Judged:
    """Samples that have a chance: no rule but the mismatch's or a copy's has dropped them.

    Parameters
    ----------
    uid : (N,) bytes
    probability : (N,) float64, [0, 1]
        Of mismatch; NaN where there is no score.
    rarity : (N,) float64, [0, 1]
        NaN where there is none.
    kept : (N,) bool
    cluster : (N,) float64
        Equal for samples of one duplicate cluster.
    scale : float
        Samples of the run that each of these stands for: 1 unless they were drawn.
    """

    uid: Array
    probability: Array
    rarity: Array
    kept: Array
    cluster: Array
    scale: float = 1.0


def judge(table: pa.Table, seed: int, share: float = 1.0) -> Judged:
    """Read the eligible of a table, or of a share of its clusters.

    Clusters are drawn whole: what else of a cluster is kept decides about its members.
    """
    uids = table["uid"].to_pylist()
    names = [own or uid for own, uid in zip(column(table, "cluster_id"), uids, strict=True)]
    cluster = hash_unit(names, seed, "report clusters")
    rows = np.flatnonzero(eligible(table) & (cluster < share))
    part = table.take(pa.array(rows))
    return Judged(
        part["uid"].to_numpy(zero_copy_only=False).astype("S32"),
        numbers(part, "mismatch_probability"),
        numbers(part, "rarity"),
        np.asarray(part["keep"].to_numpy(), bool),
        cluster[rows],
        1 / share,
    )


def join_judged(parts: list[Judged]) -> Judged | None:
    """Put parts of one draw together; None if they hold nothing."""
    if not sum(len(part.uid) for part in parts):
        return None
    return Judged(
        np.concatenate([part.uid for part in parts]),
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.rarity for part in parts]),
        np.concatenate([part.kept for part in parts]),
        np.concatenate([part.cluster for part in parts]),
        parts[0].scale,
    )


def needed_rate(judged: Judged, limit: float, probability: float) -> float:
    """Return the lowest `select.max_mismatch_rate` whose limit reaches a probability.

    Parameters
    ----------
    judged : Judged
    limit : float
        Probability up to which the run kept.
    probability : float
    """
    with np.errstate(invalid="ignore"):
        among_all = judged.probability <= probability
        among_kept = _kept_up_to(judged, limit, probability) & among_all
    means = [judged.probability[rows].mean() for rows in (among_all, among_kept) if rows.any()]
    low, high = _round_up(max(means, default=probability) or 1e-6), 1.0
    if _settle(judged, limit, low)[0] >= probability:
        return low
    # Rare: the sample would not be kept itself, so that the limit stops at one that is.
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        enough = _settle(judged, limit, middle)[0] >= probability
        low, high = (low, middle) if enough else (middle, high)
    return min(_round_up(high), 1.0)


def choose_rates(probability: Array, current: float | None) -> list[float]:
    """Values of `select.max_mismatch_rate` worth trying, rising, the current one among them.

    Parameters
    ----------
    probability : (N,) float64, [0, 1]
        NaN where there is none.
    current : float or None
    """
    ordered = np.sort(probability[~np.isnan(probability)])
    if len(ordered) == 0 or ordered[-1] == 0:
        return []
    means = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    high = means[-1]
    low = max(means[int(_LEAST_KEPT * (len(means) - 1))], high / 1000)
    rates = {_round_up(rate) for rate in np.geomspace(low, high, _RATES)}
    if current is not None and current > 0:
        rates.add(current)
    return sorted(rates)


def _round_up(rate: float) -> float:
    """Three digits, so that what is printed can be typed; up, so that the last one keeps all."""
    step = 10.0 ** (np.floor(np.log10(rate)) - 2)
    return float(f"{np.ceil(rate / step - 1e-9) * step:.3g}")


def trade_off(
    judged: Judged,
    limit: float,
    rates: list[float],
    phantoms: dict[str, Array],
) -> list[dict[str, Any]]:
    """Tell what each rate would keep and lose.

    Where copies are walked in order of mismatch, a stricter threshold cuts the walk short: counts
    up to `limit` are what a run gives. Beyond it one sample is counted for each cluster of which
    none is kept.

    Parameters
    ----------
    judged : Judged
    limit : float
        Probability up to which the run kept; infinite if it did not ask.
    rates : list of float
    phantoms : dict of str to (M,) float64
        Probabilities of planted pairs by kind.

    Returns
    -------
    list of dict
        `rate`, `limit`, `kept`, `expected` (mean probability of the kept), `rare_lost`,
        `common_lost` (shares of those with a score), `caught` (share of phantoms by kind), and
        `wider`: whether this lies beyond what the run kept. Null where nothing can be said.
    """
    probability = judged.probability
    scored = ~np.isnan(probability)
    rare = judged.rarity >= RARE
    points = []
    for rate in rates:
        found, kept = _settle(judged, limit, rate)
        lost = scored & (probability > found)
        points.append(
            {
                "rate": rate,
                "limit": _shorten(found),
                "kept": round(int(kept.sum()) * judged.scale),
                "expected": _mean(probability[kept & scored]),
                "rare_lost": _mean(lost[scored & rare]),
                "common_lost": _mean(lost[scored & ~rare]),
                "caught": {kind: _mean(planted > found) for kind, planted in phantoms.items()},
                "wider": bool(found > limit and (kept & ~judged.kept).any()),
            }
        )
    return points


def _settle(judged: Judged, limit: float, rate: float) -> tuple[float, Array]:
    """Find the probability up to which a rate keeps, and who is kept, as `select` does."""
    scored = ~np.isnan(judged.probability)
    found, _ = mismatch_limit(judged.probability, rate)
    kept = _kept_up_to(judged, limit, found)
    while (kept & scored).any() and judged.probability[kept & scored].mean() > rate:
        # Copies of good pairs made room for bad ones, and are gone.
        found, _ = mismatch_limit(judged.probability[kept], rate)
        kept = _kept_up_to(judged, limit, found)
    return found, kept


def _kept_up_to(judged: Judged, limit: float, wanted: float) -> Array:
    """(N,) bool: the kept under another limit, from those under the run's."""
    with np.errstate(invalid="ignore"):  # NaN: a sample without a score is never judged by it
        kept: Array = judged.kept & ~(judged.probability > wanted)
        if wanted <= limit:
            return kept
        new = ~judged.kept & (judged.probability > limit) & (judged.probability <= wanted)
    rows = np.flatnonzero(new & ~np.isin(judged.cluster, judged.cluster[judged.kept]))
    rows = rows[np.argsort(judged.probability[rows], kind="stable")]
    _, first = np.unique(judged.cluster[rows], return_index=True)
    kept[rows[first]] = True
    return kept


def _mean(values: Array) -> float | None:
    return _shorten(float(values.mean())) if len(values) else None


def _shorten(value: float) -> float:
    """Six digits from the first that is not nothing on: rates go down to 1e-7."""
    return float(f"{value:.6g}")


def bar_range(name: str, low: float, high: float) -> tuple[float, float]:
    """Return the range of a score's histogram, given its least and largest value."""
    least = LOGARITHMIC.get(name)
    if least is None:
        # Values that hardly differ are one bar, not a comb of rounding errors.
        return min(low, high - _LEAST_SPAN), high
    low = max(low, least)
    return low, max(high, 10 * low)


def count_bins(name: str, values: Array, low: float, high: float) -> Array:
    """(BINS,) int64: how many of a score's values fall into each bar of [low, high].

    Bars are equally wide, of logarithms where the score is in `LOGARITHMIC`.

    Parameters
    ----------
    name : str
    values : (N,) float64
        NaN is left out; what is beyond the range stands in the bar at its end.
    low, high : float
        As from `bar_range`.
    """
    found = values[~np.isnan(values)]
    if name in LOGARITHMIC:
        found, low, high = np.log(np.maximum(found, low)), math.log(low), math.log(high)
    width = (high - low) / BINS or 1.0
    places = np.clip(((found - low) / width).astype(np.int64), 0, BINS - 1)
    return np.bincount(places, minlength=BINS)
