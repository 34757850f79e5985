"""Would titles be judged better than captions? `python -m benchmarks.titles OUT TRUTH LABELS...`.

A caption may be a title and other parts, "Clipart by A. Painter - piggybank. vehicle, transport":
where only the title is wrong, the rest speaks for the pair. Scores a finished run on a corpus
without planted faults by whole captions, by titles alone, and by either, and prints one JSON line:
how well each finds the pairs that judges called wrong. LABELS are as `benchmarks.labels merge`
writes them; a pair that was not drawn at random stands for 0 and counts among the top only, and one
that a single judge saw has no second label.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.labels import rank_quality, read_judged
from benchmarks.parts import find_titles
from benchmarks.trial import Corpus, embed_captions, read_corpus, run_score
from curate.stages.score import Score

__all__ = ["by_title"]

Array = np.ndarray[Any, Any]

_TOP = 100


def by_title(corpus: Corpus) -> Corpus:
    """Leave nothing of the captions but their titles."""
    titles = find_titles(corpus.captions.tolist(), corpus.clusters.tolist())
    unique, places = np.unique(titles, return_inverse=True)
    vectors = embed_captions(unique.tolist())[places]
    return corpus.with_captions(np.arange(len(corpus)), np.array(titles), vectors)


def _read_labels(paths: Sequence[Path]) -> dict[str, tuple[str, str, float]]:
    labels = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                pair = (row["first"], row["second"] or row["first"])
                labels[row["source"]] = (*pair, float(row["stands_for"]))
    return labels


def _top_rows(values: Array, clusters: Array, usable: Array) -> list[int]:
    """Highest values, one of each cluster."""
    rows: dict[str, int] = {}
    for row in np.argsort(-np.where(usable, values, -1), kind="stable"):
        rows.setdefault(str(clusters[row]), int(row))
        if len(rows) == _TOP:
            break
    return list(rows.values())


@click.command()
@click.argument("out")
@click.argument("truth")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(out: str, truth: str, files: tuple[Path, ...]) -> None:
    """Compare three scores on the run in OUT with the labels in FILES."""
    corpus = read_corpus(out, truth)
    whole, title = (
        run_score(pairs, Score()).columns["mismatch_probability"]
        for pairs in (corpus, by_title(corpus))
    )
    usable = np.isin(corpus.sources, read_judged(Path(out), Path(truth))["source"].to_pylist())
    usable &= np.isfinite(whole) & np.isfinite(title)
    labels = _read_labels(files)
    judged = np.array([source in labels for source in corpus.sources.tolist()]) & usable
    found = [labels[source] for source in corpus.sources[judged].tolist()]
    weight = np.array([stands_for for _, _, stands_for in found])
    wrong, bad = (np.full(len(corpus), np.nan) for _ in range(2))
    for values, kinds in ((wrong, ("wrong",)), (bad, ("wrong", "uninformative"))):
        values[judged] = [np.mean([label in kinds for label in row[:2]]) for row in found]
    groups = np.array(find_titles(corpus.captions.tolist(), corpus.clusters.tolist()))[judged]
    report: dict[str, Any] = {}
    for name, values in (
        ("whole", whole),
        ("title", title),
        ("either", 1 - (1 - whole) * (1 - title)),
    ):
        top = _top_rows(values, corpus.clusters, usable)
        known = [row for row in top if judged[row]]
        report[name] = {
            **rank_quality(wrong[judged], values[judged], weight, groups),
            "top": {
                "labelled": len(known),
                "wrong": round(float(wrong[known].sum()), 1),
                "bad": round(float(bad[known].sum()), 1),
            },
        }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
