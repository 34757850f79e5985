"""Choose how an encoder runs on this machine: layout and number format, by a short probe.

On 2 cores with AVX512-bf16 EfficientNet-Lite0 makes 76 images/s as loaded, 112 channels-last
and 401 channels-last in bfloat16, while ViT-B/32 makes 20 in float32 and 15 in bfloat16: no one
choice fits all.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from curate.models.encoders import Encoder, Precision

__all__ = ["MIN_COSINE", "MIN_SPEEDUP", "choose_precision", "pick_device"]

#: A low-precision tower must keep every probed vector at this cosine to its own float32 output:
#: a thirtieth of the distance at which the shipped pipelines look for copies.
MIN_COSINE = 0.99
#: A variant must be this much faster than plain float32 to be chosen, so that noise on a shared
#: machine does not decide between two that are alike.
MIN_SPEEDUP = 1.3
_ROUNDS = 2
#: Rows timed: rates hardly depend on the batch, and the slowest variant takes 25 ms a picture.
_ROWS = 4

Array = np.ndarray[Any, Any]


def pick_device() -> str:
    """Return "cuda" where torch can use a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_precision(
    encoder: Encoder, device: str, images: Array, tokens: Array
) -> dict[str, dict[str, Any]]:
    """Measure the variants of both towers on real samples.

    Parameters
    ----------
    encoder : Encoder
    device : str
    images : (B, 3, S, S)
        As `Encoder.prepare` makes them.
    tokens : (B, L) int64

    Returns
    -------
    dict
        For "image" and "text": the chosen `dtype` and `channels_last`, and of every variant
        `samples_per_second` and `cosine` (the lowest, against float32).
    """
    low = "float16" if device == "cuda" else "bfloat16"
    plain = Precision()
    variants = {
        "image": [plain, Precision("float32", True), Precision(low), Precision(low, True)],
        "text": [plain, Precision(low)],
    }
    inputs = {"image": (encoder.encode_images, images), "text": (encoder.encode_texts, tokens)}
    return {
        tower: _choose(function, batch, variants[tower])
        for tower, (function, batch) in inputs.items()
    }


def _choose(
    function: Callable[[Array, Precision], Array], batch: Array, variants: list[Precision]
) -> dict[str, Any]:
    reference: Array | None = None
    tried = []
    batch = batch[:_ROWS]
    for precision in variants:
        vectors = function(batch, precision)  # also warms up
        seconds = []
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            function(batch, precision)
            seconds.append(time.perf_counter() - begun)
        if reference is None:
            reference = vectors
        cosine = float((vectors * reference).sum(axis=1).min())
        # The best of a few rounds: other work on the machine can only slow a round down.
        rate = len(batch) / min(seconds)
        tried.append({**asdict(precision), "samples_per_second": round(rate, 1), "cosine": cosine})
    fit = [one for one in tried if one["cosine"] >= MIN_COSINE]
    best = max(fit, key=lambda one: one["samples_per_second"])
    if best["samples_per_second"] < MIN_SPEEDUP * tried[0]["samples_per_second"]:
        best = tried[0]
    return {"dtype": best["dtype"], "channels_last": best["channels_last"], "tried": tried}
