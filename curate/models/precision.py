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

__all__ = ["MIN_COSINE", "MIN_SPEED_SHARE", "choose_precision", "pick_device", "pick_dtype"]

#: A low-precision tower must keep every probed vector at this cosine to its own float32 output:
#: a thirtieth of the distance at which the shipped pipelines look for copies.
MIN_COSINE = 0.99
#: The preferred variant that reaches this share of the fastest one's speed is taken. The choice
#: changes last digits of vectors, and on a busy machine speeds were misjudged by a third: only a
#: factor of two, such as emulated bfloat16 costs, is told apart surely. The price: a tower that
#: loses less than half of its speed by the preferred format keeps it (ViT-B/32 loses a quarter).
MIN_SPEED_SHARE = 0.5
_ROUNDS = 2
#: Rows timed: rates hardly depend on the batch, and the slowest variant takes 25 ms a picture.
_ROWS = 4

Array = np.ndarray[Any, Any]


def pick_device() -> str:
    """Return "cuda" where torch can use a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(device: str) -> str:
    """Return "bfloat16" where the device computes in it, "float32" where it would be emulated."""
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"


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
    low = "float16" if device == "cuda" else pick_dtype(device)
    # In order of preference: what is fastest on most machines comes first. Emulated bfloat16,
    # a twentieth as fast, would take longer to try than a small set takes to embed.
    formats = [low] if low == "float32" else [low, "float32"]
    variants = {
        "image": [Precision(dtype, last) for dtype in formats for last in (True, False)],
        "text": [Precision(dtype) for dtype in formats],
    }
    inputs = {"image": (encoder.encode_images, images), "text": (encoder.encode_texts, tokens)}
    return {
        tower: _choose(function, batch, variants[tower])
        for tower, (function, batch) in inputs.items()
    }


def _choose(
    function: Callable[[Array, Precision], Array], batch: Array, variants: list[Precision]
) -> dict[str, Any]:
    batch = batch[:_ROWS]
    reference = function(batch, Precision())
    cosines = [float((function(batch, p) * reference).sum(axis=1).min()) for p in variants]
    # Round by round over all variants: a moment in which the machine is busy hits them alike.
    seconds = np.array([[_time(function, batch, p) for p in variants] for _ in range(_ROUNDS)])
    rates = len(batch) / np.maximum(seconds.min(axis=0), 1e-9)
    tried = [
        {**asdict(precision), "samples_per_second": round(float(rate), 1), "cosine": cosine}
        for precision, rate, cosine in zip(variants, rates, cosines, strict=True)
    ]
    fit = [one for one in tried if one["cosine"] >= MIN_COSINE]
    fastest = max(one["samples_per_second"] for one in fit)
    best = next(o for o in fit if o["samples_per_second"] >= MIN_SPEED_SHARE * fastest)
    return {"dtype": best["dtype"], "channels_last": best["channels_last"], "tried": tried}


def _time(
    function: Callable[[Array, Precision], Array], batch: Array, precision: Precision
) -> float:
    function(batch[:1], precision)  # the module is brought into this variant's layout
    # On a GPU the result is copied back, so that the clock covers the work; on a CPU torch runs in
    # this very thread, whose own time does not count what else the machine does.
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    begun = clock()
    function(batch, precision)
    return clock() - begun
