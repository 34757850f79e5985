"""Students: small models of one budget, each trained on what one set keeps, and judged."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.ablate.pairs import Pairs, held_places, is_trainable, rows_by_shard
from curate.errors import MissingWeightsError
from curate.formats.pixels import read_square
from curate.memorization.retrieval import hits_at
from curate.stages.base import Room

__all__ = [
    "MODELS",
    "SHAPES",
    "Budget",
    "Judged",
    "Labels",
    "Mitigation",
    "commit_data",
    "draw_captions",
    "draw_order",
    "measure_cost",
    "train_student",
]

Array = np.ndarray[Any, Any]

#: Passes over the pool that a student may make by default, and pairs per step.
MODELS = {"small": (12.0, 64), "large": (12.0, 64), "larger": (12.0, 128), "heads": (6.0, 256)}
#: Of the CLIPs: 1.5, 3.7 and 14.7 million parameters with two thousand words.
SHAPES = {
    "small": {"image_px": 32, "image_width": 16, "text_width": 64, "text_layers": 1},
    "large": {"image_px": 32, "image_width": 24, "text_width": 128, "text_layers": 2},
    "larger": {"image_px": 64, "image_width": 48, "text_width": 256, "text_layers": 3},
}
_FRONT_WIDTH = 256
_TEXT_BATCH = 64


@dataclass(frozen=True)
class Budget:
    """What every student is given, whatever it trains on.

    Parameters
    ----------
    model : str
        One of `MODELS`.
    steps, batch : int
    retries : int
        Times that a diverged training is begun again.
    """

    model: str
    steps: int
    batch: int
    retries: int = 2


@dataclass(frozen=True)
class Mitigation:
    """What a student does besides, by the pieces of `curate.mitigation`.

    Parameters
    ----------
    noise : float
        Standard deviation on embeddings, >= 0.
    captions : int
        That a sample's is drawn from, its own first and then those of its dropped duplicates.
    text_mask : float
        Share of words hidden, [0, 1).
    """

    noise: float = 0.0
    captions: int = 1
    text_mask: float = 0.0


@dataclass(frozen=True)
class Labels:
    """Classes of the pairs that judge.

    Parameters
    ----------
    names : list of str, length C
    places : (N,) int64
        By place in the pool, -1 where there is no label.
    encoder : str
        That of the run, by which `heads` read class names.
    """

    names: list[str]
    places: Array
    encoder: str


def commit_data(
    room: Room, pairs: Pairs, budget: Budget, labels: Labels | None, folder: str
) -> list[str]:
    """Put down what students train on and are judged by, as arrays; return warnings."""
    warnings: list[str] = []
    if budget.model == "heads":
        arrays = _read_vectors(room, pairs)
        arrays |= _spell_vectors(labels, warnings)
    else:
        arrays = _read_pictures(room, pairs, SHAPES[budget.model]["image_px"])
        arrays |= _spell_tokens(pairs, labels)
    arrays |= {"codes": pairs.codes, "held_by": pairs.held_by, "judges": pairs.judges}
    if labels is not None and "names" in arrays:
        arrays["labels"] = labels.places
    for name, values in arrays.items():
        storage.commit_array(storage.join(folder, f"{name}.npy"), values)
    # Written last: the data are whole.
    storage.commit_json(storage.join(folder, "data.json"), [asdict(budget), sorted(arrays)])
    return warnings


def _read_vectors(room: Room, pairs: Pairs) -> dict[str, Array]:
    from curate.models.train import fit_front

    sides: dict[str, Array] = {}
    for shard, rows, places in rows_by_shard(room, pairs.rows):
        table = room.read(shard, ["image_emb", "text_emb"])
        for name in ("image", "text"):
            vectors = storage.read_vectors(table[f"{name}_emb"])[0][rows]
            if name not in sides:
                sides[name] = np.zeros((len(pairs), vectors.shape[1]), vectors.dtype)
            sides[name][places] = vectors
    fronts: dict[str, Array] = {}
    for name, vectors in sides.items():
        # Of all, for every seed: it knows neither which belong together nor what any setting keeps.
        mean, front = fit_front(vectors, _FRONT_WIDTH)
        fronts |= {f"{name}-mean": mean, f"{name}-front": front}
    return sides | fronts


def _spell_vectors(labels: Labels | None, warnings: list[str]) -> dict[str, Array]:
    """Embed class names by the run's own encoder."""
    if labels is None:
        return {}
    from curate.models.encoders import Precision, embed_captions, load_encoder
    from curate.models.precision import pick_device

    try:
        encoder = load_encoder(labels.encoder, pick_device())
    except MissingWeightsError as error:
        warnings.append(f"zero-shot is not measured: {error}")
        return {}
    return {"names": embed_captions(encoder, labels.names, _TEXT_BATCH, Precision())[0]}


def _read_pictures(room: Room, pairs: Pairs, side_px: int) -> dict[str, Array]:
    pixels = np.zeros((len(pairs), 3, side_px, side_px), np.uint8)
    for shard, rows, places in rows_by_shard(room, pairs.rows):
        thumbnails = room.read(shard, ["thumbnail"])["thumbnail"].take(pa.array(rows))
        for place, thumbnail in zip(places, thumbnails.to_pylist(), strict=True):
            pixels[place] = read_square(thumbnail, side_px)
    return {"pixels": pixels}


def _spell_tokens(pairs: Pairs, labels: Labels | None) -> dict[str, Array]:
    """Tokens of captions and class names, in the vocabulary of all captions."""
    from curate.models.clip_proxy import choose_words, fold_tokens, tokenize

    tokens = tokenize(pairs.captions)
    words = choose_words(Counter(tokens.ravel().tolist()))
    found = {"tokens": fold_tokens(tokens, words), "words": words}
    if labels is not None:
        found["names"] = fold_tokens(tokenize(labels.names), words)
    return found


@lru_cache(maxsize=1)
def _open(folder: str) -> tuple[Budget, dict[str, Array]]:
    """Map the arrays; kept between the tasks of a worker."""
    budget, names = storage.read_json(storage.join(folder, "data.json"))
    arrays = {name: storage.read_array(storage.join(folder, f"{name}.npy")) for name in names}
    return Budget(**budget), arrays


def draw_order(places: Array, weight: Array, count: int, seed: int) -> Array:
    """Draw what a student sees, in order: every sample as often as its weight says, up to one.

    Parameters
    ----------
    places : (K,) int64
    weight : (K,) float64, >= 0
    count : int
        Pairs in all.
    seed : int

    Returns
    -------
    (count,) int64
    """
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(len(places))
    ends = np.cumsum(weight[mixed]) / weight.sum()
    spots = np.searchsorted(ends, (np.arange(count) + rng.random()) / count, side="right")
    drawn = places[mixed[np.minimum(spots, len(places) - 1)]]
    return rng.permutation(drawn).astype(np.int64)


def draw_captions(order: Array, known: Array, seed: int) -> Array:
    """Draw whose caption each sample has, evenly among those it may have.

    Parameters
    ----------
    order : (T,) int64
        Places of samples.
    known : (M, 2) int64
        Places of samples, ascending, and of those whose captions they may have.
    seed : int

    Returns
    -------
    (T,) int64
        The sample's own place where nothing is known.
    """
    first, stop = (np.searchsorted(known[:, 0], order, side) for side in ("left", "right"))
    unit = np.random.default_rng((seed, 1)).random(len(order))
    picked = np.minimum(first + (unit * (stop - first)).astype(np.int64), len(known) - 1)
    return np.where(stop > first, known[picked, 1], order)


def train_student(folder: str, task: str) -> dict[str, float]:
    """Commit how one student does on every held-out pair.

    Parameters
    ----------
    folder : str
        See `commit_data`; files of `sets/SET` are what it trains on, and how.
    task : str
        SET-SEED.
    """
    begun = time.monotonic()
    name, spelt = task.rsplit("-", 1)
    given, seed = storage.join(folder, "sets", name), int(spelt)
    chosen = storage.read_array(f"{given}.npy")
    mitigation = Mitigation(**storage.read_json(f"{given}.json"))
    budget, arrays = _open(folder)
    chosen = chosen[is_trainable(arrays["held_by"], seed)[chosen["place"]]]
    weight = chosen["weight"] if chosen["weight"].any() else np.ones(len(chosen))
    order = draw_order(chosen["place"], weight, budget.steps * budget.batch, seed)
    spoken = order
    if mitigation.captions > 1:
        spoken = draw_captions(order, storage.read_array(f"{given}-captions.npy"), seed)
    outcome = _fit_and_judge(
        _Lesson(arrays, np.stack([order, spoken], 1), mitigation, seed, budget)
    )
    outcome["wall_seconds"] = round(time.monotonic() - begun, 3)
    storage.commit_json(storage.join(folder, "students", f"{task}.json"), outcome)
    return {"samples": budget.steps * budget.batch}


def measure_cost(folder: str, places: Array) -> float:
    """Return the seconds that a student takes, from the first steps of one.

    Parameters
    ----------
    folder : str
        See `commit_data`.
    places : (K,) int64
        Of the samples of the loosest setting.
    """
    whole, arrays = _open(folder)
    few, more = 2, 8
    seconds = []
    for steps in (few, few, more):  # the first also loads what later ones find loaded
        begun = time.monotonic()
        # Nothing is learnt in so few steps, which is not to be taken for a training that diverged.
        budget = Budget(whole.model, steps, whole.batch, retries=0)
        order = draw_order(places, np.ones(len(places)), steps * whole.batch, 0)
        _fit_and_judge(_Lesson(arrays, np.stack([order, order], 1), Mitigation(), 0, budget))
        seconds.append(time.monotonic() - begun)
    per_step = max(0.0, seconds[2] - seconds[1]) / (more - few)
    return seconds[1] + per_step * (whole.steps - few)


@dataclass(frozen=True)
class _Lesson:
    """What one student is trained on, (T, 2) rows whose picture and whose caption, and how."""

    arrays: dict[str, Array]
    rows: Array
    mitigation: Mitigation
    seed: int
    budget: Budget

    @property
    def held(self) -> Array:
        """Places that judge: (H,) int64."""
        return held_places(self.arrays["held_by"], self.arrays["judges"], self.seed)


def _fit_and_judge(lesson: _Lesson) -> dict[str, Any]:
    train = _train_heads if lesson.budget.model == "heads" else _train_clip
    image, text, named, losses = train(lesson)
    captions = lesson.arrays["codes"][lesson.held, 1]
    found: dict[str, Any] = {
        "image_to_text": hits_at(image, text, captions).astype(int).tolist(),
        "text_to_image": hits_at(text, image, captions).astype(int).tolist(),
        "loss": losses[-1] if losses else None,
    }
    if named is not None:
        right = (image @ named.T).argmax(1) == lesson.arrays["labels"][lesson.held]
        found["zero_shot"] = right.astype(int).tolist()
    return found


Judged = tuple[Array, Array, Array | None, list[float]]


def _train_clip(lesson: _Lesson) -> Judged:
    from curate.models.clip_proxy import ClipShape, embed_texts, embed_views
    from curate.models.encoders import torch_threads
    from curate.models.precision import pick_device, pick_dtype
    from curate.models.train_clip import ClipRecipe, train_clip

    arrays, budget, held, device = lesson.arrays, lesson.budget, lesson.held, pick_device()
    recipe = ClipRecipe(1, budget.batch, dtype=pick_dtype(device), retries=budget.retries)
    shape = ClipShape(len(arrays["words"]), **SHAPES[budget.model])
    # Copies: torch takes no arrays that it may not write to, such as files mapped into memory.
    pixels, tokens, codes = (np.array(arrays[name]) for name in ("pixels", "tokens", "codes"))
    trained = train_clip(
        shape, pixels, tokens, codes, recipe, lesson.seed, device, rows=lesson.rows,
        disturb=_disturb(lesson.mitigation, shape.words),
    )  # fmt: skip
    with torch_threads(1):
        image, text, _ = embed_views(trained.model, pixels[held], tokens[held], 1, recipe.dtype)
        named = None
        if "names" in arrays:
            named = embed_texts(trained.model, np.array(arrays["names"]), recipe.dtype)
    return image, text, named, trained.losses


def _disturb(mitigation: Mitigation, words: int) -> Any:
    from curate.mitigation import EmbeddingNoise, TextMask
    from curate.models.train_clip import Disturb

    marks = (words + 2, words + 3)  # of the folded vocabulary
    noise, mask = mitigation.noise, mitigation.text_mask
    return Disturb(
        EmbeddingNoise(noise) if noise else None, TextMask(mask, keep=marks) if mask else None
    )


def _train_heads(lesson: _Lesson) -> Judged:
    from curate.models.proxy import HeadsShape, embed_pairs
    from curate.models.train import Recipe, train_heads

    arrays, rows, budget, held = lesson.arrays, lesson.rows, lesson.budget, lesson.held
    image, text, codes = (np.asarray(arrays[name]) for name in ("image", "text", "codes"))
    fronts = [
        (np.asarray(arrays[f"{n}-mean"]), np.asarray(arrays[f"{n}-front"]))
        for n in ("image", "text")
    ]
    widths = (image.shape[1], text.shape[1], *(front.shape[1] for _, front in fronts))
    # Every sample as often as it is seen: the closed-form start must weigh it alike.
    trained = train_heads(
        HeadsShape(*widths), (fronts[0], fronts[1]), (image[rows[:, 0]], text[rows[:, 1]]),
        codes[rows].reshape(len(rows), -1), Recipe(1, budget.batch, retries=budget.retries),
        lesson.seed,
    )  # fmt: skip
    sides = [
        part.astype(np.float32) for part in embed_pairs(trained.heads, image[held], text[held])
    ]
    named = None
    if "names" in arrays:
        spoken = np.asarray(arrays["names"])
        blank = np.zeros((len(spoken), image.shape[1]), np.float32)
        named = embed_pairs(trained.heads, blank, spoken)[1].astype(np.float32)
    return sides[0], sides[1], named, trained.losses
