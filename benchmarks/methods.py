"""Scores by which mismatched pairs can be removed: ours, and every published one at hand.

All see one planting, the same folds and proxies of the same training budget. A higher value is
removed first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.students import fit_fronts, train_student
from benchmarks.trial import Corpus, Scored
from curate.memorization.folds import draw_masks, hash_unit
from curate.memorization.metrics import lemon, neg_clip_loss
from curate.models.proxy import Heads, embed_pairs
from curate.models.train import Front, fit_front

__all__ = ["METHODS", "Planting"]

Array = np.ndarray[Any, Any]

#: Inputs and folds of the classifiers whose margin stands for confident learning.
_CLASS_WIDTH, _CLASS_FOLDS = 128, 5
#: Share of the sound pairs that a DFN-like filter may train on.
_TRUSTED = 0.1


@dataclass(frozen=True)
class Planting:
    """A spoilt corpus and what the score stage said of it.

    Parameters
    ----------
    corpus : Corpus
    planted : (N,) bool
    scored : Scored
        With its proxies' embeddings.
    classes : (N,) str
        What the captions say the pictures are of.
    proxies, seed, epochs : int
        Of the score stage.
    """

    corpus: Corpus
    planted: Array
    scored: Scored
    classes: Array
    proxies: int
    seed: int
    epochs: int

    def column(self, name: str) -> Array:
        """Return a column of the scores or of the evidence: (N,) float64."""
        if name in self.scored.columns:
            return self.scored.columns[name]
        return self.scored.evidence[name].to_numpy(zero_copy_only=False)

    @property
    def inside(self) -> Array:
        """Which proxies trained on which pairs: (N, P) bool."""
        return draw_masks(self.corpus.clusters.tolist(), self.proxies, self.seed)

    @cached_property
    def fronts(self) -> tuple[Front, Front]:
        """What all students see of either modality."""
        return fit_fronts(self.corpus)

    @cached_property
    def whole(self) -> tuple[list[Array], Array]:
        """Heads trained on all pairs: cosines after each epoch, and their sum of losses."""
        cosines: list[Array] = []
        losses = np.zeros(len(self.corpus))

        def observe(heads: Heads) -> None:
            image, text = _embed(heads, self.corpus)
            cosines.append((image * text).sum(1))
            scale = heads.scale().item()
            losses[:] -= scale * neg_clip_loss(image, text, 1 / scale, rounds=1)

        every = np.arange(len(self.corpus))
        train_student(self.corpus, self.fronts, every, self.epochs, self.seed + 7, observe)
        return cosines, losses


def _embed(heads: Heads, corpus: Corpus) -> tuple[Array, Array]:
    """Unit vectors of all pairs under a proxy: (N, W) float32 each."""
    image, text = (
        part.astype(np.float32) for part in embed_pairs(heads, corpus.image, corpus.text)
    )
    return tuple(part / np.linalg.norm(part, axis=1, keepdims=True) for part in (image, text))


def _random(planting: Planting) -> Array:
    return hash_unit(planting.corpus.uids.tolist(), planting.seed, "random removal")


def _neg_clip_loss(planting: Planting) -> Array:
    """Published as negCLIPLoss: under the proxies that trained on the pair, at their mean."""
    total = np.zeros(len(planting.corpus))
    for (image, text), inside in zip(planting.scored.embedded, planting.inside.T, strict=True):
        parts = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (image, text)]
        total -= inside * neg_clip_loss(parts[0], parts[1], rounds=1)
    return total


def _lemon(planting: Planting) -> Array:
    """LEMoN on centred vectors; the towers share no space, so d(x, y) is left-out proxies'."""
    sides = []
    for vectors in (planting.corpus.image, planting.corpus.text):
        centred = vectors - vectors.mean(0)
        sides.append(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    apart = np.maximum(1 - planting.column("alignment_out"), 0)
    return lemon(sides[0], sides[1], pair_distance=apart)


def _confident_learning(planting: Planting) -> Array:
    """Margin of the best other class over the caption's, by classifiers that left the pair out.

    References
    ----------
    Northcutt et al., Confident Learning (arXiv:1911.00068), section 3: normalised margin.
    """
    corpus, classes = planting.corpus, planting.classes
    mean, front = fit_front(corpus.image, _CLASS_WIDTH)
    inputs = (corpus.image - mean) @ front
    inputs /= inputs.std()
    folds = hash_unit(corpus.clusters.tolist(), planting.seed, "class fold") * _CLASS_FOLDS
    margin = np.zeros(len(corpus))
    for fold in range(_CLASS_FOLDS):
        left_out = folds.astype(int) == fold
        model = LogisticRegression(tol=1e-2, max_iter=500).fit(
            inputs[~left_out], classes[~left_out]
        )
        chances = model.predict_proba(inputs[left_out])
        own = classes[left_out][:, None] == model.classes_
        margin[left_out] = np.where(own, 0, chances).max(1) - (chances * own).sum(1)
    return margin


def _trusted(planting: Planting) -> Array:
    """Cosine under heads trained on a tenth of the sound pairs, which are then kept.

    References
    ----------
    Fang et al., Data Filtering Networks (arXiv:2309.17425), section 3.
    """
    drawn = hash_unit(planting.corpus.clusters.tolist(), planting.seed, "trusted") < _TRUSTED
    rows = np.flatnonzero(drawn & ~planting.planted)
    seed = planting.seed + 8
    heads = train_student(planting.corpus, planting.fronts, rows, planting.epochs, seed)
    image, text = _embed(heads, planting.corpus)
    values = -(image * text).sum(1)
    values[rows] = -np.inf
    return values


METHODS: dict[str, Callable[[Planting], Array]] = {
    "random": _random,
    "in-sample cosine": lambda planting: -planting.column("alignment_in"),
    "early-stopped cosine": lambda planting: -planting.whole[0][0],
    "negCLIPLoss": _neg_clip_loss,
    "CSL": lambda planting: planting.whole[1],
    "confident learning": _confident_learning,
    "LEMoN": _lemon,
    "DFN-like": _trusted,
    "memorization, heads": lambda planting: planting.column("holdout_gap"),
    "left-out cosine": lambda planting: -planting.column("alignment_out"),
    "left-out loss": lambda p: p.column("out_loss_image") + p.column("out_loss_text"),
    "ours": lambda planting: planting.column("mismatch_probability"),
    "oracle": lambda planting: planting.planted + 0.5 * _random(planting),
}
