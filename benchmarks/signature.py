"""Does the memorization measure behave as it must? `python -m benchmarks.signature OUT`.

The paper's protocol on the pairs of a finished run, drawn by groups that share a cluster or a
caption: f trains on shared and candidate pairs, g on shared and independent ones, neither on the
external. Candidates must score above 0, independents as far below, shared and external about 0.
A third model, trained on the same pairs as f from another seed, gives the noise floor. Prints one
JSON line.

References: Wang et al., MultiMem (arXiv:2606.22220), section on the protocol.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curate.dedup.groups import equal_value_edges
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.folds import hash_unit
from curate.memorization.protocol import draw_sets, summarize, training_masks
from curate.memorization.verdict import coherence
from curate.models.clip_proxy import (
    ClipShape,
    choose_words,
    embed_views,
    fold_tokens,
    pick_dtype,
    tokenize,
)
from curate.models.precision import pick_device
from curate.models.train_clip import ClipRecipe, train_clip

_IMAGE_PX = 64

Array = np.ndarray[Any, Any]


def read_pairs(out: Path, limit: int) -> pa.Table:
    """Return uid, caption, cluster and thumbnail of a run's usable pairs, the first by hash."""
    (folder,) = (out / "stages").glob("embed.thumbnails-*")
    decisions = pq.read_table(out / "decisions", columns=["uid", "caption", "cluster_id"])
    table = decisions.join(pq.read_table(folder / "shards"), "uid")
    for column in ("thumbnail", "caption", "cluster_id"):
        table = table.filter(pc.is_valid(table[column]))
    order = np.argsort(hash_unit(table["uid"].to_pylist(), 0, "signature"), kind="stable")
    return table.take(pa.array(order[:limit]))


def group_pairs(table: pa.Table) -> list[str]:
    """Name the groups of pairs that share a cluster or a caption, directly or by others."""
    count = len(table)
    columns = [np.array(table[n].to_pylist(), dtype=str) for n in ("cluster_id", "caption")]
    edges = [equal_value_edges(column, np.ones(count, bool)) for column in columns]
    first, other = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_matrix((np.ones(len(first)), (first, other)), shape=(count, count))
    return [str(label) for label in connected_components(graph, directed=False)[1]]


@click.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.option("--limit", default=4000, show_default=True, help="Pairs used, of all sets.")
@click.option("--epochs", default=20, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, limit: int, epochs: int, views: int, seed: int) -> None:
    """Measure on the pairs of OUT, a finished run."""
    keep_freed_memory()
    begun = time.monotonic()
    table = read_pairs(out, limit)
    groups = group_pairs(table)
    sets = draw_sets(groups, len(table) // 2, len(table) // 8, seed)
    pixels = np.stack([read_square(data, _IMAGE_PX) for data in table["thumbnail"].to_pylist()])
    tokens = tokenize(table["caption"].to_pylist())
    words = choose_words(Counter(tokens.ravel().tolist()))
    tokens = fold_tokens(tokens, words)
    codes = np.unique(groups, return_inverse=True)[1][:, None].astype(np.int64)
    device = pick_device()
    recipe = ClipRecipe(epochs=epochs, dtype=pick_dtype(device))
    # Half of the external pairs are the unrelated ones that coherence is measured against.
    external = np.flatnonzero(sets == "external")
    uniform = hash_unit([groups[row] for row in external], seed, "held out")
    held_out = external[uniform < 0.5]
    judged = np.setdiff1d(np.arange(len(table)), held_out)

    def measure(inside: Array, number: int) -> tuple[Array, list[float]]:
        """Coherence of the judged pairs under a model that trained on the pairs inside."""
        trained = train_clip(
            ClipShape(len(words), image_px=_IMAGE_PX),
            pixels[inside],
            tokens[inside],
            codes[inside],
            recipe,
            seed * 1000 + number,
            device,
        )
        image, text, alignment = embed_views(trained.model, pixels, tokens, views, recipe.dtype)
        unrelated = (image[held_out] + text[held_out]).mean(0)
        values = coherence(alignment[judged], image[judged], text[judged], unrelated)
        return values, trained.losses

    in_mask, out_mask = training_masks(sets)
    under_f, losses = measure(in_mask, 0)
    scores = under_f - measure(out_mask, 1)[0]
    noise = under_f - measure(in_mask, 2)[0]
    names = np.array(groups)[judged]
    summary = summarize(scores, sets[judged], names.tolist())
    report = {
        "pairs": len(table),
        "epochs": epochs,
        "last_loss": round(losses[-1], 3),
        "correct": summary.correct,
        "sets": {
            name: {key: _plain(value) for key, value in vars(one).items()}
            for name, one in summary.sets.items()
        },
        "noise_floor": {
            "mean": round(float(noise.mean()), 4),
            "standard_deviation": round(float(noise.std()), 4),
        },
        "candidate_standard_deviation": round(float(scores[sets[judged] == "candidate"].std()), 4),
        "seconds": round(time.monotonic() - begun, 1),
    }
    click.echo(json.dumps(report))


def _plain(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
