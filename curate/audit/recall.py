"""The deja vu test: a caption that leads to what its picture shows beyond what it says.

With a reference, its retrieval is compared; without, that of a text embedder, which has seen no
picture at all. What the packaged image tower sees in a picture stands for its objects.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.audit.measures import estimate
from curate.memorization.metrics import deja_vu

if TYPE_CHECKING:
    from curate.models.encoders import Encoder

__all__ = ["Recall", "measure_recall", "name_objects"]

Array = np.ndarray[Any, Any]

#: Objects that a picture counts as showing: the classes of highest score.
_OBJECTS = 5
#: Retrieved pictures: the authors' number, and at most this share of the public ones, of which
#: else any caption would find all objects.
_NEIGHBOURS, _SHARE = 100, 0.02


@dataclass(frozen=True)
class Recall:
    """Result of the test.

    Parameters
    ----------
    against : str
        "reference" or "text embedder".
    k : int
        Retrieved pictures.
    gaps : dict
        `ppg` and `prg` (candidates), `ppg_held_out` and `prg_held_out`, and as estimates
        `ppg_excess` and `prg_excess`: what candidates have beyond held-out pairs. [-1, 1]; higher:
        more memorized.
    precision, reference_precision : (N,) float64, [0, 1]
    """

    against: str
    k: int
    gaps: dict[str, Any]
    precision: Array
    reference_precision: Array


def name_objects(encoder: "Encoder", images: Array) -> Array | None:
    """Tell what pictures show by the encoder's own classifier: (N, C) bool.

    Parameters
    ----------
    encoder : Encoder
    images : (N, D) float32, unit norm
        Its vectors.

    Returns
    -------
    (N, C) bool, or None where the encoder has no classifier.
    """
    if encoder.classifier is None:
        return None
    scores = images @ encoder.classifier.T
    best = np.argpartition(-scores, _OBJECTS, axis=1)[:, :_OBJECTS]
    objects = np.zeros(scores.shape, bool)
    np.put_along_axis(objects, best, True, axis=1)
    return objects


def measure_recall(
    model: tuple[Array, Array, Array],
    other: tuple[Array, Array, Array],
    against: str,
    objects: tuple[Array, Array],
    clusters: Array,
    public: Array,
) -> Recall:
    """Compare what captions retrieve under two models.

    Parameters
    ----------
    model, other : (candidates' captions, held-out captions, held-out retrieved)
        (N, D), (M, D) and (M, D) floating, unit norm; D may differ between the two. What is
        retrieved are held-out pictures: by their image under a model, by their caption under a
        text embedder.
    against : str
        What `other` is.
    objects : ((N, C) bool, (M, C) bool)
        Of the candidates' and of the held-out pictures.
    clusters : (N,) int or str
    public : (M,) bool
        Held-out pictures that are retrieved; the captions of the others say what is nothing.

    Returns
    -------
    Recall

    References
    ----------
    Jayaraman et al. (arXiv:2402.02103); Kokhlikyan et al. (arXiv:2504.05651) for the text embedder
    in the place of a reference model.
    """
    k = int(np.clip(public.sum() * _SHARE, 1, _NEIGHBOURS))
    own = _both(model, other, objects, public, k, slice(None), None)
    rest = _both(model, other, objects, public, k, None, ~public)
    gaps: dict[str, Any] = {
        "ppg": own.ppg,
        "prg": own.prg,
        "ppg_held_out": rest.ppg,
        "prg_held_out": rest.prg,
    }
    pairs = {
        "ppg_excess": ("in_precision", "out_precision"),
        "prg_excess": ("in_recall", "out_recall"),
    }
    for name, (first, second) in pairs.items():
        signs = [np.sign(getattr(one, first) - getattr(one, second)) for one in (own, rest)]
        found = estimate(signs[0], clusters, signs[1])
        gaps[name] = found and asdict(found)
    return Recall(against, k, gaps, own.in_precision, own.out_precision)


def _both(
    model: tuple[Array, Array, Array],
    other: tuple[Array, Array, Array],
    objects: tuple[Array, Array],
    public: Array,
    k: int,
    candidates: slice | None,
    held_out: Array | None,
) -> Any:
    """Run the test for candidates, or for held-out captions."""
    place, rows = (0, candidates) if candidates is not None else (1, held_out)
    sides = [(one[place][rows], one[2][public]) for one in (model, other)]
    return deja_vu(sides[0], sides[1], objects[place][rows], objects[1][public], k)
