"""Published measures of memorization and of mismatch, over anybody's embeddings.

Numpy arrays in, numpy arrays out; nothing is trained and nothing is read. "In" is a model (f)
that trained on the samples, "out" one (g) that did not. Embeddings may be of any floating type,
every row of unit norm within `NORM_TOLERANCE`; the two models may differ in width. An array of a
modality is (N, D), or (K, N, D) for K augmented views of each sample, whose expectation is taken:
view k of one modality goes with view k of the others, and (N, D) stands for K equal views.

Sums are float64. Products of every sample with every other one (losses, neighbours) are float32
and made in blocks of rows, so that memory grows with N and not with its square.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from curate.memorization import checks

# For `__all__` alone: this module is the public front, of the baselines too.
from curate.memorization.baselines import (
    LEMON_FIXED,
    DejaVu,
    LemonWeights,
    deja_vu,
    lemon,
    neg_clip_loss,
)
from curate.memorization.checks import NORM_TOLERANCE

__all__ = [
    "LEMON_FIXED",
    "NORM_TOLERANCE",
    "DejaVu",
    "LemonWeights",
    "clipmem",
    "cmc",
    "contrastive_loss",
    "deja_vu",
    "lemon",
    "loss_gap",
    "multimem",
    "neg_clip_loss",
    "rescale",
    "sslmem",
]

Array = np.ndarray[Any, Any]


def cmc(modalities: Sequence[Array], held_out: Sequence[Array]) -> Array:
    """How well a sample's modalities agree under one model, beyond unrelated samples.

    ``1/2 E|u|^2 - 1/2 <E u, mean of u over the held-out samples>``, u the sum of a sample's
    embeddings: that is half of 1' Phi Phi' 1 minus half of 1' Phi Phi_h' 1, in O(n D) per sample.

    Parameters
    ----------
    modalities : sequence of n >= 2 arrays, (N, D) or (K, N, D) floating, unit norm
    held_out : sequence of n arrays, (M, D) or (K, M, D) floating, unit norm
        Samples that have nothing to do with the N, modalities in the same order.

    Returns
    -------
    (N,) float64, [-n**2 / 8, n**2]
        Higher: the modalities agree better. Each sample's agreement of a modality with itself is
        part of it, so that only differences between two models mean something: see `multimem`.

    Raises
    ------
    ValueError
        If n < 2, a set is empty, shapes do not fit, or a row is not finite or not of unit norm.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220), definition of CMC.
    """
    return _cmc(("modalities", "held_out"), modalities, held_out)


def _cmc(where: tuple[str, str], modalities: Sequence[Array], held_out: Sequence[Array]) -> Array:
    arrays = checks.modalities(where[0], modalities)
    mean = checks.held_out_means(where[1], held_out, arrays).sum(0)
    result = np.empty(arrays[0].shape[1])
    for rows, block in checks.blocks(arrays):
        total = sum(block, start=np.zeros(1))
        own = np.einsum("kbd,kbd->kb", total, total).mean(0)
        result[rows] = (own - total.mean(0) @ mean) / 2
    return result


def multimem(
    in_model: Sequence[Array],
    out_model: Sequence[Array],
    in_held_out: Sequence[Array],
    out_held_out: Sequence[Array],
    form: Literal["raw", "pair_mean", "per_modality"] = "raw",
) -> Array:
    """Memorization of samples with n >= 2 modalities: `cmc` under f minus `cmc` under g.

    Parameters
    ----------
    in_model, out_model : sequence of n arrays, (N, D) or (K, N, D) floating, unit norm
    in_held_out, out_held_out : sequence of n arrays, (M, D) or (K, M, D) floating, unit norm
    form : {"raw", "pair_mean", "per_modality"}
        The difference as defined; divided by the number of pairs, n (n - 1) / 2, which makes
        different n comparable; divided by n - 1, with which the paper's tables agree. Equal for
        n = 2.

    Returns
    -------
    (N,) float64, [-9 n**2 / 8, 9 n**2 / 8] before the division
        Higher: more memorized. 0 if both models are the same.

    Raises
    ------
    ValueError
        As `cmc`; or if f and g do not hold the same number of samples and modalities, or the
        form is unknown.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220), definition of MultiMem; Table 3 for the scale.
    """
    number = len(in_model)
    scales = {"raw": 1.0, "pair_mean": number * (number - 1) / 2, "per_modality": number - 1.0}
    if form not in scales:
        raise ValueError(f"form: must be one of {', '.join(scales)}; got {form!r}")
    if len(out_model) != number:
        raise ValueError(
            f"out_model: must hold the {number} modalities of in_model; got {len(out_model)}"
        )
    first = _cmc(("in_model", "in_held_out"), in_model, in_held_out)
    second = _cmc(("out_model", "out_held_out"), out_model, out_held_out)
    checks.same_samples(first, second)
    return (first - second) / scales[form]


def clipmem(
    in_model: tuple[Array, Array],
    out_model: tuple[Array, Array],
    in_held_out: tuple[Array, Array],
    out_held_out: tuple[Array, Array],
) -> Array:
    """Memorization of image-text pairs: alignment under f minus alignment under g, raw.

    Alignment is the mean cosine of image and text over views, minus the image's mean cosine with
    the held-out texts, minus the text's with the held-out images.

    Parameters
    ----------
    in_model, out_model : (image, text), each (N, D) or (K, N, D) floating, unit norm
    in_held_out, out_held_out : (image, text), each (M, D) or (K, M, D) floating, unit norm

    Returns
    -------
    (N,) float64, [-6, 6]
        Higher: more memorized. For the published range see `rescale`.

    Raises
    ------
    ValueError
        As `cmc`; or if there are not exactly two modalities.

    References
    ----------
    Wang et al., Captured by Captions (arXiv:2502.07830), definition of CLIPMem. The weight of
    the negative terms is as we recall it; `multimem` has half of it, and the same positive term.
    """
    for name, pair in (("in_model", in_model), ("out_model", out_model)):
        if len(pair) != 2:
            raise ValueError(f"{name}: must hold two modalities; got {len(pair)}; use multimem")
    first = _alignment(("in_model", "in_held_out"), in_model, in_held_out)
    second = _alignment(("out_model", "out_held_out"), out_model, out_held_out)
    checks.same_samples(first, second)
    return first - second


def _alignment(where: tuple[str, str], pair: Sequence[Array], held_out: Sequence[Array]) -> Array:
    """L_align of one model, in [-3, 3]."""
    arrays = checks.modalities(where[0], pair)
    image_mean, text_mean = checks.held_out_means(where[1], held_out, arrays)
    result = np.empty(arrays[0].shape[1])
    for rows, (image, text) in checks.blocks(arrays):
        image, text = np.broadcast_arrays(image, text)
        own = np.einsum("kbd,kbd->kb", image, text).mean(0)
        result[rows] = own - image.mean(0) @ text_mean - text.mean(0) @ image_mean
    return result


def rescale(scores: Array) -> Array:
    """Divide scores by their range, as CLIPMem and SSLMem values are published.

    The divisor depends on the set's two most extreme samples, so that means and thresholds of
    rescaled scores of different sets or models must not be compared. Report the raw ones too.

    Parameters
    ----------
    scores : (N,) floating

    Returns
    -------
    (N,) float64, [-1, 1]
        Same signs and order. 0 counts into the range, which else would not bound scores of one
        sign. Zeros if all scores are 0.

    Raises
    ------
    ValueError
        If scores are not one finite row.

    References
    ----------
    Wang et al., Memorization in Self-Supervised Learning (arXiv:2401.12233), the authors' code:
    difference / (maximum - minimum).
    """
    values = checks.finite_row("scores", scores)
    low, high = values.min(initial=0), values.max(initial=0)
    if high / 2 - low / 2 > np.finfo(np.float64).max / 2:  # their range is no float64
        values, low, high = values / 2, low / 2, high / 2
    span = high - low
    return values / span if span > 0 else np.zeros(len(values))


def sslmem(in_views: Array, out_views: Array) -> Array:
    """Memorization by one encoder: how much closer f holds views of a sample than g does.

    Parameters
    ----------
    in_views, out_views : (K, N, D) floating, unit norm
        K >= 2 augmented views of the samples under f and under g. All pairs of views count.

    Returns
    -------
    (N,) float64, [-2, 2]
        Mean Euclidean distance of two views, g's minus f's. Higher: more memorized.

    Raises
    ------
    ValueError
        If there are fewer than two views, N differs, or a row is not finite or not of unit norm.

    References
    ----------
    Wang et al., Memorization in Self-Supervised Learning (arXiv:2401.12233), definition of SSLMem.
    """
    first, second = _spread("in_views", in_views), _spread("out_views", out_views)
    checks.same_samples(first, second)
    return second - first


def _spread(where: str, views: Array) -> Array:
    """Mean distance of two different views."""
    array = checks.embeddings(where, views)
    if len(array) < 2:
        raise ValueError(f"{where}: must be (K, N, D) with K >= 2 views; got {np.shape(views)}")
    result = np.zeros(array.shape[1])
    for rows, (block,) in checks.blocks([array]):
        for view in range(1, len(block)):
            result[rows] += np.linalg.norm(block[view] - block[:view], axis=-1).sum(0)
    return result / (len(array) * (len(array) - 1) / 2)


def loss_gap(in_loss: Array, out_loss: Array) -> Array:
    """Memorization in units of loss: the sample's loss under g minus its loss under f.

    Parameters
    ----------
    in_loss, out_loss : (N,) floating
        For example of `contrastive_loss`, against the same samples.

    Returns
    -------
    (N,) float64, unbounded
        Higher: more memorized.

    Raises
    ------
    ValueError
        If N differs or a loss is not finite.

    References
    ----------
    Feldman and Zhang (arXiv:2008.03703), definition of memorization, with a loss as performance.
    """
    first, second = checks.finite_row("in_loss", in_loss), checks.finite_row("out_loss", out_loss)
    checks.same_samples(first, second)
    return second - first


def contrastive_loss(
    image: Array,
    text: Array,
    bank: tuple[Array, Array],
    temperature: float = 0.07,
    rows: Array | None = None,
) -> Array:
    """Symmetric InfoNCE of each pair against the images and texts of a bank.

    Parameters
    ----------
    image, text : (N, D) floating, unit norm
    bank : ((B, D), (B, D)) floating, unit norm
        Images and texts that serve as negatives.
    temperature : float
        Cosines are divided by it.
    rows : (N,) int, optional
        The bank's row that holds the sample itself, which is then no negative; -1 if none does.

    Returns
    -------
    (N,) float64, [0, inf)
        Nats, mean of both directions. Lower: better match. Grows with log B: compare losses
        against equal banks only.

    Raises
    ------
    ValueError
        If shapes do not fit, a row is not finite or not of unit norm, the temperature is not
        positive, or no negative is left.

    References
    ----------
    Radford et al., CLIP (arXiv:2103.00020), Figure 3; negatives from a bank instead of a batch.
    """
    pair, banks = checks.pair(image, text), checks.pair(*bank, where=("bank[0]", "bank[1]"))
    checks.width("bank", banks[0], pair[0].shape[1])
    places = np.full(len(pair[0]), -1) if rows is None else np.asarray(rows)
    size = len(banks[0])
    if places.shape != (len(pair[0]),) or places.dtype.kind not in "iu":
        raise ValueError(f"rows: must be ({len(pair[0])},) int; got {places.shape} {places.dtype}")
    if places.min() < -1 or places.max() >= size:
        raise ValueError(f"rows: must be in [-1, {size}); got {places.min()} to {places.max()}")
    if size == 1 and places.max() == 0:
        raise ValueError("bank: must hold a sample besides the one it is compared with; got 1")
    checks.positive("temperature", temperature)
    return checks.info_nce(pair, banks, temperature, places)
