"""Does `curate ablate` find the planted share? `python -m benchmarks.ablate OUT TRUTH WORK`.

Swaps captions in a copy of a finished run, between pairs that differ by name, cluster and caption;
runs `score` and `select` on that anew, then `curate ablate`. Prints one JSON line: what share the
recommended setting drops of what the loosest keeps, of what planted share, what it gained and what
the best of the others would have needed; with several models also how alike each two rank the
settings, and what one loses by the setting that is recommended for the other. All stays in WORK, so
that a benchmark that was stopped goes on.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from benchmarks.noise import plant
from benchmarks.trial import Corpus, read_corpus
from curate import storage
from curate.ablate.grid import Setting, decide_all, open_select
from curate.engine.finished import read_finished
from curate.stages.base import Room, Stage
from curate.stages.score import Score

__all__ = ["compare_models"]

#: Tables of the run that depend on captions are made anew or not needed.
_ANEW = ("score", "select", "write", "report")


def _plant_run(
    out: Path, truth: Path, target: Path, swaps: float, information: float | None
) -> None:
    """Copy a finished run, swap captions in the copy, score and select anew."""
    if (target / "run.json").exists():
        return
    run = read_finished(str(out))
    run["stages"]["select"]["parameters"]["min_caption_information"] = information
    room = open_select(str(out), run)
    folders = {name: path.replace(str(out), str(target)) for name, path in room.folders.items()}
    room = replace(room, folders=folders)
    if not (target / "planted.npy").exists():
        shutil.rmtree(target, ignore_errors=True)
        kept = [name for name in run["stages"] if name.partition(".")[0] not in _ANEW]
        for name in kept:
            folder = f"stages/{name}-{run['stages'][name]['fingerprint']}"
            shutil.copytree(out / folder, target / folder, copy_function=os.link)
        for path in (out / "stages").glob("score-*/concepts"):
            shutil.copytree(path, target / path.relative_to(out), copy_function=os.link)
        corpus = read_corpus(str(out), str(truth))
        if information is not None:
            corpus = corpus.take(np.isin(corpus.uids, _informative(out, information)))
        planted = np.zeros(0, "U32")
        if swaps:
            spoilt, rows = plant(corpus, "swap", swaps, 0)
            planted = spoilt.uids[rows]
            _write_captions(room, spoilt)
        storage.commit_array(str(target / "planted.npy"), planted)
    for stage in (Score(**run["stages"]["score"]["parameters"]), room.stage):
        _carry_out(room, stage, target / "done")
    storage.commit_json(str(target / "run.json"), run)


def _informative(out: Path, least: float) -> Any:
    """Uids whose captions tell as much: (M,) str."""
    columns = pq.read_table(out / "decisions", columns=["uid", "caption_information"])
    told = columns.filter(pc.greater_equal(columns["caption_information"], least))
    return np.array(told["uid"].to_pylist())


def _write_captions(room: Room, spoilt: Corpus) -> None:
    """Put captions and their vectors into the tables of the copy."""
    place = {uid: row for row, uid in enumerate(spoilt.uids.tolist())}
    for shard in room.shards():
        for table, column in (("ingest", "caption"), ("embed.vectors", "text_emb")):
            path = room.shard_path(table, shard)
            content = storage.read_table(path)
            rows = [place.get(uid, -1) for uid in content["uid"].to_pylist()]
            known = np.array(rows) >= 0
            if column == "caption":
                before = content[column].to_pylist()
                texts = [
                    str(spoilt.captions[r]) if r >= 0 else b
                    for r, b in zip(rows, before, strict=True)
                ]
                values: Any = pa.array(texts, pa.string())
            else:
                vectors, valid = storage.read_vectors(content[column])
                vectors = np.where(known[:, None], spoilt.text[rows], vectors)
                values = storage.vector_column(vectors, valid)
            at = content.schema.get_field_index(column)
            changed = content.set_column(at, content.schema.field(at), values)
            os.unlink(path)  # a link to the original
            storage.commit_table(path, changed)


def _carry_out(room: Room, stage: Stage, done: Path) -> None:
    """Run all tasks of a stage but those whose mark is in `done`."""
    own = replace(room, stage=stage, missing=frozenset(t.name for t in stage.tables()))
    for step in stage.steps():
        for task in step.tasks(own):
            mark = done / f"{stage.name}-{step.name}-{task}"
            if not mark.exists():
                step.run(own, task)
                storage.commit_bytes(str(mark), b"")


def _ablate(out: Path, model: str, seeds: int, controls: bool, workers: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "curate", "ablate", str(out), "--model", model, "--seeds", str(seeds),
        "--workers", str(workers), "--controls" if controls else "--no-controls", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _judge(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Compare the recommended setting with what was planted."""
    found = report["recommended"]
    room = open_select(str(out), read_finished(str(out)))
    (loosest,) = decide_all(room, [Setting({"select.max_mismatch_rate": None})])
    uids = [uid for shard in room.shards() for uid in room.read(shard, ["uid"])["uid"].to_pylist()]
    planted = np.isin(uids, storage.read_array(str(out / "planted.npy")))
    settings = [row for row in report["lines"] if row["kind"] == "setting"]
    return {
        "planted": round(float(planted[loosest.keep].mean()), 4),
        "recommended": round(found["share_dropped"], 4),
        "options": found["options"],
        "best": found["best"],
        "is_better": found["is_better"],
        "gain": [round(found["gain"][name], 4) for name in ("mean", "stderr")],
        "needed": round(found["rival"]["needed"], 4),
        "versus": {
            kind: [round(one[name], 4) for name in ("mean", "stderr")]
            for kind, one in found["versus"].items()
        },
        "curve": [
            [
                round(row["share_dropped"], 4),
                round(row["figures"]["all"]["gain"], 4),
                round(row["figures"]["all"]["stderr"], 4),
                row["seeds"],
            ]
            for row in settings
        ],
    }


def compare_models(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tell how well settings found by one model hold for another.

    Parameters
    ----------
    reports : mapping of str to mapping
        By model, of the same settings: what `curate ablate --json` prints.

    Returns
    -------
    dict
        By "ONE OTHER", for every two: `rank_correlation` of the settings' gains (Spearman's; None
        if one's gains are all equal), the shares that their `recommended` settings drop, and how
        much less than its best each gains (`lost`) by the setting recommended for the other.
    """
    return {f"{one} {two}": _compare(reports[one], reports[two]) for one, two in
            combinations(reports, 2)}  # fmt: skip


def _compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    gains = [
        {
            row["name"]: row["figures"]["all"]["gain"]
            for row in report["lines"]
            if row["kind"] == "setting"
        }
        for report in (one, other)
    ]
    names = list(gains[0])
    both = [[found[name] for name in names] for found in gains]
    chosen = [report["recommended"]["name"] for report in (one, other)]
    alike = None
    if all(len(set(values)) > 1 for values in both):
        alike = round(float(np.asarray(spearmanr(*both).statistic)), 3)
    return {
        "rank_correlation": alike,
        "recommended": [round(r["recommended"]["share_dropped"], 4) for r in (one, other)],
        "lost": [
            round(max(found.values()) - found[name], 4)
            for found, name in zip(gains, reversed(chosen), strict=True)
        ],
    }


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("truth", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--swaps", multiple=True, type=float, default=(0.0, 0.2), show_default=True)
@click.option("--model", "models", multiple=True, default=("heads",), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--controls/--no-controls", default=True, show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--min-information", type=float, help="Of the captions that are in question.")
def main(
    out: Path,
    truth: Path,
    work: Path,
    swaps: tuple[float, ...],
    models: tuple[str, ...],
    seeds: int,
    controls: bool,
    workers: int,
    min_information: float | None,
) -> None:
    """Plant swapped captions in copies of the run in OUT, whose planted truth is TRUTH."""
    found: dict[str, Any] = {"run": out.name, "seeds": seeds}
    least = "" if min_information is None else f"-{min_information:g}"
    for share in swaps:
        copy = work / f"{out.name}{least}-{share:g}"
        _plant_run(out, truth, copy, share, min_information)
        reports = {one: _ablate(copy, one, seeds, controls, workers) for one in models}
        judged = {one: _judge(copy, report) for one, report in reports.items()}
        found[f"{share:g}"] = {**judged, "transfer": compare_models(reports)}
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
