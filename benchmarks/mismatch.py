"""Judge `mismatch_probability` by planted swaps: `python -m benchmarks.mismatch OUT TRUTH`.

Prints one JSON line with two regimes: `as_it_comes`, the finished run's own scores, and
`one_per_cluster`, the score stage run again in a temporary folder on one sample of each cluster,
where no duplicate can speak for a caption.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from benchmarks.planting import CLEAN, SWAP
from curate import storage
from curate.memorization.folds import hash_unit
from curate.stages.base import Room
from curate.stages.score import Score

__all__ = ["judge", "score_one_per_cluster"]

Array = np.ndarray[Any, Any]

_BINS = 15
_READS = ("caption", "cluster_id", "image_emb", "text_emb")
_TABLES = {
    "caption": "ingest",
    "image_emb": "embed.vectors",
    "text_emb": "embed.vectors",
    "cluster_id": "dedup",
}


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


def _folder(out: str, table: str) -> Path:
    """Folder of a table of the run; the latest one if there are several."""
    found = sorted(Path(out, "stages").glob(f"{table}-*"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def _read(out: str, table: str, columns: list[str]) -> pa.Table:
    paths = sorted((_folder(out, table) / "shards").glob("*.parquet"))
    return pa.concat_tables([storage.read_table(str(path), ["uid", *columns]) for path in paths])


def score_one_per_cluster(out: str, stage: Score) -> tuple[pa.Table, dict[str, Any], float]:
    """Run the score stage on one sample of each cluster, chosen by hash.

    Returns
    -------
    scores : pyarrow.Table
    facts : dict
    seconds : float
    """
    whole = storage.join_aligned(
        (t, _read(out, t, _of(t))) for t in dict.fromkeys(_TABLES.values())
    )
    usable = whole["image_emb"].is_valid().to_numpy() & whole["text_emb"].is_valid().to_numpy()
    order = np.argsort(hash_unit(whole["uid"].to_pylist(), 0, "one per cluster"))
    order = order[usable[order]]
    _, first = np.unique(np.asarray(whole["cluster_id"].to_pylist())[order], return_index=True)
    chosen = whole.take(np.sort(order[first]))
    with tempfile.TemporaryDirectory() as folder:
        room = _lay_out(folder, chosen, out, stage)
        begun = time.monotonic()
        for step in stage.steps():
            for task in step.tasks(room):
                step.run(room, task)
        seconds = time.monotonic() - begun
        parts = [storage.read_table(room.shard_path("score", shard)) for shard in room.shards()]
        # Copied out of the folder, which is gone after this.
        table = pa.concat_tables(parts).combine_chunks()
        facts = stage.facts(room)
        return pa.table({name: table[name].to_pylist() for name in _KEPT}), facts, seconds


_KEPT = ("uid", "mismatch_probability")


def _of(table: str) -> list[str]:
    return [column for column in _READS if _TABLES[column] == table]


def _lay_out(folder: str, chosen: pa.Table, out: str, stage: Score) -> Room:
    """Write a run's tables for the chosen samples, as one shard per thousand."""
    folders = {name: f"{folder}/{name}" for name in (*_TABLES.values(), "score")}
    layout = []
    for start in range(0, chosen.num_rows, 1000):
        part, name = chosen.slice(start, 1000), f"{start // 1000:05d}"
        layout.append({"name": name, "samples": part.num_rows})
        for table in dict.fromkeys(_TABLES.values()):
            path = f"{folders[table]}/shards/{name}.parquet"
            storage.commit_table(path, part.select(["uid", *_of(table)]).combine_chunks())
    storage.commit_json(f"{folders['ingest']}/layout.json", {"shards": layout})
    for extra in (_folder(out, "embed.vectors") / "concepts").glob("*.npy"):
        storage.commit_array(f"{folder}/embed.vectors/concepts/{extra.name}", np.load(extra))
    return Room(stage, folders, dict(_TABLES), frozenset({"score"}))


@click.command()
@click.argument("out")
@click.argument("truth")
@click.option("--seed", default=0, show_default=True, help="score.seed of the second regime.")
def main(out: str, truth: str, seed: int) -> None:
    """Print one JSON line about the run in OUT, whose planted truth is TRUTH."""
    kinds = {row["key"]: row["kind"] for row in pq.read_table(truth).to_pylist()}
    decisions = pq.read_table(Path(out) / "decisions", columns=["uid", "key"])
    by_uid = {row["uid"]: kinds[row["key"]] for row in decisions.to_pylist()}

    def compare(table: pa.Table) -> dict[str, Any]:
        rows = [
            (row["mismatch_probability"], by_uid[row["uid"]] == SWAP)
            for row in table.select(_KEPT).to_pylist()
            if row["mismatch_probability"] is not None and by_uid[row["uid"]] in (CLEAN, SWAP)
        ]
        return judge(np.array([p for p, _ in rows]), np.array([wrong for _, wrong in rows]))

    lone, facts, seconds = score_one_per_cluster(out, Score(seed=seed))
    result = {
        "as_it_comes": compare(_read(out, "score", ["mismatch_probability"])),
        "one_per_cluster": {
            **compare(lone),
            "share": facts["mismatch"].get("share"),
            "seconds": round(seconds, 1),
        },
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
