"""The steps of `score` that train small CLIPs end to end and measure memorization by them."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.formats.pixels import read_square
from curate.memorization.folds import draw_masks, hash_unit
from curate.memorization.retrieval import RETRIEVED, hits_at
from curate.memorization.verdict import coherence, measure_memorization, tell_kinds
from curate.schema import select_schema
from curate.stages.base import Room
from curate.stages.score_inputs import read_plan, read_samples, score_stage
from curate.stages.score_proxies import trained_clusters

if TYPE_CHECKING:
    from curate.models.clip_proxy import ClipShape

__all__ = [
    "MEMORIZATION",
    "collect_pairs",
    "fold_vocabulary",
    "summarize_clips",
    "train_clip_proxy",
    "view_shard",
    "write_memorization",
]

Array = np.ndarray[Any, Any]

#: The table whose folder holds all of this.
MEMORIZATION = "score.memorization"
_COLUMNS = ("memorization_score", "memorization_score_stderr", "memorization_kind")

#: Side of what a proxy sees. Thumbnails have 128 px on their longer side.
_IMAGE_PX = 64
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
    pixels = np.zeros((len(rows), 3, _IMAGE_PX, _IMAGE_PX), np.uint8)
    for place, thumbnail in enumerate(chosen["thumbnail"].to_pylist()):
        pixels[place] = read_square(thumbnail, _IMAGE_PX)
    return pixels, tokenize(chosen["caption"].to_pylist()), rows


def collect_pairs(room: Room, task: str) -> dict[str, float]:
    """Commit pixels, tokens and keys of the samples of a shard that proxies may train on."""
    stage = score_stage(room)
    samples = read_samples(room, task)
    trained = samples.usable & trained_clusters(samples.clusters, read_plan(room), stage.seed)
    pixels, tokens, rows = _read_pairs(room, task, np.flatnonzero(trained))
    chosen = samples.take(rows)
    storage.commit_array(_path(room, "pairs", f"{task}.pixels.npy"), pixels)
    storage.commit_array(_path(room, "pairs", f"{task}.tokens.npy"), tokens)
    keys = {
        "uid": pa.array(chosen.uids, pa.string()),
        "cluster": pa.array(chosen.clusters, pa.string()),
        "cluster_code": pa.array(chosen.cluster_codes),
        "caption_code": pa.array(chosen.caption_codes),
    }
    storage.commit_table(_path(room, "pairs", f"{task}.parquet"), pa.table(keys))
    return {"samples": len(rows)}


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

    return ClipShape(len(words), image_px=_IMAGE_PX)


def train_clip_proxy(room: Room, task: str) -> dict[str, float]:
    """Commit one proxy: weights, the mean of what it left out, and how its training went."""
    from curate.models.clip_proxy import embed_views, fold_tokens
    from curate.models.encoders import torch_threads
    from curate.models.precision import pick_device, pick_dtype
    from curate.models.train import has_rivals
    from curate.models.train_clip import ClipRecipe, train_clip
    from curate.models.weights import dump_weights

    stage, proxy, device = score_stage(room), int(task), pick_device()
    words = np.array(storage.read_array(_path(room, "words.npy")))
    pixels, tokens, groups, inside = _gather_pairs(room, proxy)
    tokens = fold_tokens(tokens, words)
    dtype = pick_dtype(device)
    seed = stage.seed * 1000 + proxy
    recipe = ClipRecipe(epochs=stage.clip_epochs, dtype=dtype)
    trained = train_clip(
        _shape(words), pixels[inside], tokens[inside], groups[inside], recipe, seed, device
    )
    held = np.flatnonzero(~inside)[:_HELD_OUT]
    shown = np.flatnonzero(inside)[:_HELD_OUT]
    with torch_threads(1):
        image, text, out = embed_views(trained.model, pixels[held], tokens[held], 1, dtype)
        *seen, within = embed_views(trained.model, pixels[shown], tokens[shown], 1, dtype)
    # A proxy that leaves nothing out, all being one cluster, has its own samples to compare with:
    # against none, whatever it trained on would pass for memorized.
    others = image + text if len(held) else seen[0] + seen[1]
    mean = others.mean(0) if len(others) else np.zeros(image.shape[1], np.float32)
    storage.commit_array(_path(room, "clips", f"held-out-{task}.npy"), mean)
    storage.commit_bytes(_path(room, "clips", f"{task}.safetensors"), dump_weights(trained.model))
    count = int(inside.sum())
    record = {
        "seed": seed,
        "device": device,
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
        "samples": count * stage.clip_epochs,
        "no_rivals": int(not record["rivals"]),
        "retries": trained.retries,
        "diverged": int(trained.diverged),
    }


def _recall(image: Array, text: Array, captions: Array) -> float | None:
    """Share of captions that find an image of theirs among the first ten."""
    if len(image) <= RETRIEVED:
        return None
    return round(float(hits_at(text, image, captions).mean()), 4)


def _gather_pairs(room: Room, proxy: int) -> tuple[Array, Array, Array, Array]:
    """All committed pairs in an order drawn by hash, and which of them the proxy trains on."""
    stage = score_stage(room)
    parts: list[tuple[Array, ...]] = []
    uids: list[str] = []
    for shard in room.shards():
        keys = storage.read_table(_path(room, "pairs", f"{shard}.parquet"))
        codes = [keys[name].to_numpy() for name in ("cluster_code", "caption_code")]
        clusters = keys["cluster"].to_pylist()
        masks = draw_masks(clusters, stage.proxies, stage.seed)[:, proxy]
        arrays = [
            storage.read_array(_path(room, "pairs", f"{shard}.{name}.npy"))
            for name in ("pixels", "tokens")
        ]
        parts.append((*arrays, np.stack(codes, axis=1), masks))
        uids += keys["uid"].to_pylist()
    order = np.argsort(hash_unit(uids, stage.seed, "order"), kind="stable")
    pixels, tokens, groups, inside = (
        np.concatenate([part[place] for part in parts])[order] for place in range(4)
    )
    return pixels, tokens, groups, inside


def view_shard(room: Room, task: str) -> dict[str, float]:
    """Commit a shard's embeddings under every proxy, and the alignment over views."""
    from curate.models.clip_proxy import embed_views, fold_tokens, load_clip
    from curate.models.encoders import torch_threads
    from curate.models.precision import pick_device

    stage, device = score_stage(room), pick_device()
    samples = read_samples(room, task)
    pixels, tokens, rows = _read_pairs(room, task, np.flatnonzero(samples.usable))
    words = np.array(storage.read_array(_path(room, "words.npy")))
    tokens = fold_tokens(tokens, words)
    whole = np.zeros(len(samples.uids), bool)
    whole[rows] = True
    columns: dict[str, Any] = {"uid": pa.array(samples.uids, pa.string())}
    with torch_threads(1):
        for proxy in range(stage.proxies):
            record = storage.read_json(_path(room, "clips", f"{proxy}.json"))
            weights = storage.read_bytes(_path(room, "clips", f"{proxy}.safetensors"))
            model = load_clip(weights, _shape(words), device)
            found = embed_views(model, pixels, tokens, stage.clip_views, record["dtype"])
            for name, vectors in zip(("image", "text"), found, strict=False):
                spread = np.zeros((len(whole), vectors.shape[1]), np.float16)
                spread[rows] = vectors
                columns[f"{name}_{proxy}"] = storage.vector_column(spread, whole)
            alignment = np.full(len(whole), np.nan, np.float32)
            alignment[rows] = found[2]
            columns[f"alignment_{proxy}"] = pa.array(alignment, from_pandas=True)
    storage.commit_table(_path(room, "views", f"{task}.parquet"), pa.table(columns))
    return {"samples": len(rows)}


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
    clusters = [name or "" for name in room.read(task, ["cluster_id"])["cluster_id"].to_pylist()]
    views = storage.read_table(_path(room, "views", f"{task}.parquet"))
    values = np.empty((len(clusters), stage.proxies))
    for proxy in range(stage.proxies):
        image, text = (storage.read_vectors(views[f"{s}_{proxy}"])[0] for s in ("image", "text"))
        held_out = storage.read_array(_path(room, "clips", f"held-out-{proxy}.npy"))
        alignment = views[f"alignment_{proxy}"].to_numpy(zero_copy_only=False)
        values[:, proxy] = coherence(alignment, image, text, held_out)
    inside = draw_masks(clusters, stage.proxies, stage.seed)
    values[~trained_clusters(clusters, read_plan(room), stage.seed)] = np.nan
    score, error = measure_memorization(values, inside)
    table = storage.read_table(room.shard_path("score", task), ["mismatch_probability"])
    mismatch = table["mismatch_probability"].to_numpy(zero_copy_only=False)
    within = np.where(inside, values, 0).sum(1) / inside.sum(1)
    kinds = tell_kinds(score, error, within, mismatch)
    return [
        pa.array(score.astype(np.float32), from_pandas=True),
        pa.array(error.astype(np.float32), from_pandas=True),
        pa.array(kinds, pa.string()),
    ]


def summarize_clips(room: Room) -> list[dict[str, Any]]:
    """Return every proxy's training curve, in/out gap and retrieval figure, for `run.json`."""
    return [
        storage.read_json(_path(room, "clips", f"{proxy}.json"))
        for proxy in range(score_stage(room).proxies)
    ]
