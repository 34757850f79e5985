"""The steps of `score` that train small CLIPs end to end and measure memorization by them."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.formats.pixels import read_square
from curate.memorization.company import Company, adjust_values, fit_slopes, regression_sums
from curate.memorization.folds import draw_halves, hash_unit
from curate.memorization.retrieval import RETRIEVED, hits_at
from curate.memorization.verdict import coherence, mean_of_others, measure_memorization, tell_kinds
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.score_inputs import (
    centre,
    read_plan,
    read_reference,
    read_samples,
    score_stage,
)
from curate.stages.score_proxies import trained_clusters

if TYPE_CHECKING:
    from curate.models.clip_proxy import ClipShape
    from curate.models.train_clip import ClipTraining

__all__ = [
    "CLIP_SHAPE",
    "MEMORIZATION",
    "collect_pairs",
    "fold_vocabulary",
    "place_pairs",
    "summarize_clips",
    "train_clip_proxies",
    "train_clip_proxy",
    "view_shard",
    "weigh_company",
    "write_memorization",
]

Array = np.ndarray[Any, Any]

#: The table whose folder holds all of this.
MEMORIZATION = "score.memorization"
_COLUMNS = ("memorization_score", "memorization_score_stderr", "memorization_kind")

#: What a proxy is. One of 64 px and four times the text tower takes four times as long and ranks
#: samples alike; four of these tell a score from its noise better than one of those.
CLIP_SHAPE = {"image_px": 32, "text_width": 64, "text_layers": 1}
#: Directions of either modality by which a sample's neighbours are found; twice as many find none
#: that matter more.
_COMPANY_WIDTH = 64

#: Left-out samples that give a proxy's mean held-out embedding and its retrieval figure.
_HELD_OUT = 1000


def _path(room: Room, *names: str) -> str:
    return room.path(*names, table=MEMORIZATION)


def _read_pairs(room: Room, shard: str, rows: Array) -> tuple[Array, Array, Array]:
    """Pixels (M, 3, S, S) uint8 and tokens (M, L) int32 of those rows that have both."""
    from curate.models.clip_proxy import tokenize

    table = room.read(shard, ["thumbnail", "caption"])
    present = table["thumbnail"].is_valid().to_numpy()
    rows = rows[present[rows]]
    chosen = table.take(pa.array(rows))
    side_px = CLIP_SHAPE["image_px"]
    pixels = np.zeros((len(rows), 3, side_px, side_px), np.uint8)
    for place, thumbnail in enumerate(chosen["thumbnail"].to_pylist()):
        pixels[place] = read_square(thumbnail, side_px)
    return pixels, tokenize(chosen["caption"].to_pylist()), rows


def collect_pairs(room: Room, task: str) -> dict[str, float]:
    """Commit pixels, tokens, vectors and keys of the samples that proxies may train on."""
    samples = read_samples(room, task)
    clusters = trained_clusters(samples.clusters, read_plan(room), score_stage(room).seed)
    trained = np.flatnonzero(samples.usable & clusters)
    pixels, tokens, rows = _read_pairs(room, task, trained)
    chosen = samples.take(rows)
    vectors = place_pairs(chosen.image, chosen.text, read_reference(room).fronts)
    storage.commit_array(_path(room, "pairs", f"{task}.pixels.npy"), pixels)
    storage.commit_array(_path(room, "pairs", f"{task}.tokens.npy"), tokens)
    storage.commit_array(_path(room, "pairs", f"{task}.vectors.npy"), vectors)
    keys = {
        "uid": pa.array(chosen.uids, pa.string()),
        "cluster": pa.array(chosen.clusters, pa.string()),
        "cluster_code": pa.array(chosen.cluster_codes),
        "caption_code": pa.array(chosen.caption_codes),
    }
    storage.commit_table(_path(room, "pairs", f"{task}.parquet"), pa.table(keys))
    return {"samples": len(rows)}


def place_pairs(image: Array, text: Array, fronts: Sequence[tuple[Array, Array]]) -> Array:
    """Put image and caption side by side, in the directions that tell neighbours.

    Parameters
    ----------
    image, text : (N, D), (N, E) floating
    fronts : pair of (mean, directions)
        See `fit_front`, of at least as many directions.

    Returns
    -------
    (N, 2 F) float32, unit norm
    """
    sides = [
        centre(part, (mean, directions[:, :_COMPANY_WIDTH]))
        for part, (mean, directions) in zip((image, text), fronts, strict=True)
    ]
    return np.concatenate(sides, axis=1) / np.float32(np.sqrt(2))


def fold_vocabulary(room: Room, task: str) -> dict[str, float]:
    """Commit `words.npy`: the tokens that the set uses most."""
    from curate.models.clip_proxy import choose_words

    counts: Counter[int] = Counter()
    for shard in room.shards():
        tokens = storage.read_array(_path(room, "pairs", f"{shard}.tokens.npy"))
        ids, times = np.unique(tokens, return_counts=True)
        counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
    storage.commit_array(_path(room, "words.npy"), choose_words(counts))
    return {}


def _shape(words: Array) -> "ClipShape":
    from curate.models.clip_proxy import ClipShape

    return ClipShape(len(words), **CLIP_SHAPE)


def train_clip_proxy(room: Room, task: str) -> dict[str, float]:
    """Commit one proxy: weights, some of what it left out, and how its training went."""
    return train_clip_proxies(room, [task])[0]


def train_clip_proxies(room: Room, tasks: Sequence[str]) -> list[dict[str, float]]:
    """Train several proxies at once and commit each."""
    from curate.models.clip_proxy import fold_tokens
    from curate.models.precision import pick_device, pick_dtype
    from curate.models.train_clip import ClipRecipe, train_clips

    stage, device = score_stage(room), pick_device()
    words = np.array(storage.read_array(_path(room, "words.npy")))
    pixels, tokens, groups, masks = _gather_pairs(room)
    tokens = fold_tokens(tokens, words)
    recipe = ClipRecipe(epochs=stage.clip_epochs, dtype=pick_dtype(device))
    chosen = [(masks[:, int(task)], _seed(room, task)) for task in tasks]
    trained = train_clips(_shape(words), pixels, tokens, groups, recipe, chosen, device)
    return [
        _commit_proxy(room, task, one, (pixels, tokens, groups), inside, recipe.dtype)
        for task, one, (inside, _) in zip(tasks, trained, chosen, strict=True)
    ]


def _seed(room: Room, task: str) -> int:
    return score_stage(room).seed * 1000 + int(task)


def _commit_proxy(
    room: Room,
    task: str,
    trained: "ClipTraining",
    pairs: tuple[Array, Array, Array],
    inside: Array,
    dtype: str,
) -> dict[str, float]:
    from curate.models.clip_proxy import embed_views
    from curate.models.encoders import torch_threads
    from curate.models.precision import pick_device
    from curate.models.train import has_rivals
    from curate.models.weights import dump_weights

    pixels, tokens, groups = pairs
    held = np.flatnonzero(~inside)[:_HELD_OUT]
    shown = np.flatnonzero(inside)[:_HELD_OUT]
    with torch_threads(1):
        image, text, out = embed_views(trained.model, pixels[held], tokens[held], 1, dtype)
        _, _, within = embed_views(trained.model, pixels[shown], tokens[shown], 1, dtype)
    storage.commit_array(_path(room, "clips", f"held-out-{task}.npy"), image + text)
    storage.commit_array(_path(room, "clips", f"held-out-{task}.clusters.npy"), groups[held, 0])
    storage.commit_bytes(_path(room, "clips", f"{task}.safetensors"), dump_weights(trained.model))
    count = int(inside.sum())
    record = {
        "seed": _seed(room, task),
        "device": pick_device(),
        "dtype": dtype,
        "samples": count,
        "rivals": has_rivals(groups[inside]),
        "retries": trained.retries,
        "diverged": trained.diverged,
        "losses": [round(loss, 6) for loss in trained.losses],
        "alignment_in": round(float(within.mean()), 4) if len(within) else None,
        "alignment_out": round(float(out.mean()), 4) if len(out) else None,
        "held_out": len(held),
        f"recall_at_{RETRIEVED}": _recall(image, text, groups[held, 1]),
    }
    storage.commit_json(_path(room, "clips", f"{task}.json"), record)
    return {
        "samples": count * score_stage(room).clip_epochs,
        "no_rivals": int(not record["rivals"]),
        "retries": trained.retries,
        "diverged": int(trained.diverged),
    }


def _recall(image: Array, text: Array, captions: Array) -> float | None:
    """Share of captions that find an image of theirs among the first ten."""
    if len(image) <= RETRIEVED:
        return None
    return round(float(hits_at(text, image, captions).mean()), 4)


def _gather_pairs(room: Room) -> tuple[Array, Array, Array, Array]:
    """All committed pairs in an order drawn by hash, and which of them each proxy trains on."""
    stage = score_stage(room)
    parts: list[tuple[Array, ...]] = []
    uids: list[str] = []
    for shard in room.shards():
        keys = storage.read_table(_path(room, "pairs", f"{shard}.parquet"))
        codes = [keys[name].to_numpy() for name in ("cluster_code", "caption_code")]
        masks = draw_halves(keys["cluster"].to_pylist(), stage.clip_proxies, stage.seed)
        arrays = [
            storage.read_array(_path(room, "pairs", f"{shard}.{name}.npy"))
            for name in ("pixels", "tokens")
        ]
        parts.append((*arrays, np.stack(codes, axis=1), masks))
        uids += keys["uid"].to_pylist()
    order = np.argsort(hash_unit(uids, stage.seed, "order"), kind="stable")
    pixels, tokens, groups, masks = (
        np.concatenate([part[place] for part in parts])[order] for place in range(4)
    )
    return pixels, tokens, groups, masks


def view_shard(room: Room, task: str) -> dict[str, float]:
    """Commit the coherence of a shard's pairs under every proxy, and who else it trained on.

    (M, P) and (M, P, K) float32, and the shard's part of what the slopes are fitted to.
    """
    from curate.models.clip_proxy import embed_views, fold_tokens, load_clip
    from curate.models.encoders import torch_threads
    from curate.models.precision import pick_device

    stage, device = score_stage(room), pick_device()
    keys = storage.read_table(_path(room, "pairs", f"{task}.parquet"))
    pixels, tokens, vectors = (
        np.array(storage.read_array(_path(room, "pairs", f"{task}.{name}.npy")))
        for name in ("pixels", "tokens", "vectors")
    )
    words = np.array(storage.read_array(_path(room, "words.npy")))
    tokens = fold_tokens(tokens, words)
    clusters = keys["cluster_code"].to_numpy()
    # A proxy without a pair to train on has first weights: what it says is unknown.
    values = np.full((len(keys), stage.clip_proxies), np.nan, np.float32)
    with torch_threads(1):
        for proxy in range(stage.clip_proxies):
            record = storage.read_json(_path(room, "clips", f"{proxy}.json"))
            if record["samples"] < 2:
                continue
            weights = storage.read_bytes(_path(room, "clips", f"{proxy}.safetensors"))
            others = mean_of_others(
                storage.read_array(_path(room, "clips", f"held-out-{proxy}.npy")),
                storage.read_array(_path(room, "clips", f"held-out-{proxy}.clusters.npy")),
                clusters,
            )
            model = load_clip(weights, _shape(words), device)
            image, text, alignment = embed_views(
                model, pixels, tokens, stage.clip_views, record["dtype"]
            )
            values[:, proxy] = coherence(alignment, image, text, others)
    names = tuple(room.shards())
    company = _read_company(_path(room, "pairs"), names, stage.clip_proxies, stage.seed)
    shares = company.shares(vectors, clusters)
    inside = draw_halves(keys["cluster"].to_pylist(), stage.clip_proxies, stage.seed)
    sums = regression_sums(values, inside, shares)
    for name, array in (("values", values), ("shares", shares), ("sums", sums)):
        storage.commit_array(_path(room, "views", f"{task}.{name}.npy"), array)
    return {"samples": len(keys)}


@lru_cache(maxsize=1)
def _read_company(folder: str, shards: tuple[str, ...], proxies: int, seed: int) -> Company:
    """All committed pairs; kept between the tasks of one worker."""
    paths = [storage.join(folder, shard) for shard in shards]
    keys = pa.concat_tables([storage.read_table(f"{path}.parquet") for path in paths])
    vectors = np.concatenate([storage.read_array(f"{path}.vectors.npy") for path in paths])
    inside = draw_halves(keys["cluster"].to_pylist(), proxies, seed)
    return Company(vectors, keys["cluster_code"].to_numpy(), inside)


def weigh_company(room: Room, task: str) -> dict[str, float]:
    """Commit `slopes.npy`: how coherence rises with the share of neighbours trained on."""
    parts = [
        storage.read_array(_path(room, "views", f"{shard}.sums.npy")) for shard in room.shards()
    ]
    storage.commit_array(_path(room, "slopes.npy"), fit_slopes(np.sum(parts, axis=0)))
    return {}


def write_memorization(room: Room, task: str) -> dict[str, float]:
    """Commit a shard of the table; nulls where there are no proxies trained end to end."""
    schema = select_schema(_COLUMNS)
    uids = room.read(task, [])["uid"]
    columns: list[Any] = [pa.nulls(len(uids), field.type) for field in schema]
    if score_stage(room).proxy == "clip" and read_plan(room).scored:
        columns = _measure(room, task)
    room.commit_shard(MEMORIZATION, task, pa.table([uids, *columns], names=["uid", *_COLUMNS]))
    return {"samples": len(uids)}


def _measure(room: Room, task: str) -> list[Any]:
    stage = score_stage(room)
    keys = storage.read_table(_path(room, "pairs", f"{task}.parquet"))
    values, shares = (
        storage.read_array(_path(room, "views", f"{task}.{name}.npy"))
        for name in ("values", "shares")
    )
    inside = draw_halves(keys["cluster"].to_pylist(), stage.clip_proxies, stage.seed)
    slopes = storage.read_array(_path(room, "slopes.npy"))
    values = adjust_values(values, inside, shares, slopes)
    table = storage.read_table(room.shard_path("score", task), ["uid", "mismatch_probability"])
    mismatch = table["mismatch_probability"].to_numpy(zero_copy_only=False)
    places = {uid: row for row, uid in enumerate(table["uid"].to_pylist())}
    rows = [places[uid] for uid in keys["uid"].to_pylist()]
    found = np.full((3, len(table)), np.nan)
    found[:2, rows] = measure_memorization(values, inside)
    found[2, rows] = np.where(inside, values, 0).sum(1) / inside.sum(1)
    kinds = tell_kinds(found[0], found[1], found[2], mismatch)
    scores = [pa.array(part.astype(np.float32), from_pandas=True) for part in found[:2]]
    return [*scores, pa.array(kinds, pa.string())]


def summarize_clips(room: Room) -> list[dict[str, Any]]:
    """Return every proxy's training curve, in/out gap and retrieval figure, for `run.json`."""
    return [
        storage.read_json(_path(room, "clips", f"{proxy}.json"))
        for proxy in range(score_stage(room).clip_proxies)
    ]
