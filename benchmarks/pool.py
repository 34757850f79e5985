"""A DataComp pool without images, score tables and lists: `python -m benchmarks.pool WORK`.

Writes metadata and vectors as CommonPool has them, with planted near-copies, and carries out the
pipelines `clip-score` and `dedup` on them; then `clip-score` again by a column of a table from
outside of which the pool is a small part, with a removal list as long. Prints one
JSON line.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.mixture import write_mixture
from benchmarks.whole import watch_command

_ROWS_A_GROUP = 1 << 20


def _uids(start: int, stop: int) -> list[str]:
    # As far apart as hashes are, and the same each time.
    return [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"
            for number in range(start, stop)]  # fmt: skip


def _write_pool(folder: Path, samples: int, width: int) -> None:
    write_mixture(folder / "vectors", samples, width)
    start = 0
    for path in sorted((folder / "vectors").glob("*.npy")):
        images = np.load(path, allow_pickle=False)
        stop = start + len(images)
        rng = np.random.default_rng(start)
        noise = rng.standard_normal(images.shape, np.float32) / width**0.5
        scores = rng.random(len(images), np.float32)
        table = {
            "uid": _uids(start, stop),
            "url": [f"http://example.com/{number}" for number in range(start, stop)],
            "text": [f"caption of number {number}" for number in range(start, stop)],
            "original_width": rng.integers(64, 4096, len(images)),
            "original_height": rng.integers(64, 4096, len(images)),
            "clip_b32_similarity_score": scores,
            "clip_l14_similarity_score": scores,
        }
        pq.write_table(pa.table(table), folder / f"{path.stem}.parquet")
        np.savez(folder / f"{path.stem}.npz", l14_img=images, l14_txt=images + noise)
        path.unlink()
        start = stop
    (folder / "vectors").rmdir()


def _write_outside(folder: Path, rows: int) -> None:
    """Write a table of `rows` scores, and a list of as many uids, half of them the table's."""
    kind = pa.schema([("uid", pa.string()), ("aesthetic", pa.float32())])
    with (
        pq.ParquetWriter(folder / "scores.parquet", kind) as writer,
        open(folder / "removed.txt", "w", encoding="ascii") as file,
    ):
        for start in range(0, rows, _ROWS_A_GROUP):
            uids = _uids(start, min(start + _ROWS_A_GROUP, rows))
            scores = np.random.default_rng(start).random(len(uids), np.float32)
            writer.write_table(pa.table([pa.array(uids), pa.array(scores)], schema=kind))
            file.writelines(f"{uid}\n{uid[::-1]}\n" for uid in uids[::2])


def _measure(name: str, pool: Path, out: Path, workers: int, *settings: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = ["run", name, "--input", str(pool), "--output", str(out), "--workers", str(workers)]
    more = [text for setting in settings for text in ("--set", setting)]
    wall, one, together = watch_command([*command, *more])
    summary = json.loads((out / "run.json").read_text("utf-8"))
    shutil.rmtree(out)
    found = summary["stages"]
    return {
        "wall_seconds": round(wall, 1),
        "counts": summary["counts"],
        "step_seconds": {
            f"{table}.{step}": round(told["wall_seconds"], 1)
            for table in ("remove", "select")
            for step, told in found[table]["steps"].items()
        },
        "peak_mb_one_process": round(one / 1e6),
        "peak_mb_all": round(together / 1e6),
    }


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--samples", default=100_000, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--rows", default=5_000_000, show_default=True, help="Rows of the table.")
@click.option("--workers", default=2, show_default=True)
def main(work: Path, samples: int, width: int, rows: int, workers: int) -> None:
    """Measure on SAMPLES, which are kept in WORK for the next measurement."""
    pool, outside = work / f"pool-{samples}-{width}", work / f"outside-{rows}"
    if not pool.exists():
        _write_pool(pool, samples, width)
    if not outside.exists():
        outside.mkdir(parents=True)
        _write_outside(outside, rows)
    tables = [{"path": str(outside / "scores.parquet"), "name": "s"}]
    rule = {"column": "s.aesthetic", "fraction": 0.3}
    lists = [{"path": str(outside / "removed.txt"), "by": "uid"}]
    by_table = (
        f"select.score_tables={json.dumps(tables)}",
        f"select.keep_fraction={json.dumps(rule)}",
        f"remove.lists={json.dumps(lists)}",
    )
    report = {
        "samples": samples,
        "table_rows": rows,
        "list_rows": rows,
        "clip_score": _measure("clip-score", pool, work / "out", workers),
        "dedup": _measure("dedup", pool, work / "out", workers),
        "by_table": _measure("clip-score", pool, work / "out", workers, *by_table),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
