"""What speaks for or against a pair, none of it from a model that saw the pair.

Real pairs and phantoms go through the same functions. Both parts of a pair, and the samples they
come from, are kept out of everything that the pair is compared with; else a detector would learn
how phantoms are made instead of what a mismatch looks like.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from curate.memorization.blocks import by_blocks, exact_products

__all__ = ["EVIDENCE", "FEATURES", "Bank", "Pairs", "ProxyView", "gather_evidence", "highest"]

Array = np.ndarray[Any, Any]
_Multiply = Callable[[Array], Array]

#: Columns whose maximum stands for them in a first round.
_GROUP = 32

#: Neighbours whose captions (images) are looked at one by one.
_NEIGHBOURS = 10

#: Width of the kernel over cosines of centred vectors: at 0.1, a neighbour at .5 counts as much
#: as 150 unrelated samples. Within .07 to .15 nothing changed by more than its noise.
_KERNEL_WIDTH = 0.1

#: Scales up to this keep powers of cosines within float32: exp(-2 x 40) is 1e-35.
_MAX_FLOAT32_SCALE = 40.0

_PROXY_FEATURES = ("cosine", "loss_image", "loss_text")
_SIDE_FEATURES = ("best", "best_five", "nearest")

#: Under the proxies that left the pair out: mean cosine, mean loss against other captions and
#: other images, spread of the cosine. Of the ten nearest images' captions, likeness to the
#: caption (highest, mean of the nearest five), and the nearest image's cosine; the same with
#: modalities exchanged. Mutual information of the two neighbourhoods. In a space that the encoder
#: brings: cosine and losses. Ranks and z-scores among other pairs, and a kernel regression from
#: either modality to the other, added nothing to these.
FEATURES: tuple[str, ...] = (
    *(f"out_{name}" for name in _PROXY_FEATURES),
    "out_cosine_spread",
    *(f"{name}_of_image_neighbours" for name in _SIDE_FEATURES),
    *(f"{name}_of_caption_neighbours" for name in _SIDE_FEATURES),
    "information",
    *(f"shared_{name}" for name in _PROXY_FEATURES),
)

#: All that is gathered: besides the detector's features how far the caption narrows down the
#: pictures that the proxies left out (see `information.score_information`).
EVIDENCE: tuple[str, ...] = (*FEATURES, "caption_bits")


@dataclass(frozen=True)
class Bank:
    """Reference samples, in an order drawn by hash.

    Parameters
    ----------
    image, text : (B, F) float32, unit norm
        Centred vectors.
    """

    image: Array
    text: Array


@dataclass(frozen=True)
class Pairs:
    """Pairs to be judged.

    Parameters
    ----------
    image, text : (N, F) float32, unit norm
        Centred vectors.
    clusters : (N, 2) int64
        Of the image's sample and of the caption's.
    captions : (N,) int64
    rows : (N, 2) int64
        Rows of the bank in which these samples lie; -1 where they do not.
    """

    image: Array
    text: Array
    clusters: Array
    captions: Array
    rows: Array


@dataclass(frozen=True)
class ProxyView:
    """The pairs and references under one proxy.

    Parameters
    ----------
    image, text : (N, W) float16 or float32, unit norm
        The pairs.
    left_out : (N,) bool
        Pairs whose parts this proxy did not train on.
    scale : float
        1 / temperature.
    image_references, text_references : (R, W) float32, unit norm
        Samples that it did not train on either.
    clusters, captions : (R,) int64
        Theirs.
    """

    image: Array
    text: Array
    left_out: Array
    scale: float
    image_references: Array
    text_references: Array
    clusters: Array
    captions: Array


def gather_evidence(
    pairs: Pairs, bank: Bank, views: list[ProxyView], shared: ProxyView | None = None
) -> Array:
    """Describe pairs by `EVIDENCE`.

    Parameters
    ----------
    pairs : Pairs
    bank : Bank
    views : list of ProxyView, length P
        Every pair is left out of the same number of them.
    shared : ProxyView, optional
        A space that the encoder brings, if any; these features are 0 without.

    Returns
    -------
    (N, len(EVIDENCE)) float32
        Finite.

    References
    ----------
    Zhang et al., LEMoN (arXiv:2407.18941), section 3: neighbours in either modality.
    """
    cosines = exact_products(bank.image.T), exact_products(bank.text.T)
    near = by_blocks(partial(_neighbour_evidence, cosines), pairs.image, pairs.text, pairs.rows)
    own, _, _ = _proxy_evidence(pairs, [shared] if shared else [])
    mean, spread, bits = _proxy_evidence(pairs, views)
    result = np.column_stack([mean, spread, near, own, bits])
    return np.nan_to_num(result.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _proxy_evidence(pairs: Pairs, views: list[ProxyView]) -> tuple[Array, Array, Array]:
    """Over the proxies that left the pair out: means, spread of the cosine, mean of the bits."""
    count = len(pairs.captions)
    total = np.zeros((count, len(_PROXY_FEATURES) + 1))
    squares = np.zeros(count)
    seen = np.zeros(count)
    for view in views:
        rows = np.flatnonzero(view.left_out)
        references = view.text_references, view.image_references
        cosines = [exact_products(part.T) for part in references]
        found = by_blocks(partial(_under_proxy, pairs, view, cosines), rows)
        total[rows] += found
        squares[rows] += found[:, 0] ** 2
        seen[rows] += 1
    seen = np.maximum(seen, 1)
    mean = total / seen[:, None]
    spread = np.sqrt(np.maximum(squares / seen - mean[:, 0] ** 2, 0))
    return mean[:, :-1], spread, mean[:, -1]


def _under_proxy(pairs: Pairs, view: ProxyView, cosines: Sequence[_Multiply], rows: Array) -> Array:
    """Cosine, contrastive loss against other captions and other images, the caption's bits."""
    image, text = view.image[rows].astype(np.float32), view.text[rows].astype(np.float32)
    cosine = (image * text).sum(1)
    clusters = pairs.clusters[rows]
    others = (view.clusters != clusters[:, :1]) & (view.clusters != clusters[:, 1:])
    others &= view.captions != pairs.captions[rows][:, None]
    number = others.sum(1) + 1
    result = [cosine]
    kind: Any = np.float32 if view.scale <= _MAX_FLOAT32_SCALE else np.float64
    own = np.exp(view.scale * (cosine.astype(kind) - 1))
    for queries, multiply in zip((image, text), cosines, strict=True):
        logits = view.scale * (multiply(queries).astype(kind, copy=False) - 1)
        powers = np.where(others, np.exp(logits), 0)
        total = powers.sum(1)
        result.append(np.log((own + total) / number) - view.scale * (cosine - 1))
    # Of the second pass: how far from uniform the caption's softmax over other images is.
    total[number == 1] = 1  # no other image: nothing to narrow down, no bits
    entropy = np.log(total) - (powers * logits).sum(1) / total
    result.append((np.log(np.maximum(number - 1, 1)) - entropy) / np.log(2))
    return np.stack(result, axis=1)


def _neighbour_evidence(
    cosines: tuple[_Multiply, _Multiply], image: Array, text: Array, rows: Array
) -> Array:
    """See `FEATURES`: either side's, then the information."""
    with_images, with_captions = cosines
    by_image, by_text = _without(with_images(image), rows), _without(with_captions(text), rows)
    near_image, near_text = _kernel(by_image), _kernel(by_text)
    # Pointwise mutual information by kernel densities: do the image's neighbours and the
    # caption's neighbours coincide more than by chance?
    joint = np.einsum("ij,ij->i", near_image, near_text) / by_image.shape[1]
    apart = near_image.mean(1) * near_text.mean(1)
    information = np.log((joint + 1e-20) / (apart + 1e-20))
    sides = (_side_evidence(by_image, by_text), _side_evidence(by_text, by_image))
    return np.concatenate([*sides, information[:, None]], axis=1)


def _without(cosines: Array, excluded: Array) -> Array:
    """Put the bank's rows that a pair is made of out of reach, in place."""
    lines, places = np.nonzero(excluded >= 0)
    cosines[lines, excluded[lines, places]] = -1
    return cosines


def _kernel(cosines: Array) -> Array:
    weights: Array = np.exp((cosines - 1) / np.float32(_KERNEL_WIDTH))
    return weights


def _side_evidence(by_query: Array, by_target: Array) -> Array:
    """Compare the target with those of the query's neighbours: (N, len(_SIDE_FEATURES))."""
    nearest = highest(by_query, _NEIGHBOURS)
    likeness = np.take_along_axis(by_target, nearest, 1)
    closeness = np.take_along_axis(by_query, nearest[:, :1], 1)[:, 0]
    return np.stack([likeness.max(1), likeness[:, :5].mean(1), closeness], axis=1)


def highest(values: Array, count: int) -> Array:
    """Find each row's largest values, exactly.

    Groups of columns are compared by their maxima first: the `count` largest values lie in the
    `count` groups of largest maximum. Eight times as fast as `np.argpartition` on 10 000 columns.

    Parameters
    ----------
    values : (N, B) floating
    count : int

    Returns
    -------
    (N, min(count, B)) int64
        Columns, largest value first, of equal ones the first column first.
    """
    lines, width = values.shape
    groups = width // _GROUP
    if groups > 2 * count:
        tops = values[:, : groups * _GROUP].reshape(lines, groups, _GROUP).max(2)
        # Not by a partition, which of equal groups takes what the processor's code happens to.
        best = np.sort(np.argsort(-tops, axis=1, kind="stable")[:, :count], axis=1)
        inside = (best[:, :, None] * _GROUP + np.arange(_GROUP)).reshape(lines, count * _GROUP)
        rest = np.broadcast_to(np.arange(groups * _GROUP, width), (lines, width % _GROUP))
        columns = np.concatenate([inside, rest], axis=1)
    else:
        columns = np.broadcast_to(np.arange(width), (lines, width))
    order = np.argsort(-np.take_along_axis(values, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order[:, : min(count, width)], 1)
