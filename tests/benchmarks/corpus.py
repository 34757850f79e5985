"""Corpora as arrays, for tests of what is planted in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.trial import Corpus
from curate.formats.pixels import make_thumbnail

_HUES, _LIGHTS = ("red", "green", "blue"), ("dark", "pale", "plain", "deep")


def make_corpus(count: int, seed: int = 0) -> Corpus:
    """Pictures and captions as two views of hidden numbers, in twenty kinds."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(20, size=count)
    hidden = 2 * rng.normal(size=(20, 6))[kinds] + rng.normal(size=(count, 6))
    # 384 is what the packaged text tower gives the names of categories.
    image, text = (np.tanh(hidden @ rng.normal(size=(6, width))) for width in (64, 384))
    return Corpus(
        np.array([f"{row:032x}" for row in range(count)]),
        np.array([f"caption {row}" for row in range(count)]),
        np.array([f"cluster {row}" for row in range(count)]),
        np.array(["clean"] * count),
        np.array([f"name {row}" for row in range(count)]),
        np.array([f"kind {kind}" for kind in kinds]),
        np.array([f"{row}.png" for row in range(count)]),
        (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32),
        (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32),
        Path("no concepts"),
    )


def paint(number: int) -> tuple[str, Image.Image]:
    """Paint one of twelve colours over another, and name them."""
    image, names = Image.new("RGB", (32, 32)), []
    for half, place in enumerate(np.random.default_rng(number).integers(12, size=2).tolist()):
        hue, light = place % 3, place // 3
        colour = [(20, 120, 0, 60)[light]] * 3
        colour[hue] = (120, 255, 255, 190)[light]
        image.paste(tuple(colour), (0, 16 * half, 32, 16 * half + 16))
        names.append(f"{_LIGHTS[light]} {_HUES[hue]}")
    return f"{names[0]} over {names[1]}", image


def make_painted(out: Path, count: int) -> Corpus:
    """`make_corpus` with captions and thumbnails by `paint`, which lie in `out` as in a run."""
    corpus = make_corpus(count)
    captions, pictures = zip(*map(paint, range(count)), strict=True)
    folder = out / "stages" / "embed.thumbnails-0" / "shards"
    folder.mkdir(parents=True)
    thumbnails = [make_thumbnail(picture, 32) for picture in pictures]
    table = pa.table({"uid": corpus.uids.tolist(), "thumbnail": thumbnails})
    pq.write_table(table.slice(0, count // 2), folder / "a.parquet")
    pq.write_table(table.slice(count // 2), folder / "b.parquet")
    return corpus.with_captions(np.arange(count), np.array(captions), corpus.text)
