"""What memorizing a sample does: help the rare and right, or harm by the wrong."""

from typing import Any

import numpy as np

from curate.memorization.folds import average, split_sides

__all__ = ["coherence", "mean_of_others", "measure_memorization", "tell_kinds"]

Array = np.ndarray[Any, Any]

#: A sample counts as memorized if this share of its coherence under proxies that trained on it is
#: missing under those that did not, and the difference exceeds this many standard errors.
_MEMORIZED_SHARE = 0.5
_SURE = 2.0

#: Above this probability of mismatch, what was memorized is wrong.
_WRONG = 0.5


def coherence(alignment: Array, image: Array, text: Array, held_out: Array) -> Array:
    """Cross-modal coherence of pairs under one proxy, from stored means over views.

    Parameters
    ----------
    alignment : (N,) floating, [-1, 1]
        Mean over views of the pair's cosine.
    image, text : (N, D) floating
        Means over views of the unit vectors.
    held_out : (N, D) or (D,) floating
        Mean over samples that the proxy left out of image plus text vector: see `mean_of_others`.

    Returns
    -------
    (N,) float64
        1 + alignment - half the product with the held-out mean: `1/2 |u|^2 - 1/2 <u, mean u_h>`
        for u = image + text. Higher: the parts agree with each other more than with others.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220): CMC, for two modalities.
    """
    both = image.astype(np.float64) + text.astype(np.float64)
    result: Array = 1 + np.asarray(alignment, np.float64) - (both * held_out).sum(1) / 2
    return result


def mean_of_others(held_out: Array, held_clusters: Array, clusters: Array) -> Array:
    """Mean of held-out vectors beyond each sample's own cluster.

    With itself and its copies among them, a left-out pair would agree less with its own parts than
    with others, as one that was trained on never does, and seem memorized the more copies it has.

    Parameters
    ----------
    held_out : (M, D) floating
    held_clusters : (M,) int64
    clusters : (N,) int64

    Returns
    -------
    (N, D) float64
        Over all of them where there are no others; 0 where there are none.
    """
    count = len(held_out)
    names, places = np.unique(np.concatenate([held_clusters, clusters]), return_inverse=True)
    held, own = places[:count], places[count:]
    sums = np.zeros((len(names), held_out.shape[1]))
    np.add.at(sums, held, held_out)
    left = count - np.bincount(held, minlength=len(names))[own]
    # Of all, summed up in their order: nothing depends on which samples are asked for together.
    total = held_out.sum(0, dtype=np.float64)
    others = np.where(left[:, None] > 0, total - sums[own], total)
    means: Array = others / np.maximum(np.where(left > 0, left, count), 1)[:, None]
    return means


def measure_memorization(values: Array, inside: Array) -> tuple[Array, Array]:
    """Mean coherence under in-proxies minus that under out-proxies (MultiMem, raw, n = 2).

    Parameters
    ----------
    values : (N, P) floating
        Coherence under every proxy; NaN where a sample has none.
    inside : (N, P) bool
        Whether the proxy trained on the sample. Every row holds P / 2 times True.

    Returns
    -------
    score : (N,) float64
        Higher: memorized more; 0 for a sample whose fit does not depend on training on it.
    stderr : (N,) float64
        Over the P / 2 pairs of complementary proxies; NaN below two.

    References
    ----------
    Feldman and Zhang (arXiv:2008.03703), section 2: the subset-sampling estimator.
    """
    within, without = split_sides(values, inside)
    return average(within - without)


def tell_kinds(
    score: Array, stderr: Array, coherence_in: Array, mismatch: Array
) -> list[str | None]:
    """Tell harmful from beneficial memorization.

    Parameters
    ----------
    score, stderr : (N,) floating
        See `measure_memorization`; NaN where unknown.
    coherence_in : (N,) floating
        Mean coherence under in-proxies; about 1 for unrelated parts.
    mismatch : (N,) floating, [0, 1]
        Probability that the caption does not belong to the image; NaN where unknown.

    Returns
    -------
    list of str or None
        `none`: generalised; `harmful`: memorized and mismatched; `beneficial`: memorized and, by
        the evidence, correct. None where score, its error or the probability is unknown.

    Notes
    -----
    An outlier to both modalities is no case of its own. Foreign but right pairs lie as far out as
    noise beside garbled captions, which in numbers lie close to each other: isolation in both
    spaces, or distance from the mean picture, holds on one corpus and fails on the next
    (`benchmarks.outliers`).
    """
    memorized = score > _SURE * stderr
    memorized &= score > _MEMORIZED_SHARE * np.maximum(coherence_in - 1, 0)
    known = np.isfinite(score) & np.isfinite(stderr) & np.isfinite(mismatch)
    kinds = np.where(memorized, np.where(mismatch >= _WRONG, "harmful", "beneficial"), "none")
    return [str(kind) if sure else None for kind, sure in zip(kinds, known, strict=True)]
