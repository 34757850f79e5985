"""Is influence reliable enough to be evidence? `python -m benchmarks.influence OUT WORK`.

The influence of a sample is what training on it adds to the fit of its nearest neighbours under
proxies that left those out. WORK holds the proxies' values of `benchmarks.reliability`, made of the
same OUT and limit. Prints one JSON line: mean influence on nearest neighbours and on samples drawn
at random, and how alike two halves of the proxies rank samples by it, and eight other proxies. With
`--swaps`, heads are trained instead on pairs of which so many have another's caption, and influence
and left-out fit are asked which.

References: Feldman and Zhang (arXiv:2008.03703), section 2: influence by subset sampling.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.reliability import FEW, Data, heads_fit, read_data
from curate.memorization.folds import draw_halves, draw_masks

Array = np.ndarray[Any, Any]


def find_near(data: Data, count: int) -> Array:
    """Places of the pairs of other clusters with the most similar pictures: (N, count)."""
    image = data.vectors[0] / np.linalg.norm(data.vectors[0], axis=1, keepdims=True)
    likeness = image @ image.T
    names = np.unique(data.clusters, return_inverse=True)[1]
    likeness[names[:, None] == names] = -np.inf
    near: Array = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
    return near


def measure_influence(values: Array, masks: Array, others: Array) -> Array:
    """Mean over others of their value, left out, under proxies with the sample less without it.

    Parameters
    ----------
    values : (N, P) float64
        A pair's fit under every proxy.
    masks : (N, P) bool
        What each proxy trained on.
    others : (N, K) int64

    Returns
    -------
    (N,) float64
        NaN where no proxy has the one and not the other.
    """
    found = np.full(others.shape, np.nan)
    for place in range(others.shape[1]):
        other = others[:, place]
        left_out = np.where(masks[other], np.nan, values[other])
        sides = [np.where(masks == seen, left_out, np.nan) for seen in (True, False)]
        with_it, without = (_mean(side) for side in sides)
        found[:, place] = with_it - without
    return _mean(found)


def _mean(values: Array) -> Array:
    """Row means of what is no NaN."""
    known = np.isfinite(values)
    count = known.sum(1)
    sums = np.where(known, values, 0).sum(1)
    found: Array = np.divide(sums, count, out=np.full(len(values), np.nan), where=count > 0)
    return found


def _describe(values: Array, masks: Array, others: Array) -> dict[str, float]:
    whole = measure_influence(values, masks, others)
    half = values.shape[1] // 2
    parts = [
        measure_influence(values[:, side], masks[:, side], others)
        for side in (slice(None, half), slice(half, None))
    ]
    rank = _rank_alike(*parts)
    return {
        "mean": round(float(np.nanmean(whole)), 5),
        "stderr": round(float(np.nanstd(whole) / np.isfinite(whole).sum() ** 0.5), 5),
        "positive": round(float((whole[np.isfinite(whole)] > 0).mean()), 4),
        "split_half": rank,
        "reliability": round(2 * rank / (1 + rank), 4),
    }


def _rank_alike(one: Array, other: Array) -> float:
    known = np.isfinite(one) & np.isfinite(other)
    return round(float(np.asarray(spearmanr(one[known], other[known]).statistic)), 4)


def _swap(data: Data, share: float) -> tuple[Data, Array]:
    """Give so many pairs the caption of another; and which."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(data.captions))[: round(share * len(data.captions))]
    donors = np.roll(rows, 1)
    captions, text = np.array(data.captions), data.vectors[1].copy()
    differs = captions[donors] != captions[rows]
    rows, donors = rows[differs], donors[differs]
    captions[rows], text[rows] = captions[donors], data.vectors[1][donors]
    swapped = np.zeros(len(captions), bool)
    swapped[rows] = True
    return replace(data, captions=captions.tolist(), vectors=(data.vectors[0], text)), swapped


def _find_swaps(data: Data, share: float, proxies: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Train heads on pairs with swaps; AUROC of low left-out fit, low influence, both."""
    data, swapped = _swap(data, share)
    masks = draw_halves(data.clusters, proxies, 0)
    fit = heads_fit(data)
    values = np.stack([fit(masks[:, proxy], proxy) for proxy in range(proxies)], axis=1)
    left_out = _mean(np.where(masks, np.nan, values))
    found: dict[str, Any] = {"swapped": int(swapped.sum())}
    found["left_out_fit"] = round(float(roc_auc_score(swapped, -left_out)), 4)
    for count in counts:
        near = find_near(data, count)
        influence = measure_influence(values, masks, near)
        known = np.isfinite(influence)
        ranks = np.stack([rankdata(part[known]) for part in (left_out, influence)], axis=1)
        model = make_pipeline(StandardScaler(), LogisticRegression())
        both = cross_val_predict(model, ranks, swapped[known], cv=5, method="decision_function")
        found[str(count)] = {
            **_describe(values, masks, near),
            "influence": round(float(roc_auc_score(swapped[known], -influence[known])), 4),
            "left_out_fit": round(float(roc_auc_score(swapped[known], -left_out[known])), 4),
            "both": round(float(roc_auc_score(swapped[known], both)), 4),
        }
    return found


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", default=2000, show_default=True, help="Pairs used, as there.")
@click.option("--proxies", default=64, show_default=True)
@click.option("--neighbours", multiple=True, type=int, default=(1, 5, 20), show_default=True)
@click.option("--swaps", default=0.0, show_default=True, help="Share of captions swapped.")
def main(
    out: Path, work: Path, limit: int, proxies: int, neighbours: tuple[int, ...], swaps: float
) -> None:
    """Measure by the values in WORK."""
    data = read_data(out, limit)
    report: dict[str, Any] = {"pairs": len(data.captions), "proxies": proxies}
    if swaps:
        report |= _find_swaps(data, swaps, proxies, neighbours)
        click.echo(json.dumps(report))
        return
    masks = draw_halves(data.clusters, proxies, 0)
    few = draw_masks(data.clusters, FEW, 0)
    values, of_few = (
        np.stack([np.load(work / f"{name}-{proxy}.npy") for proxy in range(count)], axis=1)
        for name, count in (("truth", proxies), ("few", FEW))
    )
    rng = np.random.default_rng(0)
    for count in neighbours:
        near = find_near(data, count)
        drawn = rng.integers(0, len(values), (len(values), count))
        by_few, by_all = (measure_influence(*one, near) for one in ((of_few, few), (values, masks)))
        report[str(count)] = {
            "near": _describe(values, masks, near),
            "random": _describe(values, masks, drawn),
            "few": {
                "known": float(np.isfinite(by_few).mean()),
                "rank": _rank_alike(by_few, by_all),
            },
        }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
