"""Which reference samples should a bank hold? `python -m benchmarks.bank OUT TRUTH`.

Plants swapped captions among the clean pairs of a finished run, draws reference banks of one size
in several ways, and judges the pairs by what a bank alone gives: the evidence of neighbours, and
rarity. No proxies are trained, so that nothing but the draw differs. Prints one JSON line.
"""

import json
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import pyarrow as pa
from sklearn.cluster import KMeans

from benchmarks.memorization import judge_removal, mean_of, rare_rows
from benchmarks.noise import KINDS, plant
from benchmarks.planting import CLEAN
from benchmarks.trial import Corpus, read_corpus
from curate.memorization.evidence import EVIDENCE, Bank, Pairs, gather_evidence
from curate.memorization.folds import hash_unit
from curate.memorization.mismatch import (
    DETECTORS,
    REAL,
    RUNGS,
    Keys,
    draw_donors,
    fit_detector,
    normalise_caption,
)
from curate.memorization.rarity import isolation, rank_scale
from curate.models.train import fit_front
from curate.stages.score_evidence import read_features
from curate.stages.score_inputs import centre, unit

Array = np.ndarray[Any, Any]

_CELLS = 64
_FRONT_WIDTH = 256
_JUDGED = 2000


def _by_rank_in(groups: Array, uniform: Array, power: float) -> Array:
    """Order rows so that a group of m of them is drawn about m**power times as often as one of 1.

    0 takes a row of every group in turn, 1 is a simple random order.
    """
    codes = np.unique(groups, return_inverse=True)[1]
    order = np.lexsort((uniform, codes))
    sizes = np.bincount(codes)
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.empty(len(codes))
    turn[order] = (rank + uniform[order]) / sizes[codes[order]] ** power
    return np.argsort(turn, kind="stable")


def draws(
    clusters: Array, image: Array, rarity: Array, uids: list[str], seed: int
) -> dict[str, Array]:
    """Return ways to fill a bank, each an order of the rows: (N,) int64."""
    uniform = hash_unit(uids, seed, "bank")
    random = np.argsort(uniform, kind="stable")
    means = KMeans(_CELLS, n_init=1, max_iter=10, random_state=seed).fit(image[random[:_JUDGED]])
    cells = means.predict(image)
    return {
        "random": random,
        "clusters in turn": _by_rank_in(clusters, uniform, 0),
        "cells in turn": _by_rank_in(cells, uniform, 0),
        "cells by the root of their size": _by_rank_in(cells, uniform, 0.5),
        # Efraimidis and Spirakis 2006: the rarest is four times as likely as the commonest.
        "the rare more often": np.argsort(-(uniform ** (1 / (1 + 3 * rarity))), kind="stable"),
    }


class _Judged:
    """A planting, and what of it stays the same whatever the bank."""

    def __init__(self, corpus: Corpus, planted: Array, seed: int, rows: Array) -> None:
        self.corpus, self.planted, self.seed, self.rows = corpus, planted, seed, rows
        few = rows[:_JUDGED]
        self.image, self.text = (
            centre(part, fit_front(part[few], _FRONT_WIDTH)) for part in (corpus.image, corpus.text)
        )
        self.own_image, self.own_text = unit(corpus.image), unit(corpus.text)
        captions = [normalise_caption(caption) for caption in corpus.captions.tolist()]
        codes = [np.unique(part, return_inverse=True)[1] for part in (corpus.clusters, captions)]
        self.keys = Keys(np.zeros(len(corpus), np.int32), *codes)

    def probabilities(self, bank_rows: Array) -> Array:
        """Judge the chosen rows by one bank: (M,) float64."""
        rows, keys = self.rows, self._keys(self.rows)
        uids = self.corpus.uids[rows].tolist()
        bank = (self.own_image[bank_rows], self.own_text[bank_rows], self.keys.clusters[bank_rows])
        few = slice(0, _JUDGED)
        alone = isolation(*(part[few] for part in bank), bank)
        own = isolation(self.own_image[rows], self.own_text[rows], keys.clusters, bank)
        rarity = rank_scale(own, alone)
        rungs, donated, found = [], [], []
        for number, rung in enumerate((REAL, *range(len(RUNGS)))):
            donors = rows
            if rung != REAL:
                draw = hash_unit(uids, self.seed, f"phantom {number}")[:, None]
                likeness = self._likeness(bank_rows) if RUNGS[rung] == "near_image" else None
                donors = bank_rows[draw_donors(keys, self._keys(bank_rows), draw, likeness)[:, 0]]
            found.append(self._gather(donors, bank_rows, rarity))
            rungs.append(np.full(len(rows), rung))
            donated.append(self.keys.clusters[donors])
        folds = np.stack(
            [
                (hash_unit(codes.astype(str).tolist(), self.seed, "fold") * DETECTORS).astype(int)
                for codes in (np.tile(keys.clusters, len(rungs)), np.concatenate(donated))
            ],
            axis=1,
        )
        features, bits = np.concatenate(found), np.zeros(len(folds))
        detector = fit_detector(features, bits, np.concatenate(rungs), folds)
        assert detector is not None
        own_folds = folds[: len(rows), 0]
        return detector.probabilities(found[0], bits[: len(rows)], own_folds)[0]

    def _keys(self, rows: Array) -> Keys:
        return Keys(*(part[rows] for part in vars(self.keys).values()))

    def _likeness(self, bank_rows: Array) -> Callable[[Array, Array], Array]:
        return lambda rows, donors: self.image[self.rows[rows]] @ self.image[bank_rows[donors]].T

    def _gather(self, donors: Array, bank_rows: Array, rarity: Array) -> Array:
        """What a bank tells of the rows beside the donors' captions."""
        places = np.full(len(self.corpus), -1)
        places[bank_rows] = np.arange(len(bank_rows))
        pairs = Pairs(
            self.image[self.rows],
            self.text[donors],
            np.stack([self.keys.clusters[self.rows], self.keys.clusters[donors]], axis=1),
            self.keys.captions[donors],
            np.stack([places[self.rows], places[donors]], axis=1),
        )
        evidence = gather_evidence(pairs, Bank(self.image[bank_rows], self.text[bank_rows]), [])
        table = {name: evidence[:, place] for place, name in enumerate(EVIDENCE)}
        return read_features(pa.table({**table, "rarity": rarity}))


@click.command()
@click.argument("out", type=click.Path(exists=True))
@click.argument("truth", type=click.Path(exists=True))
@click.option("--size", default=1000, show_default=True, help="Of the bank.")
@click.option("--kind", type=click.Choice(tuple(KINDS)), default="swap", show_default=True)
@click.option("--share", default=0.2, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--pairs", default=10_000, show_default=True, help="At most, by hash.")
@click.option("--as-is", is_flag=True, help="All rows instead of one of each cluster.")
def main(
    out: str,
    truth: str,
    size: int,
    kind: str,
    share: float,
    seeds: int,
    pairs: int,
    as_is: bool,
) -> None:
    """Measure on the clean pairs of the run in OUT, whose planted truth is TRUTH."""
    corpus = read_corpus(out, truth)
    corpus = corpus.take(np.flatnonzero(corpus.kinds == CLEAN))
    corpus = corpus if as_is else corpus.one_per_cluster()
    order = np.argsort(hash_unit(corpus.uids.tolist(), 0, "pairs"), kind="stable")
    corpus = corpus.take(order[:pairs])
    rare = rare_rows(corpus)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        spoilt, planted = plant(corpus, kind, share, seed)
        uids = corpus.uids.tolist()
        rows = np.argsort(hash_unit(uids, seed, "judged"), kind="stable")[:_JUDGED]
        judged = _Judged(spoilt, planted, seed, rows)
        clusters = judged.keys.clusters
        ways = draws(clusters, judged.image, rare.astype(float), uids, seed)
        for name, order in ways.items():
            values = judged.probabilities(order[:size])
            result = judge_removal(values, planted[rows], rare[rows])
            found.setdefault(name, []).append(result)
    report = {
        name: {key: mean_of([one[key] for one in results]) for key in results[0]}
        for name, results in found.items()
    }
    click.echo(
        json.dumps({"pairs": len(corpus), "size": size, "kind": kind, "share": share, **report})
    )


if __name__ == "__main__":
    main()
