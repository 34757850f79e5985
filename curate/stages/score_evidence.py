"""The step of `score` that describes every pair, and the phantoms made of some of them."""

from typing import Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.memorization.blocks import by_blocks, exact_products
from curate.memorization.evidence import EVIDENCE, FEATURES, Pairs, gather_evidence
from curate.memorization.folds import average, block_masks, hash_unit, split_sides
from curate.memorization.mismatch import DETECTORS, REAL, RUNGS, Keys, draw_donors
from curate.memorization.rarity import isolation, rank_scale
from curate.stages.base import Room
from curate.stages.score_inputs import (
    Plan,
    Reference,
    Samples,
    centre,
    read_plan,
    read_reference,
    read_samples,
    read_shared_space,
    read_training_sizes,
    score_stage,
    unit,
)
from curate.stages.score_proxies import trained_clusters

__all__ = ["ALIGNMENT", "draw_folds", "gather_shard", "read_features", "spread_rows"]

Array = np.ndarray[Any, Any]

ALIGNMENT = (
    "alignment_in",
    "alignment_in_stderr",
    "alignment_out",
    "alignment_out_stderr",
    "holdout_gap",
    "holdout_gap_stderr",
)

#: Rarity that needs no protection. Without the feature 5.0 and 4.5 % of the rare clean pairs of
#: emoji and openclipart are lost among 20 % swaps, with it 3.8 and 3.7 %, and precision rises. From
#: 0 it is 3.3 and 3.7 %, but of 900 pairs fewer swaps are found.
_PROTECTED = 0.6


def gather_shard(room: Room, task: str) -> dict[str, float]:
    """Commit alignments, isolation and evidence of a shard, and its part of the detector's fit."""
    stage, plan, reference = score_stage(room), read_plan(room), read_reference(room)
    everything = read_samples(room, task)
    rows = np.flatnonzero(everything.usable)
    samples = everything.take(rows)
    projections = storage.read_table(room.path("projections", f"{task}.parquet"))
    embedded = [
        [storage.read_vectors(projections[f"{side}_{p}"])[0][rows] for side in ("image", "text")]
        for p in range(stage.proxies)
    ]
    keys = samples.keys(stage.proxies, stage.seed)
    columns: dict[str, Array] = _align(room, embedded, keys.blocks, samples)
    bank = (reference.image, reference.text, reference.keys.clusters)
    alone = isolation(unit(samples.image), unit(samples.text), keys.clusters, bank)
    columns["rarity"] = rank_scale(alone, reference.isolations)
    gather = _Gatherer(room, plan, reference, samples, keys, embedded)
    found = gather.real()
    columns |= {name: found[:, place] for place, name in enumerate(EVIDENCE)}
    columns["caption_uniqueness"] = reference.uniqueness(keys)
    table = {"uid": pa.array(everything.uids, pa.string())}
    for name, values in columns.items():
        table[name] = spread_rows(values, rows, len(everything.uids))
    storage.commit_table(room.path("evidence", f"{task}.parquet"), pa.table(table))
    fit = gather.fit(found, columns["rarity"])
    storage.commit_table(room.path("fit", f"{task}.parquet"), fit)
    return {"samples": len(everything.uids)}


def spread_rows(values: Array, rows: Array, count: int) -> pa.Array:
    """Put values at their rows, with nulls elsewhere and where they are NaN."""
    whole = np.full(count, np.nan, np.float32)
    whole[rows] = values
    return pa.array(whole, pa.float32(), from_pandas=True)


def _align(
    room: Room, embedded: list[list[Array]], blocks: Array, samples: Samples
) -> dict[str, Array]:
    """Means of cosines over in- and out-proxies, with standard errors."""
    stage, plan = score_stage(room), read_plan(room)
    cosines = np.stack(
        [(i.astype(np.float32) * t.astype(np.float32)).sum(1) for i, t in embedded], axis=1
    )
    cosines = np.clip(cosines, -1, 1)
    # Without a pair to train on, where one cluster is most of the set, a proxy has first weights.
    cosines[:, read_training_sizes(room) < 2] = np.nan
    within, without = split_sides(cosines, block_masks(stage.proxies, stage.seed)[blocks])
    within[~trained_clusters(samples.clusters, plan, stage.seed)] = np.nan
    result: dict[str, Array] = {}
    for name, values in zip(ALIGNMENT[::2], (within, without, within - without), strict=True):
        result[name], result[f"{name}_stderr"] = average(values)
    return result


class _Gatherer:
    """Evidence on a shard's real pairs and on the phantoms made of them."""

    def __init__(
        self,
        room: Room,
        plan: Plan,
        reference: Reference,
        samples: Samples,
        keys: Keys,
        embedded: list[list[Array]],
    ) -> None:
        self._room, self._stage, self._plan = room, score_stage(room), plan
        self._reference, self._samples, self._keys = reference, samples, keys
        self._embedded = embedded
        self._bank = reference.bank
        self._space = read_shared_space(room, plan, reference)
        self._image = centre(samples.image, reference.fronts[0])
        self._own_rows = reference.rows_of(samples.uids)

    def real(self) -> Array:
        """(N, F) float32 of the samples themselves."""
        every = np.arange(len(self._samples.uids))
        text = centre(self._samples.text, self._reference.fronts[1])
        texts = [text_of for _, text_of in self._embedded]
        return self._gather(
            every, text, unit(self._samples.text), texts, self._keys, self._own_rows
        )

    def fit(self, real: Array, rarity: Array) -> pa.Table:
        """Rows for the detector: of the samples that fit it, real pairs and phantoms."""
        stage, samples, reference = self._stage, self._samples, self._reference
        chosen = hash_unit(samples.uids, stage.seed, "fit") < self._plan.fit_below
        rows = np.flatnonzero(chosen)
        tables = [self._fit_rows(rows, real[rows], rarity, self._keys.clusters[rows], REAL, 0)]
        for number in range(self._plan.phantoms * len(RUNGS)):
            rung = number % len(RUNGS)
            draws = hash_unit(samples.uids, stage.seed, f"phantom {number}")[:, None]
            likeness = self._image_likeness if RUNGS[rung] == "near_image" else None
            donors = draw_donors(self._keys, reference.keys, draws, likeness)[:, 0]
            paired = np.flatnonzero(chosen & (donors >= 0))
            given = donors[paired]
            texts = [
                storage.read_array(self._room.path("proxies", f"bank-{p}.npy"))[1][given]
                for p in range(stage.proxies)
            ]
            keys = Keys(*(part[given] for part in vars(reference.keys).values()))
            found = self._gather(
                paired, self._bank.text[given], reference.text[given], texts, keys, given
            )
            tables.append(self._fit_rows(paired, found, rarity, keys.clusters, rung, number))
        return pa.concat_tables(tables)

    def _image_likeness(self, rows: Array, donors: Array) -> Array:
        return by_blocks(exact_products(self._bank.image[donors].T), self._image[rows])

    def _gather(
        self,
        rows: Array,
        text: Array,
        own_text: Array,
        texts: list[Array],
        donors: Keys,
        donor_rows: Array,
    ) -> Array:
        """Evidence on the images of `rows` beside the given captions, of equal length."""
        reference, blocks = self._reference, self._keys.blocks[rows]
        pairs = Pairs(
            self._image[rows],
            text,
            np.stack([self._keys.clusters[rows], donors.clusters], axis=1),
            donors.captions,
            np.stack([self._own_rows[rows], donor_rows], axis=1),
        )
        views = [
            reference.view(self._room, p, image[rows], texts[p], blocks)
            for p, (image, _) in enumerate(self._embedded)
        ]
        shared = None
        if self._space is not None:
            image = unit(self._samples.image)[rows]
            shared = reference.shared_view(self._space, image, own_text)
        return gather_evidence(pairs, self._bank, views, shared)

    def _fit_rows(
        self, rows: Array, found: Array, rarity: Array, donors: Array, rung: int, number: int
    ) -> pa.Table:
        """Rows of the fit: of the images of `rows` beside captions of the clusters `donors`."""
        samples, seed = self._samples, self._stage.seed
        uids = [samples.uids[row] for row in rows]
        columns = {
            "order": pa.array(hash_unit(uids, seed, f"row {rung} {number}")),
            "rung": pa.array(np.full(len(rows), rung)),
            "rarity": pa.array(rarity[rows].astype(np.float32)),
            "fold_image": pa.array(draw_folds(self._keys.clusters[rows], seed)),
            "fold_text": pa.array(draw_folds(donors, seed)),
        }
        columns |= {name: pa.array(found[:, place]) for place, name in enumerate(EVIDENCE)}
        return pa.table(columns)


def draw_folds(clusters: Array, seed: int) -> Array:
    """Detector that does not train on a cluster: (N,) int64."""
    uniform = hash_unit([str(code) for code in clusters], seed, "fold")
    return (uniform * DETECTORS).astype(np.int64)


def read_features(table: pa.Table) -> Array:
    """Stack what the detector judges by: (N, F) float32, NaN where a row has no evidence.

    `FEATURES`, then how rare the sample is beyond `_PROTECTED`: where data are thin all other
    evidence is poor, and would call the sound ones mismatched.
    """
    rarity = np.maximum(table["rarity"].to_numpy() - np.float32(_PROTECTED), 0)
    return np.stack([*(table[name].to_numpy() for name in FEATURES), rarity], axis=1)
