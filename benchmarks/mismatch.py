"""Judge `mismatch_probability` by planted swaps: `python -m benchmarks.mismatch OUT TRUTH`.

Prints one JSON line with two regimes: `as_it_comes`, the finished run's own scores, and
`one_per_cluster`, the score stage run again in a temporary folder on one sample of each cluster,
where no duplicate can speak for a caption.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from benchmarks.planting import CLEAN, SWAP
from benchmarks.trial import Corpus, read_corpus, run_score
from curate.stages.score import Score

__all__ = ["calibration_error", "judge"]

Array = np.ndarray[Any, Any]

_BINS = 15


def calibration_error(probability: Array, wrong: Array) -> float:
    """Expected calibration error over bins of equal width, weighted by their samples."""
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    total = 0.0
    for number in range(_BINS):
        inside = bins == number
        if inside.any():
            total += inside.mean() * abs(probability[inside].mean() - wrong[inside].mean())
    return float(total)


def judge(probability: Array, wrong: Array) -> dict[str, Any]:
    """Compare probabilities with planted truth.

    Parameters
    ----------
    probability : (N,) float, [0, 1]
    wrong : (N,) bool

    Returns
    -------
    dict
        `caught_at_10`: share of swaps above the probability that 10 % of clean pairs exceed, and
        the like; `swaps_above` and `clean_above` by threshold.
    """
    clean = probability[~wrong]
    thresholds = (0.1, 0.3, 0.5, 0.9)
    return {
        "pairs": len(wrong),
        "swaps": int(wrong.sum()),
        "auroc": round(float(roc_auc_score(wrong, probability)), 4),
        "calibration_error": round(calibration_error(probability, wrong), 4),
        "mean_probability": round(float(probability.mean()), 4),
        **{
            f"caught_at_{percent}": round(
                float((probability[wrong] > np.quantile(clean, 1 - percent / 100)).mean()), 4
            )
            for percent in (2, 5, 10)
        },
        "swaps_above": {t: round(float((probability[wrong] >= t).mean()), 4) for t in thresholds},
        "clean_above": {t: round(float((clean >= t).mean()), 4) for t in thresholds},
    }


@click.command()
@click.argument("out")
@click.argument("truth")
@click.option("--seed", default=0, show_default=True, help="score.seed of the second regime.")
def main(out: str, truth: str, seed: int) -> None:
    """Print one JSON line about the run in OUT, whose planted truth is TRUTH."""
    corpus = read_corpus(out, truth)
    table = pq.read_table(Path(out) / "decisions", columns=["uid", "mismatch_probability"])
    found = {row["uid"]: row["mismatch_probability"] for row in table.to_pylist()}

    def compare(pairs: Corpus, probability: Array) -> dict[str, Any]:
        known = np.isin(pairs.kinds, (CLEAN, SWAP)) & np.isfinite(probability)
        return judge(probability[known], pairs.kinds[known] == SWAP)

    as_it_comes = np.array([found[uid] for uid in corpus.uids.tolist()], np.float64)
    lone = corpus.one_per_cluster()
    scored = run_score(lone, Score(seed=seed))
    result = {
        "as_it_comes": compare(corpus, as_it_comes),
        "one_per_cluster": {
            **compare(lone, scored.columns["mismatch_probability"]),
            "share": scored.facts["mismatch"].get("share"),
            "seconds": round(scored.seconds, 1),
        },
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
