"""Does an audit measure memorization? `python -m benchmarks.audit OUT`.

f trains on shared and candidate samples, g on shared and independent ones, held-out samples are of
neither (`curate.memorization.protocol`). Audited is f against g, where candidates must be above
zero, independent samples as far below and shared ones about zero; f without a reference; and g
with f as its reference, which has seen what is audited. On the pairs of a finished run, or with
`--three` on emoji of three modalities (two renderings and a name). Prints one JSON line.

`--monitor SECONDS` measures instead what share of a training's time a Monitor takes at its
defaults.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from open_clip.loss import ClipLoss

from benchmarks.corpora import DEFAULT_CACHE
from benchmarks.emoji import EMOJI_VENDORS
from benchmarks.signature import IMAGE_PX, Samples, embed, join_groups, make_samples, read_pairs
from benchmarks.signature_three import Setting, read_setting
from curate.audit import Embeddings, Measures, Monitor, measure
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.protocol import draw_sets, training_masks
from curate.models.clip_proxy import ClipShape, build_clip, normalise_pixels
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe, train_clip

Array = np.ndarray[Any, Any]


def read_samples(out: Path, limit: int) -> Samples:
    table = read_pairs(out, limit)
    captions = table["caption"].to_pylist()
    groups = join_groups([table["cluster_id"].to_pylist(), captions])
    pixels = np.stack([read_square(data, IMAGE_PX) for data in table["thumbnail"].to_pylist()])
    return make_samples(("image", "caption"), pixels[None], [captions], groups)


def cut(samples: Samples, rows: Array) -> Samples:
    groups = [samples.groups[row] for row in rows.tolist()]
    parts = {"pixels": samples.pixels[:, rows], "tokens": samples.tokens[:, rows]}
    return replace(samples, **parts, groups=groups)


def judge(samples: Samples, recipe: ClipRecipe, seed: int) -> dict[str, Any]:
    """Train f and g, and audit them."""
    count = len(samples.groups)
    sets = draw_sets(samples.groups, count // 2, count // 8, seed)
    embedded = []
    for number, inside in enumerate(training_masks(sets)):
        chosen = cut(samples, np.flatnonzero(inside))
        shape = ClipShape(samples.words, image_px=IMAGE_PX)
        trained = train_clip(
            shape, chosen.pixels, chosen.tokens, chosen.codes, recipe, seed * 1000 + number,
            pick_device(),
        )  # fmt: skip
        click.echo(f"model {number}: loss {trained.losses[-1]:.3f} of chance", err=True)
        embedded.append(embed(trained.model, samples, 1, recipe.dtype))

    def audit(name: str, model: int, reference: int | None) -> dict[str, Any]:
        rows, held_out = (np.flatnonzero(sets == one) for one in (name, "external"))
        one, other = (
            None if number is None else panel(samples.modalities, embedded[number], rows, held_out)
            for number in (model, reference)
        )
        assert one is not None
        clusters = [samples.groups[row] for row in rows.tolist()]
        return told(measure(one, other, clusters))

    return {
        "modalities": list(samples.modalities),
        "samples": count,
        "sets": {name: int((sets == name).sum()) for name in np.unique(sets)},
        "f against g": {name: audit(name, 0, 1) for name in ("candidate", "independent", "shared")},
        "f alone": {name: audit(name, 0, None) for name in ("candidate", "independent")},
        "g against f, which has seen the candidates": audit("candidate", 1, 0),
    }


def panel(modalities: Any, embedded: list[Array], rows: Array, held_out: Array) -> Embeddings:
    parts = (
        {name: one[..., chosen, :] for name, one in zip(modalities, embedded, strict=True)}
        for chosen in (rows, held_out)
    )
    return Embeddings(*parts)


def told(found: Measures) -> dict[str, Any]:
    mean = {
        key: float(f"{value:.4g}") for key, value in asdict(found.estimates["memorization"]).items()
    }
    multimem = found.estimates.get("multimem")
    return {
        "memorization": mean,
        "multimem": multimem and float(f"{multimem.mean:.4g}"),
        "auc": round(found.auc, 4),
        "memorized": round(float(found.memorized.mean()), 4),
        "warnings": found.warnings,
    }


def watch(samples: Samples, seconds: float, batch: int) -> dict[str, Any]:
    """Train one model for so long, with a Monitor as it comes, on a panel of 256 and 256."""
    count = len(samples.groups)
    pixels, tokens = torch.from_numpy(samples.pixels[0]), torch.from_numpy(samples.tokens[0])
    order = np.random.default_rng(0).permutation(count)
    parts = {
        name: {"image": normalise_pixels(pixels[rows].float()), "text": tokens[rows]}
        for name, rows in (("in", order[:256]), ("out", order[256:512]))
    }
    training = torch.from_numpy(order[np.r_[0:256, 512:count]])
    torch.manual_seed(0)
    model = build_clip(ClipShape(samples.words, image_px=IMAGE_PX)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, parts["in"], parts["out"])
    monitor.attach(optimizer)
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        rows = training[torch.randint(len(training), (batch,))]
        image, text, scale = model(normalise_pixels(pixels[rows].float()), tokens[rows])
        optimizer.zero_grad()
        ClipLoss()(image, text, scale).backward()
        optimizer.step()
        steps += 1
    return {
        "seconds": seconds,
        "batch": batch,
        "steps": steps,
        "share_of_time": round(monitor.spent_share, 5),
        "history": monitor.history,
    }


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.option("--three", is_flag=True, help="Emoji of three modalities instead of OUT's pairs.")
@click.option("--monitor", type=float, help="Seconds to train with a Monitor.")
@click.option("--cache", default=DEFAULT_CACHE, show_default=True, type=click.Path(path_type=Path))
@click.option("--limit", default=2000, show_default=True, help="Samples used, of all sets.")
@click.option("--epochs", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    out: Path, three: bool, monitor: float | None, cache: Path, limit: int, epochs: int, seed: int
) -> None:
    """Audit small CLIPs whose training is known."""
    keep_freed_memory()
    torch.set_num_threads(1)
    begun = time.monotonic()
    if three:
        samples = read_setting(cache.expanduser(), Setting(EMOJI_VENDORS[:2], ("en",)))
        samples = cut(samples, np.arange(min(limit, len(samples.groups))))
    else:
        samples = read_samples(out, limit)
    recipe = ClipRecipe(epochs=epochs, batch=64, dtype=pick_dtype(pick_device()))
    report = watch(samples, monitor, recipe.batch) if monitor else judge(samples, recipe, seed)
    seconds = round(time.monotonic() - begun, 1)
    click.echo(json.dumps({"epochs": epochs, "seed": seed, **report, "seconds": seconds}))


if __name__ == "__main__":
    main()
