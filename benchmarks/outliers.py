"""Are outliers to both modalities told from the rare but right? `python -m benchmarks.outliers`.

Among the clean pairs of a finished run, one of each cluster, it plants pictures of noise and of
one colour beside garbled captions, and pairs of another corpus, which are right however foreign.
Prints one JSON line: how well two definitions of an outlier to both part these from each other.
"""

import json
from typing import Any

import click
import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.memorization import rare_rows
from benchmarks.noise import KINDS
from benchmarks.planting import CLEAN
from benchmarks.trial import Corpus, read_corpus
from curate.memorization.folds import hash_unit
from curate.memorization.rarity import isolation, rank_scale

Array = np.ndarray[Any, Any]

_PICTURES = ("noise_picture", "one_colour")
#: Isolated in either modality, at the least: share of pairs that are less so.
_LONELY = (0.9, 0.95, 0.99)
#: How far from the mean picture, in median absolute deviations, and how isolated the caption.
_OFF_CENTRE, _LONELY_CAPTION = 4.0, 0.8


def _read(out: str, truth: str, pairs: int) -> Corpus:
    """Read clean pairs, one of each cluster, so many by hash."""
    corpus = read_corpus(out, truth)
    corpus = corpus.take(np.flatnonzero(corpus.kinds == CLEAN)).one_per_cluster()
    order = np.argsort(hash_unit(corpus.uids.tolist(), 0, "outliers"), kind="stable")
    return corpus.take(order[:pairs])


def _plant(corpus: Corpus, foreign: Corpus, each: int, seed: int) -> tuple[Corpus, Array]:
    """Replace rows, and tell by what: (N,) str, "" for what they were."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(corpus))[: each * (len(_PICTURES) + 1)].reshape(-1, each)
    kinds = np.full(len(corpus), "", "<U16")
    for kind, part in zip(_PICTURES, rows, strict=False):
        corpus, _ = KINDS[kind](corpus, part, rng)
        corpus, changed = KINDS["garbled"](corpus, part, rng)
        kinds[changed] = kind
    given = foreign.take(rng.permutation(len(foreign))[:each])
    corpus = corpus.with_pictures(rows[-1], given.image)
    corpus = corpus.with_captions(rows[-1], given.captions, given.text)
    kinds[rows[-1]] = "foreign"
    return corpus, kinds


def _ranks(values: Array) -> Array:
    return rank_scale(values, values)


def measure(corpus: Corpus, kinds: Array, rare: Array) -> dict[str, Any]:
    """Judge both definitions: AUROC of the planted, and shares that are called outliers."""
    image, text = (
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in (corpus.image, corpus.text)
    )
    codes = np.unique(corpus.clusters, return_inverse=True)[1]
    lonely_image, lonely_text = (
        _ranks(isolation(part, part, codes, (part, part, codes))) for part in (image, text)
    )
    distance = np.linalg.norm(image - image.mean(0), axis=1)
    away = np.abs(distance - np.median(distance))
    off_centre = (distance - np.median(distance)) / np.median(away)
    lonely = np.minimum(lonely_image, lonely_text)
    both = np.minimum(_ranks(off_centre), lonely_text)
    called = {f"isolated, {least:g}": lonely >= least for least in _LONELY}
    called["off centre"] = (off_centre >= _OFF_CENTRE) & (lonely_text >= _LONELY_CAPTION)
    parts = {
        **{kind: kinds == kind for kind in (*_PICTURES, "foreign")},
        "rare": (kinds == "") & rare,
        "common": (kinds == "") & ~rare,
    }
    planted = np.isin(kinds, _PICTURES)

    def auroc(values: Array, part: str) -> float:
        asked = planted | parts[part]
        return round(float(roc_auc_score(planted[asked], values[asked])), 3)

    return {
        "auroc": {
            name: {part: auroc(values, part) for part in ("rare", "common", "foreign")}
            for name, values in (("isolated", lonely), ("off centre", both))
        },
        "called": {
            name: {part: round(float(flags[rows].mean()), 4) for part, rows in parts.items()}
            for name, flags in called.items()
        },
    }


@click.command()
@click.argument("out", type=click.Path(exists=True))
@click.argument("truth", type=click.Path(exists=True))
@click.option("--foreign", nargs=2, required=True, help="OUT and TRUTH of another corpus.")
@click.option("--pairs", default=3000, show_default=True, help="At most.")
@click.option("--each", "counts", multiple=True, type=int, default=(5, 25), show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    out: str, truth: str, foreign: tuple[str, str], pairs: int, counts: tuple[int, ...], seed: int
) -> None:
    """Measure on the run in OUT, whose planted truth is TRUTH."""
    corpus, others = _read(out, truth, pairs), _read(*foreign, pairs)
    rare = rare_rows(corpus)
    found = {each: measure(*_plant(corpus, others, each, seed), rare) for each in counts}
    click.echo(json.dumps({"pairs": len(corpus), "planted of each": found}))


if __name__ == "__main__":
    main()
