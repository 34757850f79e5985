"""Does the memorization measure behave as it must? `python -m benchmarks.signature OUT`.

The paper's protocol on the pairs of a finished run, drawn by groups that share a cluster or a
caption: f trains on shared and candidate pairs, g on shared and independent ones, neither on the
external. Candidates must score above 0, independents as far below, shared and external about 0.
A third model, trained on the same pairs as f from another seed, gives the noise floor. Prints one
JSON line. `benchmarks.signature_three` does the same for three modalities.

References: Wang et al., MultiMem (arXiv:2606.22220), section on the protocol.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from open_clip.model import CLIP
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curate import storage
from curate.dedup.groups import equal_value_edges
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.folds import hash_unit
from curate.memorization.metrics import multimem
from curate.memorization.protocol import SETS, draw_sets, summarize, training_masks
from curate.models.clip_proxy import (
    ClipShape,
    choose_words,
    embed_images,
    embed_texts,
    fold_tokens,
    tokenize,
)
from curate.models.precision import pick_device, pick_dtype
from curate.models.train_clip import ClipRecipe, train_clip

IMAGE_PX = 64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Samples:
    """Samples of two or more modalities: pictures, then captions.

    Parameters
    ----------
    modalities : sequence of str, length I + T
        Their names.
    pixels : (I, N, 3, S, S) uint8
    tokens : (T, N, L) int64
        Of the folded vocabulary.
    words : int
        Of that vocabulary.
    groups : list of str, length N
        What must not lie in two sets.
    """

    modalities: Sequence[str]
    pixels: Array
    tokens: Array
    words: int
    groups: list[str]

    @property
    def codes(self) -> Array:
        """(N, 1) int64: samples of one group are not each other's negatives."""
        return np.unique(self.groups, return_inverse=True)[1][:, None].astype(np.int64)


def make_samples(
    modalities: Sequence[str], pixels: Array, captions: Sequence[list[str]], groups: list[str]
) -> Samples:
    """Give captions of all languages, T lists of length N, one vocabulary."""
    tokens = np.stack([tokenize(part) for part in captions])
    words = choose_words(Counter(tokens.ravel().tolist()))
    return Samples(modalities, pixels, fold_tokens(tokens, words), len(words), groups)


def read_pairs(out: Path, limit: int) -> pa.Table:
    """Return uid, caption, cluster and thumbnail of a run's usable pairs, the first by hash."""
    (folder,) = (out / "stages").glob("embed.thumbnails-*")
    decisions = pq.read_table(out / "decisions", columns=["uid", "caption", "cluster_id"])
    table = decisions.join(pq.read_table(folder / "shards"), "uid")
    for column in ("thumbnail", "caption", "cluster_id"):
        table = table.filter(pc.is_valid(table[column]))
    order = np.argsort(hash_unit(table["uid"].to_pylist(), 0, "signature"), kind="stable")
    return table.take(pa.array(order[:limit]))


def read_pair_vectors(out: Path, uids: Sequence[str]) -> tuple[Array, Array]:
    """Return a run's image and text vectors of samples: (N, D) and (N, E) float32."""
    (folder,) = (out / "stages").glob("embed.vectors-*")
    names = ["image_emb", "text_emb"]
    table = pq.read_table(folder / "shards", columns=["uid", *names])
    place = {uid: row for row, uid in enumerate(table["uid"].to_pylist())}
    table = table.take(pa.array([place[uid] for uid in uids])).combine_chunks()
    image, text = (storage.read_vectors(table[name])[0].astype(np.float32) for name in names)
    return image, text


def join_groups(
    columns: Sequence[Sequence[str]], edges: tuple[Array, Array] | None = None
) -> list[str]:
    """Name the groups of rows that share a column's value or an edge, directly or by others."""
    count = len(columns[0])
    arrays = [np.array(column, dtype=str) for column in columns]
    every = [equal_value_edges(array, np.ones(count, bool)) for array in arrays]
    every += [] if edges is None else [edges]
    first, other = (np.concatenate(ends) for ends in zip(*every, strict=True))
    graph = coo_matrix((np.ones(len(first)), (first, other)), shape=(count, count))
    return [str(label) for label in connected_components(graph, directed=False)[1]]


def embed(model: CLIP, samples: Samples, views: int, dtype: str) -> list[Array]:
    """Return unit vectors of every modality: pictures (views, N, D), captions (N, D) float32."""
    images = [
        np.stack([embed_images(model, pixels, view, dtype) for view in range(views)])
        for pixels in samples.pixels
    ]
    return images + [embed_texts(model, tokens, dtype) for tokens in samples.tokens]


def judge(samples: Samples, recipe: ClipRecipe, views: int, seed: int) -> dict[str, Any]:
    """Train f, g and f again, and report the measure by set."""
    groups = samples.groups
    sets = draw_sets(groups, len(groups) // 2, len(groups) // 8, seed)
    # Half of the external samples are the unrelated ones that agreement is measured against.
    external = np.flatnonzero(sets == "external")
    held_out = external[hash_unit([groups[row] for row in external], seed, "held out") < 0.5]
    judged = np.setdiff1d(np.arange(len(groups)), held_out)
    device, losses = pick_device(), []

    def fit(inside: Array, number: int) -> list[Array]:
        """Embeddings of all samples under a model that trained on those inside."""
        trained = train_clip(
            ClipShape(samples.words, image_px=IMAGE_PX),
            samples.pixels[:, inside],
            samples.tokens[:, inside],
            samples.codes[inside],
            recipe,
            seed * 1000 + number,
            device,
        )
        losses.append(round(trained.losses[-1], 4))
        click.echo(f"model {number}: loss {losses[-1]} of chance", err=True)
        return embed(trained.model, samples, views, recipe.dtype)

    in_mask, out_mask = training_masks(sets)
    f, g, again = fit(in_mask, 0), fit(out_mask, 1), fit(in_mask, 2)

    def score(one: list[Array], other: list[Array], form: Any = "raw") -> Array:
        first, second = ([part[..., judged, :] for part in parts] for parts in (one, other))
        rest, others = ([part[..., held_out, :] for part in parts] for parts in (one, other))
        return multimem(first, second, rest, others, form)

    where, scores, noise = sets[judged], score(f, g), score(f, again)
    summary = summarize(scores, where, np.array(groups)[judged].tolist())
    numbers = range(len(samples.modalities))
    return {
        "modalities": list(samples.modalities),
        "samples": len(groups),
        "groups": len(set(groups)),
        "last_losses": losses,
        "correct": summary.correct,
        "sets": {
            name: {key: _plain(value) for key, value in vars(one).items()}
            for name, one in summary.sets.items()
        },
        "forms": {
            form: _means(score(f, g, form), where) for form in ("raw", "pair_mean", "per_modality")
        },
        "pairs": {
            " x ".join(samples.modalities[m] for m in pair): _means(
                score([f[m] for m in pair], [g[m] for m in pair]), where
            )
            for pair in combinations(numbers, 2)
        },
        "noise_floor": {"all": _spread(noise), "candidate": _spread(noise[where == "candidate"])},
        "candidate_standard_deviation": _plain(scores[where == "candidate"].std()),
    }


def _means(scores: Array, sets: Array) -> dict[str, float]:
    return {name: _plain(scores[sets == name].mean()) for name in SETS}


def _spread(scores: Array) -> dict[str, float]:
    return {"mean": _plain(scores.mean()), "standard_deviation": _plain(scores.std())}


def _plain(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float | np.floating) else value


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
    captions = table["caption"].to_pylist()
    groups = join_groups([table["cluster_id"].to_pylist(), captions])
    pixels = np.stack([read_square(data, IMAGE_PX) for data in table["thumbnail"].to_pylist()])
    samples = make_samples(("image", "caption"), pixels[None], [captions], groups)
    recipe = ClipRecipe(epochs=epochs, dtype=pick_dtype(pick_device()))
    report = judge(samples, recipe, views, seed)
    click.echo(json.dumps({**report, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
