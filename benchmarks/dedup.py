"""Speed and memory of dedup: `python -m benchmarks.dedup WORK --samples 1000000`.

Runs `curate run dedup` on vectors with planted near-copies and one picture that is everywhere, and
watches the memory of its processes. Beside it, in the same run and on as many threads, brute force
and plain FAISS IVF range search answer a slice of the queries; their time is scaled to all. Prints
one JSON line.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np

from benchmarks.mixture import write_mixture
from benchmarks.whole import watch_command

Array = np.ndarray[Any, Any]

_MIN_COSINE = 0.95
_BRUTE_QUERIES, _IVF_QUERIES = 4096, 20_000
#: As `curate` trains its own.
_TRAIN_PER_CELL, _ROUNDS = 64, 10


def _baselines(folder: Path, probes: int, threads: int) -> dict[str, float]:
    """Seconds that FAISS would take for all queries, by brute force and with an inverted file."""
    parts = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
    rows = np.concatenate([np.asarray(part, np.float32) for part in parts])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    faiss.omp_set_num_threads(threads)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    slice_ = np.ascontiguousarray(rows[:: max(1, len(rows) // _BRUTE_QUERIES)])
    brute = _timed(lambda: flat.range_search(slice_, _MIN_COSINE)) * len(rows) / len(slice_)
    flat.reset()
    cells = round(len(rows) ** 0.5)
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], cells, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter, index.cp.spherical, index.nprobe = _ROUNDS, True, probes
    every = max(1, len(rows) // (cells * _TRAIN_PER_CELL))
    build = _timed(lambda: index.train(rows[::every]), lambda: index.add(rows))
    slice_ = np.ascontiguousarray(rows[:: max(1, len(rows) // _IVF_QUERIES)])
    search = _timed(lambda: index.range_search(slice_, _MIN_COSINE)) * len(rows) / len(slice_)
    return {"brute_force_seconds": brute, "faiss_ivf_seconds": build + search}


def _timed(*calls: Callable[[], Any]) -> float:
    begun = time.monotonic()
    for call in calls:
        call()
    return time.monotonic() - begun


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--samples", default=100_000, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--baselines/--no-baselines", default=True, help="Time FAISS too.")
@click.option("--keep", is_flag=True, help="Leave the output in WORK.")
def main(work: Path, samples: int, width: int, workers: int, baselines: bool, keep: bool) -> None:
    """Measure on SAMPLES vectors, which are kept in WORK for the next measurement."""
    folder, out = work / f"vectors-{samples}-{width}", work / f"out-{samples}-{width}-{workers}"
    if not folder.exists():
        write_mixture(folder, samples, width)
    shutil.rmtree(out, ignore_errors=True)
    command = ["run", "dedup", "--input", str(folder), "--output", str(out)]
    wall, one, together = watch_command([*command, "--workers", str(workers)])
    summary = json.loads((out / "run.json").read_text("utf-8"))
    dedup = summary["stages"]["dedup"]["steps"]
    facts = summary["facts"]["dedup"]
    visits = dedup["spread"]["visits"] / samples
    report: dict[str, Any] = {
        "samples": samples,
        "width": width,
        "workers": workers,
        "wall_seconds": round(wall, 1),
        "dedup_seconds": round(sum(step["wall_seconds"] for step in dedup.values()), 1),
        "step_seconds": {name: round(step["wall_seconds"], 1) for name, step in dedup.items()},
        "stage_seconds": {
            name: round(sum(step["wall_seconds"] for step in stage["steps"].values()), 1)
            for name, stage in summary["stages"].items()
        },
        "peak_mb_one_process": round(one / 1e6),
        "peak_mb_all": round(together / 1e6),
        "kept": summary["counts"]["kept"],
        "visits": round(visits, 3),
        "facts": facts,
    }
    if baselines:
        found = _baselines(folder, int(np.ceil(visits)), workers)
        report |= {name: round(value, 1) for name, value in found.items()}
        for name, value in found.items():
            report[name.replace("seconds", "ratio")] = round(report["dedup_seconds"] / value, 4)
    click.echo(json.dumps(report))
    if not keep:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
