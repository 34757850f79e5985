"""What mitigation does to memorization and retrieval: `python -m benchmarks.mitigation WORK`.

Emoji, as a picture and a name, or two vendors' pictures and a name; or pairs of a finished run,
whose captions are the whole, its title and the rest (`--run`, with a WORK of its own). f trains on
shared and candidate samples, g on shared and independent ones (`curate.memorization.protocol`),
with 10 % of all names swapped, in a plain loop over the pieces of `curate.mitigation`. Every arm
has the same samples, swaps, first weights and number of steps; memorization is that of the
candidates that were not swapped, and R@10 that of external samples, of f and g on average. The
curated arms leave out what the score stage and `select.max_mismatch_rate` find in all training
samples.

Each model is a file in WORK, so that a run that was stopped goes on. Prints one JSON line;
`--table` prints the same for people to read.

References: Wang et al., MultiMem (arXiv:2606.22220) and CLIPMem (arXiv:2502.07830), mitigation.
"""

import json
import time
from dataclasses import replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.corpora import DEFAULT_CACHE
from benchmarks.memorization import mean_of
from benchmarks.mitigation_data import (
    CAPTIONS,
    NAME,
    SETTINGS,
    Data,
    cut_modalities,
    read_data,
    read_run,
)
from benchmarks.mitigation_training import BATCH, Arm, embed_rows, train
from benchmarks.noise import plant
from benchmarks.trial import run_score
from curate import storage
from curate.engine.workers import keep_freed_memory
from curate.memorization.folds import hash_unit
from curate.memorization.metrics import clipmem, multimem
from curate.memorization.protocol import draw_sets, training_masks
from curate.memorization.retrieval import hits_at
from curate.stages.score import Score
from curate.stages.select import mismatch_limit

Array = np.ndarray[Any, Any]

_RAW = "raw"
_SWAPS = 0.1
#: Of the external samples, those that agreement is measured against; the rest are tested on.
_UNRELATED = 0.25
#: What is asked of the kept, as `select.max_mismatch_rate`.
_MAX_RATE = 0.02

_MITIGATED = Arm(noise=0.05, captions=3, mask=0.15)
ARMS = {
    _RAW: Arm(),
    "noise on all": Arm(noise=0.1),
    "noise on name": Arm(noise=0.15, noisy="name"),
    "noise on first picture": Arm(noise=0.15, noisy="first"),
    "five captions": Arm(captions=CAPTIONS),
    "words masked": Arm(mask=0.15),
    "targeted": Arm(every=5),
    "curated": Arm(curated=True),
    "mitigated": _MITIGATED,
    "curated and mitigated": replace(_MITIGATED, curated=True),
    "curated, three captions": Arm(captions=3, curated=True),
    "curated, five captions": Arm(captions=CAPTIONS, curated=True),
    "curated, captions and masks": Arm(captions=3, mask=0.15, curated=True),
    "two captions, masks 30": Arm(captions=2, mask=0.3),
    "curated, two captions": Arm(captions=2, curated=True),
    "curated, two captions, masks 15": Arm(captions=2, mask=0.15, curated=True),
    "curated, two captions, masks 30": Arm(captions=2, mask=0.3, curated=True),
    "curated, three captions, masks 30": Arm(captions=3, mask=0.3, curated=True),
    "curated, masks 30": Arm(mask=0.3, curated=True),
}


class Bench:
    """One seed's sets and swaps, and the models that train on them.

    Parameters
    ----------
    data : Data
    seed : int
    epochs : dict of str to int
        Of a model on all of its samples, by setting.
    work : Path
    """

    def __init__(self, data: Data, seed: int, epochs: dict[str, int], work: Path) -> None:
        self.data, self.seed, self.epochs, self.work = data, seed, epochs, work
        clusters, count = data.corpus.clusters, len(data.rare)
        self.sets = draw_sets(clusters.tolist(), count // 2, count // 8, seed)
        self.pool = np.flatnonzero(self.sets != "external")
        spoilt, planted = plant(data.corpus.take(self.pool), "swap", _SWAPS, seed)
        self.spoilt = spoilt
        place = {name: row for row, name in enumerate(data.corpus.captions.tolist())}
        self.donors = np.arange(count)
        swapped = self.pool[planted]
        self.donors[swapped] = [place[name] for name in spoilt.captions[planted].tolist()]
        self.clean = np.flatnonzero((self.sets == "candidate") & (self.donors == np.arange(count)))
        external = np.flatnonzero(self.sets == "external")
        apart = hash_unit(clusters[external].tolist(), seed, "held out") < _UNRELATED
        self.unrelated, self.test = external[apart], external[~apart]

    @cached_property
    def kept(self) -> Array:
        """Whether the score stage leaves a row in, from the spoilt training samples: (N,) bool."""
        path = self.work / f"mismatch-{self.seed}.npy"
        if not path.exists():
            scored = run_score(self.spoilt, Score(seed=self.seed))
            storage.commit_array(str(path), scored.columns["mismatch_probability"])
        probability = np.nan_to_num(storage.read_array(str(path)))
        kept = np.ones(len(self.sets), bool)
        kept[self.pool] = probability <= mismatch_limit(probability, _MAX_RATE)[0]
        return kept

    def curation(self) -> dict[str, float]:
        """Tell what curation does to the training samples."""
        planted = (self.donors != np.arange(len(self.donors)))[self.pool]
        dropped = ~self.kept[self.pool]
        return {
            "dropped": float(dropped.mean()),
            "planted_dropped": float(dropped[planted].mean()),
            "clean_dropped": float(dropped[~planted].mean()),
            "candidates_dropped": float((~self.kept[self.clean]).mean()),
        }

    def embeddings(self, setting: str, name: str, arm: Arm) -> list[dict[str, Array]]:
        """Return what f and g make of clean candidates, unrelated and test rows, in this order."""
        return [self._embedded(setting, name, arm, number) for number in range(2)]

    def _embedded(self, setting: str, name: str, arm: Arm, number: int) -> dict[str, Array]:
        epochs, which = self.epochs[setting], "fg"[number]
        path = self.work / f"{setting}-{epochs}-{name.replace(' ', '_')}-{self.seed}-{which}.npy"
        data = cut_modalities(self.data, setting)
        if not path.exists():
            begun = time.monotonic()
            inside = training_masks(self.sets)[number]
            steps = int(inside.sum()) // BATCH * epochs
            rows = np.flatnonzero(inside & self.kept if arm.curated else inside)
            seed = 1000 * self.seed + number
            model = train(data, rows, self.donors, arm, steps, seed, self.unrelated)
            judged = np.concatenate([self.clean, self.unrelated, self.test])
            found = embed_rows(model, data, judged, np.arange(len(self.donors)))
            storage.commit_array(str(path), np.stack(list(found.values())))
            click.echo(f"{path.stem}: {time.monotonic() - begun:.0f} s", err=True)
        return dict(zip(data.modalities, storage.read_array(str(path)), strict=True))

    def judge(self, models: list[dict[str, Array]]) -> dict[str, float]:
        """Return memorization of the clean candidates and retrieval on the test rows."""
        first, second = len(self.clean), len(self.clean) + len(self.unrelated)
        inside, unrelated, test = (
            [{name: part[rows] for name, part in model.items()} for model in models]
            for rows in (slice(first), slice(first, second), slice(second, None))
        )

        def memorized(names: list[str]) -> Array:
            both = [[model[name] for name in names] for model in (*inside, *unrelated)]
            return multimem(both[0], both[1], both[2], both[3])

        names, rare = list(models[0]), self.data.rare[self.clean]
        values = memorized(names)
        found = {
            "memorization": float(values.mean()),
            "memorization_rare": float(values[rare].mean()),
            **self._retrieve(test),
        }
        if len(names) == 2:
            pairs = [tuple(model[name] for name in names) for model in (*inside, *unrelated)]
            found["clipmem"] = float(clipmem(*pairs).mean())
        for pair in combinations(names, 2) if len(names) > 2 else ():
            found[f"memorization {' x '.join(pair)}"] = float(memorized(list(pair)).mean())
        return found

    def _retrieve(self, models: list[dict[str, Array]]) -> dict[str, float]:
        """R@10, the mean over models, pictures and both ways."""
        captions, rare = self.data.corpus.captions[self.test], self.data.rare[self.test]
        hits = np.mean([
            hits_at(*way, captions)
            for model in models
            for name in model if name != NAME
            for way in ((model[name], model[NAME]), (model[NAME], model[name]))
        ], axis=0)  # fmt: skip
        return {
            "recall": float(hits.mean()),
            "recall_rare": float(hits[rare].mean()),
            "recall_rest": float(hits[~rare].mean()),
        }


def summarize(results: dict[tuple[int, str], dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over seeds by arm, and of changes relative to raw, seed by seed."""
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for _, arm in results):
        rows = {seed: row for (seed, other), row in results.items() if other == arm}
        names = next(iter(rows.values()))
        figures = {name: mean_of([row[name] for row in rows.values()]) for name in names}
        pairs = [(row, results.get((seed, _RAW))) for seed, row in rows.items()]
        changes = {
            name: mean_of([row[name] / raw[name] - 1 for row, raw in pairs if raw])
            for name in names
            if any(raw for _, raw in pairs)
        }
        found[arm] = {"seeds": len(rows), "figures": figures, "changes": changes}
    return found


def write_table(summary: dict[str, Any]) -> str:
    """Write a setting's summary as Markdown."""
    columns = list(next(iter(summary.values()))["figures"])
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm, row in summary.items():
        cells = []
        for name in columns:
            (mean, error), change = row["figures"][name], row["changes"].get(name)
            told = f" ({change[0]:+.0%} ± {change[1]:.0%})" if change and arm != _RAW else ""
            cells.append(f"{mean:.3f} ± {error:.3f}{told}")
        lines.append(f"| {arm} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--cache", default=DEFAULT_CACHE, show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--arm",
    "arms",
    multiple=True,
    type=(click.Choice(list(SETTINGS)), click.Choice(list(ARMS))),
    help="Setting and arm; repeat for several. Default: all.",
)
@click.option(
    "--epochs",
    type=(int, int),
    default=(16, 8),
    show_default=True,
    help="Of a model on all its samples, of two and of three modalities.",
)
@click.option("--run", "out", type=click.Path(exists=True, path_type=Path), help="A finished run.")
@click.option("--limit", default=2000, show_default=True, help="Pairs of the run.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--table", is_flag=True, help="Print tables instead of one JSON line.")
def main(
    work: Path,
    cache: Path,
    arms: tuple[tuple[str, str], ...],
    epochs: tuple[int, int],
    out: Path | None,
    limit: int,
    seeds: tuple[int, ...],
    table: bool,
) -> None:
    """Train all arms and measure them."""
    keep_freed_memory()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    settings = [name for name in SETTINGS if (name == "run") == (out is not None)]
    if any(setting not in settings for setting, _ in arms):
        raise click.UsageError("--arm run goes with --run, and no other setting does.")
    data = read_data(cache.expanduser()) if out is None else read_run(out, limit)
    results: dict[str, dict[tuple[int, str], dict[str, float]]] = {}
    curation = {}
    for seed in seeds:
        bench = Bench(data, seed, {"two": epochs[0], "three": epochs[1], "run": epochs[0]}, work)
        curation[seed] = bench.curation()
        for setting, name in arms or product(settings, ARMS):
            models = bench.embeddings(setting, name, ARMS[name])
            results.setdefault(setting, {})[seed, name] = bench.judge(models)
    summary = {setting: summarize(found) for setting, found in results.items()}
    if table:
        for setting, found in summary.items():
            click.echo(f"{setting}\n\n{write_table(found)}")
    else:
        click.echo(json.dumps({"epochs": epochs, "curation": curation, **summary}))


if __name__ == "__main__":
    main()
