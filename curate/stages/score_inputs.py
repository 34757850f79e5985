"""What the steps of `score` read: samples, the reference bank, committed proxies."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.memorization.blocks import by_blocks, exact_products
from curate.memorization.concepts import name_images
from curate.memorization.evidence import Bank, ProxyView
from curate.memorization.folds import block_masks, draw_blocks, hash_unit
from curate.memorization.information import uniqueness
from curate.memorization.mismatch import RUNGS, Keys, normalise_caption
from curate.stages.base import Room

if TYPE_CHECKING:
    from curate.models.proxy import Heads, HeadsShape
    from curate.stages.score import Score

__all__ = [
    "Plan",
    "Reference",
    "Samples",
    "SharedSpace",
    "centre",
    "commit_phantoms",
    "commit_plan",
    "concept_paths",
    "heads_shape",
    "read_heads",
    "read_phantoms",
    "read_plan",
    "read_reference",
    "read_samples",
    "read_shared_space",
    "read_training_sizes",
    "score_stage",
    "unit",
]

Array = np.ndarray[Any, Any]

#: Samples against which a pair is compared under one proxy.
_VIEW_REFERENCES = 1024

#: 1 / temperature at which cosines of a space that the encoder brings are compared: CLIP's own
#: after training; cosines with mixtures of class names are less sure.
_SHARED_SCALES = {"vectors": 100.0, "concepts": 20.0}


def score_stage(room: Room) -> "Score":
    """Return the stage that a room of `score` works for."""
    from curate.stages.score import Score

    assert isinstance(room.stage, Score)
    return room.stage


@dataclass(frozen=True)
class Plan:
    """What the bank step decided for the whole set; `bank.json`.

    Parameters
    ----------
    samples, usable : int
        All samples, and those with both vectors, a caption and a cluster.
    scored : bool
        False where too few are usable.
    train_below : float
        Clusters whose hash is below are trained on.
    train_without : list of int
        Of 65 536 bins of these hashes those that a large cluster fills: they are not.
    fit_below : float
        Samples whose hash is below fit the detector.
    phantoms : int
        Per sample that fits the detector; 0 where all images or all captions have one vector.
    shared : str
        How the encoder's own image and text vectors can be compared: `vectors` as they are,
        `concepts` by what its classifier would call the image, "" not at all.
    shape : dict
        Fields of `HeadsShape`.
    """

    samples: int
    usable: int
    scored: bool
    train_below: float
    train_without: list[int]
    fit_below: float
    phantoms: int
    shared: str
    shape: dict[str, Any]


def commit_plan(room: Room, plan: Plan) -> None:
    """Write `bank.json`."""
    storage.commit_json(room.path("bank.json"), asdict(plan))


def read_plan(room: Room) -> Plan:
    """Read `bank.json`."""
    return Plan(**storage.read_json(room.path("bank.json")))


@dataclass(frozen=True)
class Samples:
    """One shard's samples.

    Parameters
    ----------
    uids, clusters : list of str, length N
    image, text : (N, D), (N, E) float16
    usable : (N,) bool
    cluster_codes, caption_codes : (N,) int64
        Hashes.
    """

    uids: list[str]
    clusters: list[str]
    image: Array
    text: Array
    usable: Array
    cluster_codes: Array
    caption_codes: Array

    def take(self, rows: Array) -> "Samples":
        """Return some of the samples."""
        return Samples(
            [self.uids[row] for row in rows],
            [self.clusters[row] for row in rows],
            self.image[rows],
            self.text[rows],
            self.usable[rows],
            self.cluster_codes[rows],
            self.caption_codes[rows],
        )

    def keys(self, proxies: int, seed: int) -> Keys:
        """Return what decides which samples may form phantoms."""
        blocks = draw_blocks(self.clusters, proxies, seed)
        return Keys(blocks, self.cluster_codes, self.caption_codes)


def _codes(names: list[str]) -> Array:
    return (hash_unit(names, 0, "code") * 2.0**53).astype(np.int64)


def read_samples(room: Room, shard: str) -> Samples:
    """Read one shard."""
    table = room.read(shard, ["image_emb", "text_emb", "cluster_id", "caption"])
    image, has_image = storage.read_vectors(table["image_emb"])
    text, has_text = storage.read_vectors(table["text_emb"])
    captions = table["caption"].to_pylist()
    clusters = table["cluster_id"].to_pylist()
    known = [
        bool(c and c.strip()) and k is not None for c, k in zip(captions, clusters, strict=True)
    ]
    usable = has_image & has_text & np.array(known, bool)
    usable &= storage.has_direction(image) & storage.has_direction(text)
    names = [name or "" for name in clusters]
    normal = [normalise_caption(caption or "") for caption in captions]
    return Samples(
        table["uid"].to_pylist(), names, image, text, usable, _codes(names), _codes(normal)
    )


def centre(vectors: Array, front: tuple[Array, Array]) -> Array:
    """Centre and rotate: (N, D) -> (N, F) float32, unit norm."""
    mean, directions = front
    multiply = exact_products(directions)
    return by_blocks(lambda rows: unit(multiply(rows.astype(np.float32) - mean)), vectors)


def unit(vectors: Array) -> Array:
    """Return rows as float32 of unit norm; rows of zeros stay zero."""
    rows = vectors.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)


@dataclass(frozen=True)
class Reference:
    """The reference samples, as committed by the bank step.

    Parameters
    ----------
    uids : list of str, length B
    image, text : (B, D), (B, E) float32, unit norm
    keys : Keys
    fronts : pair of (mean, directions)
        Image, text.
    isolations : (R,) float32
        Of reference samples, for the rank scale of rarity.
    bank : Bank
        The centred vectors, ready for `gather_evidence`.
    """

    uids: list[str]
    image: Array
    text: Array
    keys: Keys
    fronts: tuple[tuple[Array, Array], tuple[Array, Array]]
    isolations: Array
    bank: Bank

    @staticmethod
    def commit(
        room: Room, samples: Samples, keys: Keys, fronts: tuple[Any, Any], isolations: Array
    ) -> None:
        """Write the reference samples."""
        whole = np.ones(len(samples.uids), bool)
        columns = {
            "uid": pa.array(samples.uids, pa.string()),
            "image_emb": storage.vector_column(samples.image, whole),
            "text_emb": storage.vector_column(samples.text, whole),
            "block": pa.array(keys.blocks),
            "cluster": pa.array(keys.clusters),
            "caption": pa.array(keys.captions),
        }
        storage.commit_table(room.path("bank", "samples.parquet"), pa.table(columns))
        for name, (mean, directions) in zip(("image", "text"), fronts, strict=True):
            stacked = np.concatenate([mean[None], directions.T])
            storage.commit_array(room.path("bank", f"front-{name}.npy"), stacked)
        storage.commit_array(room.path("bank", "isolations.npy"), isolations)

    def rows_of(self, uids: list[str]) -> Array:
        """Return the rows in which samples lie: (N,) int64, -1 for those that do not."""
        places = {uid: row for row, uid in enumerate(self.uids)}
        return np.array([places.get(uid, -1) for uid in uids], np.int64)

    def uniqueness(self, keys: Keys) -> Array:
        """Return how far captions are of one cluster's own: see `information.uniqueness`."""
        pairs = np.unique(np.stack([self.keys.captions, self.keys.clusters], axis=1), axis=0)
        codes, counts = np.unique(pairs[:, 0], return_counts=True)
        places = np.minimum(np.searchsorted(codes, keys.captions), len(codes) - 1)
        sharing = np.where(codes[places] == keys.captions, counts[places], 0)
        known = set(map(tuple, pairs.tolist()))
        asking = zip(keys.captions.tolist(), keys.clusters.tolist(), strict=True)
        # The asking cluster counts whether or not it is among the references.
        sharing += np.array([both not in known for both in asking], int)
        clusters = len(np.unique(self.keys.clusters))
        return uniqueness(np.minimum(sharing, clusters), clusters)

    def view(self, room: Room, proxy: int, image: Array, text: Array, blocks: Array) -> ProxyView:
        """Return pairs and references under one proxy, for pairs of the given blocks."""
        stage = score_stage(room)
        masks = block_masks(stage.proxies, stage.seed)[:, proxy]
        embedded = storage.read_array(room.path("proxies", f"bank-{proxy}.npy"))
        rows = np.flatnonzero(~masks[self.keys.blocks])[:_VIEW_REFERENCES]
        record = storage.read_json(room.path("proxies", f"{proxy}.json"))
        return ProxyView(
            image,
            text,
            ~masks[blocks],
            record["scale"],
            embedded[0][rows].astype(np.float32),
            embedded[1][rows].astype(np.float32),
            self.keys.clusters[rows],
            self.keys.captions[rows],
        )

    def shared_view(self, space: "SharedSpace", image: Array, text: Array) -> ProxyView:
        """Return pairs and references in a space of the encoder, which no pair is kept out of."""
        rows = slice(0, _VIEW_REFERENCES)
        return ProxyView(
            space.place_images(image),
            space.place_texts(text),
            np.ones(len(image), bool),
            space.scale,
            space.place_images(self.image[rows]),
            space.place_texts(self.text[rows]),
            self.keys.clusters[rows],
            self.keys.captions[rows],
        )


@dataclass(frozen=True)
class SharedSpace:
    """A space in which images and texts can be compared before any proxy is trained.

    Parameters
    ----------
    scale : float
        1 / temperature.
    concepts : pair of arrays or None
        Classifier and names, where images are expressed by what the classifier calls them.
    means : pair of arrays or None
        Of images and texts in that space, over references.
    """

    scale: float
    concepts: tuple[Array, Array] | None = None
    means: tuple[Array, Array] | None = None

    def place_images(self, image: Array) -> Array:
        """Return unit image vectors: (N, D) -> (N, E) float32."""
        if self.concepts is None or self.means is None:
            return image
        return unit(name_images(image, *self.concepts) - self.means[0])

    def place_texts(self, text: Array) -> Array:
        """Return unit text vectors: (N, E) -> (N, E) float32."""
        return text if self.means is None else unit(text - self.means[1])


def concept_paths(room: Room) -> list[str]:
    """Where the classifier of the image tower and its names lie, if it has one."""
    return [room.path("concepts", f"{name}.npy") for name in ("classifier", "names")]


def read_shared_space(room: Room, plan: Plan, reference: Reference) -> SharedSpace | None:
    """Return the encoder's own space, if it has one."""
    if not plan.shared:
        return None
    scale = _SHARED_SCALES[plan.shared]
    if plan.shared == "vectors":
        return SharedSpace(scale)
    classifier, names = (np.array(storage.read_array(path)) for path in concept_paths(room))
    rows = slice(0, _VIEW_REFERENCES)
    named = name_images(reference.image[rows], classifier, names)
    means = (named.mean(axis=0), reference.text[rows].mean(axis=0))
    return SharedSpace(scale, (classifier, names), means)


def read_reference(room: Room) -> Reference:
    """Read the reference samples; kept between the tasks of one worker."""
    return _read_reference(room.path("bank"))


@lru_cache(maxsize=1)
def _read_reference(folder: str) -> Reference:
    table = storage.read_table(storage.join(folder, "samples.parquet"))
    image, text = (unit(storage.read_vectors(table[n])[0]) for n in ("image_emb", "text_emb"))
    keys = Keys(*(table[name].to_numpy() for name in ("block", "cluster", "caption")))
    stacked = [
        np.array(storage.read_array(storage.join(folder, f"front-{name}.npy")))
        for name in ("image", "text")
    ]
    fronts = tuple((both[0], np.ascontiguousarray(both[1:].T)) for both in stacked)
    isolations = np.array(storage.read_array(storage.join(folder, "isolations.npy")))
    bank = Bank(centre(image, fronts[0]), centre(text, fronts[1]))
    uids = table["uid"].to_pylist()
    pair = (fronts[0], fronts[1])
    return Reference(uids, image, text, keys, pair, isolations, bank)


def heads_shape(plan: Plan) -> "HeadsShape":
    """Return the shape of all proxies."""
    from curate.models.proxy import HeadsShape

    return HeadsShape(**plan.shape)


def commit_phantoms(room: Room, rungs: Array, probability: Array) -> None:
    """Write how the detector judges its own phantoms, each by a part that did not train on it."""
    columns = {"rung": np.array(RUNGS)[rungs].tolist(), "mismatch_probability": probability}
    storage.commit_table(room.path("phantoms.parquet"), pa.table(columns))


def read_phantoms(room: Room) -> tuple[Array, Array] | None:
    """Read rungs (M,) str and probabilities (M,) float64; None where nothing was scored."""
    path = storage.join(room.folders["score"], "phantoms.parquet")
    if not storage.exists(path):
        return None
    table = storage.read_table(path)
    return np.array(table["rung"].to_pylist()), table["mismatch_probability"].to_numpy()


def read_training_sizes(room: Room) -> Array:
    """Read how many samples each proxy trained on: (P,) int64."""
    paths = [room.path("proxies", f"{proxy}.json") for proxy in range(score_stage(room).proxies)]
    return np.array([storage.read_json(path)["samples"] for path in paths])


def read_heads(room: Room, proxy: int) -> "Heads":
    """Read a committed proxy."""
    from curate.models.proxy import load_heads

    weights = storage.read_bytes(room.path("proxies", f"{proxy}.safetensors"))
    return load_heads(weights, heads_shape(read_plan(room)))
