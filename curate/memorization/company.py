"""Memorization with less noise: what the other samples of a training did to a sample is taken off.

Whether a proxy fits a pair depends on the pair, on whether it was trained on, and on its company:
which of its neighbours were. Under heads over the vectors by which neighbours are found that is
most of the noise of a score, under small CLIPs a fifth. Each cluster is in half of the proxies by a
draw of its own, so that the expected share of trained neighbours is one half, and a regression on
the share takes off what it was by chance, as in a randomized experiment with a covariate.

References: Lin, Agnostic Notes on Regression Adjustments to Experimental Data (2013): one slope for
either side. Feldman and Zhang (arXiv:2008.03703), section 2: the estimator whose variance this
lowers; its expectation stays.
"""

from typing import Any

import numpy as np

from curate.memorization.blocks import exact_products
from curate.memorization.folds import split_sides

__all__ = ["COVARIATES", "Company", "adjust_values", "fit_slopes", "regression_sums"]

Array = np.ndarray[Any, Any]

#: Widths of the kernels over cosines by which neighbours count: near ones alone, and a region.
#: With .02, .05, .1 and .2 nothing was gained.
_WIDTHS = (0.03, 0.1)
COVARIATES = len(_WIDTHS)
_EXPECTED = 0.5
_BLOCK_ROWS = 64


class Company:
    """Samples that proxies train on.

    Parameters
    ----------
    vectors : (M, D) floating, unit norm
        Image and caption side by side, so that a product is the mean of two cosines.
    clusters : (M,) int64
    inside : (M, P) bool
        Which proxies train on them.
    """

    def __init__(self, vectors: Array, clusters: Array, inside: Array) -> None:
        self._clusters, self._proxies = clusters, inside.shape[1]
        self._cosines = exact_products(vectors.T)
        self._totals = exact_products(np.column_stack([inside, np.ones(len(inside))]))

    def shares(self, vectors: Array, clusters: Array) -> Array:
        """Return what share of each sample's neighbours each proxy trained on.

        Parameters
        ----------
        vectors : (N, D) floating, unit norm
        clusters : (N,) int64
            Samples of a sample's own cluster are no neighbours: they are in where it is.

        Returns
        -------
        (N, P, COVARIATES) float32, [0, 1]
            One half where there are no others.
        """
        found = np.full((len(vectors), self._proxies, COVARIATES), _EXPECTED, np.float32)
        for start in range(0, len(vectors) if len(self._clusters) else 0, _BLOCK_ROWS):
            cosines = self._cosines(vectors[start : start + _BLOCK_ROWS])
            cosines[clusters[start : start + _BLOCK_ROWS, None] == self._clusters] = -np.inf
            nearest = cosines.max(1, keepdims=True)
            some = np.flatnonzero(np.isfinite(nearest[:, 0]))
            for place, width in enumerate(_WIDTHS):
                weights = np.exp((cosines[some] - nearest[some]) / np.float32(width))
                totals = self._totals(weights)
                found[start + some, :, place] = totals[:, :-1] / totals[:, -1:]
        return found


def regression_sums(values: Array, inside: Array, shares: Array) -> Array:
    """Sum up what the slopes of values by shares follow from; sums of parts can be added.

    Parameters
    ----------
    values : (N, P) floating
        NaN where a sample has none.
    inside : (N, P) bool
        Whether the proxy trained on the sample. Every row holds P / 2 times True.
    shares : (N, P, K) floating

    Returns
    -------
    (2, K, K + 1) float64
        For in- and for out-proxies products of deviations from a sample's mean on that side:
        shares with shares, and in the last column with values.
    """
    sides = zip(split_sides(values, inside), split_sides(shares, inside), strict=True)
    return np.stack([_side_sums(*side) for side in sides])


def _side_sums(values: Array, shares: Array) -> Array:
    known = np.isfinite(values).all(1)
    both = np.concatenate([shares[known], values[known, :, None]], axis=2).astype(np.float64)
    both -= both.mean(1, keepdims=True)
    flat = both.reshape(-1, both.shape[2])
    sums: Array = flat[:, :-1].T @ flat
    return sums


def fit_slopes(sums: Array) -> Array:
    """Return how values rise with shares of trained neighbours.

    Parameters
    ----------
    sums : (2, K, K + 1) float64
        Of all samples, see `regression_sums`.

    Returns
    -------
    (2, K) float64
        Of in- and of out-proxies; 0 where two proxies are all, so that no sample has two on a side.
    """
    return np.stack([np.linalg.lstsq(side[:, :-1], side[:, -1])[0] for side in sums])


def adjust_values(values: Array, inside: Array, shares: Array, slopes: Array) -> Array:
    """Take off what a share of trained neighbours other than one half did to values.

    Parameters
    ----------
    values, inside, shares
        See `regression_sums`.
    slopes : (2, K) float64
        See `fit_slopes`.

    Returns
    -------
    (N, P) float64
    """
    adjusted = np.array(values, np.float64)
    for side, own in zip((inside, ~inside), slopes, strict=True):
        adjusted[side] -= (shares[side] - _EXPECTED) @ own
    return adjusted
