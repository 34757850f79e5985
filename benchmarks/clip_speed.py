"""Speed of proxies trained end to end: `python -m benchmarks.clip_speed OUT WORK --samples 100000`.

Tiles the pairs of a finished run, each copy seen in another crop and light, trains proxies on a
half each as `score` does, on a GPU several at once, in as many processes as workers, and embeds
everything under each; with `--image-px 64` larger ones.
Products are counted by torch and set against what the device multiplies in bfloat16, measured in
the same run. Prints one JSON line.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dedup_device import measure_device
from benchmarks.reliability import read_data, shrink
from curate.models.clip_proxy import (
    ClipShape,
    build_clip,
    embed_views,
    encode,
    normalise_pixels,
)
from curate.models.encoders import torch_threads
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe, augment_pixels, train_clips
from curate.stages.score_clips import CLIP_SHAPE

#: Of the score stage, and the larger ones that it had before.
_SHAPES = {CLIP_SHAPE["image_px"]: CLIP_SHAPE, 64: {"image_px": 64}}
_NAMES = ("pixels", "tokens", "codes")


def _write_pairs(out: Path, work: Path, samples: int, image_px: int) -> int:
    """Put down pixels, tokens and codes of so many pairs; return the number of words."""
    data = shrink(read_data(out, samples), image_px)
    pictures = data.pixels
    rows = np.arange(samples) % len(pictures)
    pixels = np.lib.format.open_memmap(
        work / "pixels.npy", "w+", np.uint8, (samples, *pictures.shape[1:])
    )
    torch.manual_seed(0)
    for start in range(0, samples, len(pictures)):
        part = torch.from_numpy(pictures[rows[start : start + len(pictures)]])
        seen = augment_pixels(part).byte() if start else part
        pixels[start : start + len(part)] = seen.numpy()
    pixels.flush()
    np.save(work / "tokens.npy", data.tokens[rows])
    np.save(work / "codes.npy", data.codes[rows])
    return data.words


def _train(
    work: str, shape: ClipShape, recipe: ClipRecipe, views: int, proxies: range
) -> tuple[float, float, list[float]]:
    """Train proxies at once and embed everything; the seconds of both, and their losses."""
    pixels, tokens, codes = (np.load(Path(work) / f"{name}.npy") for name in _NAMES)
    chosen = []
    for proxy in proxies:
        halves = np.random.default_rng(proxy // 2).permutation(len(pixels)) % 2
        chosen.append((halves == proxy % 2, proxy))
    begun = time.monotonic()
    trained = train_clips(shape, pixels, tokens, codes, recipe, chosen, pick_device())
    between = time.monotonic()
    with torch_threads(1):
        for one in trained:
            embed_views(one.model, pixels, tokens, views, recipe.dtype)
    losses = [one.losses[-1] for one in trained]
    return between - begun, time.monotonic() - between, losses


def _count_step(shape: ClipShape, recipe: ClipRecipe) -> float:
    """Operations of a step's towers, forth and back."""
    device = pick_device()
    model = build_clip(shape).to(device)
    pixels = torch.zeros(recipe.batch, 3, shape.image_px, shape.image_px, device=device)
    tokens = torch.ones(recipe.batch, model.context_length, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        image, text = encode(model, normalise_pixels(pixels), tokens, recipe.dtype)
        (image @ text.T).sum().backward()
    return float(counter.get_total_flops())


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--samples", default=4000, show_default=True)
@click.option("--proxies", default=2, show_default=True)
@click.option("--epochs", default=ClipRecipe().epochs, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--together", default=8 if pick_device() == "cuda" else 1, show_default=True,
              help="Proxies that a worker trains at once.")  # fmt: skip
@click.option("--workers", default=1 if pick_device() == "cuda" else 2, show_default=True)
@click.option("--image-px", type=click.Choice(list(_SHAPES)), default=CLIP_SHAPE["image_px"],
              show_default=True)  # fmt: skip
def main(
    out: Path,
    work: Path,
    samples: int,
    proxies: int,
    epochs: int,
    views: int,
    together: int,
    workers: int,
    image_px: int,
) -> None:
    """Measure on the pairs of OUT, tiled in WORK."""
    work.mkdir(parents=True, exist_ok=True)
    recipe = ClipRecipe(epochs=epochs, dtype=pick_dtype(pick_device()))
    words = _write_pairs(out, work, samples, image_px)
    shape = ClipShape(words, **_SHAPES[image_px])
    rates = measure_device()
    step = _count_step(shape, recipe)
    begun = time.time()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        tasks = []
        for first in range(0, proxies, together):
            part = range(proxies)[first : first + together]
            tasks.append(pool.submit(_train, str(work), shape, recipe, views, part))
        ended = []
        for task in as_completed(tasks):
            ended.append(task.result())
            took = np.round(ended[-1][:2], 1).tolist()
            click.echo(f"{len(ended)} of {len(tasks)}: training, embedding {took} s", err=True)
    wall = time.time() - begun
    training, embedding = (sum(part[place] for part in ended) / workers for place in (0, 1))
    seen = proxies * epochs * (samples // 2)
    operations = step * seen / recipe.batch / training / 1e12
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "samples": samples,
        "proxies": proxies,
        "epochs": epochs,
        "together": together,
        "workers": workers,
        "wall_seconds": round(wall, 1),
        "training_seconds": round(training, 1),
        "embedding_seconds": round(embedding, 1),
        "samples_per_second": round(seen / training),
        "mega_operations_per_sample": round(step / recipe.batch / 1e6, 1),
        "tera_operations_per_second": round(operations, 3),
        "bfloat16_tera_operations_per_second": round(rates["bfloat16"], 2),
        "share_of_bfloat16_rate": round(operations / rates["bfloat16"], 5),
        "losses": [round(loss, 3) for part in ended for loss in part[2]],
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
