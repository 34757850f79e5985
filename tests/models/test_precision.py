from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from curate.models import precision as module
from curate.models.encoders import Precision
from curate.models.precision import (
    MIN_COSINE,
    MIN_SPEED_SHARE,
    choose_precision,
    pick_device,
    pick_dtype,
)

Array = np.ndarray[Any, Any]


class Clock:
    """Time that passes only where a tower says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter


class Towers:
    """Towers whose speed and error at each precision are given."""

    def __init__(self, clock: Clock, seconds: Callable[[Precision], float], error: float) -> None:
        self._clock, self._seconds, self._error = clock, seconds, error
        self.seen: list[Precision] = []

    def encode_images(self, batch: Array, precision: Precision) -> Array:
        self.seen.append(precision)
        self._clock.now += self._seconds(precision)
        rows = np.zeros((len(batch), 2), np.float32)
        # One sample strays as far as low precision takes it; the others are exact.
        angle = 0.0 if precision.dtype == "float32" else np.arccos(1 - self._error)
        rows[:, 0] = 1
        rows[0] = np.cos(angle), np.sin(angle)
        return rows

    encode_texts = encode_images


def choose(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[tuple[str, bool], float],
    error: float = 0.0,
    device: str = "cpu",
    has_units: bool = True,
) -> tuple[dict[str, dict[str, Any]], Towers]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "pick_dtype", lambda _: "bfloat16" if has_units else "float32")
    towers: Any = Towers(clock, lambda p: seconds[p.dtype, p.channels_last], error)
    chosen = choose_precision(towers, device, np.zeros((12, 3, 4, 4)), np.zeros((12, 5), int))
    return chosen, towers


SLOW = 10.0


def times(**faster: float) -> dict[tuple[str, bool], float]:
    """Return seconds per variant: all slow but those named."""
    names = {
        "plain": ("float32", False),
        "plain_last": ("float32", True),
        "low": ("bfloat16", False),
        "low_last": ("bfloat16", True),
    }
    return {variant: faster.get(name, SLOW) for name, variant in names.items()}


def test_the_fastest_that_is_near_enough_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = choose(monkeypatch, times(plain_last=5, low=4, low_last=1), error=1e-4)
    assert (chosen["image"]["dtype"], chosen["image"]["channels_last"]) == ("bfloat16", True)
    assert (chosen["text"]["dtype"], chosen["text"]["channels_last"]) == ("bfloat16", False)
    tried = chosen["image"]["tried"]
    assert len(tried) == 4
    rates = [one["samples_per_second"] for one in tried]
    assert [rate / rates[3] for rate in rates] == pytest.approx([10, 2.5, 2, 1], rel=0.2)
    assert tried[0]["cosine"] == pytest.approx(1 - 1e-4, abs=1e-6)


def test_the_worst_sample_decides_whether_a_variant_is_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beyond = 1 - MIN_COSINE + 1e-4
    chosen, _ = choose(monkeypatch, times(plain_last=5, low=2, low_last=1), error=beyond)
    assert (chosen["image"]["dtype"], chosen["image"]["channels_last"]) == ("float32", True)
    assert (chosen["text"]["dtype"], chosen["text"]["channels_last"]) == ("float32", False)
    within = 1 - MIN_COSINE - 1e-4
    chosen, _ = choose(monkeypatch, times(plain_last=5, low=2, low_last=1), error=within)
    assert chosen["image"]["dtype"] == "bfloat16"


def test_of_variants_that_are_alike_the_preferred_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near = 1 / (MIN_SPEED_SHARE + 0.05)
    chosen, _ = choose(monkeypatch, times(plain=1, plain_last=near, low=near, low_last=near))
    assert (chosen["image"]["dtype"], chosen["image"]["channels_last"]) == ("bfloat16", True)
    far = 1 / (MIN_SPEED_SHARE - 0.05)
    chosen, _ = choose(monkeypatch, times(plain=1, plain_last=near, low=far, low_last=far))
    assert (chosen["image"]["dtype"], chosen["image"]["channels_last"]) == ("float32", True)
    assert chosen["text"]["dtype"] == "float32"


def test_slower_variants_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = choose(monkeypatch, times(plain=1))
    assert chosen["image"]["dtype"] == "float32"
    assert not chosen["image"]["channels_last"]


def test_what_would_be_emulated_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, towers = choose(monkeypatch, times(plain_last=1), has_units=False)
    assert {one.dtype for one in towers.seen} == {"float32"}
    assert (chosen["image"]["dtype"], chosen["image"]["channels_last"]) == ("float32", True)
    assert [len(chosen[tower]["tried"]) for tower in ("image", "text")] == [2, 1]


def test_graphics_cards_try_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("float32", False): 9.0, ("float32", True): 9.0}
    seconds |= {("float16", False): 1.0, ("float16", True): 2.0}
    chosen, towers = choose(monkeypatch, seconds, device="cuda")
    assert chosen["image"]["dtype"] == "float16"
    assert {one.dtype for one in towers.seen} == {"float32", "float16"}


def test_the_choice_can_be_committed_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    chosen, _ = choose(monkeypatch, times(low_last=1))
    assert json.loads(json.dumps(chosen)) == chosen
    for tower in ("image", "text"):
        found = Precision(chosen[tower]["dtype"], chosen[tower]["channels_last"])
        assert found in [Precision(t["dtype"], t["channels_last"]) for t in chosen[tower]["tried"]]


def test_device() -> None:
    import torch

    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_computes_in_bfloat16() -> None:
    assert pick_dtype("cuda") == "bfloat16"
    assert pick_dtype("cpu") in {"bfloat16", "float32"}
