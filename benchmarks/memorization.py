"""The proof: which score removes what harms? `python -m benchmarks.memorization OUT TRUTH WORK`.

Plants swapped captions among the clean pairs of a finished run, lets every method of
`benchmarks.methods` remove as many pairs as were planted, and trains students on what is left.
Pairs held out by cluster, which nothing touched, judge the students. Two regimes: `deduplicated`,
one row per cluster, and `as-is`, where a pair's duplicates may speak for its caption. Each
planting's result is a file in WORK, so that a run that was stopped goes on and `--part` shares the
work among processes. Prints one JSON line; `--table` prints the same for people to read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import roc_auc_score

from benchmarks.methods import METHODS, Planting
from benchmarks.mismatch import calibration_error
from benchmarks.noise import KINDS, plant
from benchmarks.planting import CLEAN
from benchmarks.students import judge_student, train_student
from benchmarks.trial import Corpus, read_corpus, run_score
from curate import storage
from curate.dedup.groups import equal_value_edges
from curate.memorization.folds import hash_unit
from curate.memorization.mismatch import normalise_caption
from curate.memorization.rarity import RARE, isolation, rank_scale
from curate.stages.score import Score

Array = np.ndarray[Any, Any]

REGIMES = ("deduplicated", "as-is")
#: What fold groups are made of: one picture, one name, or one caption as well.
GROUPS = ("picture", "concept", "caption")

_HELD_OUT = 0.25
#: Distance in R@10 from nothing to the oracle below which shares of it say nothing.
_LEAST_WAY = 0.005
_CURVE = (50, 100, 200, 400, 800, 1600, 3200)
_CURVE_METHODS = ("random", "in-sample cosine", "memorization, heads", "left-out loss", "ours")


def group_rows(corpus: Corpus, how: str) -> Corpus:
    """Join clusters whose pairs also share a name or a caption, directly or by others."""
    if how == "picture":
        return corpus
    captions = [normalise_caption(caption) for caption in corpus.captions.tolist()]
    other = corpus.name_groups if how == "concept" else np.array(captions)
    edges = [equal_value_edges(v, np.ones(len(v), bool)) for v in (corpus.clusters, other)]
    left, right = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(len(corpus),) * 2)
    labels = connected_components(graph, directed=False)[1]
    return corpus.with_clusters(np.array([f"group {label}" for label in labels]))


def rare_rows(corpus: Corpus) -> Array:
    """Tell the rarest fifth, before anything is planted: (N,) bool."""
    codes = np.unique(corpus.clusters, return_inverse=True)[1]
    image, text = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        for vectors in (corpus.image, corpus.text)
    )
    alone = isolation(image, text, codes, (image, text, codes))
    rare: Array = rank_scale(alone, alone) >= RARE
    return rare


@dataclass(frozen=True)
class Trial:
    """A planting and what was held out before.

    Parameters
    ----------
    planting : Planting
    rare : (N,) bool
        Whether a pair of it was among the rarest fifth of all.
    held : Corpus
        Held out by cluster; nothing is planted there.
    held_rare : (H,) bool
    """

    planting: Planting
    rare: Array
    held: Corpus
    held_rare: Array


def set_up(corpus: Corpus, kind: str, share: float, stage: Score) -> Trial:
    """Hold out a quarter of the clusters, spoil some of the rest, and score it."""
    rare = rare_rows(corpus)
    held_out = hash_unit(corpus.clusters.tolist(), stage.seed, "held out") < _HELD_OUT
    spoilt, planted, given = spoil(corpus.take(np.flatnonzero(~held_out)), kind, share, stage.seed)
    held = corpus.take(np.flatnonzero(held_out))
    planting = score_planting(spoilt, planted, given, stage)
    return Trial(planting, rare[~held_out], held, rare[held_out])


def spoil(clean: Corpus, kind: str, share: float, seed: int) -> tuple[Corpus, Array, Array]:
    """Plant, and tell what the captions then say the pictures are of: (N,) str, "" if nothing."""
    classes = dict(zip(clean.captions.tolist(), clean.categories.tolist(), strict=True))
    spoilt, planted = plant(clean, kind, share, seed)
    given = np.array([classes.get(caption, "") for caption in spoilt.captions.tolist()])
    return spoilt, planted, given


def score_planting(spoilt: Corpus, planted: Array, given: Array, stage: Score) -> Planting:
    """Run the score stage on what `spoil` returned."""
    scored = run_score(spoilt, stage)
    return Planting(spoilt, planted, scored, given, stage.proxies, stage.seed, stage.epochs)


def apply_methods(planting: Planting) -> dict[str, Array]:
    """Return what every method removes first, highest: (N,) float64 each."""
    return {name: np.nan_to_num(score(planting)) for name, score in METHODS.items()}


def judge_removal(badness: Array, planted: Array, rare: Array) -> dict[str, float]:
    """Remove as many pairs as were planted, those of the highest values.

    Returns
    -------
    dict
        AUROC, precision among the removed, shares of rare and common clean pairs among them.
    """
    dropped = np.argsort(badness, kind="stable")[len(badness) - planted.sum() :]
    lost = np.isin(np.arange(len(badness)), dropped) & ~planted
    return {
        "auroc": float(roc_auc_score(planted, badness)),
        "precision": float(planted[dropped].mean()),
        "rare_lost": float(lost[~planted & rare].mean()),
        "common_lost": float(lost[~planted & ~rare].mean()),
    }


def measure(
    corpus: Corpus, kind: str, share: float, stage: Score, epochs: int, curve: bool
) -> dict[str, Any]:
    """Plant, score, remove, train students for so many epochs (0: none), judge them.

    Returns
    -------
    dict
        `methods`: per method AUROC, precision at the planted number, shares of rare and common
        clean pairs lost, and the student's figures; `curve`: R@10 by number removed.
    """
    trial = set_up(corpus, kind, share, stage)
    planting, rare, held = trial.planting, trial.rare, trial.held
    spoilt, planted, scored = planting.corpus, planting.planted, planting.scored
    removed = int(planted.sum())
    whole = len(spoilt) * epochs

    def student(values: Array, count: int) -> dict[str, float]:
        """What a student trained on all but the highest values scores, at equal compute."""
        if epochs == 0:
            return {}
        rows = np.sort(np.argsort(values, kind="stable")[: len(values) - count])
        passes = round(whole / len(rows))
        heads = train_student(spoilt, planting.fronts, rows, passes, stage.seed + 100)
        return judge_student(heads, held, trial.held_rare)

    found: dict[str, Any] = {"nothing": student(np.zeros(len(spoilt)), 0)}
    values = apply_methods(planting)
    for name, badness in values.items():
        found[name] = {**judge_removal(badness, planted, rare), **student(badness, removed)}
    curves = {
        name: {count: student(values[name], count)["all"] for count in _CURVE if count < len(rare)}
        for name in (_CURVE_METHODS if curve else ())
    }
    facts = scored.facts["mismatch"]
    probability = scored.columns["mismatch_probability"]
    return {
        "pairs": len(spoilt),
        "planted": removed,
        "held_out": len(held),
        "share_estimated": facts.get("share"),
        "calibration_error": calibration_error(probability, planted),
        "methods": found,
        "curve": curves,
    }


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over seeds, and how far from nothing to the oracle each one gets.

    Returns
    -------
    dict
        Per method and figure `[mean, standard error]`; `gain`, `behind`: in R@10 over nothing and
        to ours, seed by seed; `recovered_all`, `recovered_rare`: share of the distance in R@10
        between the students of nothing and of the oracle, of the means.
    """
    methods = {}
    for name in results[0]["methods"]:
        rows = [result["methods"][name] for result in results]
        methods[name] = {key: mean_of([row[key] for row in rows]) for key in rows[0]}
        if "all" in rows[0]:
            for key, other, sign in (("gain", "nothing", 1), ("behind", "ours", -1)):
                rivals = [result["methods"][other]["all"] for result in results]
                pairs = zip(rows, rivals, strict=True)
                methods[name][key] = mean_of([sign * (row["all"] - rival) for row, rival in pairs])
    for part in ("all", "rare") if methods["oracle"].get("all") else ():
        least, most = methods["nothing"][part][0], methods["oracle"][part][0]
        for row in methods.values():
            way = (row[part][0] - least) / (most - least) if most - least >= _LEAST_WAY else np.nan
            row[f"recovered_{part}"] = round(way, 3)
    one = results[0]
    return {
        "seeds": len(results),
        **{key: one[key] for key in ("pairs", "planted", "held_out")},
        **{
            key: mean_of([r[key] for r in results])
            for key in ("share_estimated", "calibration_error")
        },
        "methods": methods,
        "curve": {
            name: {count: mean_of([r["curve"][name][count] for r in results]) for count in counts}
            for name, counts in one["curve"].items()
        },
    }


def mean_of(values: list[float]) -> list[float]:
    """Return mean and standard error, to four digits."""
    error = (
        float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    )
    return [round(float(np.mean(values)), 4), round(error, 4)]


def write_table(title: str, summary: dict[str, Any]) -> str:
    """Lay a summary out as a Markdown table."""
    lost = ("auroc", "precision", "rare_lost", "common_lost")
    columns = (*lost, "all", "rare", "rest", "zero_shot", "gain", "behind")
    lines = [
        f"{title}: {summary['pairs']} pairs, {summary['planted']} planted, "
        f"{summary['held_out']} held out, {summary['seeds']} seeds",
        "",
        "| removed by | " + " | ".join(columns) + " | of the way | rare |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, row in summary["methods"].items():
        cells = [f"{row[c][0]:.3f} ± {row[c][1]:.3f}" if c in row else "-" for c in columns]
        cells += [f"{row.get(f'recovered_{part}', np.nan):.2f}" for part in ("all", "rare")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, counts in summary["curve"].items():
        lines.append(f"{name}: " + ", ".join(f"{n} {v[0]:.3f}" for n, v in counts.items()))
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("out", type=click.Path(exists=True))
@click.argument("truth", type=click.Path(exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--regime", "regimes", multiple=True, type=click.Choice(REGIMES), default=REGIMES)
@click.option("--share", "shares", multiple=True, type=float, default=(0.2,), show_default=True)
@click.option("--kind", type=click.Choice(tuple(KINDS)), default="swap", show_default=True)
@click.option("--groups", type=click.Choice(GROUPS), default="picture", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=20, show_default=True, help="Of a student on all pairs, 0: none.")
@click.option("--trained", default=1.0, show_default=True, help="Share of clusters proxies see.")
@click.option("--curve", is_flag=True, help="Also students by number of pairs removed.")
@click.option("--part", type=(int, int), default=(0, 1), help="Which share of the plantings to do.")
@click.option("--table", is_flag=True, help="Print tables instead of one JSON line.")
def main(
    out: str,
    truth: str,
    work: Path,
    regimes: tuple[str, ...],
    shares: tuple[float, ...],
    kind: str,
    groups: str,
    seeds: int,
    epochs: int,
    trained: float,
    curve: bool,
    part: tuple[int, int],
    table: bool,
) -> None:
    """Measure on the clean pairs of the run in OUT, whose planted truth is TRUTH."""
    corpus = read_corpus(out, truth)
    corpus = group_rows(corpus.take(np.flatnonzero(corpus.kinds == CLEAN)), groups)
    by_regime = {"deduplicated": corpus.one_per_cluster(), "as-is": corpus}
    settings = list(product(regimes, shares))
    paths: dict[tuple[str, float], list[Path]] = {setting: [] for setting in settings}
    # Seeds turn slowest, so that a run that is stopped has seen all settings equally often.
    for number, (seed, setting) in enumerate(product(range(seeds), settings)):
        regime, share = setting
        seen = "" if trained == 1 else f"-{trained}"
        path = work / f"{regime}-{groups}-{kind}-{share}-{seed}{seen}.json"
        if number % part[1] == part[0] and not path.exists():
            pairs = by_regime[regime]
            # A proxy trains on half of the clusters that any of them sees.
            most = max(20, round(trained * (1 - _HELD_OUT) * len(pairs) / 2))
            stage = Score(seed=seed, **({} if trained == 1 else {"max_train_samples": most}))
            result = measure(pairs, kind, share, stage, epochs, curve)
            storage.commit_json(str(path), result)
        paths[setting].append(path)
    report = {}
    for (regime, share), chosen in paths.items():
        results = [storage.read_json(str(path)) for path in chosen if path.exists()]
        if results:
            report[f"{regime}, {groups}, {kind}, {share:g}"] = summarize(results)
    if table:
        for title, summary in report.items():
            click.echo(write_table(title, summary))
    else:
        click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
