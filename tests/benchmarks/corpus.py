"""A corpus as arrays, for tests of what is planted in memory."""

from pathlib import Path

import numpy as np

from benchmarks.trial import Corpus


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
