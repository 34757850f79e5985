"""Whether a caption belongs to its image: a detector trained on planted mismatches.

Phantoms are pairs of one sample's image and another's caption whose two parts the same proxies
left out, on a ladder of `RUNGS`: the donor is drawn from all samples, or from those whose images
are most alike. A classifier learns to tell them from the real pairs by left-out evidence alone. The
real pairs hold some mismatches too; how many is estimated from how far the two can be told apart.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize

__all__ = [
    "DETECTORS",
    "REAL",
    "RUNGS",
    "Detector",
    "Keys",
    "draw_donors",
    "fit_detector",
    "normalise_caption",
]

Array = np.ndarray[Any, Any]

#: Whose captions phantoms are given. A rung of donors with the most similar captions was tried: it
#: teaches nothing that these do not.
RUNGS = ("random", "near_image")

#: In place of a rung's number: not a phantom.
REAL = -1

#: Donors on the harder rung are drawn from so many of the most alike.
_NEAREST = 5

#: Cross-fitted detectors; none judges a pair whose cluster it was trained on.
DETECTORS = 5

#: Ridge of the classifier, in units of one pair: weak against thousands of pairs, and at a few
#: hundred as good as any of 10 to 1000.
_RIDGE = 100.0

#: Standardised features are cut here: one freak value must not decide.
_CLIP = 5.0

#: Real pairs above this probability of being a phantom sit out the second fit.
_SUSPECT = 0.7

#: Real pairs and random phantoms that each detector needs: with ten real ones, where all others lay
#: in one cluster, a fifth of the sound pairs was called mismatched.
_LEAST_PAIRS = 20

_NEWTON_ROUNDS = 30
#: Shares of the phantoms, from the top, at which real pairs are counted to estimate the share.
_TAILS = (0.3, 0.4, 0.5)

#: Shares below this are not told from none.
_MIN_SHARE = 1e-4

#: Captions are judged in so many strata of how much they tell, each with a share of its own, as
#: far as every stratum has so many real pairs: below, its share would be a guess.
_STRATA = 3
_STRATUM_PAIRS = 1000

#: A stratum has at least this part of the share of all: taken for none where others have some, a
#: whole stratum ranked behind them (pictures of noise were told at AUROC .88 instead of .96).
_LEAST_OF_ALL = 0.25


def normalise_caption(caption: str) -> str:
    """Fold case, compatibility forms and white space: captions equal then are one caption."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


@dataclass(frozen=True)
class Keys:
    """What decides whether two samples may form a phantom.

    Parameters
    ----------
    blocks : (N,) int32
        See `folds.draw_blocks`.
    clusters, captions : (N,) int64
        Hashes of cluster and normalised caption.
    """

    blocks: Array
    clusters: Array
    captions: Array


def draw_donors(
    samples: Keys,
    bank: Keys,
    draws: Array,
    likeness: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Choose whose captions are planted beside each sample's image.

    Parameters
    ----------
    samples : Keys, N samples
    bank : Keys, B samples
    draws : (N, K) float64, [0, 1)
        Uniform numbers that belong to the samples.
    likeness : callable, optional
        How like rows of the samples are to rows of the bank, (n,) and (b,) to (n, b). Donors are
        then drawn from the `_NEAREST` most alike instead of from all.

    Returns
    -------
    (N, K) int64
        Rows of the bank of equal block, another cluster and another caption; -1 where a sample
        has no such partner.
    """
    result = np.full(draws.shape, -1, np.int64)
    for block in np.unique(samples.blocks):
        rows = np.flatnonzero(samples.blocks == block)
        donors = np.flatnonzero(bank.blocks == block)
        fits = bank.clusters[donors] != samples.clusters[rows, None]
        fits &= bank.captions[donors] != samples.captions[rows, None]
        if likeness is not None:
            fits = _only_nearest(fits, likeness(rows, donors))
        counts = fits.sum(1)
        # The nth fitting donor of each row, for a uniform n.
        wanted = np.floor(draws[rows] * counts[:, None]).astype(np.int64) + 1
        running = np.cumsum(fits, axis=1, dtype=np.int32)
        for line in np.flatnonzero(counts):
            result[rows[line]] = donors[np.searchsorted(running[line], wanted[line])]
    return result


def _only_nearest(fits: Array, likeness: Array) -> Array:
    """Keep the most alike of each row's fitting columns."""
    order = np.argsort(np.where(fits, -likeness, np.inf), axis=1, kind="stable")[:, :_NEAREST]
    nearest = np.zeros_like(fits)
    np.put_along_axis(nearest, order, True, axis=1)
    kept: Array = nearest & fits
    return kept


@dataclass(frozen=True)
class Detector:
    """Cross-fitted classifiers and their calibration.

    Parameters
    ----------
    centre, spread : (F,) float64
        Standardisation of the features.
    weights : (DETECTORS, F) float64
    intercepts : (DETECTORS,) float64
    edges : (S - 1,) float64
        Between the strata of captions.
    calibration : (S, 2) float64
        Log-odds of phantom against sound pair are `calibration[:, 0] + calibration[:, 1] * score`.
    shares : (S,) float64, [0, 1]
        Estimated share of mismatched pairs among the real ones of each stratum.
    share : float, [0, 1]
        The same over all real pairs.
    share_stderr : float
        Its standard error over the folds (delete-a-fold jackknife), at least what one pair counts.
    """

    centre: Array
    spread: Array
    weights: Array
    intercepts: Array
    edges: Array
    calibration: Array
    shares: Array
    share: float
    share_stderr: float

    def to_json(self) -> dict[str, Any]:
        """Return the detector as plain lists and numbers."""
        values = vars(self).items()
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Detector":
        """Read what `to_json` gave."""
        values: dict[str, Any] = {
            k: np.array(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return Detector(**values)

    def scores(self, features: Array) -> Array:
        """Score pairs by each detector: (N, DETECTORS) float64, higher is more like a phantom."""
        return _standardise(features, self.centre, self.spread) @ self.weights.T + self.intercepts

    def probabilities(self, features: Array, bits: Array, folds: Array) -> tuple[Array, Array]:
        """Tell how likely pairs are mismatched.

        Parameters
        ----------
        features : (N, F) float32
        bits : (N,) floating
            By which captions fall into strata.
        folds : (N,) int
            The detector that was not trained on the pair's cluster.

        Returns
        -------
        probability : (N,) float64, [0, 1]
            Lower is a better match.
        stderr : (N,) float64
            Standard error over the detectors (delete-a-fold jackknife).
        """
        every = self._calibrate(self.scores(features), np.searchsorted(self.edges, bits, "right"))
        own = every[np.arange(len(every)), folds]
        deviations = ((every - every.mean(1, keepdims=True)) ** 2).sum(1)
        return own, np.sqrt(deviations * (DETECTORS - 1) / DETECTORS)

    def _calibrate(self, scores: Array, strata: Array) -> Array:
        offset, slope = self.calibration[strata].T[:, :, None]
        share = self.shares[strata][:, None]
        odds = np.exp(np.clip(offset + slope * scores, -50, 50))
        suspect: Array = share * odds / (share * odds + 1 - share)
        return suspect


def fit_detector(features: Array, bits: Array, rungs: Array, folds: Array) -> Detector | None:
    """Train the detectors, estimate the share of mismatched pairs, calibrate.

    All phantoms train the classifiers. Only random ones say how many pairs are mismatched and how
    likely one is: captions go astray at random before they go to a look-alike, and a sound pair is
    hard to tell from a look-alike's caption, which would be counted as mismatches.

    Parameters
    ----------
    features : (N, F) float32
    bits : (N,) floating
        By which captions fall into strata: how far each narrows down the pictures.
    rungs : (N,) int
        Place in `RUNGS`; `REAL` for a real pair.
    folds : (N, 2) int, [0, DETECTORS)
        Folds of the clusters of image and caption.

    Returns
    -------
    Detector or None
        None if a fold leaves too few phantoms or real pairs to learn from.
    """
    phantom = rungs != REAL
    for fold in range(DETECTORS):
        inside = (folds != fold).all(1)
        if min((inside & (rungs == 0)).sum(), (inside & ~phantom).sum()) < _LEAST_PAIRS:
            return None
    centre, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    spread = np.where(spread > 1e-9, spread, 1.0)
    inputs = _standardise(features, centre, spread)
    weights, intercepts = _cross_fit(inputs, phantom, folds, np.ones(len(inputs), bool))
    scores = _own_scores(inputs, weights, intercepts, folds[:, 0])
    # Real pairs that look like phantoms may be some: the second fit does without them.
    sound = phantom | (scores < np.log(_SUSPECT / (1 - _SUSPECT)))
    weights, intercepts = _cross_fit(inputs, phantom, folds, sound)
    easy = rungs <= 0
    scores = _own_scores(inputs[easy], weights, intercepts, folds[easy, 0])
    edges = _cut_strata(bits[easy], phantom[easy], folds[easy, 0])
    strata = np.searchsorted(edges, bits[easy], "right")
    shares = _estimate_shares(scores, phantom[easy], strata, len(edges) + 1)
    calibration = np.stack(
        [
            _fit_calibration(scores[strata == place], phantom[easy][strata == place], share)
            for place, share in enumerate(shares)
        ]
    )
    share, error = _sum_up(scores, phantom[easy], strata, folds[easy, 0], len(shares))
    return Detector(centre, spread, weights, intercepts, edges, calibration, shares, share, error)


def _cut_strata(bits: Array, phantom: Array, folds: Array) -> Array:
    """Quantiles of the real pairs that part the strata.

    None where ties leave a stratum too small, or a large cluster does once its fold is left out.
    """
    count = int(np.clip((~phantom).sum() // _STRATUM_PAIRS, 1, _STRATA))
    edges: Array = np.quantile(bits[~phantom], np.arange(1, count) / count)
    strata = np.searchsorted(edges, bits, "right")
    least = [(_STRATUM_PAIRS / 2, -1), *((_LEAST_PAIRS, fold) for fold in range(DETECTORS))]
    for (enough, fold), kind in product(least, (phantom, ~phantom)):
        if np.bincount(strata[kind & (folds != fold)], minlength=count).min() < enough:
            return np.zeros(0)
    return edges


def _estimate_shares(scores: Array, phantom: Array, strata: Array, count: int) -> Array:
    parts = [strata == place for place in range(count)]
    own = np.array([_estimate_share(scores[part], phantom[part]) for part in parts])
    sizes = np.array([(~phantom[part]).sum() for part in parts])
    floored: Array = np.maximum(own, _LEAST_OF_ALL * (own @ sizes) / max(sizes.sum(), 1))
    return floored


def _sum_up(
    scores: Array, phantom: Array, strata: Array, folds: Array, count: int
) -> tuple[float, float]:
    """Share over all real pairs, and its standard error by leaving out a fold at a time.

    Where all folds meet a bound of the share they agree, but no count is surer than to one pair.
    """

    def share(rows: Array) -> float:
        sizes = np.bincount(strata[rows & ~phantom], minlength=count)
        shares = _estimate_shares(scores[rows], phantom[rows], strata[rows], count)
        return float(shares @ sizes / sizes.sum())

    rest = [share(folds != fold) for fold in range(DETECTORS)]
    whole = share(np.ones(len(scores), bool))
    one_pair = 1 / ((~phantom).sum() * max(_TAILS))
    return whole, float(max(np.sqrt(np.var(rest) * (DETECTORS - 1)), one_pair))


def _standardise(features: Array, centre: Array, spread: Array) -> Array:
    return np.clip((features.astype(np.float64) - centre) / spread, -_CLIP, _CLIP)


def _own_scores(inputs: Array, weights: Array, intercepts: Array, folds: Array) -> Array:
    own: Array = (inputs * weights[folds]).sum(1) + intercepts[folds]
    return own


def _cross_fit(inputs: Array, phantom: Array, folds: Array, used: Array) -> tuple[Array, Array]:
    fits = [
        _fit_logistic(inputs[rows], phantom[rows])
        for rows in (used & (folds != fold).all(1) for fold in range(DETECTORS))
    ]
    return np.stack([fit[1:] for fit in fits]), np.array([fit[0] for fit in fits])


def _fit_logistic(inputs: Array, phantom: Array) -> Array:
    """Ridge logistic regression by Newton's method, both classes of equal weight in total."""
    design = np.column_stack([np.ones(len(inputs)), inputs])
    # A pair counts as one real pair; phantoms, of which there may be more, share that weight.
    weight = np.where(phantom, (~phantom).sum() / max(phantom.sum(), 1), 1.0)
    ridge = np.full(design.shape[1], _RIDGE)
    ridge[0] = 1e-6
    solution = np.zeros(design.shape[1])
    for _ in range(_NEWTON_ROUNDS):
        chance = 1 / (1 + np.exp(-np.clip(design @ solution, -50, 50)))
        slope = design.T @ (weight * (phantom - chance)) - ridge * solution
        curve = (design.T * (weight * chance * (1 - chance))) @ design + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        solution = solution + step
        if np.abs(step).max() < 1e-8:
            break
    return solution


def _estimate_share(scores: Array, phantom: Array) -> float:
    """Estimate which share of the real pairs is distributed like the phantoms.

    Above any score, share x (phantoms above it) is the least that real pairs can show; sound
    pairs only add to it, and among high scores hardly do. So every such ratio is an upper bound,
    and the lowest of a few, none of which rests on a handful of pairs, is the estimate.

    References
    ----------
    Storey 2002 (the same on p-values); Blanchard, Lee and Scott 2010, section 3.
    """
    real, planted = scores[~phantom], scores[phantom]
    above = [(real > np.quantile(planted, 1 - part)).mean() / part for part in _TAILS]
    return float(np.clip(min(above), _MIN_SHARE, 1 - _MIN_SHARE))


def _fit_calibration(scores: Array, phantom: Array, share: float) -> Array:
    """Fit offset and steepness of the log-odds of phantom against sound pair: (2,) float64.

    Real pairs are `share` parts of phantom-like and 1 - `share` parts of sound ones.
    """
    weight = np.where(phantom, (~phantom).sum() / phantom.sum(), 1.0)
    weight = weight / weight.sum()

    def loss(values: Array) -> float:
        log_odds = np.clip(values[0] + np.exp(values[1]) * scores, -50, 50)
        # log of f_phantom / f_real
        ratio = log_odds - np.logaddexp(np.log(share) + log_odds, np.log1p(-share))
        return float((weight * np.logaddexp(0, np.where(phantom, -ratio, ratio))).sum())

    found = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-20, 20), (-5, 5)]).x
    return np.array([found[0], np.exp(found[1])])
