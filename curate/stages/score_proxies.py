"""The steps of `score` that make models: the reference bank, the proxies, what they see."""

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.memorization.folds import draw_masks, hash_unit
from curate.memorization.rarity import isolation
from curate.stages.base import Room
from curate.stages.embed import Embed, open_encoder
from curate.stages.score_inputs import (
    Plan,
    Reference,
    Samples,
    commit_plan,
    concept_paths,
    heads_shape,
    read_heads,
    read_plan,
    read_reference,
    read_samples,
    score_stage,
    unit,
)

if TYPE_CHECKING:
    from curate.stages.score import Score

__all__ = ["fill_bank", "project_shard", "train_proxy", "trained_clusters"]

Array = np.ndarray[Any, Any]

#: Bins of the histogram of cluster hashes, from which the share that is trained on is read.
_BINS = 1 << 16

#: Of the samples that are trained on: a bin that holds more, and twice what bins do, is one
#: cluster's, and left out.
_LARGEST = 0.1

#: Directions of each modality that heads and neighbours see. On openclipart 256 hold 93 % of the
#: image vectors' variance, and distances take a fifth of the time.
_FRONT_WIDTH = 256

#: Reference samples whose isolation scales rarity: ranks to 1 in 2 000.
_ISOLATION_SAMPLES = 2000

#: Phantoms are drawn until the detector has about this many, at most 8 per sample.
_PHANTOMS = 6000
_MAX_PHANTOMS_EACH = 8

#: Unit vectors with less variance than this differ by the rounding of float16 at most.
_LEAST_VARIANCE = 1e-7


def fill_bank(room: Room, task: str) -> dict[str, float]:
    """Commit the reference samples and `bank.json`."""
    from curate.models.train import fit_front

    stage = score_stage(room)
    best: Samples | None = None
    histogram = np.zeros(_BINS, np.int64)
    total = 0
    for shard in room.shards():
        samples = read_samples(room, shard)
        total += len(samples.uids)
        samples = samples.take(np.flatnonzero(samples.usable))
        places = hash_unit(samples.clusters, stage.seed, "train") * _BINS
        histogram += np.bincount(places.astype(np.int64), minlength=_BINS)
        best = _keep_lowest(best, samples, stage)
    usable = int(histogram.sum())
    if best is None or usable < stage.min_samples:
        commit_plan(room, Plan(total, usable, False, 0.0, [], 0.0, 0, "", {}))
        return {"too_few_samples": 1}
    fronts = (fit_front(best.image, _FRONT_WIDTH), fit_front(best.text, _FRONT_WIDTH))
    keys = best.keys(stage.proxies, stage.seed)
    image, text = unit(best.image), unit(best.text)
    few = slice(0, _ISOLATION_SAMPLES)
    bank = (image, text, keys.clusters)
    isolations = isolation(image[few], text[few], keys.clusters[few], bank)
    Reference.commit(room, best, keys, fronts, isolations)
    # A proxy trains on about half of the clusters, so twice its cap may take part.
    below, without = _share_training(histogram, 2 * stage.max_train_samples)
    fitting = min(usable, stage.detector_samples)
    phantoms = int(np.clip(_PHANTOMS // fitting, 1, _MAX_PHANTOMS_EACH))
    if min(image.var(0).sum(), text.var(0).sum()) < _LEAST_VARIANCE:
        phantoms = 0  # all that tells phantoms from real pairs then is how they were made
    widths = {
        "image_width": image.shape[1],
        "text_width": text.shape[1],
        "image_front": fronts[0][1].shape[1],
        "text_front": fronts[1][1].shape[1],
    }
    shared = _find_shared_space(room)
    plan = Plan(total, usable, True, below, without, fitting / usable, phantoms, shared, widths)
    commit_plan(room, plan)
    return {"samples": total}


def _share_training(histogram: Array, most: int) -> tuple[float, list[int]]:
    """Return `Plan.train_below` and `train_without` for so many samples of so many in each bin."""
    if histogram.sum() <= most:
        return 1.0, []
    # A placeholder's copies would leave no room for others, or none at all if they did not fit.
    large = histogram > max(_LARGEST * most, 2 * np.median(histogram))
    allowed = int(np.searchsorted(np.cumsum(np.where(large, 0, histogram)), most, "right"))
    return allowed / _BINS, np.flatnonzero(large[:allowed]).tolist()


def _keep_lowest(best: Samples | None, more: Samples, stage: "Score") -> Samples:
    """Merge into what is kept the samples with the lowest hashes, in order of hash."""
    if best is not None:
        more = Samples(
            best.uids + more.uids,
            best.clusters + more.clusters,
            *(
                np.concatenate([getattr(best, name), getattr(more, name)])
                for name in ("image", "text", "usable", "cluster_codes", "caption_codes")
            ),
        )
    order = np.argsort(hash_unit(more.uids, stage.seed, "bank"), kind="stable")
    return more.take(order[: stage.bank_size])


def _find_shared_space(room: Room) -> str:
    """Return `Plan.shared`; commit the concepts of an encoder of two spaces."""
    if _has_shared_space(room):
        return "vectors"
    if any(isinstance(stage, Embed) for stage in room.pipeline) and not room.has_source_vectors():
        _commit_concepts(room)
    return "concepts" if all(map(storage.exists, concept_paths(room))) else ""


def _commit_concepts(room: Room) -> None:
    from curate.models.encoders import torch_threads

    with torch_threads(1):
        encoder = open_encoder(room)
        if encoder.classifier is None:
            return
        found = (encoder.classifier, encoder.embed_classes())
    for path, array in zip(concept_paths(room), found, strict=True):
        storage.commit_array(path, array)


def _has_shared_space(room: Room) -> bool:
    if not room.has("clip_score"):
        return False
    for shard in room.shards():
        table = room.read(shard, ["clip_score"])
        if table["clip_score"].null_count < table.num_rows:
            return True
    return False


def train_proxy(room: Room, task: str) -> dict[str, float]:
    """Commit one proxy: weights, what it saw of the bank, loss per epoch, and its mask's print."""
    from curate.models.proxy import embed_pairs
    from curate.models.train import Recipe, has_rivals, train_heads
    from curate.models.weights import dump_weights

    stage, plan, proxy = score_stage(room), read_plan(room), int(task)
    reference = read_reference(room)
    samples = _training_samples(room, plan, proxy)
    groups = np.stack([samples.cluster_codes, samples.caption_codes], axis=1)
    trained = train_heads(
        heads_shape(plan),
        reference.fronts,
        (samples.image, samples.text),
        groups,
        Recipe(epochs=stage.epochs),
        stage.seed * 1000 + proxy,
    )
    embedded = embed_pairs(trained.heads, reference.image, reference.text)
    storage.commit_array(room.path("proxies", f"bank-{task}.npy"), np.stack(embedded))
    storage.commit_bytes(room.path("proxies", f"{task}.safetensors"), dump_weights(trained.heads))
    mask = blake2b("".join(sorted(samples.uids)).encode(), digest_size=8).hexdigest()
    record = {
        "seed": stage.seed * 1000 + proxy,
        "samples": len(samples.uids),
        "mask": mask,
        "scale": float(trained.heads.scale()),
        "rivals": has_rivals(groups),
        "retries": trained.retries,
        "diverged": trained.diverged,
        "losses": [round(loss, 6) for loss in trained.losses],
    }
    storage.commit_json(room.path("proxies", f"{task}.json"), record)
    return {
        "samples": len(samples.uids) * stage.epochs,
        "no_rivals": int(not record["rivals"]),
        "retries": trained.retries,
        "diverged": int(trained.diverged),
    }


def trained_clusters(clusters: list[str], plan: Plan, seed: int) -> Array:
    """Tell which clusters any proxy trains on: (N,) bool."""
    places = hash_unit(clusters, seed, "train")
    left_out = np.isin((places * _BINS).astype(np.int64), plan.train_without)
    chosen: Array = (places < plan.train_below) & ~left_out
    return chosen


def _training_samples(room: Room, plan: Plan, proxy: int) -> Samples:
    """Return what one proxy trains on, in an order drawn by hash."""
    stage = score_stage(room)
    parts = []
    for shard in room.shards():
        samples = read_samples(room, shard)
        inside = draw_masks(samples.clusters, stage.proxies, stage.seed)[:, proxy]
        inside &= samples.usable & trained_clusters(samples.clusters, plan, stage.seed)
        parts.append(samples.take(np.flatnonzero(inside)))
    whole = Samples(
        [uid for part in parts for uid in part.uids],
        [name for part in parts for name in part.clusters],
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("image", "text", "usable", "cluster_codes", "caption_codes")
        ),
    )
    return whole.take(np.argsort(hash_unit(whole.uids, stage.seed, "order"), kind="stable"))


def project_shard(room: Room, task: str) -> dict[str, float]:
    """Commit a shard's two embeddings under every proxy."""
    from curate.models.encoders import torch_threads
    from curate.models.proxy import embed_pairs

    samples = read_samples(room, task)
    columns: dict[str, Any] = {"uid": pa.array(samples.uids, pa.string())}
    image, text = (
        np.where(samples.usable[:, None], unit(np.nan_to_num(part)), 0)
        for part in (samples.image, samples.text)
    )
    with torch_threads(1):
        for proxy in range(score_stage(room).proxies):
            both = embed_pairs(read_heads(room, proxy), image, text)
            for name, embedded in zip(("image", "text"), both, strict=True):
                column = storage.vector_column(embedded, samples.usable)
                columns[f"{name}_{proxy}"] = column
    storage.commit_table(room.path("projections", f"{task}.parquet"), pa.table(columns))
    return {"samples": len(samples.uids)}
