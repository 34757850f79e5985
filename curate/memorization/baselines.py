"""Per-sample baselines of other papers: negCLIPLoss, LEMoN and deja vu.

Conventions are those of `curate.memorization.metrics`, from which these are meant to be imported.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from curate.memorization import checks
from curate.memorization.evidence import highest

__all__ = ["LEMON_FIXED", "DejaVu", "LemonWeights", "deja_vu", "lemon", "neg_clip_loss"]

Array = np.ndarray[Any, Any]


def neg_clip_loss(
    image: Array,
    text: Array,
    temperature: float = 0.01,
    batch_size: int = 32_768,
    rounds: int = 5,
    seed: int = 0,
) -> Array:
    """Cosine of a pair, less what either half gets from the rest of a random batch.

    ``cos_ii - (t / 2) (log sum_j exp(cos_ij / t) + log sum_j exp(cos_ji / t))``, the mean over
    rounds that deal all samples to batches. The last batch of a round is filled up with samples
    already dealt, so that everyone is compared with equally many.

    Parameters
    ----------
    image, text : (N, D) floating, unit norm
    temperature, batch_size, rounds
        t, samples per batch (N if there are fewer) and rounds, as published.
    seed : int
        The same seed and order of rows give the same batches.

    Returns
    -------
    (N,) float64, [-2 - t log(batch_size), 0]
        Higher: better match.

    Raises
    ------
    ValueError
        If N < 2, shapes do not fit, a row is not finite or not of unit norm, or a setting is out
        of range.

    References
    ----------
    Wang et al., CLIPLoss and Norm-Based Data Selection (arXiv:2405.19547), definition of
    negCLIPLoss; t = 0.01, batches of 32 768, at least 5 rounds.
    """
    pair = checks.pair(image, text, least=2)
    checks.positive("temperature", temperature)
    checks.at_least("batch_size", batch_size, 2)
    checks.at_least("rounds", rounds, 1)
    number = len(pair[0])
    size = min(batch_size, number)
    result = np.zeros(number)
    for turn in range(rounds):
        order = np.random.default_rng([seed, turn]).permutation(number)
        for start in range(0, number, size):
            first = min(start, number - size)
            take = order[first : first + size]
            batch = (pair[0][take], pair[1][take])
            loss = checks.info_nce(batch, batch, temperature, np.arange(size))
            new = slice(start - first, None)
            result[take[new]] -= temperature * loss[new]
    return result / rounds


@dataclass(frozen=True)
class LemonWeights:
    """What `lemon` adds up.

    Parameters
    ----------
    beta, gamma : float
        Weights of the image's and of the text's neighbours.
    tau1, tau2 : float
        How fast a neighbour's say falls with its distance, and with its own pair's distance.
    """

    beta: float = 5.0
    gamma: float = 5.0
    tau1: float = 0.1
    tau2: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < np.inf:
                raise ValueError(f"{name}: must be finite and at least 0; got {value}")


#: What the authors use where there are no labels to choose by.
LEMON_FIXED = LemonWeights()


def lemon(
    image: Array,
    text: Array,
    k: int = 5,
    weights: LemonWeights = LEMON_FIXED,
    pair_distance: Array | None = None,
    clusters: Array | None = None,
) -> Array:
    """Mismatch of a pair, from its own distance and from its neighbours in either modality.

    ``d(x, y) + beta s_n + gamma s_m`` with ``s_n = 1/k sum_j d(y, y_j) exp(-tau1 d(x, x_j))
    exp(-tau2 d(x_j, y_j))`` over the k images nearest to x, s_m the same with modalities
    exchanged, and d = 1 - cosine.

    Parameters
    ----------
    image : (N, D) floating, unit norm
    text : (N, E) floating, unit norm
    k : int
        Neighbours of a sample, itself not among them; as many as there are if fewer.
    weights : LemonWeights
    pair_distance : (N,) floating, nonnegative, optional
        d(x, y) for encoders without a shared space, 1 - cosine otherwise.
    clusters : (N,) int or str, optional
        Samples of one's own cluster are then no neighbours: near-duplicates would vouch for each
        other.

    Returns
    -------
    (N,) float64, [0, 2 + 2 beta + 2 gamma] for cosine distances
        Higher: more likely mismatched.

    Raises
    ------
    ValueError
        If N < 2, shapes do not fit, a row is not finite or not of unit norm, D and E differ
        without a `pair_distance`, a sample's cluster is unknown, all samples are of one, or a
        setting is out of range.

    References
    ----------
    Zhang et al., LEMoN (arXiv:2407.18941), section 3.
    """
    pair = checks.pair(image, text, least=2, shared=pair_distance is None)
    checks.at_least("k", k, 1)
    number = len(pair[0])
    apart = _pair_distance(pair, pair_distance)
    groups = np.arange(number)
    if clusters is not None:
        groups = _number_clusters(clusters, number)
        if groups.max() == 0:
            raise ValueError("clusters: must be at least two; got 1; leave them out")
    result = apart.copy()
    width = max(pair[0].shape[1], pair[1].shape[1])
    for part in checks.parts(number, 4 * max(number, min(k, number) * width)):
        own = groups[part, None] == groups
        for near, far, weight in ((0, 1, weights.beta), (1, 0, weights.gamma)):
            cosines = pair[near][part] @ pair[near].T
            cosines[own] = -np.inf
            nearest = highest(cosines, k)
            close = np.take_along_axis(cosines, nearest, 1).astype(np.float64)
            found = np.isfinite(close)
            gap = 1 - np.where(found, close, 1)
            other = 1 - np.einsum("bd,bkd->bk", pair[far][part], pair[far][nearest])
            say = np.exp(-weights.tau1 * gap - weights.tau2 * apart[nearest]) * found
            result[part] += weight * (np.maximum(other, 0) * say).sum(1) / found.sum(1)
    return result


def _number_clusters(clusters: Array, number: int) -> Array:
    """Check the clusters of so many samples and number them: (N,) int64."""
    if isinstance(clusters, np.ma.MaskedArray):
        raise ValueError("clusters: must not be masked; leave out the rows that are")
    names = np.asarray(clusters, object)  # of a list that holds a NaN NumPy else makes texts
    if names.shape != (number,):
        raise ValueError(f"clusters: must be ({number},); got {names.shape}")
    places: dict[Any, int] = {}
    for row, name in enumerate(names):
        if not isinstance(name, str) and not (isinstance(name, Real) and name == name):
            raise ValueError(
                f"clusters: must be numbers or texts; got {name!r} in row {row}; "
                "give a sample without a cluster one of its own"
            )
        places.setdefault(name, len(places))
    return np.array([places[name] for name in names], np.int64)


def _pair_distance(pair: tuple[Array, Array], given: Array | None) -> Array:
    if given is None:
        return np.maximum(1 - np.einsum("nd,nd->n", *pair, dtype=np.float64), 0)
    values = checks.finite_row("pair_distance", given)
    if len(values) != len(pair[0]) or values.min() < 0:
        raise ValueError(
            f"pair_distance: must be {len(pair[0])} numbers of at least 0; "
            f"got {len(values)}, the smallest {values.min():.3g}"
        )
    return values


@dataclass(frozen=True)
class DejaVu:
    """What `deja_vu` found. In (N,) arrays, NaN for samples whose image shows no object.

    Parameters
    ----------
    ppg, prg : float, [-1, 1]
        Population precision gap and recall gap: share of samples for which f is more precise
        (has the higher recall) than g, minus share for which it is less. Higher: more memorized.
    in_precision, out_precision, in_recall, out_recall : (N,) float64, [0, 1]
        Higher: more of the image's objects were found from its caption.
    """

    ppg: float
    prg: float
    in_precision: Array
    out_precision: Array
    in_recall: Array
    out_recall: Array


def deja_vu(
    in_model: tuple[Array, Array],
    out_model: tuple[Array, Array],
    objects: Array,
    public_objects: Array,
    k: int = 100,
) -> DejaVu:
    """Measure how much better f than g tells from captions which objects their images show.

    The objects on the k public images nearest to the caption, taken together, are the prediction.

    Parameters
    ----------
    in_model, out_model : (captions (N, D), public images (M, D)) floating, unit norm
        Under f, which trained on the N samples, and under g, which did not.
    objects : (N, O) bool
        Which objects each sample's own image shows. Samples without any are left out.
    public_objects : (M, O) bool
        The same of the public images.
    k : int
        At most M. 100 is the authors' code's.

    Returns
    -------
    DejaVu

    Raises
    ------
    ValueError
        If shapes do not fit, a row is not finite or not of unit norm, k is not in [1, M], or no
        image shows any object.

    References
    ----------
    Jayaraman et al., Deja Vu Memorization in Vision-Language Models (arXiv:2402.02103),
    definitions of PPG and PRG.
    """
    truth, public = np.asarray(objects), np.asarray(public_objects)
    for name, array in (("objects", truth), ("public_objects", public)):
        if array.ndim != 2 or array.dtype != bool:
            raise ValueError(f"{name}: must be a 2-d bool array; got {array.shape} {array.dtype}")
    if truth.shape[1] != public.shape[1]:
        raise ValueError(
            f"public_objects: must have the {truth.shape[1]} columns of objects; "
            f"got {public.shape[1]}"
        )
    if not truth.any():
        raise ValueError("objects: must hold an object of at least one sample; got none")
    if not 1 <= k <= len(public):
        raise ValueError(f"k: must be in [1, {len(public)}]; got {k}")
    first = _predict("in_model", in_model, truth, public, k)
    second = _predict("out_model", out_model, truth, public, k)
    counted = truth.any(1)
    gaps = [float(np.sign((f - g)[counted]).mean()) for f, g in zip(first, second, strict=True)]
    return DejaVu(gaps[0], gaps[1], first[0], second[0], first[1], second[1])


def _predict(
    where: str, model: tuple[Array, Array], truth: Array, public: Array, k: int
) -> tuple[Array, Array]:
    """Precision and recall of the objects found from the captions."""
    names = (f"{where}[0]", f"{where}[1]")
    captions, images = (checks.matrix(n, a) for n, a in zip(names, model, strict=True))
    checks.width(names[1], images, captions.shape[1])
    for name, array, known in ((names[0], captions, truth), (names[1], images, public)):
        if len(array) != len(known):
            raise ValueError(f"{name}: must hold {len(known)} rows; got {len(array)}")
    found = np.zeros(truth.shape, bool)
    for part in checks.parts(len(captions), 4 * len(images)):
        nearest = highest(captions[part] @ images.T, k)
        for place in nearest.T:
            found[part] |= public[place]
    hits, known = (found & truth).sum(1).astype(np.float64), truth.sum(1)
    precision, recall = hits / np.maximum(found.sum(1), 1), hits / np.maximum(known, 1)
    precision[known == 0] = recall[known == 0] = np.nan
    return precision, recall
