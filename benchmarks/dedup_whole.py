"""Files to clusters, here and by fastdup: `python -m benchmarks.dedup_whole TARS WORK --peers PY`.

Writes every decodable picture of TARS as a small PNG and times both commands on these files, in
turns, processes and all: the packaged encoder, the search and the pixel match here, fastdup's own
there. Prints one JSON line.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import click
import numpy as np
import yaml

from benchmarks.dedup_quality import draw_pictures
from benchmarks.whole import stage_seconds, watch_command


def _ours(work: Path, workers: int) -> dict[str, float]:
    """Run up to the clusters: nothing is selected or written."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    pipeline = work / "whole.yaml"
    shipped = yaml.safe_load(Path("pipelines/dedup.yaml").read_text("utf-8"))
    recipe = {stage: shipped[stage] for stage in ("ingest", "embed", "dedup")}
    pipeline.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["run", str(pipeline), "--input", str(work / "images"), "--output", str(out)]
    wall, _, together = watch_command([*command, "--workers", str(workers)])
    summary = json.loads((out / "run.json").read_text("utf-8"))
    return {"seconds": wall, "peak_mb": together / 1e6, **stage_seconds(summary)}


def _fastdup(work: Path, python: Path) -> dict[str, float]:
    shutil.rmtree(work / "fastdup", ignore_errors=True)
    script = Path(__file__).with_name("dedup_peers.py")
    begun = time.monotonic()
    subprocess.run([python, script, "fastdup", work], check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - begun
    with np.load(work / "peers" / "fastdup.npz") as found:
        return {"seconds": wall, "without_imports": float(found["seconds"])}


@click.command()
@click.argument("tars", type=click.Path(path_type=Path, exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option(
    "--peers", required=True, type=click.Path(path_type=Path), help="Python with fastdup."
)
@click.option("--longest", default=64, show_default=True, help="Longer side of a picture, px.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(tars: Path, work: Path, peers: Path, longest: int, rounds: int, workers: int) -> None:
    """Measure on all pictures of TARS."""
    images = work / "images"
    if not images.exists():
        images.mkdir(parents=True)
        for key, image in draw_pictures(tars, longest):
            image.save(images / f"{key}.png")
    turns = [(_fastdup(work, peers), _ours(work, workers)) for _ in range(rounds)]
    ours, fastdup = (min(turn[at]["seconds"] for turn in turns) for at in (1, 0))
    report = {
        "pictures": sum(1 for _ in images.iterdir()),
        "longest": longest,
        "ratio": round(ours / fastdup, 3),
        "fastdup": [{name: round(value, 1) for name, value in turn[0].items()} for turn in turns],
        "curate": [{name: round(value, 1) for name, value in turn[1].items()} for turn in turns],
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
